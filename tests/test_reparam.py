"""The re-parametrisation augmentation: same function at the start, predictably different training."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from tasks.augmentations.reparam import LEVELS, Reparam
from tasks.families.image_mlp import ImageMlp
from tasks.keys import generator
from tasks.random import keys
from tests.task_laws import RandomLibrary, assert_laws

LIBRARY = RandomLibrary()
PLAIN = ImageMlp(hidden=(8,))


def tasks_of(level, low=1e-3, high=1e3):
    return PLAIN.build(LIBRARY), Reparam(task=PLAIN, level=level, low=low, high=high).build(LIBRARY)


def particles(plain, wrapped, count):
    """The same weights with and without taus, and the taus."""
    dynamic = wrapped.sample_dynamic(generator(0), count)
    rows = [{name: leaf[i] for name, leaf in dynamic.items()} for i in range(count)]
    weights = [plain.init(generator("init", i)) for i in range(count)]
    divided = [wrapped.init(generator("init", i), rows[i]) for i in range(count)]
    stack = lambda each: {name: torch.stack([one[name] for one in each]) for name in each[0]}  # noqa: E731
    return stack(weights), stack(divided), dynamic


def tau_of(dynamic, name, like):
    """The tau of tensor ``name``, ready to multiply with ``like`` (P, ...)."""
    tau = dynamic["tau"] if "tau" in dynamic else dynamic[f"tau/{name}"]
    return tau.reshape(tau.shape + (1,) * (like.ndim - tau.ndim))


def test_the_dynamic_config_carries_the_taus_of_its_level():
    shapes = {"w0": (64, 8), "b0": (8,), "w1": (8, 10), "b1": (10,)}
    for level, expected in {
        "global": {"tau": (5,)},
        "tensor": {f"tau/{name}": (5,) for name in shapes},
        "parameter": {f"tau/{name}": (5, *shape) for name, shape in shapes.items()},
    }.items():
        dynamic = tasks_of(level)[1].sample_dynamic(generator(0), 5)
        assert {name: tuple(leaf.shape) for name, leaf in dynamic.items()} == expected


def test_what_the_task_itself_draws_is_among_it():
    static = Reparam(task=ImageMlp(activation="dynamic", initializer="dynamic"), level="global")
    dynamic = static.build(LIBRARY).sample_dynamic(generator(0), 5)
    assert dynamic.keys() == {"tau", "activation", "initializer", "initializer_scale"}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(LEVELS), st.integers(0, 1000), st.floats(1e-3, 1.0), st.floats(1.0, 1e3))
def test_tau_stays_in_its_range(level, seed, low, high):
    dynamic = tasks_of(level, low, high)[1].sample_dynamic(generator(seed), 7)
    for tau in dynamic.values():
        assert tau.min() >= low * (1 - 1e-5)
        assert tau.max() <= high * (1 + 1e-5)


def test_log_tau_is_uniform():
    tau = tasks_of("global")[1].sample_dynamic(generator(0), 20_000)["tau"]
    log_tau = tau.log10().sort().values
    distance = (log_tau + 3) / 6 - torch.linspace(0, 1, 20_000)
    assert distance.abs().max() < 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("level", ["tensor", "parameter"])
def test_every_tensor_and_every_particle_has_its_own_tau(level):
    dynamic = tasks_of(level)[1].sample_dynamic(generator(0), 6)
    drawn = torch.cat([leaf.flatten() for leaf in dynamic.values()])
    assert len(drawn.unique()) > 0.99 * len(drawn)


@pytest.mark.parametrize("level", LEVELS)
def test_the_function_at_initialisation_is_unchanged_and_the_trained_weights_are_divided(level):
    plain, wrapped = tasks_of(level)
    weights, divided, dynamic = particles(plain, wrapped, 9)
    batch = plain.batch("train", keys(9, 1))
    expected = plain.losses(weights, batch)
    torch.testing.assert_close(wrapped.losses(divided, batch, dynamic), expected, rtol=1e-5, atol=1e-6)
    out = wrapped.losses_and_grads(divided, {}, batch, dynamic)
    torch.testing.assert_close(out.losses, expected, rtol=1e-5, atol=1e-6)
    for name, leaf in weights.items():
        torch.testing.assert_close(divided[name] * tau_of(dynamic, name, leaf), leaf)
    assert not torch.allclose(divided["w0"], weights["w0"])


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_of_sgd_moves_the_weights_tau_squared_times_as_far(level):
    plain, wrapped = tasks_of(level, 0.1, 10.0)
    weights, divided, dynamic = particles(plain, wrapped, 4)
    learning_rate = 0.05
    for step in range(5):
        batch = plain.batch("train", keys(4, step))
        grads = plain.losses_and_grads(weights, {}, batch).grads
        divided_grads = wrapped.losses_and_grads(divided, {}, batch, dynamic).grads
        divided = {name: leaf - learning_rate * divided_grads[name] for name, leaf in divided.items()}
        for name, leaf in weights.items():
            tau = tau_of(dynamic, name, leaf)
            weights[name] = leaf - learning_rate * tau**2 * grads[name]
            torch.testing.assert_close(divided[name] * tau, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_it_keeps_every_law_of_tasks(level):
    assert_laws(Reparam(task=PLAIN, level=level, low=0.5, high=2.0), LIBRARY)


def test_without_a_dynamic_row_the_task_is_the_plain_one():
    plain, wrapped = tasks_of("tensor")
    params = wrapped.init(generator(3))
    batch = {name: leaf[0] for name, leaf in plain.batch("train", keys(1, 4)).items()}
    assert all(torch.equal(params[name], leaf) for name, leaf in plain.init(generator(3)).items())
    assert torch.equal(wrapped.loss(params, batch), plain.loss(params, batch))


def test_what_is_not_the_parameters_passes_through():
    plain, wrapped = tasks_of("global")
    assert (wrapped.batch_size, wrapped.worst_loss) == (plain.batch_size, plain.worst_loss)
    batch, expected = wrapped.batch("test", keys(2, 0)), plain.batch("test", keys(2, 0))
    assert all(torch.equal(leaf, expected[name]) for name, leaf in batch.items())
    loss = torch.tensor([0.5, math.nan, 1e9])
    assert torch.equal(wrapped.normalizer(loss), plain.normalizer(loss))


def test_its_static_config_names_level_and_range_and_refuses_others():
    configs = [Reparam(task=PLAIN, level=level, low=low) for level in LEVELS for low in (0.1, 1.0)]
    assert len({config.digest() for config in configs}) == len({*configs}) == 6
    assert '"level": "global"' in configs[0].to_json()
    for wrong in ({"level": "none"}, {"low": 0.0}, {"low": 2.0, "high": 1.0}, {"high": math.inf}):
        with pytest.raises(ConfigError):
            Reparam(task=PLAIN, **wrong)
