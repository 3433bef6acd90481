"""The estimators estimate the meta-gradient: against exact gradients, and against the originals' formulae."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from configs.schema import EstimatorConfig
from deploy.config import load
from tests.quadratic import Gd, Parabola, exact_gradients
from worker.estimators import (
    GPES,
    NRES,
    PES,
    Backprop,
    FullES,
    LossDifference,
    TruncatedBackprop,
    TruncatedES,
    base,
    build,
    es_gradient,
    online,
)
from worker.estimators.online import credits
from worker.perturbations import contributions, draw
from worker.unroll import Unroll

ORACLES = Path(__file__).parent / "oracles"
SIGMA = 0.003  # small against theta, so that the curvature of the meta-loss adds no visible bias


def gpes2(unroll, sigma, *, window, **options):
    return GPES(unroll, sigma, window=window, noise_windows=2, **options)


def standard_errors(residuals):
    """How many standard errors the mean of (N, D) independent residuals is away from zero, per coordinate."""
    r = residuals.double()
    return (r.mean(0) / (r.std(0) / len(r) ** 0.5)).abs()


def of_each_pair(estimate, key, num_pairs):
    """What each pair alone would have estimated, (n, D): the pairs are independent, so that n of them are n samples."""
    return num_pairs * contributions(key, estimate.terms, SIGMA, len(estimate.gradient), num_pairs)


def online_residuals(kind, monkeypatch, num_pairs=2000, window=3, length=7, windows=8):
    """Estimate minus truth (n, 2), summed over windows in which episodes end, at any of a window's steps."""
    rule, exact, key = Gd(), exact_gradients(length), ("online",)
    unroll = Unroll(Parabola(), rule, num_pairs, (length, length), key)
    estimator = kind(unroll, SIGMA, window=window)
    seen, run = [], unroll.run
    monkeypatch.setattr(unroll, "run", lambda *args: seen.append(run(*args)) or seen[-1])
    state, steps, residuals = estimator.init(), torch.zeros(num_pairs, dtype=torch.int64), 0.0
    for _ in range(windows):
        estimate, state = estimator.estimate(rule.init_theta(None), state)
        truth = torch.zeros(num_pairs, 2).double()
        for done in seen[-1].done:
            truth += exact[steps] / window
            steps = torch.where(done, 0, steps + 1)
        residuals += of_each_pair(estimate, key, num_pairs) - truth
    assert state["episode"].min() >= 2
    return residuals


@pytest.mark.parametrize("kind", [PES, gpes2, NRES])
def test_online_estimators_are_unbiased_over_episodes_ends(kind, monkeypatch):
    assert standard_errors(online_residuals(kind, monkeypatch)).max() < 3


def test_truncated_es_is_biased(monkeypatch):
    assert standard_errors(online_residuals(TruncatedES, monkeypatch)).max() > 10


def test_pes_with_the_originals_credit_of_the_terminating_step_is_biased(monkeypatch):
    def quirk(delta, done):
        return credits(delta, torch.cat([done[1:], torch.zeros_like(done[:1])]))

    monkeypatch.setattr(online, "credits", quirk)
    assert standard_errors(online_residuals(PES, monkeypatch)).max() > 3


@pytest.mark.parametrize("objective", ["mean", "final", "min"])
def test_full_es_is_unbiased(objective, monkeypatch):
    monkeypatch.setattr(base, "FINAL_BATCHES", 1)
    length, rule, n = 6, Gd(), 2000
    full = FullES(Unroll(Parabola(), rule, n, (length, length), ("es",)), SIGMA, objective=objective)
    exact = exact_gradients(length + 1)
    # the losses fall all the way, so that the least is the last one before the last update
    truth = {"mean": exact[:length].mean(0), "final": exact[length], "min": exact[length - 1]}[objective]
    estimate, _ = full.estimate(rule.init_theta(None), full.init())
    estimates = of_each_pair(estimate, ("es",), n)
    assert standard_errors(estimates - truth).max() < 3
    assert standard_errors(estimates).min() > 3, "a zero estimate would pass"


