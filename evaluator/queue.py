"""Owns which (checkpoint, task, seed) is evaluated next, by whom, and what became of it.

A pure state machine: no clock, no threads, no I/O. Work is handed out at least once, a result is
taken exactly once. It must never lose an item without an entry in its books.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

MAX_ATTEMPTS = 3


class Item(NamedTuple):
    """One piece of work: train ``task`` once, with ``seed``, by the optimizer of ``checkpoint`` (a digest)."""

    checkpoint: str
    task: str
    seed: int


class Status(StrEnum):
    WAITING = "waiting"
    LEASED = "leased"
    DONE = "done"
    DEAD = "dead"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Books:
    """Where all items ever added are; ``added`` is the sum of the others at every instant."""

    added: int
    done: int
    leased: int
    waiting: int
    dead: int
    skipped: int


@dataclass
class _Entry:
    status: Status = Status.WAITING
    attempts: int = 0
    worker: str = ""
    reasons: list[str] = field(default_factory=list)


@dataclass
class _Checkpoint:
    version: int
    kept: bool
    entries: dict[Item, _Entry]

    def has(self, status: Status) -> bool:
        return any(entry.status is status for entry in self.entries.values())

    @property
    def waits(self) -> bool:
        """Nobody has touched it yet."""
        return all(entry.status is Status.WAITING and not entry.attempts for entry in self.entries.values())


class EvaluationQueue:
    """Work on ``tasks`` x ``range(seeds)`` for each checkpoint.

    A started checkpoint is finished first (half a matrix of scores is worth nothing), then the newest one begins.
    Version 0 (the untrained start) and final checkpoints are never skipped; when more than ``max_waiting`` others wait
    untouched, the oldest of those is. An item that was leased `MAX_ATTEMPTS` times
    without a result is dead, whatever the reasons: an item that kills its worker looks like a lost worker.
    ``done`` are the items whose results are stored already: they count as done when their checkpoint is added.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        seeds: int,
        *,
        max_waiting: int,
        done: Collection[Item] = (),
    ) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting = {max_waiting}: expected at least 1")
        self._matrix = [(task, seed) for task in tasks for seed in range(seeds)]
        self._max_waiting = max_waiting
        self._stored = frozenset(done)
        self._checkpoints: dict[str, _Checkpoint] = {}
        self._added = 0

    def add_checkpoint(self, version: int, checkpoint: str, *, final: bool = False) -> None:
        """Queue ``checkpoint``; adding it again changes nothing, except that ``final`` revives a skipped one."""
        known = self._checkpoints.get(checkpoint)
        if known is None:
            items = [Item(checkpoint, task, seed) for task, seed in self._matrix]
            entries = {item: _Entry(Status.DONE if item in self._stored else Status.WAITING) for item in items}
            self._checkpoints[checkpoint] = _Checkpoint(version, version == 0 or final, entries)
            self._added += len(items)
            self._skip_surplus()
        elif final and not known.kept:
            known.kept = True
            for entry in known.entries.values():
                if entry.status is Status.SKIPPED:
                    entry.status = Status.WAITING

    def _skip_surplus(self) -> None:
        skippable = (c for c in self._checkpoints.values() if c.waits and not c.kept)
        newest_first = sorted(skippable, key=lambda c: -c.version)
        for checkpoint in newest_first[self._max_waiting :]:
            for entry in checkpoint.entries.values():
                entry.status = Status.SKIPPED

    def lease(self, worker: str) -> Item | None:
        """The next item for ``worker``, who gives it back with ``complete`` or ``fail``; None when nothing waits."""
        order = sorted(self._checkpoints.values(), key=lambda c: (c.waits, -c.version))
        for checkpoint in order:
            for item, entry in checkpoint.entries.items():
                if entry.status is Status.WAITING:
                    entry.status, entry.worker = Status.LEASED, worker
                    entry.attempts += 1
                    return item
        return None

    def complete(self, item: Item, worker: str) -> bool:
        """Whether this is the first result of ``item``: store it then, drop it otherwise.

        A result is welcome from anyone, also from a worker that had given the item up. KeyError: unknown item.
        """
        entry = self._entry(item)
        if entry.status is Status.DONE:
            return False
        entry.status, entry.worker = Status.DONE, worker
        return True

    def fail(self, item: Item, worker: str, reason: str) -> bool:
        """Give ``item`` back unfinished; False (and no effect) unless ``worker`` holds its lease. KeyError: unknown."""
        entry = self._entry(item)
        if entry.status is not Status.LEASED or entry.worker != worker:
            return False
        self._give_back(entry, reason)
        return True

    @staticmethod
    def _give_back(entry: _Entry, reason: str) -> None:
        entry.reasons.append(f"{entry.worker}: {reason}")
        entry.status = Status.DEAD if entry.attempts >= MAX_ATTEMPTS else Status.WAITING

    def _entry(self, item: Item) -> _Entry:
        return self._checkpoints[item.checkpoint].entries[item]

    def _entries(self) -> Iterator[tuple[Item, _Entry]]:
        for checkpoint in self._checkpoints.values():
            yield from checkpoint.entries.items()

    def books(self) -> Books:
        """The counts of all items; ``added`` is counted on its own, so that a leak would show."""
        counts = Counter(entry.status for _, entry in self._entries())
        return Books(added=self._added, **{status.value: counts[status] for status in Status})

    def dead_letters(self) -> dict[Item, list[str]]:
        """The items given up, each with the reason of every attempt."""
        return {item: list(entry.reasons) for item, entry in self._entries() if entry.status is Status.DEAD}

    def is_complete(self, checkpoint: str) -> bool:
        """Whether every item of ``checkpoint`` has a result, so that it can be scored. KeyError: unknown checkpoint."""
        return all(entry.status is Status.DONE for entry in self._checkpoints[checkpoint].entries.values())

    def versions_behind(self) -> int:
        """Newest version added minus newest version complete (minus 0 when none is)."""
        newest = max((c.version for c in self._checkpoints.values()), default=0)
        complete = (c.version for name, c in self._checkpoints.items() if self.is_complete(name))
        return newest - max(complete, default=0)
