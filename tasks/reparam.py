"""Re-parametrisation: an augmentation that changes a task's training dynamics and not its function.

Owns: the scales tau and where they enter. Must never look inside the task that it wraps.

The inner optimizer trains v = w / tau, the loss uses w = v * tau, so the function at initialisation is unchanged up
to rounding, and a step of SGD moves w tau^2 times as far (VeLO, arXiv 2211.09760, appendix C.5).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from configs.schema import ReparamConfig
from tasks.base import Batch, Dynamic, Params, StaticConfig, Task, TaskFamily
from tasks.keys import generator as keyed


@dataclass(frozen=True)
class ReparamStatic(StaticConfig):
    """The wrapped task's static config, with the level (global, tensor, parameter) and range of tau."""

    task: StaticConfig
    level: str
    low: float
    high: float

    def to_json(self) -> str:
        fields = {"task": json.loads(self.task.to_json()), "level": self.level, "low": self.low, "high": self.high}
        return json.dumps(fields, sort_keys=True)


class ReparamTask(Task):
    """``task`` with its parameters divided by tau; ``taus`` has ``tau`` (global) or one ``tau/<name>`` per tensor."""

    def __init__(self, task: Task, taus: Dynamic) -> None:
        self.task = task
        self.taus = taus
        self.datasets = task.datasets
        self.batch_size = task.batch_size
        self.worst_loss = task.worst_loss

    def _tau(self, name: str) -> Tensor:
        return self.taus["tau"] if "tau" in self.taus else self.taus[f"tau/{name}"]

    def init(self, generator: torch.Generator) -> Params:
        return {name: value / self._tau(name) for name, value in self.task.init(generator).items()}

    def loss(self, params: Params, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        weights = {name: value * self._tau(name) for name, value in params.items()}
        return self.task.loss(weights, batch, generator)

    def normalizer(self, loss: Tensor) -> Tensor:
        return self.task.normalizer(loss)


class ReparamFamily(TaskFamily):
    """A family whose particles each have their own taus, drawn log-uniformly from [low, high].

    The wrapped family must give every task the same parameter names and shapes (a fixed family does).
    """

    def __init__(self, family: TaskFamily, config: ReparamConfig) -> None:
        self.family = family
        self.config = config
        self.name = family.name
        self.datasets = family.datasets
        task = family.build(family.sample_static(np.random.default_rng(0)))
        params = task.init(keyed("shapes"))
        self._shapes: dict[str, tuple[int, ...]] = {"tau": ()}
        if config.level != "global":
            per_tensor = config.level == "tensor"
            self._shapes = {f"tau/{name}": () if per_tensor else tuple(leaf.shape) for name, leaf in params.items()}

    def sample_static(self, rng: np.random.Generator) -> StaticConfig:
        return ReparamStatic(self.family.sample_static(rng), self.config.level, self.config.low, self.config.high)

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """The wrapped family's own, and ``tau`` (n,), ``tau/<name>`` (n,) or ``tau/<name>`` (n, *shape) by level."""
        low, high = math.log(self.config.low), math.log(self.config.high)
        dynamic = self.family.sample_dynamic(generator, n)
        for name, shape in self._shapes.items():
            log_tau = low + (high - low) * torch.rand((n, *shape), generator=generator)
            dynamic[name] = log_tau.exp()
        return dynamic

    def build(self, static: StaticConfig, dynamic: Dynamic | None = None) -> Task:
        inner = cast(ReparamStatic, static).task
        if dynamic is None:
            return self.family.build(inner)
        taus = {name: dynamic[name] for name in self._shapes}
        rest = {name: value for name, value in dynamic.items() if name not in taus}
        return ReparamTask(self.family.build(inner, rest), taus)