@pytest.mark.parametrize("objective", ["mean", "final", "min"])
def test_full_backprop_is_exact(objective, monkeypatch):
    monkeypatch.setattr(base, "FINAL_BATCHES", 2)
    exact, rule = exact_gradients(7), Gd()
    truth = {"mean": exact[:6].mean(0), "final": exact[6], "min": exact[5]}[objective]
    backprop = Backprop(Unroll(Parabola(), rule, 2, (6, 6), ("bp",)), objective=objective)
    estimate, _ = backprop.estimate(rule.init_theta(None), backprop.init())
    torch.testing.assert_close(estimate.gradient.double(), truth, rtol=1e-5, atol=1e-6)


def test_truncated_backprop_is_what_truncated_es_estimates():
    rule, n = Gd(), 2000
    es, backprop = (
        build(Unroll(Parabola(), rule, n, (6, 6), ("t",)), EstimatorConfig(name, sigma=SIGMA, window=3))
        for name in ("truncated_es", "truncated_backprop")
    )
    one, two = es.init(), backprop.init()
    for _ in range(3):
        estimate, one = es.estimate(rule.init_theta(None), one)
        truth, two = backprop.estimate(rule.init_theta(None), two)
        # the state of a window is the noise's doing in the one and not in the other: equal to first order in sigma
        assert standard_errors(of_each_pair(estimate, ("t",), n) - truth.gradient).max() < 3
    assert truth.gradient.abs().min() > 0.01


class Shifted(Parabola):
    """A parabola whose minimum is elsewhere in validation."""

    def batch(self, split, keys):
        shift = torch.full((len(keys),), 0.0 if split == "train" else 0.5)
        return {"shift": shift, **super().batch(split, keys)}

    def loss(self, params, batch, dynamic=None):
        return super().loss({"x": params["x"] - batch["shift"]}, batch, dynamic)


def test_the_validation_objective_is_the_loss_at_the_windows_end_on_outer_valid(monkeypatch):
    monkeypatch.setattr(base, "FINAL_BATCHES", 1)
    window, rule, n = 3, Gd(), 2000
    rate = rule.init_theta(None)["rate"].double().requires_grad_()
    x, exact = torch.tensor([1.0, -1.0]).double(), []
    for _ in range(6):
        x = x - rate * Parabola.curvature.double() * x
        loss = 0.5 * (Parabola.curvature.double() * (x - 0.5).square()).sum()
        exact.append(torch.autograd.grad(loss, rate, retain_graph=True)[0])
    exact = torch.stack([exact[-1], *exact])  # by the steps taken; a task that is over stands at its last
    pes = PES(Unroll(Shifted(), rule, n, (6, 6), ("v",)), SIGMA, window=window, split="outer_valid")
    state, residuals = pes.init(), 0.0
    for _ in range(6):
        estimate, state = pes.estimate(rule.init_theta(None), state)
        residuals += of_each_pair(estimate, ("v",), n) - exact[state["inner_step"]]
    assert standard_errors(residuals).max() < 3
    full = FullES(Unroll(Shifted(), rule, n, (6, 6), ("v",)), SIGMA, objective="final", split="outer_valid")
    estimate, _ = full.estimate(rule.init_theta(None), full.init())
    assert standard_errors(of_each_pair(estimate, ("v",), n) - exact[-1]).max() < 3
    assert standard_errors(of_each_pair(estimate, ("v",), n) - exact_gradients(7)[6]).max() > 3, "that of training"


