"""The contracts of what is being trained: data sets, tasks, task families, and their losses for many particles.

Owns: the abstract interfaces and the one batched evaluation of loss and gradient.
Must never know a concrete data set or model, draw global random numbers, or update parameters.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]
Batch = dict[str, Tensor]
Dynamic = dict[str, Tensor]


class Dataset(ABC):
    """One split of a data set, ``num_examples`` long."""

    num_examples: int

    @abstractmethod
    def sample(self, generator: torch.Generator, shape: tuple[int, ...]) -> Batch:
        """Examples drawn with replacement; every leaf has the leading dimensions ``shape``, then the example's own.

        All randomness (which example, which augmentation) is drawn here, so that particles can share a batch.
        """


@dataclass(frozen=True)
class Datasets:
    """The splits of one data set: inner training, meta-validation, and the held-out test set; disjoint."""

    train: Dataset
    outer_valid: Dataset
    test: Dataset


class Task(ABC):
    """An inner problem: how its parameters start and what its loss is. Pure; works under ``torch.func``."""

    datasets: Datasets
    batch_size: int
    worst_loss: float
    """The meta-loss of a diverged run, and the largest value that ``normalizer`` gives."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Params:
        """The initial parameters of ONE particle, float32."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """The scalar loss of one particle on one batch; ``generator`` serves models that are themselves random."""

    @abstractmethod
    def normalizer(self, loss: Tensor) -> Tensor:
        """The meta-loss of each loss, any shape: within [0, worst_loss], and worst_loss where it is not finite."""


class StaticConfig(Protocol):
    """What a task is compiled for: a frozen, hashable, printable dataclass."""

    def to_json(self) -> str:
        """One line of JSON with sorted keys; equal configs give equal text."""
        ...

    def digest(self) -> str:
        """16 hex digits that identify the config: the start of the SHA-256 of ``to_json()``."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


class TaskFamily(ABC):
    """A distribution over tasks that share their data."""

    name: str
    datasets: Datasets

    @abstractmethod
    def sample_static(self, rng: np.random.Generator) -> StaticConfig:
        """A static config; a fixed family is a distribution with one member and always returns that."""

    @abstractmethod
    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """The dynamic configs of ``n`` particles, leaves (n, ...); {} when nothing varies from particle to particle."""

    @abstractmethod
    def build(self, static: StaticConfig, dynamic: Dynamic | None = None) -> Task:
        """The task; cheap. ``dynamic`` is ONE particle's row (it may be vmap-batched); None is the identity."""


def _forward(family: TaskFamily, static: StaticConfig, dynamic: Dynamic, params: Params, batch: Batch) -> Tensor:
    def one(row: Dynamic, particle: Params, examples: Batch) -> Tensor:
        return family.build(static, row).loss(particle, examples)

    losses: Tensor = torch.func.vmap(one)(dynamic, params, batch)
    return losses


def losses(family: TaskFamily, static: StaticConfig, dynamic: Dynamic, params: Params, batch: Batch) -> Tensor:
    """The loss (P,) of every particle, without gradient; shapes as in ``losses_and_grads``."""
    with torch.no_grad():
        return _forward(family, static, dynamic, params, batch)


def losses_and_grads(
    family: TaskFamily, static: StaticConfig, dynamic: Dynamic, params: Params, batch: Batch
) -> tuple[Tensor, Params]:
    """The loss (P,) of every particle and its gradients (P, ...), both detached.

    ``params`` and ``dynamic`` have leaves (P, ...), ``batch`` has leaves (P, batch size, ...). Particles do not
    influence each other, so one backward pass of the summed losses gives what ``vmap(grad(loss))`` would, several
    times faster in eager mode; a particle that is not finite leaves the others' gradients as they are.
    """
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        values = _forward(family, static, dynamic, leaves, batch)
        grads = torch.autograd.grad(values.sum(), list(leaves.values()))
    return values.detach(), dict(zip(leaves, grads, strict=True))
