"""Gradients that arrive late, as in asynchronous training (VeLO C.5, item 7).

Owns: the ring of past parameters. Must never know when an episode begins: a fresh state says it.

As AsyncDelayedGradients of google/learned_optimization's task_augmentation.py: what is remembered are parameters, and
step t gives the loss and gradient, on its own batch, at the parameters of step t - delay; in the first ``delay`` steps
at the initial ones, as workers that all start together would. The original's buffer is read one place off, so that a
delay of d >= 2 is one of d - 1 there; here it is d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.checks import at_least
from tasks.augmentations.augmented import AugmentedStatic, AugmentedTask, align
from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState
from tasks.data.library import Library
from tasks.static import Work


@dataclass(frozen=True, kw_only=True)
class DelayedGradient(AugmentedStatic, kind="delayed_gradient"):
    """A delay of ``delay`` steps between the parameters and the gradient at them."""

    delay: int = 1

    def __post_init__(self) -> None:
        at_least("delay", self.delay, 1)

    def build(self, library: Library) -> Task:
        return DelayedGradientTask(self.task.build(library), self)

    def work(self) -> Work:
        """With the past parameters among what is kept."""
        work = super().work()
        return work._replace(activations=work.activations + self.delay * work.parameters)


class DelayedGradientTask(AugmentedTask):
    """``task`` at past parameters. State: ``<tag>/past/<name>`` (P, delay, *shape) and ``<tag>/steps`` (P,) int64.

    Step t leaves its parameters in place t mod delay. A state of zeros has no past: the first parameters are all of it.
    """

    def __init__(self, task: Task, static: DelayedGradient) -> None:
        super().__init__(task)
        self.delay, self.tag = static.delay, static.tag

    def init_state(self, params: Params) -> TaskState:
        state = self.task.init_state(params)
        for name, leaf in params.items():
            state[f"{self.tag}/past/{name}"] = leaf.new_zeros(len(leaf), self.delay, *leaf.shape[1:])
            state[f"{self.tag}/steps"] = leaf.new_zeros(len(leaf), dtype=torch.int64)
        return state

    def losses_and_grads(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY
    ) -> LossesAndGrads:
        steps = state[f"{self.tag}/steps"]
        rows, place = torch.arange(len(steps), device=steps.device), steps % self.delay
        oldest = torch.where(steps < self.delay, 0, place)
        stale, after = {}, {f"{self.tag}/steps": steps + 1}
        for name, leaf in params.items():
            now, past = leaf.detach().float(), state[f"{self.tag}/past/{name}"]
            stale[name] = torch.where(align(steps == 0, now), now, past[rows, oldest]).to(leaf.dtype)
            after[f"{self.tag}/past/{name}"] = past.index_put((rows, place), now)
        out = self.task.losses_and_grads(stale, state, batch, dynamic)
        return out._replace(state=out.state | after)
