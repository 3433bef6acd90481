"""The fused update on CPUs: the binding to the C++ kernels (``rules*.cpp``, built at install if there is a compiler).

Owns how tensors become the kernels' slots, and the order of their phases. The library has a plain C interface, so one
binary serves every torch version. Never decides whether it is used: ``lopt.kernels`` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from pathlib import Path
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

AXIS_SUMS, FACTORS, COLUMN_SUMS, APPLY, MOMENTS, UPDATE = range(6)
NUM_SUMS = 33
SERIAL_BELOW = 1 << 17
"""Parameters under which starting threads costs more than it saves."""

_POINTERS = (
    "p", "g", "m", "v", "outer", "inner", "p_out", "m_out", "v_out", "outer_out", "inner_out",
    "w0", "b0", "w1", "b1", "w2", "b2", "m_decay", "v_decay", "factored_decay", "axis_sums", "factors", "sums",
)  # fmt: skip
OF_GRADS, OF_NETWORK = _POINTERS.index("g"), _POINTERS.index("w0")
SLOT = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(axis, np.int64) for axis in "aibjc"]
    + [("factored", np.int32), ("row_is_outer", np.int32)]
    + [(name, np.float32) for name in ("step", "lr", "weight_decay", "reserved")]
)


class _Rule(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("clipped_columns", ctypes.c_int32),
        ("parameter_scaled", ctypes.c_int32),
        ("max_gradient", ctypes.c_float),
        ("diag_eps", ctypes.c_float),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The kernels' library; None where the install found no compiler."""
    for path in sorted(Path(__file__).parent.glob("_rules*.so")):
        found = ctypes.CDLL(str(path))
        found.paceline_rules_build.restype = ctypes.c_char_p
        found.paceline_rules_use.argtypes = (ctypes.c_char_p,)
        found.paceline_rules_use.restype = ctypes.c_int32
        found.paceline_slot_size.restype = ctypes.c_int64
        found.paceline_rules_run.argtypes = (
            ctypes.POINTER(_Rule), ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32,
        )  # fmt: skip
        found.paceline_rules_run.restype = None
        if found.paceline_slot_size() != SLOT.itemsize:
            raise ImportError(f"{path} was built from other sources: install paceline again (make clean setup)")
        return found
    return None


def build() -> str | None:
    """The instruction set the kernels use on this processor: avx512, avx2 or portable; None: not built."""
    found = library()
    return None if found is None else found.paceline_rules_build().decode()


def use(name: str) -> None:
    """Use the kernels for ``name`` from now on. Raises ``ValueError`` where this processor or install has none."""
    found = library()
    if found is None or not found.paceline_rules_use(name.encode()):
        raise ValueError(f"kernels {name!r}: expected avx512, avx2 or portable, built and supported by this processor")


def update(
    rule: PerParameterRule, network: Network, state: State, params: Params, grads: Params
) -> tuple[Params, State]:
    """One step of every particle: new parameters and accumulators, as ``PerParameterRule.update_particles``."""
    new_params = {name: torch.empty_like(p, memory_format=torch.contiguous_format) for name, p in params.items()}
    kinds = [f"{kind}/{name}" for name, p in params.items() for kind in ("m", "v", *_geometry(p.shape[1:]).factored)]
    new_state = {key: torch.empty_like(state[key], memory_format=torch.contiguous_format) for key in kinds}
    slots = _Slots(state, params, grads, new_state, new_params)
    slots.set_network(rule, network, 1.0, 0.0)
    slots.run(UPDATE)
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
    """The same in place: p <- p - lr (step + weight_decay p), and the accumulators in ``state``.

    Raises ``ValueError`` for parameters and accumulators that are not contiguous.
    """
    slots = _Slots(state, params, grads, state, params)
    slots.set_network(rule, network, lr, weight_decay)
    slots.run(UPDATE)


class InPlace:
    """One step after the other, in place: what a step does not change is looked up once.

    Raises ``ValueError`` for parameters and accumulators that are not contiguous.
    """

    def __init__(self, rule: PerParameterRule, state: State, params: Params) -> None:
        self._rule = rule
        self._slots = _Slots(state, params, params, state, params)

    def step(self, network: Network, grads: Params) -> None:
        self._slots.set_grads(grads)
        self._slots.set_network(self._rule, network, 1.0, 0.0)
        self._slots.run(UPDATE)


