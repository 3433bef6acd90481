"""The fused path: a particle's whole window in one call, for MLPs on images and the rules that move every parameter.

Owns which tasks and rules it serves, and what a window needs from torch before and after the call. The kernels are C++
(``cpu``, built at install if there is a compiler) and Triton (``gpu``). They compute what ``worker.paths.StepByStep``
does, to rounding.
Never draws an episode and never knows what the losses are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.base import LearnedOptimizer, Theta
from lopt.kernels.gpu import is_known
from tasks import Task
from worker.fused import cpu, gpu
from worker.fused.problem import problem_of, refusal_of_rule, refusal_of_task
from worker.particles import Fresh, Leaves, Particles, Start, fresh

__all__ = ["Fused", "cpu", "gpu", "refusal"]


def refusal(task: Task, lopt: LearnedOptimizer, device: torch.device) -> str | None:
    """Why the fused path does not serve this task under this rule; None where it does."""
    if device.type == "cuda":
        return gpu.refusal(task, lopt) if is_known(device) else "the kernels are for NVIDIA GPUs since sm_80"
    if device.type != "cpu":
        return f"no fused kernels for {device.type}"
    if cpu.library() is None:
        return "the kernels are not built: there was no compiler when paceline was installed"
    return refusal_of_task(task) or refusal_of_rule(lopt)


class Fused:
    """A ``worker.paths.Path``; ``refusal`` must have been None."""

    name = "fused"

    def __init__(self, task: Task, lopt: LearnedOptimizer) -> None:
        self.task, self.lopt, self.problem = task, lopt, problem_of(task)

    def run(self, theta: Theta, particles: Particles, starts: list[Start], batches: Tensor, steps: int) -> Tensor:
        new = fresh(self.task, self.lopt, theta, starts, batches.device) if starts else None
        before = particles.dynamic
        if new is not None:
            _allocate(particles, new)
        run = gpu.run if batches.is_cuda else cpu.run
        raw = run(self.problem, self.lopt, theta, particles, new, starts, batches, steps)
        losses = self._meta_losses(raw, before or particles.dynamic, new, starts)
        if new is not None:
            _take_dynamic(particles, new, starts)
        return losses

    def _meta_losses(self, raw: Tensor, before: Leaves, new: Fresh | None, starts: list[Start]) -> Tensor:
        """Of the raw losses (steps, 2n), each under the dynamic configuration of its episode."""
        by_particle = raw.T  # normalizers take particles first
        losses = self.task.normalizer(by_particle, before)
        if new is not None and self.problem.dynamic_normalizer:
            for k, start in enumerate(starts):
                rows, sides = new.rows[[k, k + len(starts)]], [k, k + len(starts)]
                dynamic = {name: leaf[sides] for name, leaf in new.dynamic.items()}
                losses[rows, start.step :] = self.task.normalizer(by_particle[rows, start.step :], dynamic)
        return losses.T


def _allocate(particles: Particles, new: Fresh) -> None:
    """Room for all particles, where none has begun yet: all begin with the window's first step then."""
    if not particles.params:
        for part in ("params", "state", "dynamic"):
            leaves = getattr(new, part)
            setattr(
                particles, part, {k: leaf.new_zeros(particles.count, *leaf.shape[1:]) for k, leaf in leaves.items()}
            )


def _take_dynamic(particles: Particles, new: Fresh, starts: list[Start]) -> None:
    """The dynamic configuration of each task's last start of the window."""
    last = {start.task: k for k, start in enumerate(starts)}
    sides = [*last.values(), *(k + len(starts) for k in last.values())]
    for name, leaf in new.dynamic.items():
        particles.dynamic[name] = particles.dynamic[name].index_copy(0, new.rows[sides], leaf[sides])
