"""Every update rule equals its JAX original over 20 steps, at the tolerance the oracle files state."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lopt

ORACLES = Path(__file__).parent / "oracles"
CASES = {
    "adafac_mlp_lopt": lambda: lopt.SmallFcLopt(hidden_size=4),
    "celo_phase1": lambda: lopt.Celo(phase=1),
    "celo": lambda: lopt.Celo(phase=2),
}


def unpack(name):
    data = np.load(ORACLES / f"{name}.npz", allow_pickle=False)
    group = lambda prefix: {k[len(prefix) :]: data[k] for k in data.files if k.startswith(prefix)}  # noqa: E731
    return data, group


def run(name, dtype=torch.float32):
    """Yields per step: (parameters, state) of ours, and the oracle's jitted and op-by-op parameters."""
    data, group = unpack(name)
    rule = CASES[name]()
    theta = {k: v.to(dtype) for k, v in lopt.theta_from_jax(rule, group("theta/")).items()}
    params = {k: torch.from_numpy(v).to(dtype) for k, v in group("p0/").items()}
    grads = {k: torch.from_numpy(v).to(dtype) for k, v in group("g/").items()}
    losses = torch.from_numpy(data["loss"])
    state = rule.init_state(theta, params, int(data["num_steps"]))
    for t in range(len(losses)):
        params, state = rule.update(theta, state, params, {k: g[t] for k, g in grads.items()}, losses[t])
        yield t, params, state, group


@pytest.mark.parametrize("name", CASES)
def test_parameters_equal_the_original_after_each_of_20_steps(name):
    data, _ = unpack(name)
    tolerance = 10 * json.loads(str(data["meta"]))["max_abs_jit_vs_nojit"]
    for t, params, _, group in run(name):
        for key, expected in group("p/").items():
            scale = np.abs(expected[t]).max()
            error = np.abs(params[key].numpy() - expected[t]).max()
            assert error <= max(tolerance, 1e-6 * scale), f"step {t}, {key}: error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_displacements_equal_the_original_to_a_few_digits_more_than_the_parameters(name):
    # parameters hide errors of the step behind their own size: compare what moved, against jit-vs-nojit noise
    *_, (t, params, _, group) = run(name)
    for key, start in group("p0/").items():
        moved, expected = params[key].numpy() - start, group("p/")[key][t] - start
        noise = np.abs(group("p/")[key][t] - group("pn/")[key][t]).max()
        assert np.abs(moved - expected).max() <= max(
            10 * noise, 2e-5 * np.abs(expected).max(), 4 * np.spacing(np.float32(np.abs(start).max()))
        )


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
@pytest.mark.parametrize("name", CASES)
def test_accumulators_equal_the_original(name, step, prefix):
    kinds = {"mom_rolling|m": "m", "rms_rolling|rms": "v", "v_row": "row", "v_col": "col", "v_diag": "diag"}
    for t, _, state, group in run(name):
        if t != step:
            continue
        compared = 0
        for path, expected in group(prefix).items():
            kind = next((ours for theirs, ours in kinds.items() if f"{theirs}|" in path), None)
            if kind is None or expected.size == 0:
                continue
            key = f"{kind}/" + "/".join(path.split("|")[-2:])
            ours = np.moveaxis(state[key].numpy(), 0, -1).reshape(expected.shape)
            atol = 2e-6 * np.abs(expected).max()
            np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=atol, err_msg=path)
            compared += 1
        assert compared == 6 * 2 + 3 * 2 + 3


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_celos_one_schedule_equals_the_originals_copy_per_tensor(step, prefix):
    for t, _, state, group in run("celo"):
        if t != step:
            continue
        expected = group(prefix)
        for ours, theirs in (("lstm.hidden", "lstm_hidden_state|hidden"), ("lstm.cell", "lstm_hidden_state|cell")):
            np.testing.assert_allclose(np.ptp(expected[theirs], axis=0), 0, atol=1e-6)
            np.testing.assert_allclose(state[ours].numpy(), expected[theirs][0], rtol=1e-5, atol=2e-6)
        for leaf in ("means", "running_min", "decays"):
            np.testing.assert_allclose(state[f"loss/{leaf}"].numpy(), expected[f"loss_buffer|{leaf}"], rtol=2e-6)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: lopt.SmallFcLopt(4), 197),
        (lambda: lopt.SmallFcLopt(32), 2409),
        (lambda: lopt.Celo(1), 37089),
        (lambda: lopt.Celo(2), 37089),
    ],
)
def test_number_of_meta_parameters_is_the_papers(make, size):
    rule = make()
    assert rule.spec.size == size
    assert sum(leaf.numel() for leaf in rule.init_theta(torch.Generator().manual_seed(0)).values()) == size
