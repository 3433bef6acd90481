"""Vision transformers: the original's values and sizes, how they start, dropout, their laws, and their distribution."""

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data.library import Library
from tasks.families import layers
from tasks.families.draws import Pool
from tasks.families.vit import VisionTransformer, draw
from tasks.fixed.vit import TASKS
from tasks.keys import generator
from tasks.random import keys
from tests.task_laws import RandomLibrary, assert_gradients, assert_isolation, assert_laws, make_particles, rows
from tests.vision_laws import as_the_original, awake

PLAIN = VisionTransformer(batch_size=6, patch_size=4, width=12, heads=3, layers=2, mlp_dim=20)
DROPPED = dataclasses.replace(PLAIN, dataset="cifar10", image_size=10, dropout=0.3, attention_dropout=0.5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"patch_size": 4, "width": 12, "mlp_dim": 20, "heads": 3, "layers": 2, "image_size": 10},
            (3182, 3.0207904194014854, 3.084522810350425, 0.2703850042053253),
        ),
        (
            {"patch_size": 8, "width": 16, "mlp_dim": 32, "heads": 2, "layers": 1, "image_size": 8, "grey": True},
            (3514, 3.3598425690789813, 3.3549315322807964, 0.0019967747403003325),
        ),
    ],
)
def test_loss_and_gradient_are_the_originals(fields, expected):
    """To the precision of the originals' blocks, which are float32 whatever the parameters are."""
    static = VisionTransformer(dataset="cifar10", batch_size=4, **fields)
    assert as_the_original(static) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Patches 16 * 16 * 3 * 384 + 384 = 295,296; token 384; positions 17 * 384 = 6,528. A block: normalisations
        # 4 * 384; attention 4 (384 * 384 + 384); MLP 2 * 384 * 1536 + 1536 + 384. Last normalisation 768; head
        # 384 * 1000 + 1000.
        ("VIT_ImageNet64_wideshallow", 295296 + 384 + 6528 + 6 * (1536 + 591360 + 1181568) + 768 + 385000),
        ("VIT_ImageNet64_skinnydeep", 2212712),
        ("VIT_Food101_64_wideshallow", 10988645),
        ("VIT_Food101_64_skinnydeep", 2096741),
        ("VIT_Cifar100_wideshallow", 10983652),
        ("VIT_Cifar100_skinnydeep", 2095076),
    ],
)
def test_fixed_tasks_have_the_originals_sizes(name, parameters):
    static = TASKS[name]
    assert static.work().parameters == parameters
    assert (static.batch_size, static.patch_size, static.dropout, static.attention_dropout) == (128, 16, 0, 0)
    dataset = {"ImageNet64": "imagenet64", "Food101_64": "food101", "Cifar100": "cifar100"}[name[4:].rsplit("_", 1)[0]]
    assert (static.dataset, static.image_size) == (dataset, 32 if dataset == "cifar100" else 64)


def test_there_are_six_fixed_tasks_that_start_at_log_c():
    assert len(TASKS) == 6
    static = TASKS["VIT_Cifar100_skinnydeep"]
    task = dataclasses.replace(static, batch_size=4).build(RandomLibrary())
    _, params, batch = make_particles(task, 1)
    assert sum(leaf[0].numel() for leaf in params.values()) == static.work().parameters
    assert task.losses(params, batch).item() == pytest.approx(math.log(100), rel=1e-6)


@pytest.mark.parametrize("static", [PLAIN, DROPPED], ids=["plain", "dropped"])
def test_laws(static):
    library = RandomLibrary()
    assert_laws(static, library)
    task = static.build(library)
    drawn = awake(task)
    assert assert_gradients(task, drawn) < 2e-4
    assert_isolation(task, drawn)


