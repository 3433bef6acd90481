"""The estimators against back-propagation through the training of a small MLP by small_fc_lopt and by Celo."""

from functools import cache

import pytest
import torch

import lopt
from tests.tiny_mlp import TinyMlp
from worker.estimators import GPES, NRES, PES, Backprop, FullES, TruncatedBackprop, TruncatedES
from worker.estimators.online import end_with_windows
from worker.perturbations import contributions
from worker.unroll import Unroll

PAIRS, HORIZON, WINDOW, SIGMA = 512, 20, 5, 1e-3
RULES = {"small_fc": lopt.SmallFcLopt(4, step_mult=0.1), "celo": lopt.Celo(1)}
ONLINE = {
    "pes": lambda unroll: PES(unroll, SIGMA, window=WINDOW),
    "gpes": lambda unroll: GPES(unroll, SIGMA, window=WINDOW, noise_windows=2),
    "nres": lambda unroll: NRES(unroll, SIGMA, window=WINDOW),
    "truncated_es": lambda unroll: TruncatedES(unroll, SIGMA, window=WINDOW),
}


def unroll(rule, key):
    return Unroll(TinyMlp(), rule, PAIRS, (HORIZON, HORIZON), (key,), path="reference")


def theta_of(rule):
    return rule.init_theta(torch.Generator().manual_seed(3))


def leaves_of(rule):
    """One leaf of flat theta for each particle, so that one backward pass gives every task's own gradient."""
    flat = rule.spec.flatten(theta_of(rule)).expand(2 * PAIRS, -1).clone().requires_grad_()
    return flat, rule.spec.unflatten(flat, theta_of(rule))


@cache
def true_gradient(rule, key, windows, end_with):
    """(n, D): d (sum over windows of their mean losses) / d theta through all of each episode, for each task."""
    backprop = TruncatedBackprop(unroll(rule, key), window=WINDOW)
    flat, thetas = leaves_of(rule)
    particles, losses = backprop.unroll.start(), 0.0
    for number in range(windows):
        end_with_windows(particles, end_with)
        losses += backprop._run(thetas, particles, WINDOW, number, None).mean(0).sum()
    return torch.autograd.grad(losses, flat)[0][:PAIRS]


def along(directions, gradients):
    """Projections (n, k) of gradients (n, D) on k directions of unit length."""
    return gradients.double() @ torch.nn.functional.normalize(directions.double(), dim=-1).T


def directions_for(truth):
    """The true mean, and three that have nothing to do with it."""
    others = torch.randn(3, truth.shape[-1], generator=torch.Generator().manual_seed(0))
    return torch.cat([truth.mean(0, keepdim=True), others])


def standard_errors(samples):
    return samples.mean(0) / (samples.std(0) / len(samples) ** 0.5)


@pytest.mark.parametrize("key", RULES)
@pytest.mark.parametrize("name", ONLINE)
def test_estimates_of_eight_windows_are_the_back_propagated_gradient(name, key):
    rule = RULES[key]
    truth = true_gradient(rule, key, 8, WINDOW if name in ("gpes", "nres") else 1)
    estimator = ONLINE[name](unroll(rule, key))
    state, estimates = estimator.init(), 0.0
    for _ in range(8):
        estimate, state = estimator.estimate(theta_of(rule), state)
        estimates += PAIRS * contributions((key,), estimate.terms, SIGMA, rule.spec.trainable_size, PAIRS)
    directions = directions_for(truth)
    off = standard_errors(along(directions, estimates - truth))
    if name == "truncated_es":
        assert off[0] < -3, "short-sighted: it misses what earlier steps do to later losses"
    else:
        assert off.abs().max() < 3
        assert standard_errors(along(directions, estimates))[0] > 5, "too noisy to tell"


@pytest.mark.parametrize("objective", ["mean", "final"])
@pytest.mark.parametrize("name", RULES)
def test_full_es_estimates_the_back_propagated_gradient(name, objective, monkeypatch):
    monkeypatch.setattr("worker.estimators.base.FINAL_BATCHES", 4)
    rule, key = RULES[name], f"{name} {objective}"
    full = FullES(unroll(rule, key), SIGMA, objective=objective)
    estimate, _ = full.estimate(theta_of(rule), full.init())
    estimates = PAIRS * contributions((key,), estimate.terms, SIGMA, rule.spec.trainable_size, PAIRS)
    backprop = Backprop(unroll(rule, key), objective=objective)
    truth = backprop.estimate(theta_of(rule), backprop.init())[0].gradient
    directions = directions_for(truth.unsqueeze(0))
    assert standard_errors(along(directions, estimates - truth)).abs().max() < 3
    assert standard_errors(along(directions, estimates))[0] > 5, "too noisy to tell"
