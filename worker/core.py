"""What one worker does, without Ray: task families in rotation, one estimator each.

Owns the rotation and the estimators' state. Never knows the learner, the clock or the network.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from configs.schema import EstimatorConfig
from lopt.base import LearnedOptimizer, Theta
from tasks import StaticConfig, TaskFamily, generator
from worker.estimators import PES, Estimate, EstimatorState, FullES, GradientEstimator
from worker.unroll import CPU, Key, Unroll


class Turn(NamedTuple):
    """One estimate and the task it belongs to."""

    family: str
    static_digest: str
    estimate: Estimate


class WorkerCore:
    """Estimates of the task families in turn, worker ``slot`` starting at the slot-th family.

    ``key`` (run seed, worker, ...) names all randomness of this worker.
    """

    def __init__(
        self,
        lopt: LearnedOptimizer,
        families: list[TaskFamily],
        config: EstimatorConfig,
        slot: int,
        key: Key,
        device: torch.device = CPU,
    ) -> None:
        self.families, self.slot, self.turns = families, slot, 0
        self._digests: list[str] = []
        self._estimators: list[GradientEstimator] = []
        for family in families:
            static = family.sample_static(np.random.default_rng(generator(*key, family.name, "static").initial_seed()))
            self._digests.append(static.digest())
            self._estimators.append(_build(family, static, lopt, config, (*key, family.name), device))
        self._states: list[EstimatorState] = [estimator.init() for estimator in self._estimators]

    def estimate(self, theta: Theta) -> Turn:
        """The next family's meta-gradient at ``theta``."""
        index = (self.turns + self.slot) % len(self.families)
        estimate, self._states[index] = self._estimators[index].estimate(theta, self._states[index])
        self.turns += 1
        return Turn(self.families[index].name, self._digests[index], estimate)

    def snapshot(self) -> bytes:
        """Everything that the next estimate depends on besides theta, as safetensors."""
        tensors = {
            f"{i}:{name}": leaf.cpu().clone() for i, state in enumerate(self._states) for name, leaf in state.items()
        }  # cloned, because safetensors refuses tensors that share memory
        return safetensors.torch.save({"turns": torch.tensor(self.turns), **tensors})

    def restore(self, snapshot: bytes) -> None:
        """Continue exactly where ``snapshot`` was taken."""
        tensors = safetensors.torch.load(snapshot)
        self.turns = int(tensors.pop("turns"))
        self._states = [{} for _ in self._states]
        for key, leaf in tensors.items():
            index, _, name = key.partition(":")
            self._states[int(index)][name] = leaf


def _build(
    family: TaskFamily,
    static: StaticConfig,
    lopt: LearnedOptimizer,
    config: EstimatorConfig,
    key: Key,
    device: torch.device,
) -> GradientEstimator:
    unroll = Unroll(family, static, lopt, config.num_tasks, (config.horizon_low, config.horizon_high), key, device)
    if config.name == "pes":
        return PES(unroll, config.sigma, window=config.window)
    return FullES(unroll, config.sigma, objective=config.objective)
