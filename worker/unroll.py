"""The inner loop: many small trainings side by side, both sides of every antithetic pair.

Owns the particles' state, episodes (start, horizon, end) and the inner step. Never perturbs theta and never turns
losses into meta-gradients: that is the estimators'.

Layout: n tasks make 2n particles; particle i is the + side of task i, particle n + i its - side. The two sides share
initial parameters, horizon, dynamic configuration and every batch. All randomness is keyed by
(key, what, task, episode or window), so that a window can be computed again anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.base import LearnedOptimizer, Params, State, Theta
from tasks import Batch, Dynamic, Task, TaskState, generator
from tasks.random import fold, keys

Key = tuple[int | str, ...]
CPU = torch.device("cpu")


@dataclass
class Particles:
    """Inner state of n tasks on both sides. Leaves of the dicts are (2n, ...), the counters (n,) int64.

    ``ends`` is the inner step at which the episode is over: the horizon, or less in the first, staggered episode.
    A task that is ``over`` starts its next episode with its next step, under the theta of that step.
    """

    params: Params
    state: State
    task_state: TaskState
    dynamic: Dynamic
    inner_step: Tensor
    horizon: Tensor
    ends: Tensor
    episode: Tensor
    over: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Everything as one flat dict, for a checkpoint."""
        flat = {f"{part}:{name}": leaf for part in _DICTS for name, leaf in getattr(self, part).items()}
        return flat | {name: getattr(self, name) for name in _COUNTERS}

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor], device: torch.device) -> Particles:
        """The inverse of ``tensors``, a copy on ``device``; entries that are not particles' are ignored."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _DICTS}
        for key, leaf in flat.items():
            part, _, name = key.partition(":")
            if part in parts and name:
                parts[part][name] = leaf.to(device, copy=True)
        return cls(**parts, **{name: flat[name].clone() for name in _COUNTERS})  # type: ignore[arg-type]


_DICTS = ("params", "state", "task_state", "dynamic")
_COUNTERS = ("inner_step", "horizon", "ends", "episode", "over")


class Episode(NamedTuple):
    """What one episode of one task starts with: declared horizon, actual end, dynamic configuration, parameters."""

    horizon: int
    end: int
    dynamic: Dynamic
    params: Params


class Window(NamedTuple):
    """Meta-losses (W, 2n) of W inner steps, each before its update, and where episodes ended (W, n) bool."""

    losses: Tensor
    done: Tensor


class Unroll:
    """Inner training of one task under many thetas.

    ``horizon`` is (low, high): lengths of episodes are log-uniform on it; the curriculum may change it between calls.
    ``key`` names this unroll's randomness. Episodes are drawn on the CPU, batches on ``device``, where particles live,
    by a counter-based generator, so that they are the same everywhere; counters stay on the CPU.
    """

    def __init__(
        self,
        task: Task,
        lopt: LearnedOptimizer,
        num_tasks: int,
        horizon: tuple[int, int],
        key: Key,
        device: torch.device = CPU,
    ) -> None:
        self.task, self.lopt, self.key, self.device = task, lopt, key, device
        self.num_tasks, self.horizon = num_tasks, horizon

    def start(self, episode: int = 0) -> Particles:
        """Particles before the given episode: the previous one is over, so that the first step begins it."""
        zeros = torch.zeros(self.num_tasks, dtype=torch.int64)
        over = torch.ones(self.num_tasks, dtype=torch.bool)
        return Particles({}, {}, {}, {}, zeros, zeros.clone(), zeros.clone(), zeros + episode - 1, over)

    def run(self, theta: Theta, particles: Particles, steps: int, window: int, length: int | None = None) -> Window:
        """``steps`` inner steps of all particles, in place; theta leaves are (2n, ...).

        ``window`` counts the calls and names their batches. Episodes are ``length`` long; where that is None, each
        draws its horizon, and the first one of each task ends after a uniform part of it, so that the tasks' resets
        do not coincide.
        """
        batches = self._keys("batches", window)
        losses, done = [], []
        for step in range(steps):
            self._begin_episodes(theta, particles, length)
            losses.append(self._inner_step(theta, particles, self._batch(fold(batches, step))))
            particles.over = particles.inner_step >= particles.ends
            done.append(particles.over)
        return Window(torch.stack(losses).cpu(), torch.stack(done))

    def final_losses(self, particles: Particles, window: int, num_batches: int) -> Tensor:
        """Mean meta-loss (2n,) of the parameters as they are, over fresh training batches."""
        batches = self._keys("final", window)
        total = torch.zeros(2 * self.num_tasks, device=self.device)
        for number in range(num_batches):
            batch = self._batch(fold(batches, number))
            raw = self.task.losses(particles.params, batch, particles.dynamic)
            total += self.task.normalizer(raw, particles.dynamic)
        return (total / num_batches).cpu()

    def _inner_step(self, theta: Theta, particles: Particles, batch: Batch) -> Tensor:
        raw, grads, task_state = self.task.losses_and_grads(
            particles.params, particles.task_state, batch, particles.dynamic
        )
        with torch.no_grad():
            particles.params, particles.state = self.lopt.update_particles(
                theta, particles.state, particles.params, grads, raw
            )
        particles.task_state = task_state
        particles.inner_step = particles.inner_step + 1
        return self.task.normalizer(raw, particles.dynamic)

    def _keys(self, purpose: str, window: int) -> Tensor:
        """One key for each task, shared by its two sides."""
        return keys(self.num_tasks, *self.key, purpose, window, device=self.device)

    def _batch(self, batches: Tensor) -> Batch:
        one_side = self.task.batch("train", batches)
        return {name: torch.cat([leaf, leaf]) for name, leaf in one_side.items()}

    def _begin_episodes(self, theta: Theta, particles: Particles, length: int | None) -> None:
        starting = particles.over.nonzero().flatten()
        if not len(starting):
            return
        particles.episode[starting] += 1
        episodes = [self._draw_episode(int(i), int(particles.episode[i]), length) for i in starting]
        particles.inner_step[starting] = 0
        particles.horizon[starting] = torch.tensor([episode.horizon for episode in episodes])
        particles.ends[starting] = torch.tensor([episode.end for episode in episodes])

        rows = torch.cat([starting, starting + self.num_tasks]).to(self.device)
        fresh = self._both_sides([episode.params for episode in episodes])
        dynamic = self._both_sides([episode.dynamic for episode in episodes])
        horizons = particles.horizon[starting].repeat(2).to(self.device)
        state = self.lopt.init_particles({name: leaf[rows] for name, leaf in theta.items()}, fresh, horizons)
        particles.params = _write_rows(particles.params, fresh, rows, 2 * self.num_tasks)
        particles.dynamic = _write_rows(particles.dynamic, dynamic, rows, 2 * self.num_tasks)
        particles.state = _write_rows(particles.state, state, rows, 2 * self.num_tasks)
        task_state = self.task.init_state(fresh)
        particles.task_state = _write_rows(particles.task_state, task_state, rows, 2 * self.num_tasks)

    def _draw_episode(self, task: int, episode: int, length: int | None) -> Episode:
        draws = generator(*self.key, "episode", task, episode)
        horizon = log_uniform(self.horizon, draws) if length is None else length
        staggered = episode == 0 and length is None
        end = int(torch.randint(1, horizon + 1, (), generator=draws)) if staggered else horizon
        dynamic = {name: leaf[0] for name, leaf in self.task.sample_dynamic(draws, 1).items()}
        return Episode(horizon, end, dynamic, self.task.init(draws, dynamic))

    def _both_sides(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """k rows of single tasks as (2k, ...): the + sides, then the - sides with the same content."""
        return {name: torch.stack([row[name] for row in rows] * 2).to(self.device) for name in rows[0]}


def log_uniform(bounds: tuple[int, int], draws: torch.Generator) -> int:
    """An integer, log-uniform on [low, high], both included."""
    low, high = math.log(bounds[0]), math.log(bounds[1] + 1)
    value = math.exp(low + (high - low) * float(torch.rand((), generator=draws, dtype=torch.float64)))
    return min(int(value), bounds[1])


def _write_rows(old: dict[str, Tensor], new: dict[str, Tensor], rows: Tensor, total: int) -> dict[str, Tensor]:
    """``old`` with ``rows`` replaced by ``new``; where ``old`` is empty, ``new`` defines what there is."""
    result = {}
    for name, leaf in new.items():
        target = old[name] if name in old else leaf.new_zeros(total, *leaf.shape[1:])
        # written into a copy: the update rule may have returned a tensor that it shares with something else
        result[name] = target.index_copy(0, rows, leaf)
    return result
