"""Running statistics of gradients that the learned optimizers look at.

Owns the three accumulators of learned_optimization: momenta, second moments, and Adafactor's factored second moments
(Shazeer & Stern 2018). None is bias-corrected. Never turns them into features.

Shapes: g (P, *s) is one tensor of P particles; decays are (P, K), one set of K per particle; accumulators are
(P, K, *s), the factored ones with one axis of s missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lopt.base import State, Theta

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAYS = (0.999,)
ADAFACTOR_DECAYS = (0.9, 0.99, 0.999)
DECAYS = {
    "momentum_decays": MOMENTUM_DECAYS,
    "rms_decays": RMS_DECAYS,
    "adafactor_decays": ADAFACTOR_DECAYS,
}
"""Names that learned decays have in theta."""
Decays = tuple[Tensor, Tensor, Tensor]
"""Momentum (P, 3), second-moment (P, 1) and Adafactor (P, 3) decays."""


def align(per_particle: Tensor, like: Tensor) -> Tensor:
    """Append axes to (P, ...) so that it broadcasts against ``like`` from the left."""
    return per_particle.reshape(*per_particle.shape, *(1 for _ in range(like.ndim - per_particle.ndim)))


def decayed(old: Tensor, new: Tensor, decay: Tensor) -> Tensor:
    """old <- d old + (1 - d) new for every decay: old (P, K, *s), new (P, *s), decay (P, K) or (1, K)."""
    return torch.lerp(old, new.unsqueeze(1), align(1 - decay, old))


def fixed_decays(device: torch.device) -> Decays:
    """The decays as published: one row that serves all particles."""
    momentum, rms, adafactor = (
        torch.tensor([values], device=device) for values in (MOMENTUM_DECAYS, RMS_DECAYS, ADAFACTOR_DECAYS)
    )
    return momentum, rms, adafactor


def learned_decays(theta: Theta) -> Decays:
    """Decays that are meta-learned as offsets (P, K) of log(1 - decay) / 10. Source: digest 1.1."""
    momentum, rms, adafactor = (
        1 - torch.exp((torch.log(1 - torch.tensor(initial, device=theta[name].device)) / 10 + theta[name]) * 10)
        for name, initial in DECAYS.items()
    )
    return momentum, rms, adafactor


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two largest axes (d1, d0) of a tensor with at least two, d0 the largest; None where nothing is factored.

    The sort is stable, so that a square matrix has d1 = 0, d0 = 1 on every machine (numpy's default sort may differ
    between processors for such ties).
    """
    if len(shape) < 2:
        return None
    order = np.argsort(np.asarray(shape), kind="stable")
    return int(order[-2]), int(order[-1])


def safe_rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.clamp_min(1e-9))


@dataclass(frozen=True)
class Factored:
    """Factored second moment of one tensor, broadcastable to (P, K, *s).

    ``row`` has size 1 along d0, ``col`` along d1. Where nothing is factored both are the full second moment.
    ``row_factor`` and ``col_factor`` are Adafactor's preconditioners, None where nothing is factored.
    """

    row: Tensor
    col: Tensor
    row_factor: Tensor | None
    col_factor: Tensor | None


@dataclass(frozen=True)
class Statistics:
    """All accumulators of one tensor after a step: m (P, 3, *s), v (P, 1, *s) and the factored moments."""

    m: Tensor
    v: Tensor
    factored: Factored


@dataclass(frozen=True)
class AxisMeans:
    """Means over a whole tensor of which only a part is at hand, for its factored second moment.

    Of g^2 + 1e-30: over d0 (``row``), over d1 (``col``) and over both (``both``), and of the row accumulator before
    this step over d1 (``old_row``, (P, K, *s) with size 1 there). ``axes`` are the whole tensor's d1 and d0.
    """

    axes: tuple[int, int]
    row: Tensor
    col: Tensor
    both: Tensor
    old_row: Tensor


def as_vector(p: Tensor) -> Tensor:
    """Scalars (P,) as vectors of one element (P, 1); anything else unchanged."""
    return p.unsqueeze(-1) if p.ndim == 1 else p


def init_accumulators(name: str, p: Tensor) -> State:
    """Zero accumulators of one tensor (P, *s), under ``kind/name``."""
    p = as_vector(p)
    state = {
        "m": p.new_zeros(p.shape[0], len(MOMENTUM_DECAYS), *p.shape[1:]),
        "v": p.new_zeros(p.shape[0], len(RMS_DECAYS), *p.shape[1:]),
        **_init_factored(p, len(ADAFACTOR_DECAYS)),
    }
    return {f"{kind}/{name}": accumulator for kind, accumulator in state.items()}


def update_accumulators(
    name: str, state: State, g: Tensor, decays: Decays, whole: AxisMeans | None = None
) -> tuple[State, Statistics]:
    """Accumulators of one tensor after the gradient g (P, *s); ``state`` may hold those of other tensors as well.

    ``whole`` is given where g and the accumulators are a part of a tensor only.
    """
    m = decayed(state[f"m/{name}"], g, decays[0])
    v = decayed(state[f"v/{name}"], g.square(), decays[1].clamp(0, 1))
    old = {kind: state[f"{kind}/{name}"] for kind in ("row", "col", "diag") if f"{kind}/{name}" in state}
    factored_state, factored = _update_factored(old, g, decays[2], whole)
    new = {"m": m, "v": v, **factored_state}
    return {f"{kind}/{name}": accumulator for kind, accumulator in new.items()}, Statistics(m, v, factored)


def _init_factored(g: Tensor, num_decays: int) -> dict[str, Tensor]:
    """Zero accumulators for one tensor (P, *s): ``row`` and ``col``, or ``diag`` where nothing is factored."""
    axes = factored_axes(tuple(g.shape[1:]))
    full = (g.shape[0], num_decays, *g.shape[1:])
    if axes is None:
        return {"diag": g.new_zeros(full)}
    d1, d0 = axes
    return {"row": g.new_zeros(_without(full, d0 + 2)), "col": g.new_zeros(_without(full, d1 + 2))}


def _update_factored(
    accumulators: dict[str, Tensor], g: Tensor, decay: Tensor, whole: AxisMeans | None
) -> tuple[dict[str, Tensor], Factored]:
    """One step of the factored second moment of one tensor, and what the features need of it."""
    square = g.square() + 1e-30
    decay = decay.clamp(0, 1)
    axes = whole.axes if whole else factored_axes(tuple(g.shape[1:]))
    if axes is None:
        v = decayed(accumulators["diag"], square, decay)
        return {"diag": v}, Factored(v, v, None, None)
    d1, d0 = axes
    row = decayed(accumulators["row"], whole.row if whole else square.mean(d0 + 1), decay)
    col = decayed(accumulators["col"], whole.col if whole else square.mean(d1 + 1), decay)
    wide_row, wide_col = row.unsqueeze(d0 + 2), col.unsqueeze(d1 + 2)
    row_mean = decayed(whole.old_row, whole.both, decay) if whole else wide_row.mean(d1 + 2, keepdim=True)
    row_factor = safe_rsqrt(wide_row / (row_mean + 1e-9))
    col_factor = safe_rsqrt(wide_col)
    return {"row": row, "col": col}, Factored(wide_row, wide_col, row_factor, col_factor)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
