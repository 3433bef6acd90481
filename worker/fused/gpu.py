"""The fused window on GPUs: one launch for all inner steps of a truncation window of an MLP classifier.

Owns which tasks and rules the kernel takes, what it is handed (a particle's state as one row of numbers, tables of
where everything lies, and what is known before the window begins: resets, taus, time features), and the launch. Never
draws an episode and never decides whether it is used. Imports triton only when a window is run.

Unmeasured: it equals the reference under triton's interpreter, and compiles for sm_80 and sm_90 to 128 registers a
thread (with 80 to 200 bytes of stack) and 8 to 16 kB of shared memory, so that two programs share a multiprocessor.
A particle of the fast set takes 50 kB of state and 40 kB of scratch, which the caches hold. Compiled once per rule,
storage of pixels, side, shift and noise; widths, depth, batch and window are arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.accumulators import factored_axes, fixed_decays, init_accumulators, learned_decays
from lopt.base import LearnedOptimizer, Theta
from lopt.celo import Celo
from lopt.features import STEP_MULT, time_features
from lopt.kernels import VELO_COLUMNS
from lopt.kernels.gpu import PLACES, UNROLLED, mlp_shape
from lopt.per_parameter import PerParameterRule
from lopt.small_fc import NUM_COLUMNS, SmallFcLopt
from tasks import Dynamic, Task
from tasks.augmentations.reparam import ReparamTask
from tasks.families.image_mlp import ImageMlpTask
from tasks.random import tag_bits
from worker.fused.problem import Problem, refusal_of_rule, refusal_of_task
from worker.particles import Fresh, Leaves, Particles, Start

TENSOR = ("size", "factored", "p", "g", "m", "v", "of_rows", "of_columns", "rows", "columns", "row_is_rows")
"""Columns of the table of tensors: sizes, and where in a particle's row each accumulator begins (g: in the scratch
row). ``of_rows`` are Adafactor's moments of a matrix's rows, or a vector's; its "row" may be either of the two."""
LAYER = ("inputs", "outputs", "weights", "biases", "weights_gradient", "biases_gradient", "input", "output")
"""Columns of the table of layers: widths, where the parameters begin, and where in the scratch row the rest does."""
TILE = (64, 32, 16)
"""Rows and columns of a product that are computed at a time, and how many terms are added at a time."""
LINES = 32
"""The same of rows or columns whose means are taken."""
MAX_HIDDEN = 32
CACHED = 64
"""Tables that are kept on the device."""
WARPS, REGISTERS = 8, 128
"""Warps of a program and registers of a thread: two programs fill the 65,536 registers of a multiprocessor."""


