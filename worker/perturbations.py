"""Perturbations of theta, drawn from keys: seeds and coefficients alone rebuild a meta-gradient.

Owns the map (key, window, pair) -> standard normal vector, the sigma of each meta-parameter, and ``Terms``, the form
in which a meta-gradient is a list of seeds with coefficients. Never knows losses, episodes or who is credited.

The bits behind a vector are the same on every device (SplitMix64 of an integer key, ``tasks.random``); the normals
agree up to the rounding of log, sqrt and cos, a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from configs.checks import ConfigError, did_you_mean
from lopt.base import ThetaSpec
from tasks.random import fold, keys, normal

ROWS_AT_ONCE = 16
"""How many vectors ``contributions`` holds at a time."""


class Terms(NamedTuple):
    """g = sum_m coefficient_m z_m / sigma, where z_m is the draw of ``window`` and ``pair``; all (M,), on the CPU."""

    window: Tensor
    pair: Tensor
    coefficient: Tensor


def draw(key: tuple[int | str, ...], window: Tensor, pair: Tensor, size: int) -> Tensor:
    """Standard normals (M, size), on the device of ``window`` and ``pair`` (M,) int64.

    Row m depends on (key, window_m, pair_m) and on nothing else.
    """
    own = keys(int(pair.max()) + 1, *key, "perturbation", device=pair.device)[pair]
    return normal(fold(own + window, "window"), (size,))


def contributions(key: tuple[int | str, ...], terms: Terms, sigma: float | Tensor, size: int, num_pairs: int) -> Tensor:
    """What each pair adds to the meta-gradient that ``terms`` are of: (num_pairs, size); ``sigma`` is () or (size,)."""
    parts = torch.zeros(num_pairs, size)
    for window, pair, coefficient in _chunks(terms):
        parts.index_add_(0, pair, coefficient.unsqueeze(-1) * draw(key, window, pair, size))
    return parts / sigma


def rebuild(key: tuple[int | str, ...], terms: Terms, sigma: float | Tensor, size: int) -> Tensor:
    """The meta-gradient (size,) that ``terms`` are of, from seeds and coefficients; equal up to fp32 rounding.

    This is what a worker has to send where theta is long: one (window, pair, coefficient) for each perturbation.
    """
    gradient = torch.zeros(size)
    for window, pair, coefficient in _chunks(terms):
        gradient += coefficient @ draw(key, window, pair, size)
    return gradient / sigma


def sigmas(spec: ThetaSpec, sigma: float, by_name: Mapping[str, float]) -> Tensor:
    """The perturbation's standard deviation of every trainable meta-parameter, (D,) fp32 in the flat vector's order.

    ``by_name`` maps glob patterns of entry names to sigmas; the first that matches counts, ``sigma`` where none does.
    Raises ConfigError for a pattern that matches no trainable entry.
    """
    names = [entry.name for entry in spec.entries if not entry.frozen]
    for pattern in by_name:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = f"patterns of trainable parts of theta: {', '.join(names)}{did_you_mean(pattern, names)}"
            raise ConfigError("estimator.sigmas", pattern, expected)
    parts = [
        torch.full((entry.size,), next((by_name[p] for p in by_name if fnmatchcase(entry.name, p)), sigma))
        for entry in spec.entries
        if not entry.frozen
    ]
    return torch.cat(parts)


def _chunks(terms: Terms) -> Iterator[Terms]:
    for start in range(0, len(terms.pair), ROWS_AT_ONCE):
        yield Terms(*(part[start : start + ROWS_AT_ONCE] for part in terms))
