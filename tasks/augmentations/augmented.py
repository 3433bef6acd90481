"""What all augmentations share: a static config around a static config, a task around a task.

Owns: how wrapped tasks are forwarded to, and the names that keep nested augmentations apart.
Must never know a concrete augmentation, a model or a data set.

Augmentations are those of VeLO (arXiv 2211.09760, appendix C.5). Any of them may be put around any other: each one
computes its batched losses and gradients from those of the task that it wraps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState
from tasks.static import StaticConfig, Work


@dataclass(frozen=True, kw_only=True)
class AugmentedStatic(StaticConfig):
    """A static config around ``task``."""

    task: StaticConfig

    @property
    def tag(self) -> str:
        """What this layer draws and remembers is called: its kind, and its number if there are more of it inside."""
        inner, number = self.task, 1
        while isinstance(inner, AugmentedStatic):
            number += inner.kind == self.kind
            inner = inner.task
        return self.kind if number == 1 else f"{self.kind}{number}"

    def work(self) -> Work:
        """That of the wrapped task's forward pass; how often a step takes it is not counted."""
        return self.task.work()


def innermost(static: StaticConfig) -> StaticConfig:
    """What is left of ``static`` without its augmentations."""
    while isinstance(static, AugmentedStatic):
        static = static.task
    return static


class AugmentedTask(Task):
    """``task`` as it is; a subclass overrides what it changes."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.datasets = task.datasets
        self.batch_size = task.batch_size
        self.worst_loss = task.worst_loss

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        return self.task.sample_dynamic(generator, n)

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        return self.task.init(generator, dynamic)

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.loss(params, batch, dynamic)

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.normalizer(loss, dynamic)

    def batch(self, split: str, keys: Tensor) -> Batch:
        return self.task.batch(split, keys)

    def init_state(self, params: Params) -> TaskState:
        return self.task.init_state(params)

    def losses(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.losses(params, batch, dynamic)

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        return self.task.losses_and_grads(params, state, batch, dynamic)


class GradientTask(AugmentedTask):
    """``task`` with another gradient: the same losses, and ``transform`` of the gradient as one vector."""

    @abstractmethod
    def transform(self, gradient: Tensor, keys: Tensor) -> Tensor:
        """The new gradient (P, D) of each old one (P, D); ``keys`` (P,) name the step's randomness."""

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        out = self.task.losses_and_grads(params, state, batch, dynamic)
        gradient = torch.cat([leaf.reshape(len(leaf), -1) for leaf in out.grads.values()], 1).float()
        return out._replace(grads=as_params(self.transform(gradient, batch["key"]), out.grads))


def as_params(vectors: Tensor, like: Params) -> Params:
    """The vectors (P, D) as leaves of the names and shapes of ``like``, (P, ...), whose sizes make up D."""
    parts = torch.split(vectors, [leaf[0].numel() for leaf in like.values()], dim=1)
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def align(per_particle: Tensor, like: Tensor) -> Tensor:
    """Axes appended to ``per_particle`` so that it broadcasts against ``like`` from the left."""
    return per_particle.reshape(per_particle.shape + (1,) * (like.ndim - per_particle.ndim))
