"""Owns training fixed tasks for measurement: one theta, or a whole sweep of them, as particles of one batch.

A run is fixed by (task, seed) alone: initial parameters, training batches and the batches of the final losses come
from counter-based keys that do not contain the optimizer. So every checkpoint and every Adam learning rate starts at
the same point and sees the same data, and a difference in loss is a difference of optimizers. Must never augment a
task, touch global randomness or read a clock.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from evaluator.results import TaskResult, Yardstick, rounded
from lopt import Adam, LearnedOptimizer
from lopt.base import Theta
from tasks import Batch, Dynamic, Params, Task, generator
from tasks.random import fold, keys

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
    optimizer: LearnedOptimizer, theta: Theta, name: str, task: Task, num_steps: int, seeds: Sequence[int]
) -> Curves:
    """Train ``task``, called ``name``, for ``num_steps`` with P particles: ``theta[...][p]`` on ``seeds[p]``.

    ``theta`` leaves are (P, ...). Particles with the same seed share dynamic config, initial parameters and batches.
    """
    particles = len(seeds)
    for leaf_name, leaf in theta.items():
        if leaf.ndim == 0 or leaf.shape[0] != particles:
            raise ValueError(
                f"theta[{leaf_name!r}] has shape {tuple(leaf.shape)}: expected ({particles}, ...), one per seed"
            )
    streams = _Streams(name, task, seeds)
    dynamic, params = streams.start()
    batches = streams.batches("train", "train")
    with torch.no_grad():
        state = optimizer.init_particles(theta, params, torch.full((particles,), num_steps))
        task_state = task.init_state(params)
        stepper = optimizer.stepper(theta, state, params)
        curve = torch.empty(particles, num_steps)
        for step in range(num_steps):
            loss, grads, task_state = task.losses_and_grads(stepper.params, task_state, next(batches), dynamic)
            stepper.step(grads, loss)
            curve[:, step] = loss
        final = {}
        for split in ("train", "test"):
            fresh = islice(streams.batches(f"final {split}", split), FINAL_BATCHES)
            final[split] = torch.stack([task.losses(stepper.params, batch, dynamic) for batch in fresh]).mean(0)
    diverged = ~(final["train"].isfinite() & final["test"].isfinite())
    return Curves(_finite(task, curve), _finite(task, final["train"]), _finite(task, final["test"]), diverged)


def train_one(
    optimizer: LearnedOptimizer,
    theta: Theta,
    name: str,
    task: Task,
    num_steps: int,
    seed: int,
    *,
    version: int,
    checkpoint: str,
) -> TaskResult:
    """The `TaskResult` of one checkpoint's ``theta`` (no particle axis) on one task and seed; ``seconds`` is None."""
    single = {leaf_name: leaf.unsqueeze(0) for leaf_name, leaf in theta.items()}
    curves = train(optimizer, single, name, task, num_steps, [seed])
    train_loss, test_loss = rounded([float(curves.train_loss), float(curves.test_loss)])
    return TaskResult(
        task=name,
        seed=seed,
        version=version,
        checkpoint=checkpoint,
        curve=rounded(curves.losses[0].tolist()),
        train_loss=train_loss,
        test_loss=test_loss,
        diverged=bool(curves.diverged),
    )


def tune_adam(
    name: str, task: Task, num_steps: int, seeds: Sequence[int], learning_rates: Sequence[float] = LEARNING_RATES
) -> Yardstick:
    """The best Adam of the sweep ``learning_rates`` x ``seeds``, trained as ONE batch.

    Best: lowest final loss on the test split, mean over seeds, among the learning rates that never diverged. Adam is
    thus tuned on the very number it is compared by. ValueError if every learning rate diverged.
    """
    rates = [rate for rate in learning_rates for _ in seeds]
    theta = {"learning_rate": torch.tensor(rates)}
    curves = train(Adam(), theta, name, task, num_steps, [*seeds] * len(learning_rates))
    shape = (len(learning_rates), len(seeds))
    test = curves.test_loss.reshape(shape)
    diverged = curves.diverged.reshape(shape).any(1)
    if diverged.all():
        raise ValueError(f"task {name!r}: Adam diverged with every learning rate of {list(learning_rates)}")
    best = int(test.mean(1).masked_fill(diverged, torch.inf).argmin())
    means = rounded(test.mean(1).tolist())
    return Yardstick(
        task=name,
        learning_rate=learning_rates[best],
        sweep=[
            [rate, None if bad else mean]
            for rate, mean, bad in zip(learning_rates, means, diverged.tolist(), strict=True)
        ],
        curves=[rounded(curve) for curve in curves.losses.reshape(*shape, num_steps)[best].tolist()],
        test_losses=rounded(test[best].tolist()),
    )


class _Streams:
    """The randomness of (task, seed), drawn once per distinct seed and handed out to all its particles."""

    def __init__(self, name: str, task: Task, seeds: Sequence[int]) -> None:
        self._name = name
        self._task = task
        self._seeds = sorted(set(seeds))
        self._rows = torch.tensor([self._seeds.index(seed) for seed in seeds])

    def _spread(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf[self._rows] for name, leaf in rows.items()}

    def start(self) -> tuple[Dynamic, Params]:
        """Dynamic configs and initial parameters, leaves (P, ...)."""
        starts = []
        for seed in self._seeds:
            draws = generator("evaluation", self._name, seed, "init")
            dynamic = {name: leaf[0] for name, leaf in self._task.sample_dynamic(draws, 1).items()}
            starts.append((dynamic, self._task.init(draws, dynamic)))
        dynamics, params = ([start[part] for start in starts] for part in (0, 1))
        return self._spread(_stacked(dynamics)), self._spread(_stacked(params))

    def batches(self, purpose: str, split: str) -> Iterator[Batch]:
        """Endless batches of ``split``, leaves (P, batch size, ...)."""
        key = torch.cat([keys(1, "evaluation", self._name, seed, purpose) for seed in self._seeds])
        for number in count():
            yield self._spread(self._task.batch(split, fold(key, number)))


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _finite(task: Task, loss: Tensor) -> Tensor:
    """Raw losses (P,) or (P, T) where they are finite, the task's worst elsewhere."""
    return torch.where(loss.isfinite(), loss, torch.tensor(task.worst_loss))
