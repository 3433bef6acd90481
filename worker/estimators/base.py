"""What all estimators of the meta-gradient share: the contract, perturbed thetas, and the antithetic formula.

Owns ``Estimate``, ``GradientEstimator``, and how losses of the two sides become differences. Never normalises,
averages over task families or knows who asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt.base import Theta
from worker.perturbations import Terms, draw
from worker.unroll import Unroll

FINAL_BATCHES = 50
"""Fresh batches that the loss of the final parameters is the mean of, as in learned_optimization."""

EstimatorState = dict[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """A meta-gradient (D,) fp32, the mean meta-loss of both sides, and how many inner steps it took.

    ``terms`` rebuild the gradient from the unroll's key (``perturbations.rebuild``); None where nothing is perturbed.
    """

    gradient: Tensor
    mean_loss: float
    inner_steps: int
    terms: Terms | None = None


class GradientEstimator(ABC):
    """Estimates d meta-loss / d theta of one task family; its state is a flat dict of tensors."""

    def __init__(self, unroll: Unroll) -> None:
        self.unroll = unroll

    @abstractmethod
    def init(self) -> EstimatorState:
        """State before the first estimate."""

    @abstractmethod
    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        """One estimate at ``theta`` (one particle's, no leading axis) and the state after it."""


@dataclass(frozen=True)
class LossDifference:
    """delta = L(theta + eps) - L(theta - eps), as it enters an estimate.

    ``clip`` bounds the magnitude of each (``clip_loss_diff`` of learned_optimization); ``sign`` puts the sign of a
    pair's mean difference times this in the place of all of them (``sign_delta_loss_scalar``), window by window, in
    full ES once for a training. Both change what is estimated: a bounded influence of each pair, bought with a bias.
    """

    clip: float | None = None
    sign: float | None = None

    def __call__(self, losses: Tensor) -> Tensor:
        """Differences (n,) of losses (2n,), or (W, n) of a window's (W, 2n); the + sides come first."""
        positive, negative = losses.chunk(2, dim=-1)
        delta = positive - negative
        if self.clip is not None:
            delta = delta.clamp(-self.clip, self.clip)
        if self.sign is not None:
            mean = delta if delta.ndim == 1 else delta.mean(0)
            delta = (self.sign * mean.sign()).expand_as(delta)
        return delta


class EvolutionStrategy(GradientEstimator):
    """Antithetic estimates: eps ~ N(0, diag(sigma^2)), theta + eps and theta - eps are trained on the same data.

    Losses come already clipped to the task's declared worst value, so that a diverged side still pushes away and no
    task can spoil another's contribution. ``sigma`` is one number or (D,), one for each trainable meta-parameter.
    """

    def __init__(self, unroll: Unroll, sigma: float | Tensor, difference: LossDifference, split: str) -> None:
        super().__init__(unroll)
        self.sigma = torch.as_tensor(sigma, dtype=torch.float32, device=unroll.device)
        self.difference, self.split = difference, split
        self.pairs = torch.arange(unroll.num_tasks)

    def _perturb(self, theta: Theta, noise: Tensor) -> tuple[Tensor, Theta]:
        """eps (n, D) of the windows ``noise`` (n,), and the 2n thetas on both sides of ``theta``."""
        spec, device = self.unroll.lopt.spec, self.unroll.device
        normals = draw(self.unroll.key, noise.to(device), self.pairs.to(device), spec.trainable_size)
        eps = normals.mul_(self.sigma)
        flat = spec.flatten(theta).to(device)
        frozen = {name: leaf.to(device) for name, leaf in theta.items()}
        return eps, spec.unflatten(torch.cat([flat + eps, flat - eps]), frozen)


def es_gradient(delta: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """mean_i delta_i eps_i / (2 sigma^2): delta (n,), eps (n, D), sigma () or (D,) -> (D,)."""
    return delta @ eps / (2 * sigma**2 * len(delta))
