"""What the learner remembers about the meta-gradients it accepted: rates, staleness, meta-losses, for people to see.

Owns these running figures. Never influences theta. Times are seconds of any monotonic clock and come in as ``now``.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np

from lopt.meta_gradient import MetaGradient

RATE_SECONDS = 20.0
RECENT = 256


class Progress:
    """Figures of one life of the learner. Mappings are replaced, never changed, so that other threads may read them."""

    def __init__(self) -> None:
        self.meta_loss: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.compile_seconds: dict[str, float] = {}
        self._accepted_at: deque[float] = deque(maxlen=100_000)
        self._recent_staleness: deque[int] = deque(maxlen=RECENT)
        self._step_staleness: Counter[int] = Counter()
        self._step_losses: dict[str, list[float]] = {}

    def accepted(self, gradient: MetaGradient, staleness: int, now: float) -> None:
        """Take note of an accepted meta-gradient."""
        family = gradient.family
        self._accepted_at.append(now)
        self._recent_staleness.append(staleness)
        self._step_staleness[staleness] += 1
        self._step_losses.setdefault(family, []).append(gradient.mean_loss)
        self.norms = self.norms | {family: gradient.norm}
        self.seconds = _plus(self.seconds, family, gradient.seconds)
        self.compile_seconds = _plus(self.compile_seconds, family, gradient.compile_seconds)

    def stepped(self) -> dict[str, Any]:
        """Close one meta-step: its meta-loss by family and how stale its meta-gradients were, for the diary."""
        losses = {family: float(np.mean(values)) for family, values in self._step_losses.items()}
        self.meta_loss = self.meta_loss | losses
        staleness = {str(age): count for age, count in sorted(self._step_staleness.items())}
        self._step_losses, self._step_staleness = {}, Counter()
        return {"meta_loss": losses, "staleness": staleness}

    def mean_meta_loss(self) -> float | None:
        """Mean over families of their newest meta-loss; None before the first meta-step."""
        return float(np.mean(list(self.meta_loss.values()))) if self.meta_loss else None

    def mean_staleness(self) -> float:
        """Versions, over the newest accepted meta-gradients."""
        return float(np.mean(self._recent_staleness)) if self._recent_staleness else 0.0

    def rate(self, now: float) -> float:
        """Accepted meta-gradients per second over the last ``RATE_SECONDS``."""
        while self._accepted_at and now - self._accepted_at[0] > RATE_SECONDS:
            self._accepted_at.popleft()
        if not self._accepted_at:
            return 0.0
        return len(self._accepted_at) / max(now - self._accepted_at[0], 1.0)


def _plus(totals: dict[str, float], family: str, seconds: float) -> dict[str, float]:
    return totals | {family: totals.get(family, 0.0) + seconds}
