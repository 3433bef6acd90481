"""Inner trainings under a learned optimizer, many at once, and back-propagation through them.

Owns: which update rule a ``LoptTraining`` is of, the trainings of one (how they start, one step, whole ones) and the
gradient of their losses with respect to theta. This is the one module of the room that imports ``lopt``, whose rules it
uses as they are. Must never hold an update rule of its own or train theta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lopt import kernels
from lopt.accumulators import factored_axes
from lopt.base import LearnedOptimizer, Theta, ThetaSpec
from lopt.features import EXP_MULT, STEP_MULT, TIMESCALES, mlp_entries
from lopt.hand_designed import SGD, SGDM, Adam, HandDesigned
from lopt.hand_designed.rule import Value, Values, correction
from lopt.mlp_lopt import MlpLopt
from lopt.small_fc import SmallFcLopt
from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState
from tasks.data.library import Library
from tasks.keys import generator as keyed
from tasks.random import bits, fold

if TYPE_CHECKING:
    from tasks.families.lopt_training import LoptTraining

NETWORKS = ("mlp_lopt", "small_fc")
"""The optimizers that are a network applied to every parameter."""


class DifferentiableAdam(Adam):
    """Adam with 1e-8 under the root too, as the original's: without it, a gradient of 0 makes theta's gradient NaN.

    p <- p - lr m_hat / (sqrt(v_hat + 1e-8) + eps).
    """

    ROOT_EPS = 1e-8

    def prepare(self, h: Mapping[str, Value], state: dict[str, Tensor]) -> Values:
        decays = {name: torch.as_tensor(h[name]).clamp(min=1e-7) for name in ("beta1", "beta2")}  # log(0) is at 0
        values = super().prepare({**h, **decays}, state)
        return values | {"root_eps": self.ROOT_EPS * correction(decays["beta2"], state["iteration"])}

    def moved(self, h: Mapping[str, Value], p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return super().moved(h, p, m, v + h["root_eps"])


def rule_of(static: LoptTraining) -> LearnedOptimizer:
    """The update rule; the hand-designed ones have their hyper-parameters in log space."""
    hand_designed: dict[str, type[HandDesigned]] = {"sgd": SGD, "sgdm": SGDM, "adam": DifferentiableAdam}
    if static.optimizer in hand_designed:
        return hand_designed[static.optimizer](log_space=True)
    kind = MlpLopt if static.optimizer == "mlp_lopt" else SmallFcLopt
    rule: MlpLopt | SmallFcLopt = kind(static.hidden_size)
    first, *others = rule.spec.entries
    hidden = [static.hidden_size] * static.hidden_layers
    decays = [entry for entry in others if not entry.name.startswith("mlp.")]
    rule.spec = ThetaSpec((*mlp_entries(first.shape[0], *hidden, 2), *decays))
    return rule


def network_flops(static: LoptTraining, shapes: list[tuple[int, ...]]) -> int:
    """Of the optimizer's network in one update of tensors of these shapes."""
    if static.optimizer not in NETWORKS:
        return 0
    later = static.hidden_size * (static.hidden_size * (static.hidden_layers - 1) + 2)
    inputs = len(TIMESCALES)
    for shape in shapes:
        inputs += 8 * prod(shape) if static.optimizer == "mlp_lopt" else _small_fc_inputs(shape)
    return 2 * (inputs * static.hidden_size + later * sum(prod(shape) for shape in shapes))


def _small_fc_inputs(shape: tuple[int, ...]) -> int:
    """Numbers in small_fc_lopt's 28 columns, of which 12 are constant along an axis where there are two."""
    axes = factored_axes(shape)
    if axes is None:
        return 28 * prod(shape)
    return 16 * prod(shape) + sum(6 * prod(shape) // shape[axis] for axis in axes)


TRAININGS = ("params/", "state/", "dynamic/")
Trainings = dict[str, Tensor]
"""N inner trainings on their way: ``params/<name>``, ``state/<name>`` and ``dynamic/<name>``, leaves (N, ...)."""

InnerGradient = Callable[[Task, Params, Batch, Dynamic], tuple[Tensor, Params]]
"""The losses (N,) of N trainings and their gradients, both differentiable."""


def _by_func(task: Task, params: Params, batch: Batch, dynamic: Dynamic) -> tuple[Tensor, Params]:
    """By torch.func: also where this is itself within its transformations."""

    def total(params: Params) -> tuple[Tensor, Tensor]:
        losses = torch.func.vmap(task.loss)(params, batch, dynamic)
        return losses.sum(), losses

    grads, losses = torch.func.grad(total, has_aux=True)(params)
    return losses, grads


def _by_autograd(task: Task, params: Params, batch: Batch, dynamic: Dynamic) -> tuple[Tensor, Params]:
    """By autograd, in half the time; differentiable if gradients are enabled, and then ``params`` must require them."""
    if not torch.is_grad_enabled():
        return task.losses_and_grads(params, {}, batch, dynamic)[:2]
    losses = task._forward(params, batch, dynamic)
    grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=True)
    return losses, dict(zip(params, grads, strict=True))