@pytest.mark.parametrize(("kind", "period"), [(PES, 1), (gpes2, 2), (NRES, 10**9)])
def test_the_trace_equals_the_algorithm_written_out_plainly(kind, period, monkeypatch):
    """One task at a time, one step at a time: which perturbations has the running episode seen?"""
    n, window, sigma = 5, 4, 0.01
    rule, theta = Gd(), Gd().init_theta(None)
    estimator = kind(Unroll(Parabola(), rule, n, (2, 13), ("trace",)), sigma, window=window)
    runs = []
    run = estimator.unroll.run
    monkeypatch.setattr(
        estimator.unroll, "run", lambda *args, **kw: runs.append((args, run(*args, **kw))) or runs[-1][1]
    )
    state = estimator.init()
    seen = [[] for _ in range(n)]  # the perturbations of each task's episode, each once
    age, started_amid, over = [0] * n, [False] * n, [True] * n
    current = [None] * n
    for number in range(60):
        estimate, state = estimator.estimate(theta, state)
        (thetas, *_), (losses, done) = runs[-1]
        expected = torch.zeros(2)
        for i in range(n):
            if over[i] or started_amid[i] or age[i] == period:
                current[i] = sigma * draw(("trace",), torch.tensor([number]), torch.tensor([i]), 2)[0]
                age[i], started_amid[i] = 0, False
                seen[i] = [current[i]] if over[i] else [*seen[i], current[i]]
            age[i] += 1
            torch.testing.assert_close(thetas["rate"][i], theta["rate"] + current[i])
            torch.testing.assert_close(thetas["rate"][n + i], theta["rate"] - current[i])
            for t in range(window):
                if over[i] and t:
                    seen[i], started_amid[i] = [current[i]], True
                expected += (losses[t, i] - losses[t, n + i]) * sum(seen[i]) / (2 * sigma**2 * window * n)
                over[i] = bool(done[t, i])
        torch.testing.assert_close(estimate.gradient, expected, rtol=1e-4, atol=1e-4)
    assert state["episode"].min() > 20


@pytest.mark.parametrize(("kind", "amid"), [(PES, True), (gpes2, False), (NRES, False)])
def test_where_noise_is_reused_episodes_end_with_windows_after_the_first(kind, amid, monkeypatch):
    unroll = Unroll(Parabola(), Gd(), 20, (11, 23), ("ends",))
    seen, run = [], unroll.run
    monkeypatch.setattr(unroll, "run", lambda *args: seen.append(run(*args)) or seen[-1])
    estimator = kind(unroll, SIGMA, window=4)
    state = estimator.init()
    for _ in range(40):
        _, state = estimator.estimate(Gd().init_theta(None), state)
        assert ((state["ends"] > state["horizon"] - 4) & (state["ends"] <= state["horizon"]))[
            state["episode"] > 0
        ].all()
    done = torch.stack([window.done for window in seen])
    assert done[10:, :-1].any() == amid
    assert state["episode"].min() >= 5