def moments(state: State, params: Params) -> Tensor:
    """Mean square of p, means of m (3) and v, and variances of m (3) and v, over each tensor: float64 (P, T, 9)."""
    slots = _Slots(state, params, params, state, params)
    slots.run(MOMENTS)
    return slots.sums[..., :9]


class _Slots:
    """The kernels' view of all tensors of all particles; keeps alive what the pointers point to."""

    def __init__(self, state: State, params: Params, grads: Params, new_state: State, new_params: Params) -> None:
        self._frame = frame = _frame(tuple(p.shape for p in params.values()))
        self._words = frame.words.copy()
        self._rule = _Rule()
        self._threads = torch.get_num_threads() if sum(p.numel() for p in params.values()) > SERIAL_BELOW else 1
        self._alive: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._network: dict[int, Tensor] = {}
        addresses = []
        for name, geometry in zip(params, frame.geometries, strict=True):
            m, v, outer, inner = f"m/{name}", f"v/{name}", f"{geometry.outer}/{name}", f"{geometry.inner}/{name}"
            addresses += [
                *(self._readable(x) for x in (params[name], grads[name], state[m], state[v])),
                self._readable(state[outer]) if geometry.outer else 0,
                self._readable(state[inner]),
                *(_writable(x) for x in (new_params[name], new_state[m], new_state[v])),
                _writable(new_state[outer]) if geometry.outer else 0,
                _writable(new_state[inner]),
            ]
        own = np.array(addresses, dtype=np.uint64).reshape(len(params), OF_NETWORK)
        self._words[..., :OF_NETWORK] += own
        # axis_sums (an outer and an inner vector), factors (three times that) and sums of every slot
        self._vectors = torch.empty(frame.vectors)
        self.sums = torch.empty(*self._words.shape[:2], NUM_SUMS, dtype=torch.float64)
        self._words[..., len(_POINTERS) - 3 : len(_POINTERS) - 1] += np.uint64(self._vectors.data_ptr())
        self._words[..., len(_POINTERS) - 1] += np.uint64(self.sums.data_ptr())

    def set_grads(self, grads: Params) -> None:
        """Gradients (P, *s) in the order of the parameters."""
        self._grads = [g if g.is_contiguous() else g.contiguous() for g in grads.values()]
        addresses = np.array([g.data_ptr() for g in self._grads], dtype=np.uint64)
        self._words[..., OF_GRADS] = self._frame.words[..., OF_GRADS] + addresses

    def set_network(
        self,
        rule: PerParameterRule,
        network: Network,
        lr: Sequence[float] | float,
        weight_decay: Sequence[float] | float,
    ) -> None:
        """What the rule does with every tensor in this step."""
        layers = [x for pair in zip(network.weights, network.biases, strict=True) for x in pair]
        dimensions = [3, 2] * 3 + [2] * 3
        for column, (x, shared) in enumerate(zip((*layers, *network.decays), dimensions, strict=True), OF_NETWORK):
            if self._network.get(column) is x:
                continue
            x = x if x[0].is_contiguous() else x.contiguous()
            self._network[column] = x
            base, stride = _pointer(x)
            per_tensor = x.stride(1) * 4 if x.ndim > shared else 0
            offsets = self._frame.tensors * np.uint64(per_tensor)
            self._words[..., column] = base + self._frame.particles * np.uint64(stride) + offsets
        floats = self._words.view(np.float32)
        floats[..., -4] = (network.factor if network.factor.ndim == 2 else network.factor.unsqueeze(1)).numpy()
        floats[..., -3] = lr
        floats[..., -2] = weight_decay
        self._rule = _Rule(
            hidden=network.weights[0].shape[-1],
            outputs=network.weights[2].shape[-1],
            clipped_columns=rule.columns == VELO_COLUMNS,
            parameter_scaled=rule.parameter_scaled,
            max_gradient=rule.max_gradient or 0.0,
            diag_eps=rule.diag_eps,
        )

    def run(self, phase: int) -> None:
        found = library()
        if found is None:
            raise RuntimeError("the kernels are not built: ask lopt.kernels.serves first")
        slots = self._words.shape[0] * self._words.shape[1]
        found.paceline_rules_run(ctypes.byref(self._rule), phase, self._words.ctypes.data, slots, self._threads)

    def _readable(self, x: Tensor) -> int:
        x = x if x.is_contiguous() else x.contiguous()
        self._alive.append(x)
        return x.data_ptr()


