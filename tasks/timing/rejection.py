"""Rejection sampling by predicted time: draws until a config is quick enough (VeLO C.4 and C.5).

Owns: the order of the draws and the error when nothing fits. Must never draw from anything but the generator it is
given: a run's tasks can be drawn again anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from configs.checks import ConfigError
from tasks.static import StaticConfig
from tasks.timing.model import load_model

_FIRST_BATCH = 8
_LARGEST_BATCH = 64


class NothingFits(ValueError):  # noqa: N818 - what happened, as a caller would say it
    """No config of a family passed the time model within the tries that were allowed."""


class Rejection:
    """Rejection sampling by the time model of ``table`` (one that ships, such as ``cpu``, or a file)."""

    def __init__(self, table: str = "cpu") -> None:
        self.model = load_model(table)

    def sample(
        self,
        rng: np.random.Generator,
        draw: Callable[[np.random.Generator], StaticConfig],
        family: str,
        max_seconds: float,
        tries: int = 512,
    ) -> StaticConfig:
        """The first of ``tries`` draws that is predicted to run, in less than ``max_seconds`` per step and particle.

        Draws that are impossible (ConfigError) count as tries. Candidates are drawn and priced in batches, each twice
        the one before, because a call of the model costs far more than a row; so ``rng`` ends past the accepted draw.
        Raises NothingFits, which says what was found instead.
        """
        tried, impossible, invalid = 0, 0, 0
        fastest = math.inf
        batch = _FIRST_BATCH
        while tried < tries:
            candidates: list[StaticConfig] = []
            for _ in range(min(batch, tries - tried)):
                try:
                    candidates.append(draw(rng))
                except ConfigError:
                    impossible += 1
            tried = min(tried + batch, tries)
            batch = min(2 * batch, _LARGEST_BATCH)
            if not candidates:
                continue
            seconds, runs = self.model.predict(candidates)
            accepted = np.flatnonzero(runs & (seconds < max_seconds))
            if len(accepted):
                return candidates[int(accepted[0])]
            invalid += int((~runs).sum())
            fastest = min(fastest, float(seconds[runs].min(initial=math.inf)))
        raise NothingFits(_what_was_found(family, max_seconds, tries, impossible, invalid, fastest))


def _what_was_found(family: str, max_seconds: float, tries: int, impossible: int, invalid: int, fastest: float) -> str:
    refused = f"{impossible} were impossible, {invalid} would not run" if impossible + invalid else "all would run"
    if math.isfinite(fastest):
        remedy = (
            f"the quickest is predicted to take {fastest:.2g} s: raise time.max_seconds or time.scale,"
            " raise the family's min_seconds above this threshold, or give it more time.tries"
        )
    else:
        remedy = "none is predicted to run: take the family out, or measure this machine with `paceline tasks time`"
    return (
        f"task family {family}: none of {tries} draws takes less than {max_seconds:.2g} s per inner step"
        f" ({refused}); {remedy}"
    )
