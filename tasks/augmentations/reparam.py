"""Re-parametrisation: an augmentation that changes a task's training dynamics and not its function.

Owns: the scales tau and where they enter. Must never look inside the task that it wraps.

The inner optimizer trains v = w / tau, the loss uses w = v * tau, so the function at initialisation is unchanged up
to rounding, and a step of SGD moves w tau^2 times as far (VeLO, arXiv 2211.09760, appendix C.5, item 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from configs.checks import at_least, one_of, positive
from tasks.augmentations.augmented import AugmentedStatic, AugmentedTask, align
from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState
from tasks.data.library import Library
from tasks.keys import generator as keyed

LEVELS = ("global", "tensor", "parameter")


@dataclass(frozen=True, kw_only=True)
class Reparam(AugmentedStatic, kind="reparam"):
    """One tau for everything, for every tensor or for every parameter of a particle, log-uniform on [low, high]."""

    level: str = "global"
    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        one_of("level", self.level, LEVELS)
        positive("low", self.low)
        at_least("high", self.high, self.low)

    def build(self, library: Library) -> Task:
        return ReparamTask(self.task.build(library), self)


class ReparamTask(AugmentedTask):
    """``task`` with its parameters divided by the taus of the dynamic config; without them, ``task`` itself.

    The taus are ``tau`` (n,), or ``tau/<name>`` (n,) or (n, *shape) by level; of a second layer ``tau2``, and so on.
    """

    def __init__(self, task: Task, static: Reparam) -> None:
        super().__init__(task)
        self.static = static
        self.name = "tau" + static.tag.removeprefix(static.kind)

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        dynamic = self.task.sample_dynamic(generator, n)
        low, high = math.log(self.static.low), math.log(self.static.high)
        for name, shape in self._shapes.items():
            dynamic[name] = (low + (high - low) * torch.rand((n, *shape), generator=generator)).exp()
        return dynamic

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        params = self.task.init(generator, dynamic)
        for name, leaf in params.items():
            tau = self._tau(name, leaf, dynamic)
            params[name] = leaf if tau is None else leaf / tau
        return params

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.loss(self._times_tau(params, dynamic), batch, dynamic)

    def losses(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.losses(self._times_tau(params, dynamic), batch, dynamic)

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        out = self.task.losses_and_grads(self._times_tau(params, dynamic), state, batch, dynamic)
        return out._replace(grads=self._times_tau(out.grads, dynamic))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of one particle's taus."""
        if self.static.level == "global":
            return {self.name: ()}
        params = self.task.init(keyed("shapes"))
        whole = self.static.level == "tensor"
        return {f"{self.name}/{name}": () if whole else tuple(leaf.shape) for name, leaf in params.items()}

    def _times_tau(self, params: Params, dynamic: Dynamic) -> Params:
        scaled = {}
        for name, leaf in params.items():
            tau = self._tau(name, leaf, dynamic)
            scaled[name] = leaf if tau is None else leaf * tau
        return scaled

    def _tau(self, name: str, like: Tensor, dynamic: Dynamic) -> Tensor | None:
        """The tau of a tensor, of one particle or of many, ready to multiply with ``like``."""
        tau = dynamic.get(self.name, dynamic.get(f"{self.name}/{name}"))
        return None if tau is None else align(tau, like)
