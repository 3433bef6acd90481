"""Gradients that are estimated by evolution strategies (Salimans et al. 2017; VeLO C.5, item 2).

Owns: the perturbations and the estimate. Must never differentiate anything.

Source of the scale: google/learned_optimization's es_wrapper.py, the mean over ``pairs`` antithetic pairs of
e (L(x + e) - L(x - e)) / (2 sigma^2), e ~ N(0, sigma^2), all on the step's one batch; the loss is that of x itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.checks import at_least, positive
from tasks.augmentations.augmented import AugmentedStatic, AugmentedTask, as_params
from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState
from tasks.data.library import Library
from tasks.random import fold, normal


@dataclass(frozen=True, kw_only=True)
class EsGradient(AugmentedStatic, kind="es_gradient"):
    """``pairs`` antithetic pairs with standard deviation ``sigma``."""

    sigma: float = 0.01
    pairs: int = 8

    def __post_init__(self) -> None:
        positive("sigma", self.sigma)
        at_least("pairs", self.pairs, 1)

    def build(self, library: Library) -> Task:
        return EsTask(self.task.build(library), self)


class EsTask(AugmentedTask):
    """``task`` with estimated gradients; whatever gradient it had itself is not asked for, and its state rests."""

    def __init__(self, task: Task, static: EsGradient) -> None:
        super().__init__(task)
        self.static = static

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        sigma, pairs = self.static.sigma, self.static.pairs
        size = sum(leaf[0].numel() for leaf in params.values())
        key = fold(batch["key"], self.static.tag)
        total = torch.zeros(len(key), size, device=key.device)
        for pair in range(pairs):
            eps = sigma * normal(fold(key, pair), (size,))
            step = as_params(eps, params)
            plus, minus = (
                self.task.losses(
                    {n: (leaf + sign * step[n]).to(leaf.dtype) for n, leaf in params.items()}, batch, dynamic
                )
                for sign in (1, -1)
            )
            total += eps * ((plus.float() - minus.float()) / (2 * sigma**2 * pairs)).unsqueeze(1)
        losses = self.task.losses(params, batch, dynamic)
        return LossesAndGrads(losses, as_params(total, params), state)
