"""Gradients of unit length (VeLO C.5, item 5).

Owns: what is divided by what. Source: NormalizeTaskGradient of google/learned_optimization's task_augmentation.py, the
norm over all parameters together. A gradient of zero stays zero; the original divides it by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.augmentations.augmented import AugmentedStatic, GradientTask
from tasks.base import Task
from tasks.data.library import Library


@dataclass(frozen=True, kw_only=True)
class NormalizedGradient(AugmentedStatic, kind="normalized_gradient"):
    """g / |g|."""

    def build(self, library: Library) -> Task:
        return NormalizedGradientTask(self.task.build(library))


class NormalizedGradientTask(GradientTask):
    """``task`` with its gradients divided by their length."""

    def transform(self, gradient: Tensor, keys: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        return gradient / torch.where(norm == 0, 1.0, norm)
