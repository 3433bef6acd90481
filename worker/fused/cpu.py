"""The binding to the C++ window kernels (``window*.cpp``, built at install if there is a compiler).

Owns how tensors become the kernels' structures. The library has a plain C interface, so one binary serves every torch
version. Never decides whether it is used: ``worker.fused`` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lopt.accumulators import fixed_decays, learned_decays
from lopt.base import LearnedOptimizer, Theta
from lopt.celo import Celo
from lopt.celo2 import EPS, MAX_GRADIENT, RMS_DECAYS, RSQRT_EPS, Celo2
from lopt.features import NORMALIZER_EPS, STEP_MULT
from lopt.kernels.columns import VELO_COLUMNS
from lopt.per_parameter import PerParameterRule
from lopt.small_fc import SmallFcLopt
from lopt.velo import Velo
from tasks.data.images import CPU
from tasks.random import tag_bits
from worker.fused.problem import SWITCHES, Problem
from worker.particles import Fresh, Leaves, Particles, Start

SMALL_FC, CELO, CELO_SCHEDULE, VELO, CELO2 = range(5)
_NETWORK = ("mlp.w0", "mlp.b0", "mlp.w1", "mlp.b1", "mlp.w2", "mlp.b2")
_RECURRENT = ("mix.w", "mix.b", "input.w", "input.b", "lstm.w", "lstm.b", "step_size.w", "step_size.b")
_CONTROLS = ("controls.w", "controls.b")
_ENTRIES = len(_NETWORK) + 3 + len(_RECURRENT) + len(_CONTROLS)
_LOSSES = {"loss_decays": "loss/decays", "loss_means": "loss/means", "loss_min": "loss/running_min"}


class _Problem(ctypes.Structure):
    _fields_ = (
        ("widths", c_void_p),
        *((name, c_int64) for name in ("layers", "batch", "loss", "activation", "center", "constrain", "log_loss")),
        *((name, c_int64) for name in ("channels", "side")),
        *((name, c_void_p) for name in ("images", "labels", "order")),
        *((name, c_int64) for name in ("bytes", "first", "examples", "shift")),
        ("noise", c_double),
        *((name, c_uint64) for name in ("examples_tag", "shift_tag", "noise_tag")),
    )


class _Rule(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "hidden", "outputs", "clipped_columns", "parameter_scaled")),
        *((name, c_int64) for name in ("lstm_size", "bank_size", "compat", "orthogonalize")),
        *((name, c_double) for name in ("max_gradient", "diag_eps", "rsqrt_eps", "normalizer_eps", "step_mult")),
        ("theta", c_void_p * _ENTRIES),
        ("strides", c_int64 * _ENTRIES),
    )


class _Rows(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "p", "m", "v", "outer", "inner", "lstm_hidden", "lstm_cell", "iteration", "num_steps", "loss_count",
            "loss_decays", "loss_means", "loss_min", "tau", "activation", "center", "constrain", "log_loss",
        )
    )  # fmt: skip


class _Window(ctypes.Structure):
    _fields_ = (
        ("problem", _Problem),
        ("rule", _Rule),
        ("particles", _Rows),
        ("fresh", _Rows),
        *((name, c_void_p) for name in ("starts", "batches", "step_tags", "losses")),
        *((name, c_int64) for name in ("num_starts", "tasks", "steps")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The kernels' library; None where the install found no compiler."""
    for path in sorted(Path(__file__).parent.glob("_window*.so")):
        found = ctypes.CDLL(str(path))
        found.paceline_window_build.restype = ctypes.c_char_p
        found.paceline_window_use.argtypes = (ctypes.c_char_p,)
        found.paceline_window_use.restype = ctypes.c_int32
        found.paceline_window_size.restype = c_int64
        found.paceline_window_run.argtypes = (ctypes.POINTER(_Window), c_int64)
        found.paceline_window_run.restype = None
        if found.paceline_window_size() != ctypes.sizeof(_Window):
            raise ImportError(f"{path} was built from other sources: install paceline again (make clean setup)")
        return found
    return None


def build() -> str | None:
    """The instruction set the kernels use on this processor: avx512, avx2 or portable; None: not built."""
    found = library()
    return None if found is None else str(found.paceline_window_build().decode())


