"""How a window of inner steps is computed: three ways with one meaning.

Owns the choice and the two ways that go step by step in torch. ``reference`` is eager torch throughout, the
definition; ``generic`` serves every task and rule, its losses and gradients compiled (``worker.compiled``); ``fused``
(``worker.fused``) computes a particle's whole window in one call, for MLP tasks. Never draws an episode and never
knows what the losses are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import groupby, islice, pairwise
from typing import Protocol

import torch
from torch import Tensor

from configs.checks import ConfigError
from lopt import kernels
from lopt.base import LearnedOptimizer, Params, Theta
from tasks import Batch, Dynamic, Task, TaskState
from tasks.base import LossesAndGrads
from tasks.random import fold_each
from worker import fused
from worker.compiled import Compiled
from worker.particles import Particles, Start, fresh

BLOCK_BYTES = 1 << 22
"""Of batches that are drawn together, because drawing few numbers takes as long as drawing more."""
Gradient = Callable[[Params, TaskState, Batch, Dynamic], LossesAndGrads]


class Path(Protocol):
    """A way to compute windows; ``name`` is what ``worker.path`` calls it."""

    name: str

    def run(self, theta: Theta, particles: Particles, starts: list[Start], batches: Tensor, steps: int) -> Tensor:
        """``steps`` inner steps of all particles in place, episodes beginning as ``starts`` say.

        theta leaves (2n, ...); ``batches`` (n,) int64, the key of each task's batches; returns the meta-losses
        (steps, 2n), each before its update.
        """


def choose(path: str, task: Task, lopt: LearnedOptimizer, device: torch.device, compiled: Compiled | None) -> Path:
    """The path that ``worker.path`` names; ``auto`` is ``fused`` where that serves, else ``generic``.

    ``compiled`` is the task's for the generic path; None leaves that to eager torch. Raises ConfigError where
    ``fused`` is demanded and does not serve.
    """
    if path in ("auto", "fused"):
        why_not = fused.refusal(task, lopt, device)
        if why_not is None:
            return fused.Fused(task, lopt)
        if path == "fused":
            raise ConfigError("worker.path", path, f"auto, generic or reference: {why_not}")
    if path == "reference":
        return StepByStep(task, lopt, "reference", task.losses_and_grads)
    return StepByStep(task, lopt, "generic", compiled or task.losses_and_grads)


class StepByStep:
    """All particles take each step together, in torch."""

    def __init__(self, task: Task, lopt: LearnedOptimizer, name: str, losses_and_grads: Gradient) -> None:
        self.task, self.lopt, self.name, self.losses_and_grads = task, lopt, name, losses_and_grads

    def run(self, theta: Theta, particles: Particles, starts: list[Start], batches: Tensor, steps: int) -> Tensor:
        begin = {step: list(group) for step, group in groupby(starts, key=lambda start: start.step)}
        losses: list[Tensor] = []
        data = self._batches(batches, steps)
        with kernels.reference() if self.name == "reference" else nullcontext():
            for first, last in pairwise([*sorted({0, *begin}), steps]):
                if first in begin:
                    particles.begin(fresh(self.task, self.lopt, theta, begin[first], batches.device))
                if last > first:
                    losses.append(self._segment(theta, particles, islice(data, last - first)))
        return torch.cat(losses)

    def _segment(self, theta: Theta, particles: Particles, batches: Iterable[Batch]) -> Tensor:
        """A step for each of ``batches``, in which no episode begins: meta-losses (number of batches, 2n)."""
        losses = []
        stepper = self.lopt.stepper(theta, particles.state, particles.params)
        for batch in batches:
            raw, grads, particles.task_state = self.losses_and_grads(
                stepper.params, particles.task_state, batch, particles.dynamic
            )
            stepper.step(grads, raw)
            losses.append(raw)
        particles.params, particles.state = stepper.params, stepper.state
        return self.task.normalizer(torch.stack(losses, 1), particles.dynamic).T

    def _batches(self, keys: Tensor, steps: int) -> Iterator[Batch]:
        """The batches of ``steps`` steps, of both sides of the pairs, as many drawn at once as are small together."""
        step, at_once = 0, 1
        while step < steps:
            block = fold_each(keys, range(step, min(step + at_once, steps)))
            drawn = self.task.batch("train", block.flatten())
            by_step = {name: leaf.view(*block.shape, *leaf.shape[1:]) for name, leaf in drawn.items()}
            pairs = [torch.cat([leaf, leaf], 1).unbind() for leaf in by_step.values()]
            for leaves in zip(*pairs, strict=True):
                yield dict(zip(drawn, leaves, strict=True))
            step += len(block)
            at_once = max(1, BLOCK_BYTES * len(block) // sum(leaf.nbytes for leaf in drawn.values()))


def both_sides(one_side: Batch) -> Batch:
    """Batches of n tasks, (n, ...), as those of 2n particles."""
    return {name: torch.cat([leaf, leaf]) for name, leaf in one_side.items()}
