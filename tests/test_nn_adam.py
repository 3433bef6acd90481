"""nn_adam equals its JAX original, starts as Adam, and keeps the laws of learned optimizers."""

import math

import numpy as np
import pytest
import torch

import lopt
from tests.lopt_laws import LAWS, Oracle, close, particles, run
from tests.test_mlp_lopt import assert_close, assert_parameters_equal

HYPER = ("lr", "beta1", "beta2", "epsilon")


@pytest.fixture(scope="module")
def oracle():
    return Oracle("nn_adam")


def test_parameters_equal_the_original_after_each_of_20_steps(oracle):
    assert_parameters_equal(oracle, lopt.NNAdam(), digits=4)


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_state_equals_the_original(oracle, step, prefix):
    expected, names = oracle.group(prefix), sorted(oracle.group("p0/"))
    [state] = [state for t, _, state in oracle.run(lopt.NNAdam()) if t == step]
    for i, name in enumerate(names):
        path = name.replace("/", "|")
        hyper = np.array([expected[f"per_layer_{kind}|{path}"] for kind in HYPER])
        # another exp can round a float32 beta the other way, once, and with it everything made of 1 - beta
        rounding = 2**-24 / np.exp(10 * hyper)
        rounding[[0, 3]] = 0
        np.testing.assert_array_less(np.abs(state[f"hyper/{name}"].numpy() - hyper), 2e-6 + 0.2 * rounding)
        for kind, original, of_beta in (("m", "m", rounding[1]), ("v", "rms", rounding[2])):
            wanted = expected[f"rolling_features|{original}|{path}"]
            ours = state[f"{kind}/{name}"].numpy().reshape(wanted.shape)
            assert_close(ours, wanted, name, rtol=2e-6 + 2 * of_beta)
        for part in ("hidden", "cell"):
            assert_close(state[f"lstm_{part}/{name}"].numpy(), expected[f"lstm_hidden_state|{part}"][i], name, 1e-5)
    assert len(state) == 5 * len(names), "nothing unused"


@pytest.mark.parametrize(("lstm_size", "size"), [(32, 6856), (64, 21896)])
def test_number_of_meta_parameters_is_the_originals(lstm_size, size):
    rule = lopt.build("nn_adam", lstm_size=lstm_size)
    assert rule.spec.size == size
    assert sum(leaf.numel() for leaf in rule.init_theta(torch.Generator().manual_seed(0)).values()) == size


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_keeps_the_laws_of_learned_optimizers(law):
    law(lopt.NNAdam(lstm_size=8))


@pytest.mark.parametrize(("epsilon", "scale"), [(1e-8, 1.0), (1e-8, 1e-4), (3.0, 1.0)])
def test_fresh_meta_parameters_are_adam_without_bias_correction(epsilon, scale):
    """A large epsilon makes it gradient descent with momentum at the same rate; a small v has 1e-10 under its root."""
    rule = lopt.NNAdam()
    batch = particles(rule, perturbation=0)
    batch.theta["initial.epsilon"][:] = 0.1 * math.log(epsilon)
    batch = batch._replace(
        params={name: torch.zeros_like(p) for name, p in batch.params.items()},
        grads=[{name: scale * leaf for name, leaf in g.items()} for g in batch.grads],
    )
    params, _ = run(rule, batch)
    for name, moved in batch.params.items():
        m = v = torch.zeros_like(moved)
        for grads in batch.grads:
            m, v = 0.9 * m + 0.1 * grads[name], 0.999 * v + 0.001 * grads[name].square()
            moved = moved - 1e-4 * (1 + epsilon) * m / (epsilon + torch.sqrt(v + 1e-10))
        torch.testing.assert_close(params[name], moved, rtol=1e-4, atol=1e-8)
        assert moved.abs().max() > 1e-4


def test_a_step_is_made_with_the_hyper_parameters_at_hand_and_the_next_with_the_controlled_ones():
    rule = lopt.NNAdam()
    batch = particles(rule)
    other = batch._replace(theta=batch.theta | {"controls.b": batch.theta["controls.b"] + 5})
    close(run(rule, batch, steps=1)[0], run(rule, other, steps=1)[0], 0, 0)
    once, twice = (run(rule, case, steps=2)[0] for case in (batch, other))
    assert all((once[name] != twice[name]).any() for name in once)


def test_hyper_parameters_stay_within_their_bounds():
    rule = lopt.NNAdam()
    bounds = torch.tensor([[1e-8, 1e3], [math.exp(-10), 1], [math.exp(-10), 1], [1e-11, 1e4]]).T
    for sign, bound in ((-1.0, bounds[0]), (1.0, bounds[1])):
        batch = particles(rule, perturbation=0)
        batch.theta["controls.b"][:] = sign * 1e6
        _, state = run(rule, batch, steps=3)
        for name in batch.params:
            natural = torch.exp(10 * state[f"hyper/{name}"])
            torch.testing.assert_close(natural, bound.expand(3, 4), rtol=1e-3, atol=0)


def test_tensors_do_not_hear_of_each_other():
    rule = lopt.NNAdam()
    batch = particles(rule)
    together, _ = run(rule, batch)
    for name in batch.params:
        only = lambda leaves, name=name: {name: leaves[name]}  # noqa: E731
        alone, _ = run(rule, batch._replace(params=only(batch.params), grads=[only(g) for g in batch.grads]))
        close(alone, only(together))


def test_gradients_are_clipped_at_a_thousand():
    rule = lopt.NNAdam()
    batch = particles(rule)
    signs = [{n: 1000 * g.sign() for n, g in step.items()} for step in batch.grads]
    huge = [{n: 1e17 * g for n, g in step.items()} for step in signs]
    close(*(run(rule, batch._replace(grads=grads))[0] for grads in (signs, huge)), 0, 0)
