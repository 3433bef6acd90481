"""What a synchronous run must remember of its workers, so that a lost one continues bit for bit.

Owns each worker's newest snapshot, and the thetas since then: a replacement restores the snapshot and makes the
estimates after it again, which is exact because an estimate depends on nothing but state, theta and keys. So a
snapshot, megabytes of inner state, need not travel with every submission. Never looks into a snapshot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy

from learner.messages import Flat

SNAPSHOT_VERSIONS = 50
"""At most so many submissions are made again: seconds of work, against megabytes sent with each."""
THETAS = "replay"


class Replay:
    """``num_workers`` workers that submit once at every version; ``every`` is the versions between checkpoints."""

    def __init__(self, num_workers: int, every: int) -> None:
        self.num_workers, self.every = num_workers, every
        self._snapshots: dict[str, tuple[int, bytes]] = {}
        self._after: dict[str, int] = {}
        self._thetas: dict[int, Flat] = {}

    def wants_snapshot(self, version: int) -> bool:
        """Whether submissions at ``version`` should bring one: those before a checkpoint, and some between."""
        return (version + 1) % self.every == 0 or (version + 1) % SNAPSHOT_VERSIONS == 0

    def published(self, version: int, flat: Flat) -> None:
        """Workers estimate at theta ``flat`` from now on."""
        self._thetas[version] = flat

    def submitted(self, worker: str, version: int, snapshot: bytes | None) -> None:
        """``worker``'s submission at ``version`` was accepted; ``snapshot`` is its state afterwards."""
        self._after[worker] = version
        if snapshot is None:
            return
        self._snapshots[worker] = (version, snapshot)
        if len(self._snapshots) == self.num_workers:
            oldest = min(at for at, _ in self._snapshots.values())
            self._thetas = {at: flat for at, flat in self._thetas.items() if at > oldest}

    def of(self, worker: str) -> tuple[bytes | None, tuple[tuple[int, Flat], ...], int]:
        """Snapshot, submissions after it (version, theta) and the version of the last one: see ``Ticket``."""
        at, snapshot = self._snapshots.get(worker, (-1, None))
        after = self._after.get(worker, -1)
        return snapshot, tuple((v, flat) for v, flat in sorted(self._thetas.items()) if at < v <= after), after

    def state(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Blobs and JSON of a checkpoint."""
        blobs = {f"worker-{worker}": snapshot for worker, (_, snapshot) in self._snapshots.items()}
        needed = [version for version in sorted(self._thetas) if version <= max(self._after.values(), default=-1)]
        if needed:
            thetas = np.stack([self._thetas[version] for version in needed])
            blobs[THETAS] = safetensors.numpy.save({"versions": np.array(needed), "thetas": thetas})
        workers = {
            worker: {"after": after, "snapshot": self._snapshots.get(worker, (None, None))[0]}
            for worker, after in self._after.items()
        }
        return blobs, workers

    def restore(self, blobs: dict[str, bytes], workers: dict[str, Any]) -> None:
        """Continue from ``state()``. Raises KeyError or TypeError if something is missing or of another form."""
        self._after = {worker: int(record["after"]) for worker, record in workers.items()}
        self._snapshots = {
            worker: (record["snapshot"], blobs[f"worker-{worker}"])
            for worker, record in workers.items()
            if record["snapshot"] is not None
        }
        self._thetas = {}
        if THETAS in blobs:
            found = safetensors.numpy.load(blobs[THETAS])
            self._thetas = {int(v): flat for v, flat in zip(found["versions"], found["thetas"], strict=True)}
