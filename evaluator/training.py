"""Owns training fixed tasks for measurement: one theta, or a whole sweep of them, as particles of one batch.

A run is fixed by (task, seed) alone: initial parameters, training batches and the batches of the final losses come
from counter-based keys that do not contain the optimizer. So every checkpoint and every Adam learning rate starts at
the same point and sees the same data, and a difference in loss is a difference of optimizers. Must never augment a
task, touch global randomness or read a clock.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from evaluator.results import TaskResult, Yardstick, rounded
from lopt import Adam, LearnedOptimizer
from lopt.base import Theta
from tasks.base import Batch, Dataset, Params, Task, TaskFamily, losses, losses_and_grads
from tasks.keys import generator

FINAL_BATCHES = 10  # Celo A.3
LEARNING_RATES = tuple(float(f"{10 ** (exponent / 2):.4g}") for exponent in range(-10, 1))
"""The Adam sweep: the 11 half powers of ten from 1e-5 to 1 (Celo 5.1; its lower ones train nothing in 2,000 steps)."""


@dataclass(frozen=True)
class Curves:
    """How P particles trained: training loss before each step (P, T), final losses (P,), and who diverged (P,) bool.

    Losses are raw where they are finite; the others are the task's ``worst_loss``. A particle diverged if a loss of
    one of its final batches, train or test, is not finite.
    """

    losses: Tensor
    train_loss: Tensor
    test_loss: Tensor
    diverged: Tensor


def train(
    optimizer: LearnedOptimizer, theta: Theta, family: TaskFamily, num_steps: int, seeds: Sequence[int]
) -> Curves:
    """Train ``family``'s fixed task for ``num_steps`` with P particles: ``theta[...][p]`` on ``seeds[p]``.

    ``theta`` leaves are (P, ...). Particles with the same seed share initial parameters and every batch. The dynamic
    configs of a family are not drawn: its task is built as published.
    """
    particles = len(seeds)
    for name, leaf in theta.items():
        if leaf.ndim == 0 or leaf.shape[0] != particles:
            raise ValueError(
                f"theta[{name!r}] has shape {tuple(leaf.shape)}: expected ({particles}, ...), one per seed"
            )
    static = family.sample_static(np.random.default_rng(0))
    task = family.build(static)
    streams = _Streams(family.name, task.batch_size, seeds)
    params = streams.init(task)
    batches = streams.batches("train", family.datasets.train)
    with torch.no_grad():
        state = optimizer.init_particles(theta, params, torch.full((particles,), num_steps))
        curve = torch.empty(particles, num_steps)
        for step in range(num_steps):
            loss, grads = losses_and_grads(family, static, {}, params, next(batches))
            params, state = optimizer.update_particles(theta, state, params, grads, loss)
            curve[:, step] = loss
        final = {}
        for split, data in (("train", family.datasets.train), ("test", family.datasets.test)):
            fresh = islice(streams.batches(f"final {split}", data), FINAL_BATCHES)
            final[split] = torch.stack([losses(family, static, {}, params, batch) for batch in fresh]).mean(0)
    diverged = ~(final["train"].isfinite() & final["test"].isfinite())
    return Curves(_finite(task, curve), _finite(task, final["train"]), _finite(task, final["test"]), diverged)


def train_one(
    optimizer: LearnedOptimizer,
    theta: Theta,
    family: TaskFamily,
    num_steps: int,
    seed: int,
    *,
    version: int,
    checkpoint: str,
) -> TaskResult:
    """The `TaskResult` of one checkpoint's ``theta`` (no particle axis) on one task and seed; ``seconds`` is None."""
    curves = train(optimizer, {name: leaf.unsqueeze(0) for name, leaf in theta.items()}, family, num_steps, [seed])
    train_loss, test_loss = rounded([float(curves.train_loss), float(curves.test_loss)])
    return TaskResult(
        task=family.name,
        seed=seed,
        version=version,
        checkpoint=checkpoint,
        curve=rounded(curves.losses[0].tolist()),
        train_loss=train_loss,
        test_loss=test_loss,
        diverged=bool(curves.diverged),
    )


def tune_adam(
    family: TaskFamily, num_steps: int, seeds: Sequence[int], learning_rates: Sequence[float] = LEARNING_RATES
) -> Yardstick:
    """The best Adam of the sweep ``learning_rates`` x ``seeds``, trained as ONE batch.

    Best: lowest final loss on the test split, mean over seeds, among the learning rates that never diverged. Adam is
    thus tuned on the very number it is compared by. ValueError if every learning rate diverged.
    """
    rates = [rate for rate in learning_rates for _ in seeds]
    curves = train(Adam(), {"learning_rate": torch.tensor(rates)}, family, num_steps, [*seeds] * len(learning_rates))
    shape = (len(learning_rates), len(seeds))
    test = curves.test_loss.reshape(shape)
    diverged = curves.diverged.reshape(shape).any(1)
    if diverged.all():
        raise ValueError(f"task {family.name!r}: Adam diverged with every learning rate of {list(learning_rates)}")
    best = int(test.mean(1).masked_fill(diverged, torch.inf).argmin())
    means = rounded(test.mean(1).tolist())
    return Yardstick(
        task=family.name,
        learning_rate=learning_rates[best],
        sweep=[
            [rate, None if bad else mean]
            for rate, mean, bad in zip(learning_rates, means, diverged.tolist(), strict=True)
        ],
        curves=[rounded(curve) for curve in curves.losses.reshape(*shape, num_steps)[best].tolist()],
        test_losses=rounded(test[best].tolist()),
    )


class _Streams:
    """The random streams of (task, seed), drawn once per distinct seed and handed out to all its particles."""

    def __init__(self, task: str, batch_size: int, seeds: Sequence[int]) -> None:
        self._task = task
        self._batch_size = batch_size
        self._seeds = sorted(set(seeds))
        self._rows = torch.tensor([self._seeds.index(seed) for seed in seeds])

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [generator("evaluation", self._task, seed, purpose) for seed in self._seeds]

    def _spread(self, draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([draw[name] for draw in draws])[self._rows] for name in draws[0]}

    def init(self, task: Task) -> Params:
        """Initial parameters, leaves (P, ...)."""
        return self._spread([task.init(stream) for stream in self._generators("init")])

    def batches(self, purpose: str, data: Dataset) -> Iterator[Batch]:
        """Endless batches of ``data``, leaves (P, batch size, ...)."""
        streams = self._generators(purpose)
        while True:
            yield self._spread([data.sample(stream, (self._batch_size,)) for stream in streams])


def _finite(task: Task, loss: Tensor) -> Tensor:
    return torch.where(loss.isfinite(), loss, task.normalizer(loss))
