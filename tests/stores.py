"""What the tests of the checkpoint store save, and as whom."""

from __future__ import annotations

import os
from typing import Any

from learner.checkpoints import Checkpoint, CheckpointStore, Lease, Owner

Place = tuple[str, str, dict[str, Any]]  # root, run and options of a CheckpointStore
NOW = 1_000_000.0
THETA = b"theta of version %d"


def owner(launch: str = "launch") -> Owner:
    return Owner(launch, "this-host", os.getpid())


def save(store: CheckpointStore, lease: Lease, *versions: int) -> Checkpoint:
    """Save these versions, in this order; the last one's checkpoint. All share the incarnation's optimizer blob."""
    for version in versions:
        blobs = {"theta": THETA % version, "optimizer": b"%d" % lease.incarnation}
        checkpoint = store.save(lease, version, blobs, {"version": version})
    return checkpoint
