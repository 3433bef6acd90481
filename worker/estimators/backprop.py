"""Back-propagation through inner training: exact meta-gradients of short horizons, to hold the estimators against.

Owns the differentiable inner step. Never used where speed or memory matters: every step's intermediate values are
kept, and past some tens of steps the gradient of a chaotic training explodes (Metz et al. 2019, arXiv:1810.10180).

The rule is its reference in torch (``lopt.kernels.reference``), and both sides of a pair are the same training here.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from configs.checks import ConfigError
from lopt import kernels
from lopt.base import Theta
from tasks import Batch, Task, generator
from tasks.augmentations.augmented import AugmentedTask
from tasks.augmentations.reparam import ReparamTask
from tasks.random import fold, keys
from worker.estimators import base
from worker.estimators.base import Estimate, EstimatorState, GradientEstimator
from worker.particles import Particles, fresh
from worker.paths import both_sides
from worker.unroll import Unroll, log_uniform


class _Backprop(GradientEstimator):
    """What both share: theta as a leaf, and windows of steps that can be differentiated."""

    def __init__(self, unroll: Unroll) -> None:
        super().__init__(unroll)
        why_not = _refusal(unroll.task)
        if why_not is not None:
            raise ConfigError("estimator.name", "backprop", f"an evolution strategy: {why_not}")

    def _leaf(self, theta: Theta) -> tuple[Tensor, Theta]:
        """Flat theta (D,) that gathers the gradient, and the 2n thetas made of it."""
        spec, device = self.unroll.lopt.spec, self.unroll.device
        flat = spec.flatten(theta).to(device).requires_grad_()
        frozen = {name: leaf.to(device) for name, leaf in theta.items()}
        return flat, spec.unflatten(flat.expand(2 * self.unroll.num_tasks, -1), frozen)

    def _run(self, thetas: Theta, particles: Particles, steps: int, number: int, length: int | None) -> Tensor:
        """As ``Unroll.run``, with a graph: meta-losses (steps, 2n)."""
        starts, _ = self.unroll.plan(particles, steps, length)
        begin = {step: list(group) for step, group in groupby(starts, key=lambda start: start.step)}
        batches = self._keys("batches", number)
        losses = []
        with torch.enable_grad(), kernels.reference():
            for step in range(steps):
                if step in begin:
                    task, rule, device = self.unroll.task, self.unroll.lopt, self.unroll.device
                    particles.begin(fresh(task, rule, thetas, begin[step], device))
                batch = both_sides(self.unroll.task.batch("train", fold(batches, step)))
                losses.append(self._step(thetas, particles, batch))
        return torch.stack(losses)

    def _step(self, thetas: Theta, particles: Particles, batch: Batch) -> Tensor:
        params = {
            name: leaf if leaf.requires_grad else leaf.requires_grad_() for name, leaf in particles.params.items()
        }
        raw = torch.func.vmap(self.unroll.task.loss)(params, batch, particles.dynamic)
        leaves = torch.autograd.grad(raw.sum(), list(params.values()), create_graph=True)
        grads = dict(zip(params, leaves, strict=True))
        particles.params, particles.state = self.unroll.lopt.update_particles(
            thetas, particles.state, params, grads, raw
        )
        losses: Tensor = self.unroll.task.normalizer(raw, particles.dynamic)
        return losses

    def _final(self, particles: Particles, number: int, split: str) -> Tensor:
        """As ``Unroll.final_losses``, with a graph."""
        batches = self._keys("final", number)
        total = torch.zeros(2 * self.unroll.num_tasks, device=self.unroll.device)
        for which in range(base.FINAL_BATCHES):
            batch = both_sides(self.unroll.task.batch(split, fold(batches, which)))
            raw = torch.func.vmap(self.unroll.task.loss)(particles.params, batch, particles.dynamic)
            total = total + self.unroll.task.normalizer(raw, particles.dynamic)
        return total / base.FINAL_BATCHES

    def _keys(self, purpose: str, number: int) -> Tensor:
        return keys(self.unroll.num_tasks, *self.unroll.key, purpose, number, device=self.unroll.device)


class Backprop(_Backprop):
    """Back-propagation through whole trainings (Maclaurin et al. 2015, arXiv:1502.03492): the exact meta-gradient.

    Lengths, data and objectives are those of ``FullES``, so that with one key the two are about the same trainings.
    """

    def __init__(self, unroll: Unroll, *, objective: str, split: str = "train") -> None:
        super().__init__(unroll)
        self.objective, self.split = objective, split

    def init(self) -> EstimatorState:
        return {"windows": torch.tensor(0)}

    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        number = int(state["windows"])
        length = log_uniform(self.unroll.horizon, generator(*self.unroll.key, "length", number))
        flat, thetas = self._leaf(theta)
        particles = self.unroll.start(episode=number)
        losses = self._run(thetas, particles, length, number, length)
        if self.objective == "final":
            outcome = self._final(particles, number, self.split)
        else:
            outcome = losses.mean(0) if self.objective == "mean" else losses.amin(0)
        (gradient,) = torch.autograd.grad(outcome.mean(), flat)
        estimate = Estimate(gradient.cpu(), float(outcome.detach().mean()), losses.numel())
        return estimate, {"windows": torch.tensor(number + 1)}


class TruncatedBackprop(_Backprop):
    """Back-propagation through one window at a time (Werbos 1990; Andrychowicz et al. 2016, arXiv:1606.04474); biased.

    The state that a window starts from counts as a constant.
    """

    def __init__(self, unroll: Unroll, *, window: int) -> None:
        super().__init__(unroll)
        self.window = window

    def init(self) -> EstimatorState:
        return self.unroll.start().tensors() | {"windows": torch.tensor(0)}

    def estimate(self, theta: Theta, state: EstimatorState) -> tuple[Estimate, EstimatorState]:
        number = int(state["windows"])
        flat, thetas = self._leaf(theta)
        particles = Particles.from_tensors(state, self.unroll.device)
        losses = self._run(thetas, particles, self.window, number, None)
        (gradient,) = torch.autograd.grad(losses.mean(), flat)
        estimate = Estimate(gradient.cpu(), float(losses.detach().mean()), losses.numel())
        constants = {name: leaf.detach() for name, leaf in particles.tensors().items()}
        return estimate, constants | {"windows": torch.tensor(number + 1)}


def _refusal(task: Task) -> str | None:
    """Why ``task`` cannot be differentiated through; None if it can: its gradients are those of its loss."""
    while isinstance(task, ReparamTask):
        task = task.task
    overridden = type(task).losses_and_grads is not Task.losses_and_grads
    if isinstance(task, AugmentedTask) or overridden:
        return f"{type(task).__name__} computes gradients that are not the derivative of its loss"
    return None
