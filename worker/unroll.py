"""The inner loop: many small trainings side by side, both sides of every antithetic pair.

Owns episodes (start, horizon, end), the keys of all randomness, and windows of inner steps. Never perturbs theta and
never turns losses into meta-gradients: that is the estimators'. How a step is computed is ``paths``'.

All randomness is keyed by (key, what, task, episode or window), so that a window can be computed again anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.base import LearnedOptimizer, Theta
from tasks import Task, generator
from tasks.random import fold, keys
from worker.compiled import Compiled
from worker.particles import Episode, Particles, Start
from worker.paths import both_sides, choose

Key = tuple[int | str, ...]
CPU = torch.device("cpu")


class Window(NamedTuple):
    """Meta-losses (W, 2n) of W inner steps, each before its update, and where episodes ended (W, n) bool."""

    losses: Tensor
    done: Tensor


class Unroll:
    """Inner training of one task under many thetas.

    ``horizon`` is (low, high): lengths of episodes are log-uniform on it; the curriculum may change it between calls.
    ``key`` names this unroll's randomness, ``path`` and ``compiled`` say how steps are computed (``paths.choose``).
    Episodes are drawn on the CPU, batches on ``device``, where particles live, by a counter-based generator, so that
    they are the same everywhere; counters stay on the CPU.
    """

    def __init__(
        self,
        task: Task,
        lopt: LearnedOptimizer,
        num_tasks: int,
        horizon: tuple[int, int],
        key: Key,
        device: torch.device = CPU,
        path: str = "auto",
        compiled: Compiled | None = None,
    ) -> None:
        self.task, self.lopt, self.key, self.device = task, lopt, key, device
        self.num_tasks, self.horizon = num_tasks, horizon
        self.path = choose(path, task, lopt, device, compiled)

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
        starts, done = self.plan(particles, steps, length)
        with torch.no_grad():
            losses = self.path.run(theta, particles, starts, self._keys("batches", window), steps)
        return Window(losses.cpu(), done)

    def plan(self, particles: Particles, steps: int, length: int | None) -> tuple[list[Start], Tensor]:
        """The episodes that begin in the next ``steps`` steps, in their order, and where episodes end (steps, n).

        The counters of ``particles`` are moved to the end of these steps.
        """
        starts = []
        done = torch.zeros(steps, self.num_tasks, dtype=torch.bool)
        for i in range(self.num_tasks):
            step, taken, end = 0, int(particles.inner_step[i]), int(particles.ends[i])
            over = bool(particles.over[i])
            while step < steps:
                if over:
                    particles.episode[i] += 1
                    episode = self._draw_episode(i, int(particles.episode[i]), length)
                    starts.append(Start(step, i, episode))
                    particles.horizon[i], particles.ends[i] = episode.horizon, episode.end
                    taken, end = 0, episode.end
                advance = min(end - taken, steps - step)
                step, taken = step + advance, taken + advance
                over = taken >= end
                done[step - 1, i] = over
            particles.inner_step[i], particles.over[i] = taken, over
        return sorted(starts, key=lambda start: start.step), done

    def final_losses(self, particles: Particles, window: int, num_batches: int, split: str = "train") -> Tensor:
        """Mean meta-loss (2n,) of the parameters as they are, over fresh batches of ``split``."""
        batches = self._keys("final", window)
        total = torch.zeros(2 * self.num_tasks, device=self.device)
        for number in range(num_batches):
            batch = both_sides(self.task.batch(split, fold(batches, number)))
            raw = self.task.losses(particles.params, batch, particles.dynamic)
            total += self.task.normalizer(raw, particles.dynamic)
        return (total / num_batches).cpu()

    def _keys(self, purpose: str, window: int) -> Tensor:
        """One key for each task, shared by its two sides."""
        return keys(self.num_tasks, *self.key, purpose, window, device=self.device)

    def _draw_episode(self, task: int, episode: int, length: int | None) -> Episode:
        draws = generator(*self.key, "episode", task, episode)
        horizon = log_uniform(self.horizon, draws) if length is None else length
        staggered = episode == 0 and length is None
        end = int(torch.randint(1, horizon + 1, (), generator=draws)) if staggered else horizon
        dynamic = {name: leaf[0] for name, leaf in self.task.sample_dynamic(draws, 1).items()}
        return Episode(horizon, end, dynamic, self.task.init(draws, dynamic))


def log_uniform(bounds: tuple[int, int], draws: torch.Generator) -> int:
    """An integer, log-uniform on [low, high], both included."""
    low, high = math.log(bounds[0]), math.log(bounds[1] + 1)
    value = math.exp(low + (high - low) * float(torch.rand((), generator=draws, dtype=torch.float64)))
    return min(int(value), bounds[1])
