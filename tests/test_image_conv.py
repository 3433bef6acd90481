"""Convolutional classifiers: the originals' values, how they start, their laws, and their distribution."""

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
from tasks.families.draws import RANGES, Pool
from tasks.families.image_conv import ImageConv, draw
from tasks.keys import generator
from tasks.random import keys
from tasks.static import static_from_dict
from tests.image_oracles import META_LOSSES, ORIGINALS, measured, meta_losses
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count

DIGITS = Library(DataConfig())
RANDOM = RandomLibrary()
DYNAMIC = {"activation": "dynamic", "initializer": "dynamic", "normalizer": "parametric"}


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name.startswith("conv")])
def test_loss_and_gradient_are_the_originals(name):
    assert measured(name) == pytest.approx(ORIGINALS[name], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in META_LOSSES if name.startswith("conv")])
def test_meta_losses_are_the_originals(name):
    assert meta_losses(name) == pytest.approx(META_LOSSES[name], rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "parameters", "flops"),
    [
        # 9 channels out from 1, then 5 from 9, on 4x4 pixels; the head has 5 inputs. Flops are 2 per product.
        (
            {"hidden": (9, 5), "batch_size": 3},
            9 * 9 * 1 + 9 + 9 * 9 * 5 + 5 + 5 * 10 + 10,
            2 * 3 * (16 * 9 * 9 + 16 * 9 * 9 * 5 + 50),
        ),
        (
            {"hidden": (9, 5), "batch_size": 3, "norm": "layer_norm"},
            81 + 9 + 405 + 5 + 60 + 2 * (9 + 5),
            2 * 3 * (16 * 81 + 16 * 405 + 50),
        ),
        # 7 pixels become 4, and then 2.
        (
            {"hidden": (4, 4), "strided": 2, "image_size": 7, "batch_size": 1, "dataset": "cifar100"},
            9 * 3 * 4 + 4 + 9 * 4 * 4 + 4 + 4 * 100 + 100,
            2 * (16 * 108 + 4 * 144 + 400),
        ),
        ({"hidden": (), "strided": 0, "batch_size": 1}, 1 * 10 + 10, 2 * 10),
    ],
)
def test_it_has_the_size_it_should(fields, parameters, flops):
    static = ImageConv(**fields)
    assert static.work()[:2] == (parameters, flops)
    assert parameter_count(static.build(RANDOM).init(generator(0))) == parameters


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden": (), "strided": 0, "normalizer": "parametric"},
        {"norm": "batch_norm", "image_size": 6},
        {"norm": "layer_norm", "image_size": 5, "strided": 2, "activation": "tanh"},
        {"dataset": "cifar10", "hidden": (4, 6, 6), "image_size": 9, **DYNAMIC},
        {"norm": "batch_norm", "activation": "dynamic"},
    ],
)
def test_it_keeps_the_laws_of_tasks(fields):
    assert assert_laws(ImageConv(batch_size=16, **fields), RANDOM, particles=5) < 5e-5


@pytest.mark.parametrize("norm", ["none", "batch_norm", "layer_norm"])
@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("imagenet16", 1000)])
def test_the_loss_starts_near_log_c(dataset, classes, norm):
    task = ImageConv(dataset=dataset, image_size=16, batch_size=16, norm=norm).build(RANDOM)
    drawn = make_particles(task, 6)
    assert task.losses(drawn.params, drawn.batch).mean().item() == pytest.approx(math.log(classes), rel=0.1)


@pytest.mark.parametrize("norm", ["none", "batch_norm", "layer_norm"])
def test_sign_descent_trains_it(norm):
    task = ImageConv(hidden=(8, 8), batch_size=32, norm=norm).build(DIGITS)
    dynamic, params, _ = make_particles(task, 2)
    history, state = [], task.init_state(params)
    for step in range(80):
        losses, grads, state = task.losses_and_grads(params, state, task.batch("train", keys(2, step)), dynamic)
        params = {name: leaf - 0.01 * grads[name].sign() for name, leaf in params.items()}
        history.append(losses.mean().item())
    assert np.mean(history[-10:]) < 0.9 * history[0]


def test_the_drawn_initializer_is_also_the_heads():
    task = ImageConv(**DYNAMIC).build(RANDOM)
    row = {"initializer": torch.tensor(0), "initializer_scale": torch.tensor(2.0), "activation": torch.tensor(0)}
    params = task.init(generator(0), row)
    torch.testing.assert_close(params["head/w"].T @ params["head/w"], 4 * torch.eye(10))
    kernel = params["conv1/w"].flatten(1)  # (32, 16 * 9)
    torch.testing.assert_close(kernel @ kernel.T, 4 * torch.eye(32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strided": 3}, "task.strided = 3: expected 0 to 2, the number of convolutions"),
        ({"strided": -1}, "task.strided = -1"),
        ({"hidden": [8, 0]}, r"task.hidden\[1\] = 0"),
        ({"norm": "batchnorm"}, "did you mean 'batch_norm'"),
        ({"activation": "elu"}, "task.activation = 'elu'"),
        ({"initializer": "he"}, "task.initializer = 'he'"),
        ({"normalizer": "no"}, "task.normalizer = 'no'"),
        ({"dataset": "folder:mine"}, "task.num_classes = None"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        static_from_dict({"kind": "image_conv", **fields})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(RANGES))
def test_draws_are_in_the_papers_ranges_and_run(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    assert len(static.hidden) <= 3
    assert len(set(static.hidden)) <= 1
    assert all(4 <= channels <= 64 for channels in static.hidden)
    assert static.strided <= 2
    assert 4 <= static.image_size <= 32
    assert 4 <= static.batch_size <= 512
    assert static.dataset in Pool().images
    assert (static.activation, static.initializer, static.normalizer) == ("dynamic", "dynamic", "parametric")
    if static.work().flops > 3e8:
        return  # it would take seconds
    task = static.build(RANDOM)
    dynamic, params, batch = make_particles(task, 2)
    assert task.losses(params, batch, dynamic).isfinite().all()


def test_draws_reach_the_whole_distribution():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Pool()) for _ in range(3000)]
    layers = Counter(len(static.hidden) for static in drawn)
    assert all(layers[count] == pytest.approx(750, abs=140) for count in range(4))
    strided = Counter(static.strided for static in drawn if len(static.hidden) >= 2)
    assert all(strided[count] == pytest.approx(500, abs=100) for count in range(3))
    widths = [static.hidden[0] for static in drawn if static.hidden]
    assert (min(widths), max(widths)) == (4, 64)
    assert np.mean([width < math.sqrt(4 * 65) for width in widths]) == pytest.approx(0.5, abs=0.06)
