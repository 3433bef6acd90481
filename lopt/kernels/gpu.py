"""The fused update on GPUs: the tables that the Triton kernels (``triton_*``) read, and the launches of a step.

Owns how all tensors of all particles become two tables of integers: their pointers, uploaded again only when one has
changed, and their cut into pieces, which depends on shapes alone. A step is six launches at most, however many tensors
there are; the host never waits for the device, and equal inputs give equal bits. Never decides whether it is used:
``lopt.kernels`` does. Imports triton only when a step is taken.

Tensors are seen as flat. An accumulator that lacks an axis of the tensor is addressed by that axis's extent and
stride: element e of the tensor is entry e // (extent stride) * stride + e % stride of the accumulator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import chain, product
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lopt.accumulators import factored_axes
from lopt.base import Params, State
from lopt.kernels.columns import VELO_COLUMNS

if TYPE_CHECKING:
    from lopt.per_parameter import Network, PerParameterRule

POINTERS = (
    "p", "g", "m", "v", "row", "col", "p_out", "m_out", "v_out", "row_out", "col_out",
    "w0", "b0", "w1", "b1", "w2", "b2", "m_decay", "v_decay", "factored_decay", "factor",
)  # fmt: skip
"""Columns of the table of pointers, each an address and the bytes from one particle to the next; where nothing is
factored, row and col are both the full second moment. Then come lr and weight decay, as the bits of floats."""
AXIS = ("extent", "stride", "outputs", "parts", "offset", "contiguous")
"""An axis that is summed over: its extent and stride, how many sums there are, the parts of the axis that are summed
apart, where in the workspace the sums are, and whether lanes go along the axis."""
LAYOUT = (
    "size", "factored", "first_chunk", "last_chunk",
    *(f"{which}_{word}" for which in ("row", "col", "mean") for word in AXIS),
)  # fmt: skip
"""Columns of the table of shapes: the row lacks the largest axis d0, the column d1, and the row's means lack both."""
CHUNK = 8192
"""Elements of a tensor that one program passes through the network."""
ALONG = (8, 128, 1024)
"""Lanes along the axis that is summed: sums per program, the program's step, and the part of the axis that it sums."""
ACROSS = (128, 8, 128)
"""Lanes across it: the same."""
ENTRIES = (64, 32)
"""Entries of an accumulator that one program updates, and the parts of their sums that it adds at a time."""
MEANS = (4, 256)
"""Means of rows that one program takes, and its step along the axis."""
COMBINED = 64
"""Chunks whose sums are added at a time."""
PLACES = 32
"""Room for columns: 28 or 30, then zeros; the last place of the normalisers holds the factor of the step."""
MOMENTS = 16
"""Room for ``moments`` of a tensor."""

MAX_HIDDEN = 64
LARGEST = 2**31 - 2**16
"""Elements of a tensor that 32-bit indices count, with a chunk to spare."""
MOST_PARTICLES = 65535
"""What the second axis of a grid can count."""
OLDEST = (8, 0)
"""Compute capability of the oldest NVIDIA GPUs that tests compile the kernels for."""
UNROLLED = 8
"""Hidden units up to which the network is written out instead of as products of matrices."""
PRECISION = "ieee"
"""How fp32 matrices are multiplied: without tensor cores. "tf32x3" uses them, and differs by some last digits."""
CACHED = 64
"""Tables that are kept on the device: one per set of shapes, and one per set of pointers."""

Words = npt.NDArray[np.int64]


