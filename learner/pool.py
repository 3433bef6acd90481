"""Keeps the desired number of workers alive.

Owns who should be working: names and slots of workers, replacements, and when to give up. How a worker is started and
how its end is noticed comes in from outside, so that the rules hold without Ray.

A worker ends in one of three ways: it left (was drained, the run is over), it was lost (its process died, as spot
machines do), or it raised (a defect or a bad configuration). Lost and raised ones are replaced, until ``MAX_LOST`` or
``MAX_RAISED`` of them followed each other without one accepted meta-gradient between them: then the run ends with the
first cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

MAX_RAISED = 3
MAX_LOST = 20


class End(StrEnum):
    """How a worker's life ended."""

    LEFT = "left"
    LOST = "lost"
    RAISED = "raised"


class PoolError(RuntimeError):
    """Workers cannot be kept alive; the text is the first cause."""


@dataclass(frozen=True)
class Member:
    """A worker of the pool: its name and its place in the rotation of task families."""

    name: str
    slot: int


class WorkerPool:
    """The rules; call ``reconcile`` regularly.

    ``start(member)`` starts a worker, ``drain(member)`` asks one to leave after its present estimate. With
    ``reuse_names`` (synchronous runs) a replacement takes over its predecessor's name.
    """

    def __init__(
        self,
        desired: int,
        start: Callable[[Member], None],
        drain: Callable[[Member], None],
        *,
        reuse_names: bool,
    ) -> None:
        self.desired = desired
        self.replaced = 0
        self._start, self._drain, self._reuse_names = start, drain, reuse_names
        self._members: dict[str, Member] = {}
        self._leaving: set[str] = set()
        self._started = 0
        self._in_a_row = {End.RAISED: 0, End.LOST: 0}
        self._first_cause = ""

    @property
    def alive(self) -> int:
        """Workers that have been started, have not ended and are not leaving."""
        return len(self._members) - len(self._leaving)

    @property
    def leaving(self) -> list[Member]:
        """Workers that have been asked to leave and have not ended yet."""
        return [self._members[name] for name in sorted(self._leaving)]

    def scale(self, desired: int) -> None:
        """Change the desired number. Raises ``ValueError`` below 1 and in synchronous runs, whose number is fixed."""
        if desired < 1:
            raise ValueError(f"workers = {desired}: expected at least 1 (pause stops the work)")
        if self._reuse_names and desired != self.desired:
            raise ValueError(f"workers = {desired}: a synchronous run keeps its {self.desired} workers")
        self.desired = desired

    def reconcile(self, ended: Iterable[tuple[str, End, str]]) -> None:
        """Take note of workers that ended (name, how, cause), then start or drain until ``desired`` are working.

        Raises ``PoolError`` when workers keep raising.
        """
        for name, end, cause in ended:
            self._bury(name, end, cause)
        while self.alive < self.desired:
            member = self._next_member()
            self._members[member.name] = member
            self._start(member)
        surplus = sorted((m for n, m in self._members.items() if n not in self._leaving), key=lambda m: m.slot)
        for member in surplus[self.desired :]:
            self._leaving.add(member.name)
            self._drain(member)

    def progressed(self) -> None:
        """A meta-gradient was accepted: the workers work."""
        self._in_a_row, self._first_cause = {End.RAISED: 0, End.LOST: 0}, ""

    def _bury(self, name: str, end: End, cause: str) -> None:
        if self._members.pop(name, None) is None:
            return
        if name in self._leaving:
            self._leaving.discard(name)
            return
        if end is End.LEFT:
            return
        self.replaced += 1
        self._in_a_row[end] += 1
        self._first_cause = self._first_cause or cause
        if self._in_a_row[end] >= (MAX_RAISED if end is End.RAISED else MAX_LOST):
            raise PoolError(f"{self._in_a_row[end]} workers in a row {end}; the first one: {self._first_cause}")

    def _next_member(self) -> Member:
        taken = {member.slot for name, member in self._members.items() if name not in self._leaving}
        slot = next(slot for slot in range(self.desired) if slot not in taken)
        self._started += 1
        return Member(f"worker-{slot}" if self._reuse_names else f"worker-{self._started - 1}", slot)
