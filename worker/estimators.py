"""Estimators of the meta-gradient: siblings over one unroll.

Owns perturbations, credit assignment and the estimates' formulae. Never normalises, averages over task families or
knows who asks.

All estimates are antithetic: eps ~ N(0, sigma^2 I), theta + eps and theta - eps are trained on the same data, and
losses enter as differences delta = L(theta + eps) - L(theta - eps). Losses come already clipped to the task's declared
worst value, so that a diverged side still pushes away and no task can spoil another's contribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt.base import Theta
from tasks import generator
from worker.unroll import Particles, Unroll, log_uniform

FINAL_BATCHES = 50

EstimatorState = dict[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """A meta-gradient (D,) fp32, the mean meta-loss of both sides, and how many inner steps it took."""

    gradient: Tensor
    mean_loss: float
    inner_steps: int


class GradientEstimator(ABC):
    """Estimates d meta-loss / d theta of one task family; its state is a flat dict of tensors."""

    def __init__(self, unroll: Unroll, sigma: float) -> None:
        self.unroll, self.sigma = unroll, sigma

    @abstractmethod
    def init(self) -> EstimatorState:
        """State before the first estimate."""

    @abstractmethod
    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        """One estimate at ``theta`` (one particle's, no leading axis) and the state after it."""

    def _perturb(self, theta: Theta, window: int) -> tuple[Tensor, Theta]:
        """eps (n, D) of this window, and the 2n thetas on both sides of ``theta``."""
        spec = self.unroll.lopt.spec
        draws = generator(*self.unroll.key, "perturbation", window)
        eps = self.sigma * torch.randn(self.unroll.num_tasks, spec.trainable_size, generator=draws)
        flat = spec.flatten(theta)
        thetas = spec.unflatten(torch.cat([flat + eps, flat - eps]), theta)
        return eps, {name: leaf.to(self.unroll.device) for name, leaf in thetas.items()}


class PES(GradientEstimator):
    """Persistent evolution strategies (Vicol et al. 2021): unbiased estimates from truncation windows.

    Every window draws new perturbations; each task remembers the sum of those since its episode began, because the
    loss now depends on all of them. The objective is the mean meta-loss over the episode.
    """

    def __init__(self, unroll: Unroll, sigma: float, *, window: int) -> None:
        super().__init__(unroll, sigma)
        self.window = window

    def init(self) -> EstimatorState:
        accumulator = torch.zeros(self.unroll.num_tasks, self.unroll.lopt.spec.trainable_size)
        counters = {"accumulator": accumulator, "windows": torch.tensor(0)}
        return self.unroll.start().tensors() | counters

    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        windows = int(state["windows"])
        particles = Particles.from_tensors(state, self.unroll.device)
        eps, thetas = self._perturb(theta, windows)
        losses, done = self.unroll.run(thetas, particles, self.window, windows)
        positive, negative = losses.chunk(2, dim=1)
        gradient, accumulator = pes_gradient(positive - negative, done, eps, state["accumulator"], self.sigma)
        estimate = Estimate(gradient, float(losses.mean()), losses.numel())
        return estimate, particles.tensors() | {"accumulator": accumulator, "windows": torch.tensor(windows + 1)}


class FullES(GradientEstimator):
    """Evolution strategies over whole inner trainings (Metz et al. 2022, VeLO D.1); one length for all tasks of a call.

    ``objective``: ``mean`` of the losses on the way, or ``final``: the final parameters' on fresh batches.
    """

    def __init__(self, unroll: Unroll, sigma: float, *, objective: str) -> None:
        super().__init__(unroll, sigma)
        self.objective = objective

    def init(self) -> EstimatorState:
        return {"windows": torch.tensor(0)}

    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        windows = int(state["windows"])
        length = log_uniform(self.unroll.horizon, generator(*self.unroll.key, "length", windows))
        particles = self.unroll.start(episode=windows)
        eps, thetas = self._perturb(theta, windows)
        losses, _ = self.unroll.run(thetas, particles, length, windows, length=length)
        outcome = losses.mean(0)
        if self.objective == "final":
            outcome = self.unroll.final_losses(particles, windows, FINAL_BATCHES)
        positive, negative = outcome.chunk(2)
        gradient = es_gradient(positive - negative, eps, self.sigma)
        estimate = Estimate(gradient, float(outcome.mean()), losses.numel())
        return estimate, {"windows": torch.tensor(windows + 1)}


def es_gradient(delta: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """mean_i delta_i eps_i / (2 sigma^2): delta (n,), eps (n, D) -> (D,)."""
    return delta @ eps / (2 * sigma**2 * len(delta))


def pes_gradient(delta: Tensor, done: Tensor, eps: Tensor, accumulator: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The PES estimate of one window and the next accumulator (Vicol et al. 2021, algorithm 2, antithetic).

    delta, done (W, n): loss differences and whether the episode ended with that step; eps, accumulator (n, D).
    Losses up to and including the terminating step belong to the old episode and are credited to all its
    perturbations (the original credits the terminating step to the newest alone); later ones to ``eps``.
    """
    ended_before = (done.cumsum(0) - done.to(torch.int64)) > 0
    old = accumulator + eps
    steps = len(delta)
    before = (delta * ~ended_before).sum(0) / steps
    after = (delta * ended_before).sum(0) / steps
    gradient = es_gradient(before, old, sigma) + es_gradient(after, eps, sigma)
    newest = torch.where(done.any(0).unsqueeze(-1), eps, old)
    # an episode that ended with the window's last step has not begun anew: nothing has perturbed the next one yet
    return gradient, torch.where(done[-1].unsqueeze(-1), torch.zeros_like(eps), newest)
