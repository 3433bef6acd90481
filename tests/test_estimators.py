"""The estimators estimate the meta-gradient: against exact gradients, and against the originals' formulae."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quadratic import Gd, Parabola, exact_gradients
from worker import estimators
from worker.estimators import PES, FullES, es_gradient, pes_gradient
from worker.unroll import Unroll

ORACLES = Path(__file__).parent / "oracles"
SIGMA = 0.003  # small against theta, so that the curvature of the meta-loss adds no visible bias


def standard_errors(residuals):
    """How many standard errors the mean of (n, D) residuals is away from zero, per coordinate."""
    r = torch.stack(residuals).double()
    return (r.mean(0) / (r.std(0) / len(r) ** 0.5)).abs()


def pes_residuals(calls, num_tasks=2, window=3, length=7):
    """Estimate minus truth for every window in which an episode ended, wherever in the window it did."""
    rule = Gd()
    theta = rule.init_theta(None)
    pes = PES(Unroll(Parabola(), rule, num_tasks, (length, length), ("pes",)), SIGMA, window=window)
    exact, state, residuals = exact_gradients(length), pes.init(), []
    for _ in range(calls):
        step, ends, over = state["inner_step"].clone(), state["ends"].clone(), state["over"].clone()
        estimate, state = pes.estimate(theta, state)
        truth = torch.zeros(2).double()
        ended = False
        for task in range(num_tasks):
            t, end = (0, length) if over[task] else (int(step[task]), int(ends[task]))
            if over[task] and state["episode"][task] == 0:
                end = int(state["ends"][task])
            for _ in range(window):
                truth += exact[t] / (window * num_tasks)
                t += 1
                if t >= end:
                    t, end, ended = 0, length, True
        if ended:
            residuals.append(estimate.gradient - truth)
    return residuals


def test_pes_is_unbiased_over_2000_windows_with_terminations():
    residuals = pes_residuals(calls=4800)
    assert len(residuals) >= 2000
    assert standard_errors(residuals).max() < 3


def test_pes_with_the_originals_credit_of_the_terminating_step_is_biased(monkeypatch):
    def quirk(delta, done, eps, accumulator, sigma):
        early = torch.cat([done[1:], torch.zeros_like(done[:1])])
        gradient, _ = pes_gradient(delta, early, eps, accumulator, sigma)
        return gradient, pes_gradient(delta, done, eps, accumulator, sigma)[1]

    monkeypatch.setattr(estimators, "pes_gradient", quirk)
    assert standard_errors(pes_residuals(calls=4800)).max() > 3


@pytest.mark.parametrize("objective", ["mean", "final"])
def test_full_es_is_unbiased_over_2000_estimates(objective, monkeypatch):
    monkeypatch.setattr(estimators, "FINAL_BATCHES", 1)
    length, rule = 6, Gd()
    full = FullES(Unroll(Parabola(), rule, 1, (length, length), ("es",)), SIGMA, objective=objective)
    exact = exact_gradients(length + 1)
    truth = exact[:length].mean(0) if objective == "mean" else exact[length]
    theta, state, residuals = rule.init_theta(None), full.init(), []
    for _ in range(2000):
        estimate, state = full.estimate(theta, state)
        residuals.append(estimate.gradient - truth)
    assert standard_errors(residuals).max() < 3
    assert truth.abs().min() > 3 * torch.stack(residuals).std(0).max() / 2000**0.5, "a zero estimate would pass"


def unpack(name):
    data = np.load(ORACLES / name, allow_pickle=False)
    tensor = lambda key: torch.from_numpy(np.asarray(data[key]))  # noqa: E731
    leaves = lambda prefix: torch.cat([tensor(f"{prefix}/{k}").reshape(len(tensor("vec_pos/c")), -1) for k in "abc"], 1)  # noqa: E731
    flat = lambda prefix: torch.cat([tensor(f"{prefix}/{k}").reshape(-1) for k in "abc"])  # noqa: E731
    return tensor, leaves, flat


def test_full_es_formula_equals_the_original():
    tensor, leaves, flat = unpack("es_formula.npz")
    delta = tensor("pos_loss") - tensor("neg_loss")
    finite = torch.nan_to_num(delta, nan=0.0, posinf=0.0, neginf=0.0)
    torch.testing.assert_close(es_gradient(finite, leaves("vec_pos"), float(tensor("std"))), flat("grad"))


def test_pes_formula_equals_the_original_but_for_the_terminating_step():
    tensor, leaves, flat = unpack("pes_formula.npz")
    done, mask = tensor("is_done"), tensor("mask")
    delta = (tensor("p_loss") - tensor("n_loss")) * mask * len(mask) / mask.sum(0)
    eps, accumulator, sigma = leaves("vec_pos"), leaves("acc_in"), float(tensor("std"))
    # the original credits a terminating step as if it came after the end: the same as ends one step earlier,
    # for which an empty step in front makes room
    early = torch.cat([done, torch.zeros_like(done[:1])])
    longer = torch.cat([torch.zeros_like(delta[:1]), delta]) * (len(delta) + 1) / len(delta)
    gradient, _ = pes_gradient(longer, early, eps, accumulator, sigma)
    torch.testing.assert_close(gradient, flat("grad"), rtol=1e-5, atol=1e-5)
    ours, next_accumulator = pes_gradient(delta, done, eps, accumulator, sigma)
    assert not torch.allclose(ours, flat("grad"), rtol=1e-3)
    running = ~done[-1]
    torch.testing.assert_close(next_accumulator[running], leaves("acc_out")[running])
    assert (next_accumulator[~running] == 0).all()


def test_a_diverging_side_still_pushes_away_and_harms_no_other_task():
    delta = torch.zeros(1, 3)
    delta[0, 1] = 3.4  # the worst value minus a good one: the + side of task 1 diverged
    eps = torch.eye(3) * 0.01
    gradient, _ = pes_gradient(delta, torch.zeros(1, 3, dtype=torch.bool), eps, torch.zeros(3, 3), 0.01)
    assert gradient[1] > 0
    assert gradient[0] == gradient[2] == 0