def use(name: str) -> None:
    """Use the kernels for ``name`` from now on. Raises ``ValueError`` where this processor or install has none."""
    found = library()
    if found is None or not found.paceline_window_use(name.encode()):
        raise ValueError(f"kernels {name!r}: expected avx512, avx2 or portable, built and supported by this processor")


def run(
    problem: Problem,
    lopt: LearnedOptimizer,
    theta: Theta,
    particles: Particles,
    new: Fresh | None,
    starts: Sequence[Start],
    batches: Tensor,
    steps: int,
) -> Tensor:
    """``steps`` inner steps of all particles, in place but for their dynamic configuration; raw losses (steps, 2n).

    ``new`` holds what ``starts``, in their order, begin with.
    """
    found = library()
    if found is None:
        raise RuntimeError("the kernels are not built: ask worker.fused.refusal first")
    memory = _Memory()
    losses = torch.empty(steps, particles.count)
    tags = np.array([tag_bits(step) for step in range(steps)], dtype=np.int64)
    begins = np.array([(start.step, start.task) for start in starts], dtype=np.int64)
    window = _Window(
        problem=_problem(problem, memory),
        rule=_rule(lopt, theta, memory),
        particles=memory.rows(problem, lopt, particles.params, particles.state, particles.dynamic),
        fresh=memory.rows(problem, lopt, new.params, new.state, new.dynamic) if new else _Rows(),
        starts=memory.array(begins),
        batches=memory.tensor(batches),
        step_tags=memory.array(tags),
        losses=losses.data_ptr(),
        num_starts=len(starts),
        tasks=len(batches),
        steps=steps,
    )
    found.paceline_window_run(ctypes.byref(window), torch.get_num_threads())
    return losses


class _Memory:
    """Pointers for the kernels; keeps alive what they point to."""

    def __init__(self) -> None:
        self._alive: list[object] = []

    def array(self, values: np.ndarray) -> int:
        self._alive.append(values)
        return int(values.ctypes.data)

    def keep(self, x: Tensor) -> int:
        """Where ``x`` begins."""
        self._alive.append(x)
        return x.data_ptr()

    def tensor(self, x: Tensor) -> int:
        """Where a contiguous copy of ``x``, or ``x`` itself, begins."""
        return self.keep(x.contiguous())

    def rows(self, problem: Problem, lopt: LearnedOptimizer, params: Leaves, state: Leaves, dynamic: Leaves) -> _Rows:
        """The state of particles, leaves (any, ...); those of ``params`` and ``state`` are made contiguous in place."""
        for leaves in (params, state):
            leaves.update({name: leaf.contiguous() for name, leaf in leaves.items() if not leaf.is_contiguous()})
        # by name, because leaves that were read from a file come in any order
        names = [f"{kind}{layer}" for layer in range(len(problem.widths) - 1) for kind in "wb"]
        pointers = {kind: self._table(state, kind, names) for kind in ("m", "v", "lstm_hidden", "lstm_cell")}
        if "lstm.hidden" in state:
            for kind in ("hidden", "cell"):
                pointers[f"lstm_{kind}"] = self.array(np.array([state[f"lstm.{kind}"].data_ptr()], dtype=np.uint64))
        outer, inner = zip(*(_axes(name, params[name], state) for name in names), strict=True)
        dynamic = {name: leaf for name, leaf in dynamic.items() if name in (problem.tau, "activation", *SWITCHES)}
        counters: dict[str, int] = {}
        for name in ("iteration", "num_steps"):
            if name in state:
                counters[name] = state[name].data_ptr()
        if "loss/count" in state:
            counters |= {"loss_count": state["loss/count"].data_ptr()}
            counters |= {field: state[leaf].data_ptr() for field, leaf in _LOSSES.items()}
        fields = {problem.tau: "tau", "activation": "activation"} | dict(
            zip(SWITCHES, ("center", "constrain", "log_loss"), strict=True)
        )
        return _Rows(
            p=self.array(np.array([params[name].data_ptr() for name in names], dtype=np.uint64)),
            outer=self.array(np.array(outer, dtype=np.uint64)),
            inner=self.array(np.array(inner, dtype=np.uint64)),
            **pointers,
            **counters,
            **{fields[name]: self.tensor(leaf) for name, leaf in dynamic.items()},
        )

    def _table(self, state: Leaves, kind: str, names: Sequence[str]) -> int | None:
        leaves = [state.get(f"{kind}/{name}") for name in names]
        if leaves[0] is None:
            return None
        return self.array(np.array([leaf.data_ptr() for leaf in leaves if leaf is not None], dtype=np.uint64))


