"""What one worker does, without Ray: its tasks in rotation, one estimator each, drawn anew now and then.

Owns the slots, their tasks and the estimators' state. Never knows the learner, the clock or the network.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from configs.schema import EstimatorConfig
from lopt.base import LearnedOptimizer, Theta
from tasks import TaskDistribution, generator
from worker.compiled import Compiled
from worker.curriculum import horizon_at, size_at
from worker.estimators import Estimate, EstimatorState, GradientEstimator, build
from worker.unroll import CPU, Key, Unroll

log = logging.getLogger(__name__)


class Turn(NamedTuple):
    """One estimate, the task it belongs to, and how long the task's compiler took meanwhile."""

    family: str
    static_digest: str
    estimate: Estimate
    compile_seconds: float


@dataclass
class _Slot:
    """One task that is being worked on. ``draws`` counts the tasks of this slot, ``drawn_at`` is this one's version."""

    draws: int
    drawn_at: int
    family: str
    static_digest: str
    compiled: Compiled
    estimator: GradientEstimator
    state: EstimatorState


class WorkerCore:
    """Estimates of the slots' tasks in turn, worker ``slot`` starting at the slot-th one.

    One slot for each task family, or ``tasks.config.slots`` whose families are drawn too. ``key`` (run seed, worker,
    ...) names all randomness of this worker. Without ``wait`` a task is trained in eager torch until it is compiled, so
    that the rounding of its first estimates depends on the compiler's haste.
    """

    def __init__(
        self,
        lopt: LearnedOptimizer,
        tasks: TaskDistribution,
        config: EstimatorConfig,
        slot: int,
        key: Key,
        device: torch.device = CPU,
        path: str = "auto",
        wait: bool = True,
    ) -> None:
        self.lopt, self.tasks, self.config, self.slot, self.key = lopt, tasks, config, slot, key
        self.device, self.path, self.wait = device, path, wait
        self.turns = 0
        self._slots: list[_Slot | None] = [None] * (tasks.config.slots or len(tasks.families))

    def estimate(self, theta: Theta, version: int) -> Turn:
        """The next task's meta-gradient at ``theta``, which is the learner's at ``version``."""
        index = (self.turns + self.slot) % len(self._slots)
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = self._draw(index, 0, version)
        slot.estimator.unroll.horizon = horizon_at(self.config, version)
        compiled_before = slot.compiled.compile_seconds
        estimate, slot.state = slot.estimator.estimate(theta, slot.state)
        compiling = slot.compiled.compile_seconds - compiled_before
        self.turns += 1
        if self._resampled():
            self._slots[index] = self._draw(index, slot.draws + 1, version)
        return Turn(slot.family, slot.static_digest, estimate, compiling)

    def snapshot(self) -> bytes:
        """Everything that the next estimate depends on besides theta, as safetensors."""
        tensors = {"turns": torch.tensor(self.turns)}
        for i, slot in enumerate(self._slots):
            if slot is not None:
                tensors[f"{i}"] = torch.tensor([slot.draws, slot.drawn_at])
                # cloned, because safetensors refuses tensors that share memory
                tensors |= {f"{i}:{name}": leaf.cpu().clone() for name, leaf in slot.state.items()}
        return safetensors.torch.save(tensors)

    def restore(self, snapshot: bytes) -> None:
        """Continue exactly where ``snapshot`` was taken."""
        tensors = safetensors.torch.load(snapshot)
        self.turns = int(tensors.pop("turns"))
        for i in range(len(self._slots)):
            drawn = tensors.pop(f"{i}", None)
            self._slots[i] = None if drawn is None else self._draw(i, *drawn.tolist())
        for key, leaf in tensors.items():
            index, _, name = key.partition(":")
            slot = self._slots[int(index)]
            assert slot is not None  # noqa: S101 - a slot's state is only written with its draw
            slot.state[name] = leaf

    def _resampled(self) -> bool:
        """Whether the task of this turn has had its time."""
        probability = self.tasks.config.resample
        return probability > 0 and self._rng("resample", self.turns).random() < probability

    def _rng(self, *purpose: int | str) -> np.random.Generator:
        return np.random.default_rng(generator(*self.key, *purpose).initial_seed())

    def _draw(self, index: int, draws: int, version: int) -> _Slot:
        """The slot's ``draws``-th task; all that it depends on is in the key and the arguments."""
        family = None if self.tasks.config.slots else self.tasks.families[index]
        name = f"slot{index}" if family is None else family
        draw = self.tasks.draw(self._rng(name, draws, "static"), family, size_at(self.tasks.config, version))
        key = (*self.key, name, draws)
        horizon = horizon_at(self.config, version)
        task = self.tasks.build(draw.static)
        compiled = Compiled(task, draw.static.digest(), self.wait)
        unroll = Unroll(task, self.lopt, self.config.num_tasks, horizon, key, self.device, self.path, compiled)
        log.info("task %s is computed by the %s path", draw.family, unroll.path.name)
        estimator = build(unroll, self.config)
        return _Slot(draws, version, draw.family, draw.static.digest(), compiled, estimator, estimator.init())