def _pointer(x: Tensor) -> tuple[int, int]:
    """Where a tensor lies, and how many bytes further the next particle's part does (0: it serves all)."""
    return x.data_ptr(), 0 if x.shape[0] == 1 else x.stride(0) * 4


def _writable(x: Tensor) -> int:
    if not x.is_contiguous():
        raise ValueError(f"a parameter or accumulator of shape {tuple(x.shape)[1:]} is not contiguous")
    return x.data_ptr()


@dataclass(frozen=True)
class _Geometry:
    """How a tensor looks to the kernels: (A, I, B, J, C), and which accumulators lack J (outer) and I (inner).

    ``outer`` is empty where nothing is factored; ``vectors`` is the length of both vectors together.
    """

    sizes: tuple[int, int, int, int, int]
    outer: str
    inner: str
    vectors: int

    @property
    def bytes(self) -> tuple[int, ...]:
        """Of one particle's p, g, m, v, outer and inner."""
        a, i, b, j, c = self.sizes
        n, outer, inner = 4 * a * i * b * j * c, 12 * a * i * b * c, 12 * a * b * j * c
        return n, n, 3 * n, n, outer if self.outer else 0, inner if self.outer else 3 * n

    @property
    def factored(self) -> tuple[str, ...]:
        """Names of the factored accumulators."""
        return (self.outer, self.inner) if self.outer else (self.inner,)


@cache
def _geometry(shape: torch.Size) -> _Geometry:
    axes = factored_axes(tuple(shape))
    if axes is None:
        return _Geometry((1, 1, 1, prod(shape), 1), "", "diag", 0)
    i, j = sorted(axes)
    a, b, c = prod(shape[:i]), prod(shape[i + 1 : j]), prod(shape[j + 1 :])
    # the row lacks d0, the larger of the two axes
    outer, inner = ("row", "col") if axes[1] == j else ("col", "row")
    return _Geometry((a, shape[i], b, shape[j], c), outer, inner, a * b * c * (shape[i] + shape[j]))


@dataclass(frozen=True)
class _Frame:
    """All of the slots of P particles with T tensors that depends on shapes alone.

    ``words`` (P, T, ...) hold sizes, flags, and in the place of each pointer how far from the first particle's leaf,
    or the workspace's beginning, it points; ``vectors`` is the workspace's length in floats. ``particles`` (P, 1) and
    ``tensors`` (T,) count.
    """

    geometries: list[_Geometry]
    words: npt.NDArray[np.uint64]
    vectors: int
    particles: npt.NDArray[np.uint64]
    tensors: npt.NDArray[np.uint64]


@lru_cache(64)
def _frame(shapes: tuple[torch.Size, ...]) -> _Frame:
    """``shapes`` are those of the parameters (P, *s)."""
    geometries = [_geometry(shape[1:]) for shape in shapes]
    particles = np.arange(shapes[0][0], dtype=np.uint64)[:, None]
    words = np.zeros((len(particles), len(shapes), SLOT.itemsize // 8), dtype=np.uint64)
    reads = np.array([geometry.bytes for geometry in geometries], dtype=np.uint64)
    strides = np.concatenate([reads, reads[:, [0, 2, 3, 4, 5]]], axis=1)
    words[..., :OF_NETWORK] = particles[..., None] * strides
    words[..., len(_POINTERS) : len(_POINTERS) + 5] = [geometry.sizes for geometry in geometries]
    words.view(np.int32)[..., -6:-4] = [(bool(geometry.outer), geometry.outer == "row") for geometry in geometries]
    lengths = np.array([geometry.vectors for geometry in geometries], dtype=np.uint64)
    starts = np.cumsum(np.tile(lengths, len(particles)), dtype=np.uint64).reshape(-1, len(lengths)) - lengths
    words[..., len(_POINTERS) - 3] = 16 * starts
    words[..., len(_POINTERS) - 2] = 16 * starts + 4 * lengths
    words[..., len(_POINTERS) - 1] = 8 * NUM_SUMS * np.arange(starts.size, dtype=np.uint64).reshape(starts.shape)
    tensors = np.arange(len(shapes), dtype=np.uint64)
    return _Frame(geometries, words, len(particles) * 4 * int(lengths.sum()), particles, tensors)
