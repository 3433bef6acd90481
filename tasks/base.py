"""The contracts of what is being trained: data sets and tasks, and a task's losses and gradients for many particles.

Owns: the abstract interfaces and the one batched evaluation of loss and gradient.
Must never know a concrete data set or model, draw global random numbers, or update parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tasks.random import fold

Params = dict[str, Tensor]
Batch = dict[str, Tensor]
Dynamic = dict[str, Tensor]
TaskState = dict[str, Tensor]

IDENTITY: Dynamic = {}
"""No dynamic config: what is static in the task already, and for what is not, each component's stated default."""


class Dataset(ABC):
    """One split of a data set, ``num_examples`` long."""

    num_examples: int

    @abstractmethod
    def sample(self, keys: Tensor, batch_size: int) -> Batch:
        """For each of ``keys`` (n,) a batch of examples drawn with replacement: leaves (n, batch_size, ...).

        Row i depends on ``keys[i]`` alone, and the leaves are on the device of ``keys``.
        """


@dataclass(frozen=True)
class Datasets:
    """The splits of one data set: inner training, meta-validation, and the held-out test set; disjoint."""

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "outer_valid", "test")

    train: Dataset
    outer_valid: Dataset
    test: Dataset


class LossesAndGrads(NamedTuple):
    """Losses (P,), their gradients (P, ...), both detached and float32, and the task state after the step."""

    losses: Tensor
    grads: Params
    state: TaskState


class Task(ABC):
    """An inner problem: how its parameters start and what its loss is. Pure; works under ``torch.func``.

    ``init`` and ``loss`` are about ONE particle (``dynamic`` is its row); the other methods are particle-major.
    Batch normalisation uses the statistics of the batch, also when a loss is measured, as the originals do, so that
    there is no running average to carry. What a task must remember between steps is its ``TaskState``.
    """

    datasets: Datasets
    batch_size: int
    worst_loss: float
    """The meta-loss of a diverged run, and the largest value that ``normalizer`` gives."""

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """The dynamic configs of ``n`` particles, leaves (n, ...); {} when nothing varies from particle to particle."""
        return {}

    @abstractmethod
    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """The initial parameters of one particle, float32, on the CPU."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The scalar loss of one particle on one batch.

        A model that is itself random (dropout, a latent sample) draws from ``batch["key"]`` () with ``tasks.random``.
        """

    @abstractmethod
    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The meta-loss of each loss (P,), (P, steps) or (): at most ``worst_loss``.

        Exactly that where the loss is not finite.
        """

    def batch(self, split: str, keys: Tensor) -> Batch:
        """For each of ``keys`` (n,) int64 a batch of the split, and the ``key`` (n,) of the model's own randomness."""
        dataset: Dataset = getattr(self.datasets, split)
        return {**dataset.sample(fold(keys, "examples"), self.batch_size), "key": fold(keys, "model")}

    def init_state(self, params: Params) -> TaskState:
        """What the task remembers before the first step, leaves (P, ...); {} for all but delayed gradients."""
        return {}

    def losses(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The loss (P,) of every particle, without gradient; leaves (P, ...) everywhere."""
        with torch.no_grad():
            return self._forward(params, batch, dynamic)

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        """The loss of every particle, its gradients and the state after it; leaves (P, ...) everywhere.

        Particles do not influence each other, so one backward pass of the summed losses gives what
        ``vmap(grad(loss))`` would, several times faster in eager mode; a particle that is not finite leaves the
        others' gradients as they are.
        """
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
            values = self._forward(leaves, batch, dynamic)
            grads = torch.autograd.grad(values.sum(), list(leaves.values()))
        return LossesAndGrads(values.detach(), dict(zip(leaves, grads, strict=True)), state)

    def _forward(self, params: Params, batch: Batch, dynamic: Dynamic) -> Tensor:
        losses: Tensor = torch.func.vmap(self.loss)(params, batch, dynamic)
        return losses
