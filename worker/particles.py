"""The particles of an unroll: their inner state, and how episodes begin in it.

Owns the layout and what a fresh episode's rows are. Never takes an inner step or draws anything.

Layout: n tasks make 2n particles; particle i is the + side of task i, particle n + i its - side. The two sides share
initial parameters, horizon, dynamic configuration and every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.base import LearnedOptimizer, Params, State, Theta
from tasks import Dynamic, Task, TaskState

Leaves = dict[str, Tensor]


@dataclass
class Particles:
    """Inner state of n tasks on both sides. Leaves of the dicts are (2n, ...), the counters (n,) int64 on the CPU.

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

    def tensors(self) -> Leaves:
        """Everything as one flat dict, for a checkpoint."""
        flat = {f"{part}:{name}": leaf for part in DICTS for name, leaf in getattr(self, part).items()}
        return flat | {name: getattr(self, name) for name in _COUNTERS}

    @classmethod
    def from_tensors(cls, flat: Leaves, device: torch.device) -> Particles:
        """The inverse of ``tensors``, a copy on ``device``; entries that are not particles' are ignored."""
        parts: dict[str, Leaves] = {part: {} for part in DICTS}
        for key, leaf in flat.items():
            part, _, name = key.partition(":")
            if part in parts and name:
                parts[part][name] = leaf.to(device, copy=True)
        return cls(**parts, **{name: flat[name].clone() for name in _COUNTERS})  # type: ignore[arg-type]

    def begin(self, fresh: Fresh) -> None:
        """Put fresh rows in the place of whatever was there."""
        for part in DICTS:
            setattr(self, part, _write_rows(getattr(self, part), getattr(fresh, part), fresh.rows, self.count))

    @property
    def count(self) -> int:
        """2n."""
        return 2 * len(self.over)


DICTS = ("params", "state", "task_state", "dynamic")
_COUNTERS = ("inner_step", "horizon", "ends", "episode", "over")


class Episode(NamedTuple):
    """What one episode of one task starts with: declared horizon, actual end, dynamic configuration, parameters."""

    horizon: int
    end: int
    dynamic: Dynamic
    params: Params


class Start(NamedTuple):
    """An episode that begins with inner step ``step`` of a window, as the ``task``-th task's."""

    step: int
    task: int
    episode: Episode


class Fresh(NamedTuple):
    """The particles of k starts before their first step: leaves (2k, ...), and whose ``rows`` (2k,) they are.

    As everywhere, the k + sides come before the k - sides.
    """

    rows: Tensor
    params: Params
    state: State
    task_state: TaskState
    dynamic: Dynamic


def fresh(task: Task, lopt: LearnedOptimizer, theta: Theta, starts: Sequence[Start], device: torch.device) -> Fresh:
    """What ``starts`` (at least one) begin with, under ``theta`` (leaves (2n, ...)) of their sides."""
    num_tasks = len(next(iter(theta.values()))) // 2
    tasks = torch.tensor([start.task for start in starts])
    rows = torch.cat([tasks, tasks + num_tasks]).to(device)
    params = _both_sides([start.episode.params for start in starts], device)
    dynamic = _both_sides([start.episode.dynamic for start in starts], device)
    horizons = torch.tensor([start.episode.horizon for start in starts] * 2, device=device)
    state = lopt.init_particles({name: leaf[rows] for name, leaf in theta.items()}, params, horizons)
    return Fresh(rows, params, state, task.init_state(params), dynamic)


def _both_sides(rows: list[Leaves], device: torch.device) -> Leaves:
    """k rows of single tasks as (2k, ...): the + sides, then the - sides with the same content."""
    return {name: torch.stack([row[name] for row in rows] * 2).to(device) for name in rows[0]}


def _write_rows(old: Leaves, new: Leaves, rows: Tensor, total: int) -> Leaves:
    """``old`` with ``rows`` replaced by ``new``; where ``old`` is empty, ``new`` defines what there is."""
    result = {}
    for name, leaf in new.items():
        target = old[name] if name in old else leaf.new_zeros(total, *leaf.shape[1:])
        # written into a copy: the update rule may have returned a tensor that it shares with something else
        result[name] = target.index_copy(0, rows, leaf)
    return result
