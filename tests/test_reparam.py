"""The re-parametrisation augmentation: same function at the start, predictably different training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig, FamilyConfig, ReparamConfig
from tasks import build_family, generator, losses, losses_and_grads

LEVELS = ("global", "tensor", "parameter")


def families(level, low=1e-3, high=1e3):
    config = FamilyConfig(hidden=[8], reparam=ReparamConfig(level, low, high))
    return build_family("d", FamilyConfig(hidden=[8]), DataConfig()), build_family("d", config, DataConfig())


def initial(family, static, dynamic, count):
    rows = [{name: leaf[i] for name, leaf in dynamic.items()} for i in range(count)]
    each = [family.build(static, row).init(generator("init", i)) for i, row in enumerate(rows)]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


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
        dynamic = families(level)[1].sample_dynamic(generator(0), 5)
        assert {name: tuple(leaf.shape) for name, leaf in dynamic.items()} == expected


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(LEVELS), st.integers(0, 1000), st.floats(1e-3, 1.0), st.floats(1.0, 1e3))
def test_tau_stays_in_its_range(level, seed, low, high):
    dynamic = families(level, low, high)[1].sample_dynamic(generator(seed), 7)
    for tau in dynamic.values():
        assert tau.min() >= low * (1 - 1e-5)
        assert tau.max() <= high * (1 + 1e-5)


def test_log_tau_is_uniform():
    tau = families("global")[1].sample_dynamic(generator(0), 20_000)["tau"]
    log_tau = tau.log10().sort().values
    distance = (log_tau + 3) / 6 - torch.linspace(0, 1, 20_000)
    assert distance.abs().max() < 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("level", ["tensor", "parameter"])
def test_every_tensor_and_every_particle_has_its_own_tau(level):
    dynamic = families(level)[1].sample_dynamic(generator(0), 6)
    drawn = torch.cat([leaf.flatten() for leaf in dynamic.values()])
    assert len(drawn.unique()) > 0.99 * len(drawn)


@pytest.mark.parametrize("level", LEVELS)
def test_the_function_at_initialisation_is_unchanged_and_the_trained_weights_are_divided(level):
    plain, wrapped = families(level)
    rng = np.random.default_rng(0)
    dynamic = wrapped.sample_dynamic(generator(0), 9)
    static, wrapped_static = plain.sample_static(rng), wrapped.sample_static(rng)
    weights, divided = initial(plain, static, {}, 9), initial(wrapped, wrapped_static, dynamic, 9)
    batch = plain.datasets.train.sample(generator(1), (9, 32))
    torch.testing.assert_close(
        losses(wrapped, wrapped_static, dynamic, divided, batch),
        losses(plain, static, {}, weights, batch),
        rtol=1e-5,
        atol=1e-6,
    )
    for name, leaf in weights.items():
        torch.testing.assert_close(divided[name] * tau_of(dynamic, name, leaf), leaf)
    assert not torch.allclose(divided["w0"], weights["w0"])


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_of_sgd_moves_the_weights_tau_squared_times_as_far(level):
    plain, wrapped = families(level, 0.1, 10.0)
    rng = np.random.default_rng(0)
    dynamic = wrapped.sample_dynamic(generator(0), 4)
    static, wrapped_static = plain.sample_static(rng), wrapped.sample_static(rng)
    weights, divided = initial(plain, static, {}, 4), initial(wrapped, wrapped_static, dynamic, 4)
    learning_rate = 0.05
    for step in range(5):
        batch = plain.datasets.train.sample(generator(step), (4, 32))
        _, grads = losses_and_grads(plain, static, {}, weights, batch)
        _, divided_grads = losses_and_grads(wrapped, wrapped_static, dynamic, divided, batch)
        divided = {name: leaf - learning_rate * divided_grads[name] for name, leaf in divided.items()}
        for name, leaf in weights.items():
            tau = tau_of(dynamic, name, leaf)
            weights[name] = leaf - learning_rate * tau**2 * grads[name]
            torch.testing.assert_close(divided[name] * tau, weights[name], rtol=1e-3, atol=1e-4)


def test_without_a_dynamic_row_the_task_is_the_plain_one():
    plain, wrapped = families("tensor")
    rng = np.random.default_rng(0)
    task = wrapped.build(wrapped.sample_static(rng))
    reference = plain.build(plain.sample_static(rng))
    params = task.init(generator(3))
    batch = plain.datasets.train.sample(generator(4), (16,))
    assert all(torch.equal(params[name], leaf) for name, leaf in reference.init(generator(3)).items())
    assert torch.equal(task.loss(params, batch), reference.loss(params, batch))


def test_what_is_not_the_parameters_passes_through():
    plain, wrapped = families("global")
    rng = np.random.default_rng(0)
    row = {name: leaf[0] for name, leaf in wrapped.sample_dynamic(generator(0), 1).items()}
    task, reference = wrapped.build(wrapped.sample_static(rng), row), plain.build(plain.sample_static(rng))
    assert (task.batch_size, task.worst_loss) == (reference.batch_size, reference.worst_loss)
    assert task.datasets is wrapped.datasets
    loss = torch.tensor([0.5, math.nan, 1e9])
    assert torch.equal(task.normalizer(loss), reference.normalizer(loss))


def test_its_static_config_names_level_and_range():
    configs = [families(level, low)[1].sample_static(np.random.default_rng(0)) for level in LEVELS for low in (0.1, 1)]
    assert len({config.digest() for config in configs}) == len({*configs}) == 6
    assert '"level": "global"' in configs[0].to_json()
