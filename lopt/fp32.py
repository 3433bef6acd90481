"""What a rule computes with, of what torch's parameters and gradients are.

Owns the way from any floating dtype, layout and mode of torch to the rule's contiguous fp32 tensors, and back. Fp32
parameters that are contiguous go to the rule as they are and are written in place; only the others are copied. Never
computes a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lopt.distributed import is_sharded


def tensors(given: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor itself if it is contiguous and fp32, else a copy that is. DTensors stay as they are: their parts
    are what a rule computes with (``sharded``)."""
    ready = list(given)
    others = [
        i
        for i, x in enumerate(given)
        if (x.dtype is not torch.float32 or not x.is_contiguous() or x.is_neg()) and not is_sharded([x])
    ]
    if others:
        copies = [torch.empty(given[i].shape, dtype=torch.float32, device=given[i].device) for i in others]
        torch._foreach_copy_(copies, [given[i] for i in others])
        for i, copy in zip(others, copies, strict=True):
            ready[i] = copy
    return ready


def write_back(params: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
    """The inverse of ``tensors``, after the rule has written into what that gave.

    Half precision is rounded to nearest. To fp64 parameters the difference is added, so that they keep their digits.
    """
    copied = [(p, x) for p, x in zip(params, moved, strict=True) if p is not x]
    for p, x in copied:
        if p.dtype is torch.float64:
            p.add_(x.double().sub_(p.float()))
    rounded = [(p, x) for p, x in copied if p.dtype is not torch.float64]
    if rounded:
        torch._foreach_copy_([p for p, _ in rounded], [x for _, x in rounded])
    # kernels write where autograd does not see it; a graph from before the step must not be differentiated after it
    torch.autograd.graph.increment_version([x for p, x in zip(params, moved, strict=True) if p is x])


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """Within it, the caller's autocast, default dtype and default device do not reach the rule."""
    default = torch.get_default_dtype()
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    elsewhere = device.type == "cpu" and torch.get_default_device().type != "cpu"
    try:
        if default is not torch.float32:
            torch.set_default_dtype(torch.float32)
        with (
            torch.autocast(device.type, enabled=False) if autocast else nullcontext(),
            device if elsewhere else nullcontext(),
        ):
            yield
    finally:
        if default is not torch.float32:
            torch.set_default_dtype(default)
