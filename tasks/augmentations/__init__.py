"""Augmentations: what makes one task into another with a different training dynamics (VeLO, appendix C.5).

Owns: the table of them, and applying those that a configuration lists. Must never know a task family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.checks import ConfigError, did_you_mean
from tasks.augmentations.augmented import AugmentedStatic
from tasks.augmentations.bfloat16 import Bfloat16
from tasks.augmentations.delayed_gradient import DelayedGradient
from tasks.augmentations.es_gradient import EsGradient
from tasks.augmentations.normalized_gradient import NormalizedGradient
from tasks.augmentations.reduced_batch import ReducedBatch
from tasks.augmentations.reparam import Reparam
from tasks.augmentations.subspace_gradient import SubspaceGradient
from tasks.augmentations.velo import augment
from tasks.base import Task
from tasks.data.library import Library
from tasks.static import StaticConfig, Work, static_from_dict

AUGMENTATIONS: dict[str, type[AugmentedStatic]] = {
    cls.kind: cls
    for cls in (Reparam, EsGradient, ReducedBatch, Bfloat16, NormalizedGradient, SubspaceGradient, DelayedGradient)
}
VELO = "velo"
"""The kind of an entry that stands for all of them, as VeLO drew them."""

__all__ = ["AUGMENTATIONS", "VELO", "apply_augmentation", "augment", "check_augmentations"]


def apply_augmentation(rng: np.random.Generator, static: StaticConfig, entry: Mapping[str, Any]) -> StaticConfig:
    """``static`` with what an ``augment`` entry of a configuration says, or with ``probability`` (1) as it is.

    An entry is ``{kind: velo}``, or the kind of an augmentation with its fields: ``{kind: reparam, level: tensor,
    probability: 0.5}``. Raises ConfigError that names the field, whether or not the augmentation is drawn.
    """
    augmented, probability = _read(entry, static, "augment")
    if rng.random() >= probability:
        return static
    return augment(rng, static) if augmented is None else augmented


def check_augmentations(entries: Sequence[Mapping[str, Any]], field: str) -> None:
    """Raise ConfigError with its dotted path below ``field`` for what ``apply_augmentation`` would refuse."""
    for index, entry in enumerate(entries):
        _read(entry, _AnyTask(), f"{field}[{index}]")


@dataclass(frozen=True, kw_only=True)
class _AnyTask(StaticConfig):
    """Stands for the task where only the augmentation is looked at; every augmentation can be put around it."""

    batch_size: int = 1

    def build(self, library: Library) -> Task:
        raise NotImplementedError

    def work(self) -> Work:
        raise NotImplementedError


def _read(entry: Mapping[str, Any], static: StaticConfig, path: str) -> tuple[StaticConfig | None, float]:
    """The augmented ``static``, None for all as VeLO drew them, and the entry's probability."""
    fields = dict(entry)
    kind, probability = fields.pop("kind", None), fields.pop("probability", 1.0)
    kinds = (VELO, *AUGMENTATIONS)
    if kind not in kinds:
        raise ConfigError(f"{path}.kind", kind, f"one of {', '.join(kinds)}{did_you_mean(str(kind), kinds)}")
    if type(probability) not in (int, float) or not 0 <= probability <= 1:
        raise ConfigError(f"{path}.probability", probability, "a number from 0 to 1")
    if "task" in fields or (fields and kind == VELO):
        name = "task" if "task" in fields else next(iter(fields))
        raise ConfigError(f"{path}.{name}", fields[name], f"no such field in an entry of kind {kind}")
    if kind == VELO:
        return None, probability
    return static_from_dict({"kind": kind, "task": static, **fields}, path), probability
