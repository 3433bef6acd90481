"""Who may write a run: one learner at a time, on every kind of storage."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from learner.checkpoints import CheckpointStore, FencedError, Owner, RunHeldError, StoreError
from learner.lease import machine, process_start
from learner.records import encode_lease
from tests.stores import NOW, Place, owner, save


def test_a_lease_that_was_taken_over_can_be_neither_renewed_nor_released(place: Place, run: Any) -> None:
    store, lease = run
    lease = store.renew(lease, NOW + 5)
    later = CheckpointStore(*place).acquire(owner(), NOW + 6)
    assert (lease.incarnation, later.incarnation) == (1, 2)
    with pytest.raises(FencedError, match=r"incarnation 1 of run .* was taken over by incarnation 2"):
        store.renew(lease, NOW + 7)
    with pytest.raises(FencedError):
        store.release(lease)
    with pytest.raises(FencedError):
        store.retain(1, 1, [])


def test_releasing_while_another_thread_renews_is_not_mistaken_for_a_takeover(place: Place, run: Any) -> None:
    store, lease = run
    swap, left = store._storage.swap, [1]

    def meanwhile(path: str, tag: str | None, data: bytes) -> bool:
        if left.pop() if left else 0:
            store.renew(lease, NOW + 1)
        return bool(swap(path, tag, data))

    store._storage.swap = meanwhile
    store.release(lease)
    assert CheckpointStore(*place).acquire(owner("another launch"), NOW + 2).incarnation == 2


def test_a_run_with_a_live_owner_is_refused_and_says_who_holds_it(place: Place, run: Any) -> None:
    store, lease = run
    store.renew(lease, NOW + 10)
    with pytest.raises(RunHeldError) as caught:
        CheckpointStore(*place).acquire(owner("another launch"), NOW + 13)
    assert str(caught.value) == (
        f"run '{place[1]}' is held by process {os.getpid()} on this-host (renewed 3 s ago): stop it, or choose another "
        "run.name"
    )
    with pytest.raises(RunHeldError):
        CheckpointStore(*place).acquire(owner("another launch"), NOW + 30)
    assert CheckpointStore(*place).acquire(owner("another launch"), NOW + 30.1).incarnation == 2  # it ran out


def test_a_released_run_can_be_acquired_at_once_but_not_written_by_the_old_lease(place: Place, run: Any) -> None:
    store, lease = run
    store.release(lease)
    for forbidden in (lambda: save(store, lease, 50), lambda: store.renew(lease, NOW), lambda: store.retain(1, 1, [])):
        with pytest.raises(FencedError):
            forbidden()
    assert CheckpointStore(*place).acquire(owner("another launch"), NOW).incarnation == 2


def test_a_dead_owner_on_this_machine_is_replaced_at_once(place: Place) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store, other = CheckpointStore(*place), CheckpointStore(*place)
    store.acquire(Owner("launch", "this-host", child.pid), NOW)
    with pytest.raises(RunHeldError):
        other.acquire(owner("another launch"), NOW)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # still a zombie
    assert process_start(child.pid) is None
    assert other.acquire(owner("another launch"), NOW).incarnation == 2
    child.communicate()


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"process_start": 1}, True),  # the process id was given to another process since
        ({"process_start": 1, "machine": "another boot"}, False),  # cannot be judged from here
        ({"process_start": None}, False),
        ({}, False),
    ],
)
def test_a_recycled_process_id_does_not_count_as_alive(place: Place, run: Any, change: Any, free: bool) -> None:
    store, lease = run
    assert lease.machine == machine()
    assert lease.process_start == process_start(os.getpid())
    store._storage.put("lease.json", encode_lease(dataclasses.replace(lease, **change)))
    if free:
        assert CheckpointStore(*place).acquire(owner("another launch"), NOW).incarnation == 2
    else:
        with pytest.raises(RunHeldError):
            CheckpointStore(*place).acquire(owner("another launch"), NOW)


def test_deleting_the_lease_forces_a_takeover_that_still_fences(place: Place, run: Any) -> None:
    store, lease = run
    save(store, lease, 50)
    store._storage.delete("lease.json")
    with pytest.raises(FencedError, match=r"lost its lease\.json"):
        save(store, lease, 100)
    assert CheckpointStore(*place).acquire(owner("another launch"), NOW).incarnation == 2
    store._storage.put("lease.json", b'{"schema": 1}')
    with pytest.raises(StoreError, match=r"lease\.json: owner = nothing: expected .*; delete that file if"):
        CheckpointStore(*place).acquire(owner(), NOW)


def test_of_racing_acquirers_exactly_one_wins(place: Place) -> None:
    CheckpointStore(*place).acquire(owner("old"), NOW)
    barrier, won, held = threading.Barrier(8), [], []

    def race(launch: str) -> None:
        store = CheckpointStore(*place)
        barrier.wait(timeout=30)
        try:
            won.append(store.acquire(owner(launch), NOW + 60))
        except RunHeldError as error:
            held.append(str(error))

    threads = [threading.Thread(target=race, args=(f"launch {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert ([lease.incarnation for lease in won], len(held)) == ([2], 7)


@pytest.mark.parametrize("place", ["file", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
def test_of_racing_acquirers_in_different_processes_exactly_one_wins(place: Place) -> None:
    code = (
        "import json, os, sys, time\n"
        "from learner.checkpoints import CheckpointStore, Owner, RunHeldError\n"
        "store = CheckpointStore(*json.loads(sys.argv[1])); store.latest()\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: print('won', store.acquire(Owner(str(os.getpid()), 'host', os.getpid()), 5.0).incarnation)\n"
        "except RunHeldError: print('held')\n"
        "sys.stdout.flush(); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, json.dumps(place)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) for _ in range(4)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = sorted(racer.stdout.readline() for racer in racers)
    for racer in racers:
        racer.communicate("\n", timeout=30)
    assert answers == ["held\n"] * 3 + ["won 1\n"]
