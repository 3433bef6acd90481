"""Full evolution strategies: one meta-gradient from whole inner trainings.

Owns the objectives that are about a whole training. Never takes an inner step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.base import Theta
from tasks import generator
from worker.estimators import base
from worker.estimators.base import Estimate, EstimatorState, EvolutionStrategy, LossDifference, es_gradient
from worker.perturbations import Terms
from worker.unroll import Unroll, log_uniform


class FullES(EvolutionStrategy):
    """Evolution strategies over whole inner trainings (Metz et al. 2022, arXiv:2211.09760, D.1).

    One length for all tasks of a call. ``objective``: ``mean`` or ``min`` of the losses on the way, or ``final``: the
    final parameters' on fresh batches of ``split``.
    """

    def __init__(
        self,
        unroll: Unroll,
        sigma: float | Tensor,
        *,
        objective: str,
        difference: LossDifference = LossDifference(),  # noqa: B008 - frozen
        split: str = "train",
    ) -> None:
        super().__init__(unroll, sigma, difference, split)
        self.objective = objective

    def init(self) -> EstimatorState:
        return {"windows": torch.tensor(0)}

    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        number = int(state["windows"])
        length = log_uniform(self.unroll.horizon, generator(*self.unroll.key, "length", number))
        particles = self.unroll.start(episode=number)
        noise = torch.full_like(self.pairs, number)
        eps, thetas = self._perturb(theta, noise)
        losses, _ = self.unroll.run(thetas, particles, length, number, length=length)
        if self.objective == "final":
            outcome = self.unroll.final_losses(particles, number, base.FINAL_BATCHES, self.split)
        else:
            outcome = losses.mean(0) if self.objective == "mean" else losses.amin(0)
        delta = self.difference(outcome)
        gradient = es_gradient(delta.to(eps.device), eps, self.sigma).cpu()
        terms = Terms(noise, self.pairs, delta / (2 * len(delta)))
        return Estimate(gradient, float(outcome.mean()), losses.numel(), terms), {"windows": torch.tensor(number + 1)}