class LoptTrainingTask(Task):
    """One ``LoptTraining`` by back-propagation. P particles are N = P outer_batch trainings, computed together.

    All is float32 also where bfloat16 comes in: theta and data are rounded then and the inner training is not, as JAX's
    type promotion has it in the original.
    """

    def __init__(self, static: LoptTraining, library: Library) -> None:
        self.static, self.inner, self.rule = static, static.inner.build(library), rule_of(static)
        self.datasets, self.batch_size = self.inner.datasets, static.outer_batch
        self.worst_loss = self.inner.worst_loss

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        return self.rule.init_theta(generator)

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        with kernels.reference():
            return self._unrolled(_with_axis(params), _with_axis(batch), _by_func)[0]

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The loss as it is, since it is a mean of normalised losses."""
        worst = self.worst_loss
        return torch.nan_to_num(loss, nan=worst, posinf=worst, neginf=worst).clamp(max=worst)

    def batch(self, split: str, keys: Tensor) -> Batch:
        shape = (len(keys), self.static.outer_batch, self.static.steps)
        data = self.inner.batch(split, bits(fold(keys, "data"), shape[1] * shape[2]).flatten())
        batch = {f"data/{name}": leaf.reshape(*shape, *leaf.shape[1:]) for name, leaf in data.items()}
        drawn = {key: self.draw_starts(key) for key in keys.tolist()}
        for name in next(iter(drawn.values())):
            batch[name] = torch.stack([drawn[key][name] for key in keys.tolist()]).to(keys.device)
        return {**batch, "key": fold(keys, "model")}

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        """Back-propagation that remembers only what is carried from step to step, and computes each step again.

        So one step's graph is all the memory that it takes; the original's jax.remat does the same.
        """
        theta, trainings = self._theta(params), self.begin(_one_side(starts_of(batch)))
        history, total = [], torch.zeros((), device=batch["key"].device)
        with torch.no_grad():
            for step in range(self.static.steps):
                history.append(trainings)
                losses, trainings = self.step(theta, trainings, _one_side(of_step(batch, step)))
                total = total + losses
        gradient = {name: torch.zeros_like(leaf) for name, leaf in theta.items()}
        adjoint = {name: torch.zeros_like(leaf) for name, leaf in _differentiable(trainings).items()}
        for step in reversed(range(self.static.steps)):
            of_theta, adjoint = self._pull_back(theta, history[step], _one_side(of_step(batch, step)), adjoint)
            gradient = {name: leaf + of_theta[name] for name, leaf in gradient.items()}
        split = (len(batch["key"]), self.static.outer_batch)
        scale = 1 / (self.static.steps * self.static.outer_batch)
        grads = {name: leaf.reshape(*split, *leaf.shape[1:]).sum(1) * scale for name, leaf in gradient.items()}
        return LossesAndGrads(total.reshape(split).sum(1) * scale, grads, state)

    def _forward(self, params: Params, batch: Batch, dynamic: Dynamic) -> Tensor:
        return self._unrolled(params, batch, _by_autograd)

    def _unrolled(self, params: Params, batch: Batch, gradient: InnerGradient) -> Tensor:
        """The losses (P,) of new trainings."""
        theta, trainings = self._theta(params), self.begin(_one_side(starts_of(batch)))
        total = torch.zeros((), device=batch["key"].device)
        for step in range(self.static.steps):
            losses, trainings = self.step(theta, trainings, _one_side(of_step(batch, step)), gradient)
            total = total + losses
        return total.reshape(-1, self.static.outer_batch).mean(1) / self.static.steps

    def _pull_back(
        self, theta: Theta, trainings: Trainings, data: Batch, adjoint: Trainings
    ) -> tuple[Theta, Trainings]:
        """The gradients of this step's losses plus ``adjoint`` of what it carries on, by theta and what came to it."""
        with torch.enable_grad():
            theta = {name: leaf.detach().requires_grad_() for name, leaf in theta.items()}
            before = {name: leaf.detach().requires_grad_() for name, leaf in _differentiable(trainings).items()}
            losses, after = self.step(theta, trainings | before, data)
            grads = torch.autograd.grad(
                [losses, *(after[name] for name in adjoint)],
                [*theta.values(), *before.values()],
                [torch.ones_like(losses), *adjoint.values()],
                materialize_grads=True,
            )
        by_theta, by_before = grads[: len(theta)], grads[len(theta) :]
        return dict(zip(theta, by_theta, strict=True)), dict(zip(before, by_before, strict=True))

    def draw_starts(self, key: int) -> dict[str, Tensor]:
        """``start/<name>`` and ``dynamic/<name>`` (outer_batch, ...) of new trainings."""
        draws = keyed("inner trainings", key)
        dynamic = self.inner.sample_dynamic(draws, self.static.outer_batch)
        rows = [{name: leaf[i] for name, leaf in dynamic.items()} for i in range(self.static.outer_batch)]
        each = [self.inner.init(draws, row) for row in rows]
        starts = {f"start/{name}": torch.stack([one[name] for one in each]) for name in each[0]}
        return starts | {f"dynamic/{name}": leaf for name, leaf in dynamic.items()}

    def _theta(self, params: Params) -> Theta:
        """theta (N, ...) of every training."""
        return {name: widened(leaf).repeat_interleave(self.static.outer_batch, 0) for name, leaf in params.items()}

    def begin(self, starts: Batch) -> Trainings:
        """New trainings, from ``start/<name>`` and ``dynamic/<name>`` (*lead, ...) of which N is the product."""
        params = part(starts, "start/")
        leaf = next(iter(params.values()))
        horizons = torch.full((len(leaf),), self.static.num_steps, device=leaf.device)
        state = self.rule.init_particles({}, params, horizons)
        return {**named("params/", params), **named("state/", state), **named("dynamic/", part(starts, "dynamic/"))}

    def step(
        self, theta: Theta, trainings: Trainings, data: Batch, gradient: InnerGradient = _by_autograd
    ) -> tuple[Tensor, Trainings]:
        """One inner step of all trainings: their normalised losses (N,) before it, and what they are after it."""
        params, state, dynamic = (part(trainings, prefix) for prefix in TRAININGS)
        losses, grads = gradient(self.inner, params, data, dynamic)
        # the fused kernels are for two hidden layers; where something is differentiated they stand back by themselves
        with nullcontext() if self.static.hidden_layers == 2 else kernels.reference():
            params, state = self.rule.update_particles(self._scaled(theta), state, params, grads, losses)
        after = {**trainings, **named("params/", params), **named("state/", state)}
        return self.inner.normalizer(losses, dynamic), after

    def _scaled(self, theta: Theta) -> Theta:
        """theta whose network's step 0.001 d exp(0.001 a) is step_mult d exp(exp_mult a) of the theta given."""
        if self.static.optimizer not in NETWORKS:
            return theta
        last = [f"mlp.{leaf}{self.static.hidden_layers}" for leaf in ("w", "b")]
        factors = theta[last[0]].new_tensor([self.static.step_mult / STEP_MULT, self.static.exp_mult / EXP_MULT])
        return {**theta, **{name: theta[name] * factors for name in last}}


def starts_of(batch: Batch) -> Batch:
    """How new trainings start: ``start/<name>`` and ``dynamic/<name>`` (P, outer_batch, ...)."""
    return {name: widened(leaf) for name, leaf in batch.items() if name.startswith(("start/", "dynamic/"))}


def of_step(batch: Batch, step: int) -> Batch:
    """The inner batches (P, outer_batch, ...) of a step."""
    return {name: widened(leaf[:, :, step]) for name, leaf in part(batch, "data/").items()}


def widened(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype == torch.bfloat16 else leaf


def _one_side(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """(P, outer_batch, ...) as (N, ...)."""
    return {name: leaf.flatten(0, 1) for name, leaf in leaves.items()}


def _differentiable(trainings: Trainings) -> Trainings:
    """What back-propagation goes through, from step to step."""
    return {
        name: leaf
        for name, leaf in trainings.items()
        if leaf.is_floating_point() and name.startswith(("params/", "state/"))
    }


def _with_axis(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.unsqueeze(0) for name, leaf in leaves.items()}


def named(prefix: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: leaf for name, leaf in leaves.items()}


def part(leaves: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is called ``prefix`` and something, without the prefix."""
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
