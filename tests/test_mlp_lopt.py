"""mlp_lopt equals its JAX original, and keeps the laws of learned optimizers."""

import json

import numpy as np
import pytest
import torch

import lopt
from tests.lopt_laws import LAWS, Oracle, close, particles, run


@pytest.fixture(scope="module")
def oracle():
    return Oracle("mlp_lopt")


def assert_parameters_equal(oracle, rule, digits):
    """Parameters at the tolerance of the oracle; and what moved, which is small beside them, to ``digits``."""
    tolerance = 10 * json.loads(str(oracle.data["meta"]))["max_abs_jit_vs_nojit"]
    wanted, start = oracle.group("p/"), oracle.group("p0/")
    for t, params, _ in oracle.run(rule):
        for name, p in params.items():
            error = np.abs(p.numpy() - wanted[name][t]).max()
            assert error <= max(tolerance, 1e-6 * np.abs(wanted[name][t]).max()), f"step {t}, {name}: {error:.2e}"
            moved = np.abs(wanted[name][t] - start[name]).max()
            spacing = np.spacing(np.abs(start[name]).max().astype(np.float32))
            assert error <= max(10**-digits * moved, 2 * spacing), f"step {t}, {name}: {error / moved:.2e} of the move"
    assert t == 19


def assert_close(ours, wanted, name, rtol=2e-6):
    """``rtol`` of the largest number: the others are as exact as sums with it are."""
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=rtol * np.abs(wanted).max(), err_msg=name)


def test_parameters_equal_the_original_after_each_of_20_steps(oracle):
    assert_parameters_equal(oracle, lopt.MlpLopt(), digits=5)


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_state_equals_the_original(oracle, step, prefix):
    expected = oracle.group(prefix)
    [state] = [state for t, _, state in oracle.run(lopt.MlpLopt()) if t == step]
    assert int(state.pop("iteration")) == int(expected["iteration"]) == step + 1
    for name in oracle.group("p0/"):
        wanted = expected[f"rolling_features|m|{name.replace('/', '|')}"]
        for k in range(6):
            assert_close(state[f"m/{name}"][k].numpy(), wanted[..., k].reshape(state[f"m/{name}"].shape[1:]), name)
    assert state.keys() == {f"m/{name}" for name in oracle.group("p0/")}


@pytest.mark.parametrize(("hidden_size", "size"), [(32, 1762), (4, 110)])
def test_number_of_meta_parameters_is_the_originals(hidden_size, size):
    rule = lopt.build("mlp_lopt", hidden_size=hidden_size)
    assert rule.spec.size == size
    assert sum(leaf.numel() for leaf in rule.init_theta(torch.Generator().manual_seed(0)).values()) == size


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_keeps_the_laws_of_learned_optimizers(law):
    law(lopt.MlpLopt(hidden_size=8))


def test_neither_losses_nor_horizons_are_looked_at():
    rule = lopt.MlpLopt()
    assert not rule.needs_loss
    assert not rule.needs_horizon
    batch = particles(rule)
    close(run(rule, batch)[0], run(rule, batch._replace(losses=-batch.losses, horizons=batch.horizons + 7))[0], 0, 0)


def test_steps_are_bounded_however_large_the_gradients():
    rule = lopt.MlpLopt()
    batch = particles(rule, perturbation=0)
    for scale in (1e-20, 1.0, 1e20):
        params, _ = run(rule, batch._replace(grads=[{n: scale * g for n, g in step.items()} for step in batch.grads]))
        assert all((p - batch.params[name]).abs().max() < 10 * 0.01 for name, p in params.items())


def test_a_file_holds_it(tmp_path):
    rule = lopt.MlpLopt(hidden_size=8)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    again, loaded, _ = lopt.decode(lopt.encode(rule, theta, {}))
    assert (again.name, again.arguments) == ("mlp_lopt", {"hidden_size": 8})
    close(loaded, theta, 0, 0)