def _axes(name: str, p: Tensor, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Where the accumulators with one number per row and per column lie; of a vector the full second moment."""
    if p.ndim == 2:
        return 0, state[f"diag/{name}"].data_ptr() if f"diag/{name}" in state else 0
    _, rows, cols = p.shape
    kinds = ("row", "col") if cols >= rows else ("col", "row")  # the row lacks the larger axis
    outer, inner = (state[f"{kind}/{name}"].data_ptr() for kind in kinds)
    return outer, inner


def _problem(problem: Problem, memory: _Memory) -> _Problem:
    dataset = problem.dataset
    images, labels, order = dataset.pixels.on(CPU)
    center, constrain, log = problem.switches
    return _Problem(
        widths=memory.array(np.array(problem.widths, dtype=np.int64)),
        layers=len(problem.widths) - 1,
        batch=problem.batch_size,
        loss=problem.loss,
        activation=problem.activation,
        center=center,
        constrain=constrain,
        log_loss=log,
        channels=problem.channels,
        side=dataset.size,
        images=memory.tensor(images),
        labels=memory.tensor(labels),
        order=memory.tensor(order),
        bytes=images.dtype == torch.uint8,
        first=dataset.rows.start,
        examples=dataset.num_examples,
        shift=dataset.shift,
        noise=dataset.noise,
        **{f"{name}_tag": tag_bits(name) & (1 << 64) - 1 for name in ("examples", "shift", "noise")},
    )


def _rule(lopt: LearnedOptimizer, theta: Theta, memory: _Memory) -> _Rule:
    kind, numbers = _kind(lopt)
    decays = fixed_decays(CPU)
    if kind == SMALL_FC:
        decays = learned_decays(theta)
    elif kind == CELO2:
        decays = (decays[0], torch.tensor([RMS_DECAYS]), decays[2])
    recurrent = kind in (CELO_SCHEDULE, VELO)
    leaves: list[Tensor | None] = [theta[name] for name in _NETWORK]
    leaves += decays
    leaves += [theta[name] if recurrent else None for name in _RECURRENT]
    leaves += [theta[name] if kind == VELO else None for name in _CONTROLS]
    rule = _Rule(
        kind=kind,
        hidden=theta["mlp.w1"].shape[-1],
        outputs=theta["mlp.w2"].shape[-1],
        lstm_size=theta["lstm.hidden"].shape[-1] if recurrent else 0,
        bank_size=theta["mlp.w0"].shape[1] if kind == VELO else 0,
        **numbers,
    )
    for k, leaf in enumerate(leaves):
        if leaf is not None:
            # one particle's leaf after the other's, with a stride: theta's rows, or one row that serves all
            leaf = leaf if leaf[0].is_contiguous() else leaf.contiguous()
            rule.theta[k] = memory.keep(leaf)
            rule.strides[k] = 0 if leaf.shape[0] == 1 else leaf.stride(0)
    return rule


def _kind(lopt: LearnedOptimizer) -> tuple[int, dict[str, float]]:
    """What the kernels call the rule, and the numbers that it computes with."""
    if isinstance(lopt, Celo2):
        numbers = {"clipped_columns": True, "orthogonalize": lopt.orthogonalize, "max_gradient": MAX_GRADIENT}
        return CELO2, numbers | {"rsqrt_eps": RSQRT_EPS, "normalizer_eps": EPS, "step_mult": STEP_MULT}
    if not isinstance(lopt, PerParameterRule):
        raise TypeError(f"the rule is {lopt.name}: ask worker.fused.refusal first")
    numbers = {
        "clipped_columns": lopt.columns == VELO_COLUMNS,
        "parameter_scaled": lopt.parameter_scaled,
        "max_gradient": lopt.max_gradient or 0.0,
        "diag_eps": lopt.diag_eps,
        "rsqrt_eps": 1e-6,
        "normalizer_eps": NORMALIZER_EPS,
        "step_mult": STEP_MULT,
    }
    if isinstance(lopt, SmallFcLopt):
        return SMALL_FC, numbers | {"step_mult": lopt.step_mult}
    if isinstance(lopt, Velo):
        return VELO, numbers | {"compat": lopt.compat}
    return CELO_SCHEDULE if isinstance(lopt, Celo) and lopt.phase == 2 else CELO, numbers
