"""How a window of inner steps is computed: three ways with one meaning.

Owns the choice and the two ways that go step by step in torch. ``reference`` is eager torch throughout, the
definition; ``generic`` serves every task and rule; ``fused`` (``worker.fused``) computes a particle's whole window in
one call, for MLP tasks. Never draws an episode and never knows what the losses are for.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from configs.schema import ConfigError
from lopt import kernels
from lopt.base import LearnedOptimizer, Theta
from tasks import Batch, Task
from tasks.random import fold
from worker import fused
from worker.particles import Particles, Start, fresh


class Path(Protocol):
    """A way to compute windows; ``name`` is what ``worker.path`` calls it."""

    name: str

    def run(self, theta: Theta, particles: Particles, starts: list[Start], batches: Tensor, steps: int) -> Tensor:
        """``steps`` inner steps of all particles in place, episodes beginning as ``starts`` say.

        theta leaves (2n, ...); ``batches`` (n,) int64, the key of each task's batches; returns the meta-losses
        (steps, 2n), each before its update.
        """


def choose(path: str, task: Task, lopt: LearnedOptimizer, device: torch.device) -> Path:
    """The path that ``worker.path`` names; ``auto`` is ``fused`` where that serves, else ``generic``.

    Raises ConfigError where ``fused`` is demanded and does not serve.
    """
    if path in ("auto", "fused"):
        why_not = fused.refusal(task, lopt, device)
        if why_not is None:
            return fused.Fused(task, lopt)
        if path == "fused":
            raise ConfigError("worker.path", path, f"auto, generic or reference: {why_not}")
    return StepByStep(task, lopt, "reference" if path == "reference" else "generic")


class StepByStep:
    """All particles take each step together, in torch."""

    def __init__(self, task: Task, lopt: LearnedOptimizer, name: str) -> None:
        self.task, self.lopt, self.name = task, lopt, name

    def run(self, theta: Theta, particles: Particles, starts: list[Start], batches: Tensor, steps: int) -> Tensor:
        begin = {step: list(group) for step, group in groupby(starts, key=lambda start: start.step)}
        losses = []
        with kernels.reference() if self.name == "reference" else nullcontext():
            for step in range(steps):
                if step in begin:
                    particles.begin(fresh(self.task, self.lopt, theta, begin[step], batches.device))
                losses.append(self._step(theta, particles, self.task.batch("train", fold(batches, step))))
        return torch.stack(losses)

    def _step(self, theta: Theta, particles: Particles, batch: Batch) -> Tensor:
        raw, grads, task_state = self.task.losses_and_grads(
            particles.params, particles.task_state, both_sides(batch), particles.dynamic
        )
        particles.params, particles.state = self.lopt.update_particles(
            theta, particles.state, particles.params, grads, raw
        )
        particles.task_state = task_state
        return self.task.normalizer(raw, particles.dynamic)


def both_sides(one_side: Batch) -> Batch:
    """Batches of n tasks, (n, ...), as those of 2n particles."""
    return {name: torch.cat([leaf, leaf]) for name, leaf in one_side.items()}