def refusal(task: Task, lopt: LearnedOptimizer) -> str | None:
    """Why the kernel does not serve this task under this rule, whatever the device; None where it does."""
    if find_spec("triton") is None:
        return "triton is not installed"
    small = isinstance(lopt, SmallFcLopt) and lopt.hidden_size <= MAX_HIDDEN
    if not small and not (isinstance(lopt, Celo) and lopt.phase == 1):
        return f"the rule is {lopt.name}: expected small_fc_lopt of at most {MAX_HIDDEN} units, or celo's phase 1"
    inner = task.task if isinstance(task, ReparamTask) else task
    if not isinstance(inner, ImageMlpTask) or inner.config.loss != "cross_entropy" or inner.config.activation != "relu":
        return "the task is not a relu MLP that classifies under cross entropy"
    return refusal_of_task(task) or refusal_of_rule(lopt)


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

    As ``cpu.run``: ``new`` holds what ``starts``, in their order, begin with. Parameters and accumulators become views
    of one tensor. The host does not wait for the device.
    """
    from worker.fused.triton_window import window

    if not isinstance(lopt, PerParameterRule):
        raise TypeError(f"the rule is {lopt.name}: ask worker.fused.refusal first")
    device, num_tasks, data = batches.device, len(batches), problem.dataset
    images, labels, order = data.pixels.on(device)
    layout = _layout(problem.widths, problem.batch_size, device)
    course = _course(starts, num_tasks, steps, device)

    flat = _rows(layout.leaves, particles.params | particles.state)
    fresh = _rows(layout.params, new.params if new else particles.params)
    scratch = flat.new_empty(len(flat), layout.scratch_size)
    tau = _taus(problem.tau, particles.dynamic, new, course)
    iterations = _iterations(particles.state["iteration"], course)
    weights, first_bias, factor = _rule(lopt, theta, iterations)
    losses = flat.new_empty(steps, len(flat))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        window[(len(flat),)](
            flat, flat.shape[1], scratch, scratch.shape[1],
            layout.layers, len(layout.layers), layout.tensors, len(layout.tensors),
            weights, weights.shape[1], first_bias, course.begins, fresh, fresh.shape[1], tau,
            batches, _tags(steps, device), images, labels, order, data.rows.start, data.num_examples, losses,
            steps, num_tasks, problem.batch_size, factor,
            side=data.size, shift=data.shift, noise=data.noise, whole=255 if images.dtype == torch.uint8 else 1,
            classes=max(16, 1 << (problem.widths[-1] - 1).bit_length()),
            outputs=theta["mlp.w2"].shape[-1], clipped=lopt.columns == VELO_COLUMNS, scaled=lopt.parameter_scaled,
            max_gradient=lopt.max_gradient or 0.0, diag_eps=lopt.diag_eps, **_shape(first_bias.shape[-1]),
        )  # fmt: skip
    leaves = {leaf.name: flat[:, leaf.start : leaf.end].reshape(-1, *leaf.shape) for leaf in layout.leaves}
    particles.params = {leaf.name: leaves.pop(leaf.name) for leaf in layout.params}
    particles.state = {"iteration": iterations[:, -1] + 1, **leaves}
    return losses


def _shape(hidden: int) -> dict[str, int | str]:
    """How the kernel is built for a number of hidden units of the rule."""
    shape = mlp_shape(hidden)
    block = 64 if shape["padded"] else 32 * WARPS
    return shape | {"block": block, "num_warps": WARPS, "maxnreg": REGISTERS, "num_stages": 1}


class _Course(NamedTuple):
    """What is known of a window of W steps of n tasks before it begins, each (W, n).

    ``begins``: int32, the number of the start that this step is the first of, or -1; ``origin``: int64, that of the
    episode under way: n + the number of its start, or the number of the task where it began before the window;
    ``elapsed``: steps since then.
    """

    begins: Tensor
    origin: Tensor
    elapsed: Tensor


def _course(starts: Sequence[Start], num_tasks: int, steps: int, device: torch.device) -> _Course:
    """``starts`` are in the order of their steps."""
    begins = torch.full((steps, num_tasks), -1)
    for number, start in enumerate(starts):
        begins[start.step, start.task] = number
    latest, step = begins.cummax(0).values, torch.arange(steps).unsqueeze(1)
    began = torch.tensor([0, *(start.step for start in starts)])[latest + 1]
    origin = torch.where(latest >= 0, num_tasks + latest, torch.arange(num_tasks))
    return _Course(*(_upload(x, device) for x in (begins.to(torch.int32), origin, step - began)))


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """Without the host waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _taus(name: str | None, before: Dynamic, new: Fresh | None, course: _Course) -> Tensor:
    """What the weights are multiplied by in every step: (W, n)."""
    num_tasks = course.begins.shape[1]
    if name is None:
        return torch.ones(course.begins.shape, device=course.begins.device)
    fresh = [new.dynamic[name][: len(new.rows) // 2]] if new else []
    return torch.cat([before[name][:num_tasks], *fresh])[course.origin]


def _iterations(before: Tensor, course: _Course) -> Tensor:
    """The iteration at which every step is taken: (2n, W)."""
    num_tasks = course.begins.shape[1]
    one_side = course.elapsed + torch.where(course.origin < num_tasks, before[:num_tasks], 0)
    return torch.cat([one_side, one_side], 1).T


def _rule(lopt: PerParameterRule, theta: Theta, iterations: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weights and decays of every particle as a row (2n, ...), the first bias in every step (2n, W, h), the factor."""
    first, bias = theta["mlp.w0"], theta["mlp.b0"].unsqueeze(1)
    if isinstance(lopt, SmallFcLopt):
        times = time_features(iterations.flatten()).reshape(*iterations.shape, -1)
        bias = bias + times @ first[:, NUM_COLUMNS:]
        first, decays, factor = first[:, :NUM_COLUMNS], learned_decays(theta), lopt.step_mult
    else:
        bias = bias.expand(-1, iterations.shape[1], -1)
        decays, factor = fixed_decays(bias.device), STEP_MULT
    rest = [theta[f"mlp.{name}"] for name in ("w1", "b1", "w2", "b2")]
    row = [first, *rest, *(decay.expand(len(first), -1) for decay in decays)]
    return torch.cat([x.flatten(1) for x in row], 1), bias.contiguous(), factor


def _rows(leaves: Sequence[_Leaf], tree: Leaves) -> Tensor:
    """Each particle's numbers side by side: (P, total)."""
    return torch.cat([tree[leaf.name].flatten(1) for leaf in leaves], 1)


@lru_cache(CACHED)
def _tags(steps: int, device: torch.device) -> Tensor:
    """What a task's key is folded with in each step: (W,)."""
    return _upload(torch.tensor([tag_bits(step) for step in range(steps)]), device)


class _Leaf(NamedTuple):
    """A tensor of one particle and its place in the particle's row."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class _Layout:
    """Where everything of a particle lies. ``leaves`` are its parameters, w0, b0, w1, ..., and then accumulators."""

    params: list[_Leaf]
    leaves: list[_Leaf]
    scratch_size: int
    layers: Tensor
    tensors: Tensor


@lru_cache(CACHED)
def _layout(widths: tuple[int, ...], batch_size: int, device: torch.device) -> _Layout:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        shapes |= {f"w{i}": (inputs, outputs), f"b{i}": (outputs,)}
    state: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        zeros = init_accumulators(name, torch.empty(1, *shape, device="meta"))
        state |= {key: tuple(leaf.shape[1:]) for key, leaf in zeros.items()}
    at = _places(shapes | state)
    activations = {f"x{i}": (batch_size, width) for i, width in enumerate(widths)}
    # factors of the columns, of the rows' means (three), the first layer times the former, gradients, activations
    factors = {"columns": (PLACES,), "means": (PLACES,), "scaled": (PLACES, UNROLLED)}
    scratch = _places(factors | shapes | activations)

    layers = [
        (*pair, *(place[f"{kind}{i}"].start for place in (at, scratch) for kind in "wb"),
         scratch[f"x{i}"].start, scratch[f"x{i + 1}"].start)
        for i, pair in enumerate(pairwise(widths))
    ]  # fmt: skip
    tensors = []
    for name, shape in shapes.items():
        axes = factored_axes(shape)
        # the moments of a matrix's rows and of its columns: the "row" lacks the larger axis
        kinds = {None: ("diag", "diag"), (0, 1): ("row", "col"), (1, 0): ("col", "row")}[axes]
        own = [at[name].start, scratch[name].start, *(at[f"{kind}/{name}"].start for kind in ("m", "v", *kinds))]
        tensors.append((prod(shape), axes is not None, *own, shape[0], shape[-1], axes != (1, 0)))
    return _Layout(
        [at[name] for name in shapes],
        list(at.values()),
        max(leaf.end for leaf in scratch.values()),
        *(_upload(torch.tensor(words, dtype=torch.int32), device) for words in (layers, tensors)),
    )


def _places(shapes: dict[str, tuple[int, ...]]) -> dict[str, _Leaf]:
    """One after the other."""
    starts = accumulate(map(prod, shapes.values()), initial=0)
    return {name: _Leaf(name, shape, start) for (name, shape), start in zip(shapes.items(), starts, strict=False)}
