"""The task augmentation of VeLO's meta-training (arXiv 2211.09760, appendix C.5).

Owns: which augmentations a drawn task gets, with what probabilities and ranges, in the order of
google/learned_optimization's research/general_lopt/tasks/parametric.py. Must never know what an augmentation does.
"""

from __future__ import annotations

import numpy as np

from tasks.augmentations.augmented import innermost
from tasks.augmentations.bfloat16 import Bfloat16
from tasks.augmentations.delayed_gradient import DelayedGradient
from tasks.augmentations.es_gradient import EsGradient
from tasks.augmentations.normalized_gradient import NormalizedGradient
from tasks.augmentations.reduced_batch import ReducedBatch
from tasks.augmentations.reparam import Reparam
from tasks.augmentations.subspace_gradient import SubspaceGradient
from tasks.families.draws import choice, log_integer, log_number
from tasks.static import StaticConfig

LEVELS = (None, None, "global", "global", "tensor", "tensor", "parameter")
RANGES = ((1e-3, 1e3), (1e-2, 1e2), (1e-1, 1e1))
PAIRS = (1, 2, 4, 8, 16)


def augment(rng: np.random.Generator, static: StaticConfig) -> StaticConfig:
    """``static`` with whatever augmentations are drawn, each one around those before it."""
    reducible = innermost(static).kind != "lopt_training"
    level = choice(rng, LEVELS)
    if level is not None:
        low, high = choice(rng, RANGES)
        static = Reparam(task=static, level=level, low=low, high=high)
    if rng.random() < 0.08:
        static = EsGradient(task=static, sigma=log_number(rng, 1e-3, 1e-1), pairs=choice(rng, PAIRS))
    if reducible and rng.random() < 0.2:
        static = ReducedBatch(task=static, fraction=float(rng.uniform(0.01, 1.0)))
    if rng.random() < 0.2:
        static = Bfloat16(task=static)
    if rng.random() < 0.05:
        static = NormalizedGradient(task=static)
    if rng.random() < 0.08:
        directions, sign = log_integer(rng, 1, 1024), bool(rng.integers(2))
        static = SubspaceGradient(task=static, directions=directions, sign=sign)
    if rng.random() < 0.05:
        static = DelayedGradient(task=static, delay=log_integer(rng, 1, 8))
    return static
