"""An MLP over the columns of one tensor, a part of the tensor at a time.

Owns the order of the work: first the sizes of all columns, then the MLP, with no more columns at once than those of a
part. Never decides what the columns are or what becomes of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lopt.accumulators import Statistics
from lopt.features import NORMALIZER_EPS, mlp, normalizer, square_sums

CHUNK = 1 << 16
"""Elements (over all particles) that columns are computed of at a time."""
Blocks = Callable[[Tensor, Tensor, Statistics], list[Tensor]]
"""Column blocks (P, k, *b) of parameters and gradients (P, *s) and their statistics."""


def outputs(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    blocks: Blocks,
    p: Tensor,
    g: Tensor,
    statistics: Statistics,
    eps: float = NORMALIZER_EPS,
    scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """What ``features.mlp`` makes of ``blocks(p, g, statistics)``: (P, n_out, *s).

    ``scales`` are the normalisers of every block where they are known, because this is a part of a larger tensor.
    """
    parts = list(chunks(p, g, statistics))
    if scales is None and len(parts) > 1:
        per_part = [[square_sums(block) for block in blocks(*part)] for part in parts]
        # a column that the parts repeat counts as often in the number
        sums = [(sum(s for s, _ in column), sum(n for _, n in column)) for column in zip(*per_part, strict=True)]
        scales = [normalizer(total / count, eps) for total, count in sums]
    made = []
    for part in parts:
        out = mlp(weights, biases, blocks(*part), part[0].shape, eps, scales)
        made.append(out.reshape(*out.shape[:2], *part[0].shape[1:]))
    return made[0] if len(made) == 1 else torch.cat(made, dim=chunk_axis(p) + 1)


def chunk_axis(p: Tensor) -> int:
    """The longest axis of s, in (P, *s)."""
    sizes = list(p.shape[1:])
    return 1 + sizes.index(max(sizes))


def chunks(p: Tensor, g: Tensor, statistics: Statistics) -> Iterator[tuple[Tensor, Tensor, Statistics]]:
    """The tensor and its statistics in parts of about ``CHUNK`` elements, cut along its longest axis."""
    axis = chunk_axis(p)
    length = p.shape[axis]
    width = max(1, CHUNK * length // max(1, p.numel()))
    if width >= length:
        yield p, g, statistics
        return

    def cut(x: Tensor, start: int) -> Tensor:
        along = axis + x.ndim - p.ndim
        return x if x.shape[along] == 1 else x.narrow(along, start, min(width, length - start))

    for start in range(0, length, width):
        factored = statistics.factored
        part = Statistics(
            cut(statistics.m, start),
            cut(statistics.v, start),
            replace(
                factored,
                row=cut(factored.row, start),
                col=cut(factored.col, start),
                row_factor=None if factored.row_factor is None else cut(factored.row_factor, start),
                col_factor=None if factored.col_factor is None else cut(factored.col_factor, start),
            ),
        )
        yield cut(p, start), cut(g, start), part
