"""The fused update of the per-parameter rules: feature construction, MLP and update without temporaries.

Owns which calls have kernels: C++ on CPUs (``cpu``), Triton on GPUs (``gpu``). ``per_parameter`` holds the reference
that they equal, and is what runs where there are none.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lopt.base import Params, State
from lopt.kernels import cpu, gpu
from lopt.kernels.columns import SMALL_FC_COLUMNS, VELO_COLUMNS

if TYPE_CHECKING:
    from lopt.per_parameter import Network, PerParameterRule

MAX_HIDDEN = 32
_enabled = contextvars.ContextVar("lopt_kernels", default=True)


__all__ = [
    "SMALL_FC_COLUMNS",
    "VELO_COLUMNS",
    "apply",
    "cpu",
    "gpu",
    "on_cpu",
    "reference",
    "serves",
    "tensor_statistics",
    "update",
]


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Within it, rules use the reference in torch."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def serves(rule: PerParameterRule, params: Params, weights: Sequence[Tensor]) -> bool:
    """Whether there are kernels for this rule, its network's weights and these parameters; otherwise the reference
    does it, also where something is differentiated or vmapped through the update, which kernels cannot see."""
    return (
        not torch.compiler.is_compiling()
        and _enabled.get()
        and rule.columns in (SMALL_FC_COLUMNS, VELO_COLUMNS)
        and all(_is_plain(p) and p.dtype == torch.float32 for p in params.values())
        and all(_is_plain(weight) for weight in weights)
        and (_serves_on_cpu(params, weights[0].shape[-1]) or gpu.serves(params, weights[0].shape[-1]))
    )


def on_cpu(params: Params) -> bool:
    return all(p.device.type == "cpu" for p in params.values())


def _serves_on_cpu(params: Params, hidden: int) -> bool:
    return hidden <= MAX_HIDDEN and cpu.library() is not None and on_cpu(params)


def _on_gpu(params: Params) -> bool:
    return next(iter(params.values())).is_cuda


def _is_plain(x: Tensor) -> bool:
    tracked = x.requires_grad and torch.is_grad_enabled()
    return not tracked and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def update(
    rule: PerParameterRule, network: Network, state: State, params: Params, grads: Params
) -> tuple[Params, State]:
    """One step of every particle: new parameters and accumulators, as ``PerParameterRule.update_particles``."""
    run = gpu.update if _on_gpu(params) else cpu.update
    return run(rule, network, state, params, grads)


def apply(
    rule: PerParameterRule,
    network: Network,
    state: State,
    params: Params,
    grads: Params,
    lr: Sequence[float],
    weight_decay: Sequence[float],
) -> None:
    """The same in place: p <- p - lr (step + weight_decay p), and the accumulators in ``state``, all contiguous."""
    run = gpu.apply if _on_gpu(params) else cpu.apply
    run(rule, network, state, params, grads, lr, weight_decay)


def tensor_statistics(state: State, params: Params) -> Tensor:
    """What VeLO's LSTM sees of every tensor, as ``velo.tensor_statistics``: (P, T, 9)."""
    run = gpu.moments if _on_gpu(params) else cpu.moments
    return run(state, params).to(torch.float32)
