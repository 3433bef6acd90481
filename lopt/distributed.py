"""Training over several processes: what they have to agree on for an optimizer's step to be one and the same.

Owns the averaging of the loss (DDP: all processes hold the whole model), and the choice of how a rule is applied to
parameters that are spread over processes (FSDP2, DTensor: ``lopt.sharded``). Never touches gradients: who averages or
scatters them (DDP, FSDP2) gives the same parameters one on every process, or none at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

from lopt.base import LearnedOptimizer

if TYPE_CHECKING:
    from lopt.sharded import Sharded

ProcessGroup: TypeAlias = "dist.ProcessGroup | Literal[False] | None"
"""Whose losses are averaged: a group's, all processes' (None), or nobody's but this one's (False)."""


def average(loss: Tensor, group: ProcessGroup) -> Tensor:
    """The mean of the processes' losses (), so that each takes the same step; ``loss`` itself where there is one.

    A collective: every process of the group has to take part. A loss of one that is not finite is one for all.
    """
    if isinstance(loss, _dtensor()):
        loss = loss.full_tensor()
    if group is False or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) <= 1:
        return loss
    total = loss.double()
    dist.all_reduce(total, group=group)
    return (total / dist.get_world_size(group)).to(loss.dtype)


def is_sharded(params: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor."""
    kind = _dtensor()
    return bool(kind) and any(isinstance(p, kind) for p in params)


def spread(rule: LearnedOptimizer, params: Iterable[Tensor]) -> LearnedOptimizer | Sharded:
    """What ``init_state`` and ``apply`` of these parameters are to be called of."""
    if not is_sharded(params):
        return rule
    from lopt.sharded import sharded

    return sharded(rule)


def _dtensor() -> tuple[type[Any], ...]:
    """The class of DTensors; none where nobody has imported it, which takes seconds, so that there can be none."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)