def test_init():
    params = (
        VisionTransformer(patch_size=8, width=256, heads=4, layers=1, mlp_dim=512)
        .build(RandomLibrary())
        .init(generator(1))
    )
    assert params["embedding/w"].shape == (256, 1, 8, 8)
    assert params["embedding/w"].std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert params["embedding/w"].abs().max().item() == pytest.approx(2 * 64**-0.5 / 0.8796, rel=0.01)
    assert params["position"].std().item() == pytest.approx(0.02, rel=0.1)
    for layer, fans in (("attention/query", 512), ("attention/output", 512), ("mlp0", 768), ("mlp1", 768)):
        limit = math.sqrt(6 / fans)
        assert params[f"block0/{layer}/w"].abs().max().item() == pytest.approx(limit, rel=1e-3)
        assert params[f"block0/{layer}/w"].std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert params["block0/mlp0/b"].std().item() == pytest.approx(1e-6, rel=0.1)
    zeros = {"embedding/b", "class_token", "head/w", "head/b", "norm/offset", "block0/norm0/offset"}
    zeros |= {"block0/norm1/offset"} | {f"block0/attention/{part}/b" for part in ("query", "key", "value", "output")}
    assert {name for name, leaf in params.items() if not leaf.any()} == zeros
    assert all((leaf == 1).all() for name, leaf in params.items() if name.endswith("scale"))


def test_the_normalizer():
    task = TASKS["VIT_Food101_64_skinnydeep"].build(RandomLibrary(4))
    normalized = task.normalizer(torch.tensor([0.0, math.log(101), math.log(202), 99.0, -1.0]))
    assert normalized.tolist() == pytest.approx([0, 10 * math.log(101) / math.log(202), 10, 10, 0])
    assert task.worst_loss == pytest.approx(10)


def one(task):
    drawn = awake(task, 1)
    return rows(drawn.params, 0), rows(drawn.batch, 0)


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    task = dataclasses.replace(DROPPED, dropout=0.0, attention_dropout=0.0).build(RandomLibrary())
    params, batch = one(task)
    image = batch["image"].clone()
    image[:, :, 8:] = 0.5
    image[:, :, :, 8:] = 0.5
    assert task.loss(params, {**batch, "image": image}) == task.loss(params, batch)
    image[:, :, 7, 7] += 0.5
    assert task.loss(params, {**batch, "image": image}) != task.loss(params, batch)


def test_patches_are_read_row_by_row():
    """The position that belongs to a patch is that of its row and column."""
    task = dataclasses.replace(PLAIN, image_size=12, patch_size=4, batch_size=1).build(RandomLibrary())
    params, batch = one(task)
    image = torch.zeros_like(batch["image"])
    image[:, :, 4:8, 8:] = 1  # row 1 of 3, column 2
    params |= {name: torch.zeros_like(params[name]) for name in ("embedding/b", "class_token", "position")}
    params["embedding/w"] = torch.ones_like(params["embedding/w"]) * torch.arange(1.0, 13)[:, None, None, None]
    blank = {**params, "position": params["position"].clone()}
    blank["position"][0, 1 + 1 * 3 + 2] = -16 * torch.arange(1.0, 13)  # takes the patch away
    other = {**params, "position": params["position"].clone()}
    other["position"][0, 1 + 2 * 3 + 1] = -16 * torch.arange(1.0, 13)
    none = task.loss(params, {**batch, "image": torch.zeros_like(image)})
    assert task.loss(blank, {**batch, "image": image}) == none
    assert task.loss(other, {**batch, "image": image}) != none


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
def test_dropout_is_a_function_of_the_key(field):
    rates = {"dropout": 0.0, "attention_dropout": 0.0, field: 0.4}
    task = dataclasses.replace(DROPPED, **rates).build(RandomLibrary())
    params, batch = one(task)

    def loss(key):
        return task.loss(params, {**batch, "key": key})

    first, second = keys(2, "masks")
    assert loss(first) == loss(first)
    assert loss(first) != loss(second)
    plain = dataclasses.replace(DROPPED, dropout=0.0, attention_dropout=0.0).build(RandomLibrary())
    assert plain.loss(params, {**batch, "key": first}) == plain.loss(params, {**batch, "key": second}) != loss(first)


def test_every_place_of_dropout_has_a_mask_of_its_own_that_preserves_the_mean(monkeypatch):
    places, masks = [], []
    task = dataclasses.replace(DROPPED, dropout=0.5, attention_dropout=0.25).build(RandomLibrary())
    params, batch = one(task)

    def spy(x, key, rate):
        places.append((tuple(x.shape), rate))
        masks.append(layers.dropout(torch.ones_like(x), key, rate))
        return x

    monkeypatch.setattr("tasks.families.vit.dropout", spy)
    monkeypatch.setattr("tasks.families.attention.dropout", spy)
    task.loss(params, batch)
    tokens = ((6, 5, 12), 0.5)
    block = [((6, 3, 5, 5), 0.25), tokens, ((6, 5, 20), 0.5), tokens]
    assert places == [tokens, *block, *block]
    for mask, (_, rate) in zip(masks, places, strict=True):
        assert mask.mean().item() == pytest.approx(1, abs=4 * math.sqrt(rate / (1 - rate) / mask.numel()))
    assert not any(torch.equal(first, second) for first, second in combinations(masks, 2))


