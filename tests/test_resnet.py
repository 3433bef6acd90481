"""ResNets: the original's values and sizes, how they start, their laws, and their distribution."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data.library import Library
from tasks.families.draws import Pool
from tasks.families.resnet import PATTERNS, ResNet, draw
from tasks.fixed.resnet import TASKS
from tasks.keys import generator
from tests.task_laws import RandomLibrary, assert_gradients, assert_isolation, assert_laws, make_particles, rows
from tests.vision_laws import as_the_original, awake

V1 = ResNet(batch_size=12, stem_channels=6, widths=(8, 8, 16, 16), blocks=(2, 1, 1, 1), activation="dynamic")
V2 = dataclasses.replace(V1, version=2, activation="gelu", dataset="cifar10", image_size=9, max_pool=False)
SMALL = {"dataset": "cifar10", "batch_size": 4, "activation": "tanh"}
ORIGINALS = [
    (
        {"blocks": (2, 1, 1, 1), "widths": (8, 16, 16, 24), "stem_channels": 6, "stem_kernel": 5, "image_size": 17},
        (3080, 3.335053979619055, 9.414610177393213, 8.289854224533393),
    ),
    (
        {"blocks": (1, 1, 1, 1), "widths": (9, 9, 9, 9), "stem_channels": 5, "stem_kernel": 7, "stem_stride": 1}
        | {"max_pool": False, "image_size": 17, "grey": True},
        (1099, 2.638221420818758, 1.0991072180840984, 0.057736915981561256),
    ),
    (
        {"version": 2, "blocks": (1, 2, 1, 1), "widths": (8, 16, 16, 24), "stem_channels": 6, "image_size": 16}
        | {"grey": True},
        (2784, 3.2824959528184317, 9.89868916762564, 6.314725053967669),
    ),
    (
        {"version": 2, "widths": (8, 8, 8, 8), "stem_channels": 6, "image_size": 8},
        (868, 2.6987030687165983, 1.3293874278591755, 0.07251752145702892),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), ORIGINALS)
def test_loss_and_gradient_are_the_originals(fields, expected):
    assert as_the_original(ResNet(**SMALL | fields)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "parameters", "image_size", "batch_size"),
    [
        # Stem 3 * 3 * 3 * 64 = 1728. A block from c to w channels, i = w / 4 inside: c i + 9 i i + i w + c w weights
        # and 2 (c + i + i) of normalisation. (c, w) = (64, 8): 692 + 136; (8, 16): 368 + 32; (16, 16): 528 + 48, twice.
        # Last normalisation 32, head 16 * 1000 + 1000.
        ("Resnet_MultiRuntime_0", 1728 + 828 + 400 + 2 * 576 + 32 + 17000, 16, 64),
        ("Resnet_MultiRuntime_1", 38132, 16, 64),
        ("Resnet_MultiRuntime_2", 231784, 16, 64),
        ("Resnet_MultiRuntime_3", 1023848, 16, 192),
        ("Resnet_MultiRuntime_4", 1557416, 16, 192),
        ("Resnet_MultiRuntime_5", 1557416, 32, 128),
        ("Resnet_MultiRuntime_6", 1554344, 32, 256),
        ("Resnet_MultiRuntime_7", 3535400, 32, 256),
        ("Resnet_MultiRuntime_8", 5155880, 64, 256),
        ("Resnet_MultiRuntime_9", 13256232, 64, 256),
        ("Resnet_MultiRuntime_10", 10744872, 64, 256),
    ],
)
def test_fixed_tasks_have_the_originals_sizes(name, parameters, image_size, batch_size):
    static = TASKS[name]
    assert static.work().parameters == parameters
    assert (static.dataset, static.image_size, static.batch_size) == (f"imagenet{image_size}", image_size, batch_size)
    assert (static.version, static.activation, static.classes) == (2, "relu", 1000)


def test_there_are_eleven_fixed_tasks_each_dearer_than_the_one_before():
    assert list(TASKS) == [f"Resnet_MultiRuntime_{i}" for i in range(11)]
    flops = [static.work().flops for static in TASKS.values()]
    assert flops == sorted(flops)


@pytest.mark.parametrize("name", ["Resnet_MultiRuntime_0", "Resnet_MultiRuntime_2"])
def test_a_fixed_task_starts_at_log_c(name):
    task = dataclasses.replace(TASKS[name], batch_size=8).build(RandomLibrary())
    _, params, batch = make_particles(task, 1)
    assert sum(leaf[0].numel() for leaf in params.values()) == TASKS[name].work().parameters
    assert task.losses(params, batch).item() == pytest.approx(math.log(1000), rel=1e-6)


@pytest.mark.parametrize("static", [V1, V2], ids=["v1", "v2"])
def test_laws(static):
    library = RandomLibrary()
    assert_laws(dataclasses.replace(static, blocks=(1, 1, 1, 1)), library)
    task = static.build(library)  # at its start, version 1's second blocks lie on relu's kink: 0 + 0
    drawn = awake(task)
    assert assert_gradients(task, drawn) < 2e-4
    assert_isolation(task, drawn)


def test_init():
    task = ResNet(dataset="cifar10", stem_channels=64, stem_kernel=7, widths=(256, 256, 256, 256)).build(
        RandomLibrary()
    )
    params = task.init(generator(1))
    assert params["stem/w"].shape == (64, 3, 7, 7)
    for name, fan_in in (("stem/w", 147), ("group0/block0/conv1/w", 64 * 9), ("group3/block0/shortcut/w", 256)):
        sigma = fan_in**-0.5
        assert params[name].std().item() == pytest.approx(0.8796 * sigma, rel=0.03)
        assert params[name].abs().max() <= 2 * sigma
    zeros = {"head/w", "head/b"} | {f"group{i}/block0/conv2_norm/scale" for i in range(4)}
    assert {name for name, leaf in params.items() if not leaf.any()} == zeros | {
        name for name in params if name.endswith("offset")
    }
    scales = [leaf for name, leaf in params.items() if name.endswith("scale") and name not in zeros]
    assert len(scales) == 13  # of the stem; in each group those of conv0, conv1 and the shortcut
    assert all((leaf == 1).all() for leaf in scales)


def test_the_last_scale_of_version_2_is_one():
    params = V2.build(RandomLibrary()).init(generator(1))
    assert all((leaf == 1).all() for name, leaf in params.items() if name.endswith("scale"))


def test_it_starts_at_log_c_and_guessing_is_worth_less_than_ten():
    task = V1.build(Library(DataConfig()))
    dynamic, params, batch = make_particles(task)
    losses = task.losses(params, batch, dynamic)
    assert losses.tolist() == pytest.approx([math.log(10)] * 3, rel=1e-6)
    normalized = task.normalizer(torch.tensor([0.0, math.log(10), math.log(20), 99.0, -1.0]))
    assert normalized.tolist() == pytest.approx([0, 10 * math.log(10) / math.log(20), 10, 10, 0])
    assert task.worst_loss == pytest.approx(10)


def test_the_activation_is_each_particles_own():
    task = V1.build(RandomLibrary())
    drawn = awake(task)
    same = {name: leaf[:1].expand(3, *leaf.shape[1:]) for name, leaf in drawn.params.items()}
    batch = {name: leaf[:1].expand(3, *leaf.shape[1:]) for name, leaf in drawn.batch.items()}
    losses = task.losses(same, batch, {"activation": torch.tensor([3, 3, 9])})
    assert losses[0] == losses[1] != losses[2]
    static = dataclasses.replace(V1, activation="tanh").build(RandomLibrary())
    assert static.sample_dynamic(generator(0), 3) == {}
    torch.testing.assert_close(static.losses(same, batch)[0], losses[0])


@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_of_one_pixel_is_finite(version):
    """Where each channel of the last groups has one number, which its own mean then cancels."""
    task = dataclasses.replace(V1, version=version, batch_size=1, image_size=2, activation="relu").build(
        RandomLibrary()
    )
    drawn = awake(task, 2)
    out = task.losses_and_grads(drawn.params, {}, drawn.batch)
    assert out.losses.isfinite().all()
    assert all(leaf.isfinite().all() for leaf in out.grads.values())


def test_it_can_learn():
    task = dataclasses.replace(V1, batch_size=64).build(Library(DataConfig()))
    dynamic = {"activation": torch.tensor([0, 3])}
    params = make_particles(task, 2).params
    velocity = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for step in range(60):
        batch = task.batch("train", torch.tensor([step, step]))
        _, grads, _ = task.losses_and_grads(params, {}, batch, dynamic)
        velocity = {name: 0.9 * velocity[name] + leaf for name, leaf in grads.items()}
        params = {name: leaf - 0.1 * velocity[name] for name, leaf in params.items()}
    assert (task.losses(params, task.batch("test", torch.tensor([0, 0])), dynamic) < 1.5).all()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"version": 3}, "version"),
        ({"widths": (8, 8, 8)}, "widths"),
        ({"widths": (8, 8, 8, 3)}, "widths[3]"),
        ({"blocks": (1, 0, 1, 1)}, "blocks[1]"),
        ({"stem_stride": 0}, "stem_stride"),
        ({"activation": "gelo"}, "activation"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_fields_are_named(fields, field):
    with pytest.raises(ConfigError) as error:
        ResNet(**fields)
    assert error.value.field == field


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), ranges=st.sampled_from(("paper", "code")))
def test_what_is_drawn_is_in_range_and_runs(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    assert 8 <= static.image_size <= 64
    assert 4 <= static.batch_size <= 256
    assert 8 <= static.stem_channels <= 64
    assert static.stem_kernel in (3, 5, 7)
    assert all(1 <= blocks <= 10 for blocks in static.blocks)
    assert 8 <= static.widths[0] <= 256
    assert tuple(width // static.widths[0] for width in static.widths) in PATTERNS
    assert static.dataset in Pool().images
    assert static.activation == "dynamic"
    assert static.stem_stride == 2 or ranges == "code"
    small = dataclasses.replace(static, batch_size=4, image_size=min(static.image_size, 24))
    if small.work().flops < 1e9 and small.work().parameters < 2e6:
        task = small.build(RandomLibrary(8))
        dynamic, params, batch = make_particles(task, 1)
        one = [rows(leaves, 0) for leaves in (params, batch, dynamic)]
        assert task.loss(*one).item() == pytest.approx(math.log(small.classes), rel=1e-5)


def test_the_distribution():
    rng = np.random.default_rng(0)
    drawn = {ranges: [draw(rng, Pool(ranges=ranges)) for _ in range(3000)] for ranges in ("paper", "code")}
    for statics in drawn.values():
        counts = Counter(static.dataset for static in statics)
        assert len(counts) == 5
        assert all(520 < count < 690 for count in counts.values())
        assert np.mean([static.max_pool for static in statics]) == pytest.approx(0.5, abs=0.04)
        assert len({static.widths[3] // static.widths[0] for static in statics}) == 4
        sizes = np.log([static.image_size for static in statics])
        assert np.median(sizes) == pytest.approx(math.log(8 * 65) / 2, abs=0.06)
    assert {static.stem_stride for static in drawn["code"]} == {1, 2}
    # A mean number of blocks: of uniform ones up to m (1 + m) / 2, of log-uniform ones less.
    paper, code = (np.mean([static.blocks for static in drawn[ranges]]) for ranges in ("paper", "code"))
    assert paper > code + 0.15