ESTIMATORS = {
    "pes": lambda unroll: PES(unroll, SIGMA, window=4),
    "gpes": lambda unroll: gpes2(unroll, SIGMA, window=4),
    "nres": lambda unroll: NRES(unroll, SIGMA, window=4),
    "truncated_es": lambda unroll: TruncatedES(unroll, SIGMA, window=4),
    "full_es": lambda unroll: FullES(unroll, SIGMA, objective="mean"),
    "backprop": lambda unroll: Backprop(unroll, objective="mean"),
    "truncated_backprop": lambda unroll: TruncatedBackprop(unroll, window=4),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_state_that_went_through_a_file_goes_on_exactly(name):
    rule, theta = Gd(), Gd().init_theta(None)
    first, second = (ESTIMATORS[name](Unroll(Parabola(), rule, 3, (2, 11), ("s",))) for _ in range(2))
    state = first.init()
    for _ in range(7):
        _, state = first.estimate(theta, state)
    restored = safetensors.torch.load(safetensors.torch.save({name: leaf.clone() for name, leaf in state.items()}))
    for _ in range(5):
        one, state = first.estimate(theta, state)
        two, restored = second.estimate(theta, restored)
        assert torch.equal(one.gradient, two.gradient)
        assert one.gradient.abs().max() > 0
    assert all(torch.equal(leaf, restored[name]) for name, leaf in state.items())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_an_option_of_its_group_that_is_built_and_estimates(name):
    config = load([f"estimator={name}"]).estimator
    assert config.name == name
    small = replace(config, num_tasks=2, horizon_low=60, horizon_high=60)
    estimator = build(Unroll(Parabola(), Gd(), 2, (60, 60), ("b",)), small)
    assert type(estimator) is type(ESTIMATORS[name](estimator.unroll))
    estimate, _ = estimator.estimate(Gd().init_theta(None), estimator.init())
    assert estimate.gradient.isfinite().all()
    assert estimate.gradient.abs().max() > 0


def unpack(name):
    data = np.load(ORACLES / name, allow_pickle=False)
    tensor = lambda key: torch.from_numpy(np.asarray(data[key]))  # noqa: E731
    leaves = lambda prefix: torch.cat([tensor(f"{prefix}/{k}").reshape(len(tensor("vec_pos/c")), -1) for k in "abc"], 1)  # noqa: E731
    flat = lambda prefix: torch.cat([tensor(f"{prefix}/{k}").reshape(-1) for k in "abc"])  # noqa: E731
    return tensor, leaves, flat


@pytest.mark.parametrize("option", ["", "sign_", "clip_"])
def test_full_es_formula_equals_the_original(option):
    tensor, leaves, flat = unpack("es_formula.npz")
    options = {"": {}, "sign_": {"sign": 1.0}, "clip_": {"clip": float(tensor("clip_value"))}}[option]
    losses = torch.cat([tensor("pos_loss"), tensor("neg_loss")])
    # the original drops a pair of which one side is not finite; here the task's normalizer has made it finite
    finite = torch.isfinite(losses).reshape(2, -1).all(0).repeat(2)
    delta = LossDifference(**options)(torch.where(finite, losses, 0))
    torch.testing.assert_close(es_gradient(delta, leaves("vec_pos"), float(tensor("std"))), flat(f"{option}grad"))


@pytest.mark.parametrize("option", ["", "sign_"])
def test_pes_formula_equals_the_original_but_for_the_terminating_step(option):
    tensor, leaves, flat = unpack("pes_formula.npz")
    done, mask = tensor("is_done"), tensor("mask")
    difference = LossDifference(sign=1.0 if option else None)
    losses = torch.cat([tensor("p_loss"), tensor("n_loss")], 1) * mask.repeat(1, 2)
    delta = difference(losses) * mask * len(mask) / mask.sum(0)
    eps, sigma = leaves("vec_pos"), float(tensor("std"))
    total = leaves("acc_in") + eps

    def gradient(delta, done):
        old, new = credits(delta, done)
        return es_gradient(old, total, sigma) + es_gradient(new, eps, sigma)

    # the original credits a terminating step as if it came after the end: the same as ends one step earlier,
    # for which an empty step in front makes room
    early = torch.cat([done, torch.zeros_like(done[:1])])
    longer = torch.cat([torch.zeros_like(delta[:1]), delta]) * (len(delta) + 1) / len(delta)
    torch.testing.assert_close(gradient(longer, early), flat(f"{option}grad"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(gradient(delta, done), flat(f"{option}grad"), rtol=1e-3)


def test_a_diverging_side_still_pushes_away_and_harms_no_other_task():
    delta = torch.zeros(1, 3)
    delta[0, 1] = 3.4  # the worst value minus a good one: the + side of task 1 diverged
    eps = torch.eye(3) * 0.01
    old, new = credits(delta, torch.zeros(1, 3, dtype=torch.bool))
    gradient = es_gradient(old, eps, 0.01) + es_gradient(new, eps, 0.01)
    assert gradient[1] > 0
    assert gradient[0] == gradient[2] == 0


def test_clip_bounds_what_a_pair_can_do_and_sign_forgets_the_size():
    losses = torch.tensor([5.0, 1.0, 2.0, 1.0, 1.5, 2.0])
    assert LossDifference()(losses).tolist() == [4.0, -0.5, 0.0]
    assert LossDifference(clip=0.25)(losses).tolist() == [0.25, -0.25, 0.0]
    assert LossDifference(sign=2.0)(losses).tolist() == [2.0, -2.0, 0.0]
    window = torch.stack([losses, torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0, 0.0])])
    assert LossDifference(sign=2.0)(window).tolist() == [[2.0, -2.0, 2.0]] * 2
