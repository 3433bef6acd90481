"""Learned-optimizer training whose gradient is estimated on windows of trainings, by truncated ES or PES.

Owns: the perturbations, what goes on from step to step, and which perturbation a loss is credited to. Must never
differentiate anything, nor know an update rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, TaskState
from tasks.families.lopt_unroll import TRAININGS, LoptTrainingTask, named, of_step, part, starts_of, widened
from tasks.random import fold, integers, normal

STATE = "lopt_training/"


class EsLoptTrainingTask(LoptTrainingTask):
    """One ``LoptTraining`` by truncated ES or PES (the original's TruncGradEstTask of a TruncatedPES).

    ``outer_batch`` trainings of each particle under theta + eps and as many under theta - eps go on by ``window``
    steps, with eps drawn anew for each; one that is over begins anew. The gradient is a mean over the trainings: the
    difference of both sides' losses, a mean over the steps, / (2 sigma^2), times eps, or in PES times the sum of all
    eps since the training began (Vicol et al. 2021). So that trainings are out of step, each one's first is over early,
    at random. Two things differ from the original: each loss is credited to the eps that it depends on also in windows
    in which a training begins anew, and no step is lost in beginning.

    State, all under ``lopt_training/``: ``params/``, ``state/`` and ``dynamic/`` (P, 2, outer_batch, ...), ``step`` and
    ``end`` (P, outer_batch), and in PES ``sum/<name>`` (P, outer_batch, ...); where it is zero every training is over.
    ``loss``, which has no state, is of new trainings and their first ``window`` steps.
    """

    def init_state(self, params: Params) -> TaskState:
        like = next(iter(params.values()))
        lead = (len(like), self.static.outer_batch)
        state = {name: like.new_zeros(lead, dtype=torch.int64) for name in ("step", "end")}
        for name, leaf in self.begin(self.draw_starts(0)).items():
            state[name] = like.new_zeros(lead[0], 2, *leaf.shape, dtype=leaf.dtype)
        if self.static.gradient == "pes":
            state |= {f"sum/{name}": like.new_zeros(*lead, *leaf.shape[1:]).float() for name, leaf in params.items()}
        return named(STATE, state)

    @torch.no_grad()
    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        static, mine = self.static, part(state, STATE)
        eps = self._perturbations(params, batch["key"])
        sides = {name: torch.stack([leaf, -leaf], 1) for name, leaf in eps.items()}
        theta = {name: (widened(leaf)[:, None, None] + sides[name]).flatten(0, 2) for name, leaf in params.items()}
        window = self._run(theta, mine, batch)
        weight = 1 / (2 * static.sigma**2 * static.window * static.outer_batch)
        grads, after = {}, window.state
        for name, leaf in eps.items():
            total = leaf
            if static.gradient == "pes":
                total = leaf + mine[f"sum/{name}"]
                after[f"sum/{name}"] = torch.where(_align(window.begun, leaf), leaf, total)
            credited = _align(window.old, leaf) * total + _align(window.new, leaf) * leaf
            grads[name] = weight * credited.sum(1)
        return LossesAndGrads(window.losses, grads, {**state, **named(STATE, after)})

    def _perturbations(self, params: Params, keys: Tensor) -> Params:
        """eps of every training on its + side, (P, outer_batch, *shape)."""
        count, keys = self.static.outer_batch, fold(keys, "perturbation")
        drawn = {name: normal(fold(keys, name), (count, *leaf.shape[1:])) for name, leaf in params.items()}
        return {name: self.static.sigma * leaf for name, leaf in drawn.items()}

    def _run(self, theta: Params, state: TaskState, batch: Batch) -> Window:
        """``window`` steps of all trainings (P, 2, outer_batch) under theta (N, ...), from ``state``."""
        static = self.static
        shape = (len(batch["key"]), 2, static.outer_batch)
        early = 1 + integers(fold(batch["key"], "first"), static.num_steps, (static.outer_batch,))
        step, end = state["step"], state["end"]
        trainings = {name: leaf.flatten(0, 2) for name, leaf in state.items() if name.startswith(TRAININGS)}
        begun = torch.zeros_like(step, dtype=torch.bool)
        old, new, total = (torch.zeros_like(step, dtype=torch.float32) for _ in range(3))
        for index in range(static.window):
            over = step >= end
            if bool(over.any()):
                fresh, both = self.begin(_both_sides(starts_of(batch))), over[:, None].expand(shape).flatten()
                trainings = {
                    name: torch.where(_align(both, leaf), fresh[name], leaf) for name, leaf in trainings.items()
                }
                end = torch.where(over, torch.where(end == 0, early, static.num_steps), end)
                step, begun = torch.where(over, 0, step), begun | over
            losses, trainings = self.step(theta, trainings, _both_sides(of_step(batch, index)))
            plus, minus = losses.reshape(shape).unbind(1)
            old, new, total = old + (plus - minus) * ~begun, new + (plus - minus) * begun, total + plus + minus
            step = step + 1
        carried = {name: leaf.reshape(*shape, *leaf.shape[1:]) for name, leaf in trainings.items()}
        return Window(total.mean(1) / (2 * static.window), old, new, begun, {**carried, "step": step, "end": end})


class Window(NamedTuple):
    """What some steps of all trainings gave. (P, outer_batch), but ``losses`` are their mean for each particle (P,).

    ``old`` and ``new``: the sums of the + side's losses less the - side's, before and since the training began in this
    window, if it did (``begun``). ``state``: where the trainings are now.
    """

    losses: Tensor
    old: Tensor
    new: Tensor
    begun: Tensor
    state: TaskState


def _both_sides(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """(P, outer_batch, ...) as (N, ...), where N = P 2 outer_batch and both sides are alike."""
    return {name: torch.stack([leaf, leaf], 1).flatten(0, 2) for name, leaf in leaves.items()}


def _align(per_training: Tensor, like: Tensor) -> Tensor:
    """Axes appended, so that it broadcasts against ``like`` from the left."""
    return per_training.reshape(per_training.shape + (1,) * (like.ndim - per_training.ndim))