def test_it_can_learn():
    task = dataclasses.replace(PLAIN, batch_size=64, width=24, dropout=0.1).build(Library(DataConfig()))
    params = make_particles(task, 1).params
    moments = {name: [torch.zeros_like(leaf), torch.zeros_like(leaf)] for name, leaf in params.items()}
    for step in range(1, 101):
        _, grads, _ = task.losses_and_grads(params, {}, task.batch("train", torch.tensor([step])))
        for name, grad in grads.items():
            mean, square = moments[name]
            mean.lerp_(grad, 0.1)
            square.lerp_(grad**2, 0.01)
            rate = 3e-3 * math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
            params[name] = params[name] - rate * mean / (square.sqrt() + 1e-8)
    assert task.losses(params, task.batch("test", torch.tensor([0]))).item() < 1.5


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"patch_size": 16}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"width": 33}, "width"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_bad_fields_are_named(fields, field):
    with pytest.raises(ConfigError) as error:
        VisionTransformer(**fields)
    assert error.value.field == field


def drawn_or_none(rng, ranges):
    """None where the patch is larger than the image, which is all that may be refused."""
    try:
        return draw(rng, Pool(ranges=ranges))
    except ConfigError as error:
        if error.field == "patch_size":
            return None
        raise


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), ranges=st.sampled_from(("paper", "code")))
def test_what_is_drawn_is_in_range_and_runs(seed, ranges):
    static = drawn_or_none(np.random.default_rng(seed), ranges)
    if static is None:
        return
    assert (4 if ranges == "paper" else 8) <= static.image_size <= 64
    assert 4 <= static.batch_size <= 256
    assert 1 <= static.layers <= 16
    assert 1 <= static.heads <= 16
    assert 8 <= static.width // static.heads <= (64 if static.heads < 4 else 32)
    assert 32 <= static.mlp_dim <= 512
    assert static.patch_size in (2, 4, 8, 12, 16)
    assert 0 <= static.dropout < 0.8
    assert 0 <= static.attention_dropout < 0.8
    assert (static.dropout == 0) == (static.attention_dropout == 0)
    small = dataclasses.replace(static, batch_size=2)
    if small.work().flops < 5e8:
        task = small.build(RandomLibrary(8))
        _, params, batch = make_particles(task, 1)
        assert task.losses(params, batch).item() == pytest.approx(math.log(small.classes), rel=1e-5)


def test_the_smallest_image():
    """4 pixels, in four patches or one."""
    for patch_size in (2, 4):
        static = dataclasses.replace(DROPPED, image_size=4, patch_size=patch_size)
        assert static.tokens == (5 if patch_size == 2 else 2)
        assert_laws(static, RandomLibrary(), particles=2)


def test_the_distribution():
    rng = np.random.default_rng(0)
    for ranges, low in (("paper", 4), ("code", 8)):
        drawn = [drawn_or_none(rng, ranges) for _ in range(4000)]
        statics = [static for static in drawn if static]
        # Refused: the share of image sizes, log-uniform on [low, 64], below each patch size.
        span = math.log(65 / low)
        refused = np.mean([max(0, math.log(patch / low)) / span for patch in (2, 4, 8, 12, 16)])
        assert drawn.count(None) / 4000 == pytest.approx(refused, abs=0.03)
        assert np.mean([static.dropout > 0 for static in statics]) == pytest.approx(0.7, abs=0.03)
        for name in ("dropout", "attention_dropout"):
            rates = [getattr(static, name) for static in statics if static.dropout]
            assert np.mean(rates) == pytest.approx(0.4, abs=0.02)
        per_head = [static.width // static.heads for static in statics if static.heads >= 4]
        assert np.mean(per_head) == pytest.approx(20 if ranges == "paper" else 17.6, abs=0.7)
