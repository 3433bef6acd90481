"""Batch-size reduction (VeLO C.5, item 3).

Owns: the smaller number. Must never draw what is thrown away: the original cuts a whole batch, here the batch is drawn
at its reduced size, which is the same in distribution.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from configs.checks import ConfigError
from tasks.augmentations.augmented import AugmentedStatic, innermost
from tasks.base import Task
from tasks.data.library import Library
from tasks.static import StaticConfig, Work


@dataclass(frozen=True, kw_only=True)
class ReducedBatch(AugmentedStatic, kind="reduced_batch"):
    """``task`` with max(1, int(fraction B)) examples in a batch instead of B."""

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError("fraction", self.fraction, "a number above 0, up to 1")
        if not hasattr(innermost(self.task), "batch_size"):
            raise ConfigError("task.kind", innermost(self.task).kind, "a task with a batch_size")

    def reduced(self) -> StaticConfig:
        """``task`` with the smaller batch size in the innermost config."""
        return _with_batch(self.task, self.fraction)

    def build(self, library: Library) -> Task:
        return self.reduced().build(library)

    def work(self) -> Work:
        return self.reduced().work()


def _with_batch(static: StaticConfig, fraction: float) -> StaticConfig:
    if isinstance(static, ReducedBatch):
        static = static.reduced()
    if isinstance(static, AugmentedStatic):
        return dataclasses.replace(static, task=_with_batch(static.task, fraction))
    size: int = getattr(static, "batch_size")  # noqa: B009  # the innermost config's, which __post_init__ asked for
    changes: dict[str, int] = {"batch_size": max(1, int(size * fraction))}
    return dataclasses.replace(static, **changes)
