"""What the learner's actor says to workers and to the launcher.

Owns the form of these messages. Never decides anything; what workers say is ``lopt.MetaGradient``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Flat = npt.NDArray[np.float32]
"""The trainable part of theta, fp32 (D,)."""


@dataclass(frozen=True)
class Ticket:
    """What a worker that joins gets: theta's frozen parts, and where in the run it stands.

    In synchronous runs also the state that a predecessor of the same name left behind (``snapshot``), the estimates
    that it made since then (``replay``: version and theta of each submission, in order), and ``after``, the version of
    its last submission. To make these estimates again, unsent, brings the state up to date.
    """

    incarnation: int
    theta: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    snapshot: bytes | None = None
    replay: tuple[tuple[int, Flat], ...] = ()
    after: int = -1


@dataclass(frozen=True)
class Weights:
    """The current theta; without it (``flat`` is None): ``leave`` says why to stop, otherwise ask again.

    ``snapshot``: send the state along with what is estimated at this version.
    """

    incarnation: int
    version: int
    flat: Flat | None = None
    snapshot: bool = False
    leave: str | None = None


@dataclass(frozen=True)
class PoolCounts:
    """Workers wanted, alive and replaced so far; the launcher's numbers, exported with the learner's."""

    desired: int = 0
    alive: int = 0
    replaced: int = 0


@dataclass(frozen=True)
class LearnerStatus:
    """What the learner knows about the run at one instant; after a ``failure``, only that."""

    incarnation: int = 0
    version: int = 0
    finished: bool = False
    failure: str | None = None
    books: dict[str, dict[str, Any]] = field(default_factory=dict)
    balanced: bool = True
    meta_loss: float | None = None
    meta_gradients_per_second: float = 0.0
    mean_staleness: float = 0.0
    checkpoint: tuple[str, int] | None = None
    metrics_port: int = 0
