"""Owns the question whether a run is free: whose lease it is, and whether that owner still lives.

It must never take a run itself (``CheckpointStore.acquire`` does, by compare-and-swap), and a wrong answer must never
cost data: fencing makes it safe to take a run from an owner who lives after all. So in doubt the lease runs out.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from learner.records import Lease, Owner

LEASE_SECONDS = 20.0  # a lease not renewed for this long is free


def new_lease(incarnation: int, owner: Owner, now: float) -> Lease:
    """A lease for a process of this machine, with what is needed to notice its death."""
    start = process_start(owner.pid)
    return Lease(incarnation, owner, now, secrets.token_hex(16), machine=machine(), process_start=start)


def is_free(lease: Lease, owner: Owner, now: float) -> bool:
    """Whether ``owner`` may take over: released, run out, of the same launch, or held by a process that is dead."""
    return (
        lease.released
        or lease.owner.launch == owner.launch
        or now - lease.renewed > LEASE_SECONDS
        or _owner_is_dead(lease)
    )


def machine() -> str | None:
    """This boot of this kernel and this process id namespace: where process ids can be compared. None off Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such live process (zombies are dead)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the command before it may hold anything, even parentheses
    return None if state in "ZX" else int(fields[18])  # field 22 of proc_pid_stat(5)


def _owner_is_dead(lease: Lease) -> bool:
    # The start time tells the owner from a later process that was given the same id.
    known = lease.machine is not None and lease.process_start is not None
    return known and lease.machine == machine() and process_start(lease.owner.pid) != lease.process_start
