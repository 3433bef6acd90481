"""What a worker tells the learner: one task's meta-gradient and where it comes from.

Owns the message and its form (types, ranges, shape). Whether it is fresh, finite or wanted is the learner's verdict.
It lives beside ``ThetaSpec`` because its vector lies in the flat space of theta that both sides share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class MetaGradient:
    """A meta-gradient of one task family, before normalisation.

    ``dense`` is fp32 (D,), D = ``ThetaSpec.trainable_size``; ``norm`` its L2 norm; ``mean_loss`` the mean meta-loss
    of both sides; ``static_digest`` names the task's static configuration; ``seconds`` is the time spent on it,
    ``compile_seconds`` how long a compiler that ended meanwhile took for its task (beside the work or within).
    ``sequence`` rises by at least one with every message of one ``worker``.
    """

    run: str
    incarnation: int
    version: int
    worker: str
    sequence: int
    family: str
    static_digest: str
    dense: npt.NDArray[np.float32]
    mean_loss: float
    norm: float
    inner_steps: int
    seconds: float
    compile_seconds: float = 0.0

    def malformation(self, size: int) -> str | None:
        """Why this cannot be a meta-gradient of a theta of ``size`` numbers; None if it can."""
        for name in ("run", "worker", "family", "static_digest"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value) <= 256:
                return f"{name} = {value!r:.80}: expected 1 to 256 characters"
        for name in ("incarnation", "version", "sequence", "inner_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                return f"{name} = {value!r:.80}: expected an integer >= 0"
        for name in ("mean_loss", "norm", "seconds", "compile_seconds"):
            value = getattr(self, name)
            if not isinstance(value, float):
                return f"{name} = {value!r:.80}: expected a float"
        if not isinstance(self.dense, np.ndarray) or self.dense.dtype != np.float32:
            return f"dense is {type(self.dense).__name__}: expected a float32 array"
        if self.dense.shape != (size,):
            return f"dense has shape {self.dense.shape}: expected ({size},)"
        return None
