"""Gradients of which only some random directional derivatives are known (VeLO C.5, item 6).

Owns: the distribution of such gradients. Must never draw all the directions, which would take D numbers each.

With random unit vectors u_1 ... u_d the gradient is sum_i (g.u_i) u_i, or with ``sign`` sum_i sign(g.u_i) u_i: the sum,
as SubsampleDirectionsTaskGradient of google/learned_optimization's task_augmentation.py has it; the paper says average.

Both are drawn in d + D numbers, exactly in distribution, because u_i = c_i h + sqrt(1 - c_i^2) w_i with h = g / |g|,
the cosine c_i of its angle to h, and w_i uniform on the unit sphere across h and independent of c_i. So the sum is
|g| sum_i c_i^2 (with sign: sum_i |c_i|) times h, plus sum_i b_i w_i with b_i = |g c_i| sqrt(1 - c_i^2) (with sign:
sqrt(1 - c_i^2)). The latter is a uniform direction across h times a length, which grows with each vector as
|s + b w|^2 = |s|^2 + b^2 + 2 |s| b t, where t is the cosine between the new vector and those before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.checks import at_least
from tasks.augmentations.augmented import AugmentedStatic, GradientTask
from tasks.base import Task
from tasks.data.library import Library
from tasks.random import fold, normal, uniform


@dataclass(frozen=True, kw_only=True)
class SubspaceGradient(AugmentedStatic, kind="subspace_gradient"):
    """The gradient by ``directions`` directional derivatives, or with ``sign`` by their signs."""

    directions: int = 1
    sign: bool = False

    def __post_init__(self) -> None:
        at_least("directions", self.directions, 1)

    def build(self, library: Library) -> Task:
        return SubspaceGradientTask(self.task.build(library), self)


class SubspaceGradientTask(GradientTask):
    """``task`` with its gradients projected onto random directions; a gradient of zero stays zero."""

    def __init__(self, task: Task, static: SubspaceGradient) -> None:
        super().__init__(task)
        self.static = static

    def transform(self, gradient: Tensor, keys: Tensor) -> Tensor:
        return projected(gradient, fold(keys, self.static.tag), self.static.directions, self.static.sign)


def projected(gradient: Tensor, keys: Tensor, directions: int, sign: bool) -> Tensor:
    """The sum over ``directions`` random directions of the gradient (P, D) along each; see the module."""
    dimension = gradient.shape[1]
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    unit = gradient / torch.where(norm == 0, 1.0, norm)
    c = cosines(fold(keys, "along"), dimension, directions)
    along = c.abs() if sign else norm * c.square()
    across = (1 - c.square()).clamp(min=0).sqrt() * (1.0 if sign else norm * c.abs())
    length = _length_of_sum(across, cosines(fold(keys, "between"), dimension - 1, directions))
    w = normal(fold(keys, "across"), (dimension,))
    w = w - (w * unit).sum(1, keepdim=True) * unit
    w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp(min=1e-30)
    total = along.sum(1, keepdim=True) * unit + length.unsqueeze(1) * w
    return torch.where(norm == 0, 0.0, total)


def cosines(keys: Tensor, dimension: int, count: int) -> Tensor:
    """(P, count) cosines between a fixed direction and uniform ones in ``dimension`` dimensions (0 counts as 1).

    By Bailey's polar method (Mathematics of Computation 62, 1994) for Student's t with n = dimension - 1 degrees of
    freedom, T = sqrt(n (v^(-2/n) - 1)) cos(2 pi u), and the cosine is T / sqrt(n + T^2).
    """
    cosine = (2 * math.pi * (uniform(fold(keys, "u"), (count,)) + 2.0**-26)).cos()
    logarithm = (uniform(fold(keys, "v"), (count,)) + 2.0**-26).log()
    spread = -torch.expm1(logarithm * (2 / (dimension - 1))) if dimension > 1 else torch.ones_like(cosine)
    return cosine * (spread / (1 - spread + spread * cosine.square())).sqrt()


def _length_of_sum(lengths: Tensor, cosine: Tensor) -> Tensor:
    """|sum_i b_i w_i| (P,) for lengths b (P, d), and the cosine (P, d) of each w_i to the sum of those before it."""
    added, twice = lengths.square().T.unbind(), (2 * lengths * cosine).T.unbind()
    square = torch.zeros_like(lengths[:, 0])
    for b_squared, two_b_t in zip(added, twice, strict=True):
        square = torch.addcmul(square + b_squared, square.sqrt(), two_b_t).clamp_(min=0)
    return square.sqrt()