def serves(params: Params, hidden: int) -> bool:
    """Whether the kernels take these parameters: all on one CUDA device that is not recording a graph."""
    devices = {p.device for p in params.values()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return False
    return (
        hidden <= MAX_HIDDEN
        and is_known(next(iter(devices)))
        and not torch.cuda.is_current_stream_capturing()
        and all(len(p) <= MOST_PARTICLES and p.numel() <= LARGEST * len(p) for p in params.values())
    )


@cache
def is_known(device: torch.device) -> bool:
    """Whether there is triton, and the device is one that the kernels are known to compile for."""
    nvidia = find_spec("triton") is not None and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= OLDEST


def update(
    rule: PerParameterRule, network: Network, state: State, params: Params, grads: Params
) -> tuple[Params, State]:
    """One step of every particle: new parameters and accumulators, as ``PerParameterRule.update_particles``."""
    keys = [f"{kind}/{name}" for name in params for kind in ("m", "v", "row", "col", "diag")]
    new_params, new_state = (
        {key: torch.empty_like(x, memory_format=torch.contiguous_format) for key, x in leaves.items()}
        for leaves in (params, {key: state[key] for key in keys if key in state})
    )
    ones = [1.0] * len(params)
    _run(rule, network, _tables(state, params, grads, new_state, new_params, network, ones, [0.0] * len(params)))
    return new_params, new_state


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
    _run(rule, network, _tables(state, params, grads, state, params, network, lr, weight_decay))


def moments(state: State, params: Params) -> Tensor:
    """Mean square of p, means of m (3) and v, and variances of m (3) and v, over each tensor: (P, T, 9)."""
    from lopt.kernels import triton_moments

    state, params = ({key: x.contiguous() for key, x in leaves.items()} for leaves in (state, params))
    nothing = [0.0] * len(params)
    tables = _tables(state, params, params, state, params, None, nothing, nothing)
    layout, particles = tables.layout, tables.particles
    parts, out = tables.workspace(len(layout.chunks) * MOMENTS), tables.workspace(len(params) * MOMENTS)
    with _device(out):
        triton_moments.chunk_moments[len(layout.chunks), particles](tables.pointers, layout.words, layout.chunks, parts)
        triton_moments.tensor_moments[len(params), particles](layout.words, parts, out, len(layout.chunks))
    return out.view(particles, len(params), MOMENTS)[..., :9]


def _run(rule: PerParameterRule, network: Network, tables: _Tables) -> None:
    """All phases of an update."""
    from lopt.kernels import triton_moments, triton_rules

    layout, particles = tables.layout, tables.particles
    shared = (tables.pointers, layout.words)
    means = tables.workspace(layout.means_size)
    sums, scales = tables.workspace(len(layout.chunks) * PLACES), tables.workspace(len(layout.words) * PLACES)
    limit = rule.max_gradient or 0.0
    columns = {"clipped": rule.columns == VELO_COLUMNS, "max_gradient": limit, "diag_eps": rule.diag_eps}
    with _device(sums):
        if len(layout.pieces):
            partials = tables.workspace(layout.partials_size)
            triton_moments.axis_sums[len(layout.pieces), particles](
                *shared, layout.pieces, partials, layout.partials_size, max_gradient=limit
            )
            triton_moments.accumulate[len(layout.entries), particles](
                *shared, layout.entries, partials, layout.partials_size
            )
            triton_moments.row_means[len(layout.means), particles](*shared, layout.means, means, layout.means_size)
        triton_rules.column_sums[len(layout.chunks), particles](
            *shared, layout.chunks, means, layout.means_size, sums, block=256, **columns
        )
        triton_rules.normalizers[len(layout.words), particles](
            *shared, sums, scales, len(layout.chunks), scaled=rule.parameter_scaled, p_column=rule.columns.index("p")
        )
        triton_rules.apply[len(layout.chunks), particles](
            *shared, layout.chunks, means, layout.means_size, scales, len(layout.words), **columns,
            **mlp_shape(network.weights[0].shape[-1]), outputs=network.weights[2].shape[-1], num_stages=1,
        )  # fmt: skip


def mlp_shape(hidden: int) -> dict[str, int | str]:
    """How ``triton_rules.apply`` is built for a number of hidden units."""
    wide = hidden > UNROLLED
    padded = max(16, 1 << (hidden - 1).bit_length()) if wide else 0
    return {"hidden": hidden, "padded": padded, "precision": PRECISION, "block": 128 if wide else 512}


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device. (Under triton's interpreter there is none.)"""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@dataclass(frozen=True)
class _Layout:
    """What depends on shapes alone: the words of ``LAYOUT`` of every tensor, and the pieces of every phase."""

    words: Tensor
    pieces: Tensor
    """(tensor, 0 for the row or 1 for the column, first sum, part of the axis)."""
    entries: Tensor
    """(tensor, row or column, first entry)."""
    means: Tensor
    """(tensor, first mean)."""
    chunks: Tensor
    """(tensor, first element)."""
    partials_size: int
    """Floats per particle, like the next."""
    means_size: int


@dataclass(frozen=True)
class _Tables:
    """The tables on the device; ``alive`` are copies that the pointers point to."""

    pointers: Tensor
    layout: _Layout
    particles: int
    alive: list[Tensor]

    def workspace(self, floats: int) -> Tensor:
        """That many numbers per particle. What is freed is used again only behind the kernels queued by then."""
        return torch.empty(self.particles * max(1, floats), device=self.pointers.device)


def _tables(
    state: State,
    params: Params,
    grads: Params,
    new_state: State,
    new_params: Params,
    network: Network | None,
    lr: Sequence[float],
    weight_decay: Sequence[float],
) -> _Tables:
    first, count = next(iter(params.values())), len(params)
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
    inputs, outputs = [], []
    for name in params:
        kinds = ("m", "v", "row", "col") if f"row/{name}" in state else ("m", "v", "diag", "diag")
        keys = [f"{kind}/{name}" for kind in kinds]
        inputs.append([params[name], grads[name], *(state[key] for key in keys)])
        outputs.append([new_params[name], *(new_state[key] for key in keys)])
        if not all(x.is_contiguous() for x in outputs[-1]):
            raise ValueError(f"{name} or its state is not contiguous: what is updated in place has to be")
    alive = [x.contiguous() for x in chain(*inputs)]
    words = np.zeros((count, 2 * len(POINTERS) + 2), dtype=np.int64)
    pairs = words[:, :-2].reshape(count, len(POINTERS), 2)
    end = 0
    for leaves in (alive, list(chain(*outputs))):
        start, end = end, end + len(leaves) // count
        pairs[:, start:end, 0] = np.array([x.data_ptr() for x in leaves]).reshape(count, -1)
        if len(first) > 1:
            pairs[:, start:end, 1] = np.array([x.stride(0) * 4 for x in leaves]).reshape(count, -1)
    if network is not None:
        for column, (x, per_tensor) in enumerate(_network_leaves(network), start=end):
            own = x[0, 0] if per_tensor else x[0]
            x = x if own.is_contiguous() else x.contiguous()
            alive.append(x)
            # one row may serve all particles
            pairs[:, column] = x.data_ptr(), x.stride(0) * 4 if len(x) > 1 else 0
            if per_tensor:
                pairs[:, column, 0] += np.arange(count) * x.stride(1) * 4
    words[:, -2], words[:, -1] = (np.asarray(rates, dtype=np.float32).view(np.int32) for rates in (lr, weight_decay))
    shapes = tuple(tuple(p.shape[1:]) for p in params.values())
    return _Tables(
        _pointers(words.tobytes(), first.device, stream), _layout(shapes, first.device, stream), len(first), alive
    )


def _network_leaves(network: Network) -> Iterable[tuple[Tensor, bool]]:
    """In the order of ``POINTERS``, and whether each has a second axis with one entry per tensor."""
    for weight, bias in zip(network.weights, network.biases, strict=True):
        yield weight, weight.ndim == 4
        yield bias, bias.ndim == 3
    for decay in network.decays:
        yield decay, False
    yield network.factor, network.factor.ndim == 2


@lru_cache(CACHED)
def _pointers(words: bytes, device: torch.device, stream: int) -> Tensor:
    """The table of pointers, ready for kernels on ``stream``, which is the current one."""
    return _upload(np.frombuffer(words, dtype=np.int64), device)


def _upload(words: Words, device: torch.device) -> Tensor:
    """Without the host waiting for it: what is pinned is given back when the copy is done."""
    table = torch.from_numpy(words.copy())
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(CACHED)
def _layout(shapes: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> _Layout:
    words: list[list[int]] = []
    pieces: list[tuple[int, ...]] = []
    entries: list[tuple[int, ...]] = []
    means: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    partials_size = means_size = 0
    for t, shape in enumerate(shapes):
        first_chunk = len(chunks)
        chunks += [(t, start) for start in range(0, prod(shape), CHUNK)]
        axes = factored_axes(shape)
        own: list[int] = [prod(shape), axes is not None, first_chunk, len(chunks)]
        if axes is None:
            words.append(own + [0] * (len(LAYOUT) - len(own)))
            continue
        d1, d0 = axes
        for kind, axis in enumerate((d0, d1)):
            extent, stride, outputs = _axis(shape, axis)
            contiguous = stride == 1 and extent >= ALONG[1] // 4
            width, _, length = ALONG if contiguous else ACROSS
            parts = -(-extent // length)
            own += [extent, stride, outputs, parts, partials_size, contiguous]
            partials_size += parts * outputs
            pieces += [(t, kind, *rest) for rest in product(range(0, outputs, width), range(parts))]
            entries += [(t, kind, start) for start in range(0, outputs, ENTRIES[0])]
        row = shape[:d0] + shape[d0 + 1 :]
        extent, stride, outputs = _axis(row, d1 - (d0 < d1))
        own += [extent, stride, outputs, 1, means_size, 0]
        means_size += 3 * outputs
        means += [(t, start) for start in range(0, outputs, MEANS[0])]
        words.append(own)

    def table(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
        return _upload(np.array(rows, dtype=np.int64).reshape(len(rows), columns), device)

    return _Layout(
        words=table(words, len(LAYOUT)),
        pieces=table(pieces, 4),
        entries=table(entries, 3),
        means=table(means, 2),
        chunks=table(chunks, 2),
        partials_size=partials_size,
        means_size=means_size,
    )


def _axis(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Extent and stride of an axis of a contiguous tensor, and the elements that it has without it."""
    return shape[axis], prod(shape[axis + 1 :]), prod(shape[:axis]) * prod(shape[axis + 1 :])
