"""Training in bfloat16 (VeLO C.5, item 4).

Owns: what is rounded. Must never change what a model computes besides its precision.

The model's parameters, its data and dynamic configuration, all that it computes and its gradient are bfloat16. The
leaves that the optimizer holds are float32, as everywhere (its state, features and steps are made for it, and so is
the wire); they start representable in bfloat16, and the model sees them rounded. That is how models are trained in
bfloat16 today ("master weights"). In the original (ConvertFloatDType of google/learned_optimization's
task_augmentation.py) the parameters are bfloat16 after every update too, so that steps below 1/256 of a parameter are
lost: a property of the optimizer's arithmetic, which a task cannot have without rounding somebody else's state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.augmentations.augmented import AugmentedStatic, AugmentedTask
from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState
from tasks.data.library import Library


@dataclass(frozen=True, kw_only=True)
class Bfloat16(AugmentedStatic, kind="bfloat16"):
    """``task`` in bfloat16."""

    def build(self, library: Library) -> Task:
        return Bfloat16Task(self.task.build(library))


class Bfloat16Task(AugmentedTask):
    """``task`` on rounded parameters and data; losses and gradients come back as float32."""

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        return _widened(_rounded(self.task.init(generator, dynamic)))

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.loss(_rounded(params), _rounded(batch), _rounded(dynamic)).float()

    def losses(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.task.losses(_rounded(params), _rounded(batch), _rounded(dynamic)).float()

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        out = self.task.losses_and_grads(_rounded(params), state, _rounded(batch), _rounded(dynamic))
        return LossesAndGrads(out.losses.float(), _widened(_rounded(out.grads)), out.state)


def _rounded(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.bfloat16() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}


def _widened(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.float() for name, leaf in leaves.items()}
