"""MLP auto-encoders: the originals' values, their choices, their laws, and their distribution."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data.library import Library
from tasks.families.draws import RANGES, Pool
from tasks.families.mlp_ae import MlpAe, draw
from tasks.keys import generator
from tasks.random import keys
from tasks.static import static_from_dict
from tests.image_oracles import META_LOSSES, ORIGINALS, measured, meta_losses
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count, rows

DIGITS = Library(DataConfig())
RANDOM = RandomLibrary()
SWITCHES = ("log_loss", "center_data", "constrain_output")
DYNAMIC = dict.fromkeys(("activation", "initializer", *SWITCHES), "dynamic") | {"normalizer": "parametric"}


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name.startswith("ae")])
def test_loss_and_gradient_are_the_originals(name):
    assert measured(name) == pytest.approx(ORIGINALS[name], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in META_LOSSES if name.startswith("ae")])
def test_meta_losses_are_the_originals(name):
    assert meta_losses(name) == pytest.approx(META_LOSSES[name], rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 64 * 32 + 32 + 32 * 64 + 64),
        ({"hidden": ()}, 64 * 64 + 64),
        ({"hidden": (7, 5), "dataset": "cifar10", "image_size": 4}, 48 * 7 + 7 + 7 * 5 + 5 + 5 * 48 + 48),
    ],
)
def test_it_has_the_parameters_it_should(fields, parameters):
    static = MlpAe(**fields)
    assert static.work().parameters == parameters
    assert parameter_count(static.build(RANDOM).init(generator(0))) == parameters


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden": (), "shift": 1, "noise": 0.1},
        {"hidden": (12, 7), "constrain_output": False, "center_data": True, "activation": "tanh"},
        {"dataset": "cifar10", "log_loss": True, "normalizer": "parametric"},
        DYNAMIC,
    ],
)
def test_it_keeps_the_laws_of_tasks(fields):
    assert assert_laws(MlpAe(**fields), RANDOM if "dataset" in fields else DIGITS, particles=6) < 1e-5


def test_every_particle_has_its_own_choices():
    task = MlpAe(hidden=(6,), **DYNAMIC).build(RANDOM)
    _, params, batch = make_particles(task, 8)
    flags = torch.tensor(list(itertools.product([False, True], repeat=3)))
    dynamic = dict(zip(SWITCHES, flags.T, strict=True)) | {"activation": torch.full((8,), 3)}
    together = task.losses(params, batch, dynamic)
    for i, (log_loss, center, constrain) in enumerate(flags.tolist()):
        fields = {"log_loss": log_loss, "center_data": center, "constrain_output": constrain}
        static = MlpAe(hidden=(6,), activation="tanh", normalizer="parametric", **fields)
        alone = static.build(RANDOM)
        loss = alone.loss(rows(params, i), rows(batch, i))
        torch.testing.assert_close(together[i], loss)
        torch.testing.assert_close(task.normalizer(together, dynamic)[i], alone.normalizer(loss))
    assert len({round(loss, 4) for loss in together.tolist()}) == 8


def test_without_a_draw_nothing_is_chosen():
    task, plain = MlpAe(**DYNAMIC).build(RANDOM), MlpAe(constrain_output=False).build(RANDOM)
    params, batch = (rows(leaves, 0) for leaves in make_particles(plain, 1)[1:])
    torch.testing.assert_close(task.loss(params, batch), plain.loss(params, batch))


def test_the_log_loss_is_of_columns():
    task = MlpAe(hidden=(), log_loss=True, constrain_output=False, normalizer="parametric").build(RANDOM)
    params = {"w0": torch.zeros(64, 64), "b0": torch.zeros(64)}
    image = torch.zeros(1, 1, 8, 8)
    image[..., 3, 5] = 0.4  # one pixel, so that seven columns have no error
    expected = (7 * math.log(1e-8) + math.log(0.16 / 8 + 1e-8)) / 8
    assert task.loss(params, {"image": image}).item() == pytest.approx(expected)


def test_the_loss_of_zeros_is_that_of_the_middle_of_the_range():
    params = {"w0": torch.zeros(64, 64), "b0": torch.zeros(64)}
    image = torch.rand(5, 1, 8, 8, generator=generator(0))
    for center, expected in ((False, (image - 0.5).square().mean()), (True, (2 * image - 1).square().mean())):
        task = MlpAe(hidden=(), center_data=center).build(RANDOM)
        torch.testing.assert_close(task.loss(params, {"image": image}), expected)


def test_sgd_trains_it():
    task = MlpAe(hidden=(20,)).build(DIGITS)
    dynamic, params, _ = make_particles(task, 2)
    history, state = [], task.init_state(params)
    for step in range(200):
        losses, grads, state = task.losses_and_grads(params, state, task.batch("train", keys(2, step)), dynamic)
        params = {name: leaf - 20 * grads[name] for name, leaf in params.items()}
        history.append(losses.mean().item())
    assert np.mean(history[-10:]) < 0.6 * history[0]


@given(st.lists(st.floats(width=32), min_size=1), st.booleans())
def test_the_parametric_normalizer_is_half_the_log_error_around_ten(values, log_loss):
    task = MlpAe(log_loss=log_loss, normalizer="parametric").build(RANDOM)
    assert task.worst_loss == 10.5
    out = task.normalizer(torch.tensor(values))
    assert ((out >= 4) & (out <= 10.5)).all()
    for loss, meta_loss in zip(values, out.tolist(), strict=True):
        if not math.isfinite(loss):
            assert meta_loss == 10.5
        elif log_loss or loss >= 0:
            log = loss if log_loss else math.log(loss + 1e-8)
            assert meta_loss == pytest.approx(10 + min(max(log, -12), 1) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": [0]}, r"task.hidden\[0\] = 0"),
        ({"log_loss": "yes"}, "task.log_loss = 'yes': expected one of dynamic"),
        ({"center_data": 1}, "task.center_data = 1: expected true or false or text"),
        ({"constrain_output": "dinamic"}, "did you mean 'dynamic'"),
        ({"log_loss": True}, "task.normalizer = 'fixed': expected parametric"),
        ({"log_loss": "dynamic"}, "task.normalizer = 'fixed': expected parametric"),
        ({"activation": "x"}, "task.activation"),
        ({"initializer": "x"}, "task.initializer"),
        ({"normalizer": "x"}, "task.normalizer"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        static_from_dict({"kind": "mlp_ae", **fields})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(RANGES))
def test_draws_are_in_the_papers_ranges_and_run(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    assert len(static.hidden) <= 4
    assert len(set(static.hidden)) <= 1
    assert all(8 <= width <= 128 for width in static.hidden)
    assert 4 <= static.image_size <= 32
    assert 4 <= static.batch_size <= 512
    assert static.dataset in Pool().images
    assert {name: getattr(static, name) for name in DYNAMIC} == DYNAMIC
    task = static.build(RANDOM)
    dynamic, params, batch = make_particles(task, 2)
    assert set(dynamic) == {"activation", "initializer", "initializer_scale", *SWITCHES}
    losses = task.losses(params, batch, dynamic)
    assert losses.isfinite().all()
    assert (task.normalizer(losses, dynamic) <= 10.5).all()


def test_choices_and_layers_are_drawn_uniformly():
    dynamic = MlpAe(**DYNAMIC).build(RANDOM).sample_dynamic(generator(0), 2000)
    assert all(dynamic[name].float().mean() == pytest.approx(0.5, abs=0.05) for name in SWITCHES)
    together = torch.corrcoef(torch.stack([dynamic[name].float() for name in SWITCHES]))
    assert (together - torch.eye(3)).abs().max() < 0.1
    rng = np.random.default_rng(0)
    layers = [len(draw(rng, Pool()).hidden) for _ in range(2000)]
    assert np.bincount(layers).tolist() == pytest.approx([400] * 5, abs=80)
