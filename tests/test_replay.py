"""What a synchronous run remembers of its workers: any worker, lost at any time, is rebuilt exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.replay import SNAPSHOT_VERSIONS, THETAS, Replay

WORKERS = ["worker-0", "worker-1"]


def theta(version):
    return np.full(3, version, np.float32)


class Toy:
    """A worker whose state is a running hash of what it estimated at."""

    def __init__(self):
        self.state = 1

    def estimate(self, version, flat):
        self.state = (self.state * 31 + 7 * version + int(flat.sum())) % 1_000_003

    def rebuilt(self, replay, name):
        snapshot, missed, after = replay.of(name)
        toy = Toy()
        toy.state = 1 if snapshot is None else int(snapshot)
        for version, flat in missed:
            toy.estimate(version, flat)
        return toy, after


def submit(replay, toy, name, version):
    toy.estimate(version, theta(version))
    wanted = replay.wants_snapshot(version)
    replay.submitted(name, version, str(toy.state).encode() if wanted else None)


@given(st.integers(1, 7), st.integers(0, 25), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_replacement_is_where_the_lost_worker_was_also_after_a_checkpoint(every, steps, half_way, saved):
    replay, toys = Replay(len(WORKERS), every), {name: Toy() for name in WORKERS}
    replay.published(0, theta(0))
    for version in range(steps):
        for name in WORKERS:
            submit(replay, toys[name], name, version)
        replay.published(version + 1, theta(version + 1))
    if half_way:  # one of two has submitted
        submit(replay, toys[WORKERS[0]], WORKERS[0], steps)
    if saved:
        blobs, workers = replay.state()
        replay = Replay(len(WORKERS), every)
        replay.restore(blobs, workers)
        replay.published(steps, theta(steps))
    for position, name in enumerate(WORKERS):
        toy, after = toys[name].rebuilt(replay, name)
        assert toy.state == toys[name].state
        assert after == (steps if half_way and position == 0 else steps - 1)


def test_a_checkpoint_in_its_turn_has_every_state_and_no_theta_besides():
    replay, toys = Replay(2, 5), {name: Toy() for name in WORKERS}
    for version in range(10):
        replay.published(version, theta(version))
        for name in WORKERS:
            submit(replay, toys[name], name, version)
    replay.published(10, theta(10))
    blobs, workers = replay.state()
    assert set(blobs) == {f"worker-{name}" for name in WORKERS}
    assert workers == {name: {"after": 9, "snapshot": 9} for name in WORKERS}
    submit(replay, toys[WORKERS[0]], WORKERS[0], 10)
    assert THETAS in replay.state()[0]


def test_what_is_remembered_is_bounded_however_far_apart_checkpoints_are():
    replay, toys = Replay(2, 10_000), {name: Toy() for name in WORKERS}
    for version in range(5 * SNAPSHOT_VERSIONS):
        replay.published(version, theta(version))
        for name in WORKERS:
            submit(replay, toys[name], name, version)
            assert len(replay.of(name)[1]) <= SNAPSHOT_VERSIONS
    assert len(replay._thetas) <= SNAPSHOT_VERSIONS + 1


@pytest.mark.parametrize("damage", [{"worker-0": {}}, {"worker-0": {"after": 3, "snapshot": 3}}, {"worker-0": 3}])
def test_a_damaged_record_is_noticed(damage):
    with pytest.raises((KeyError, TypeError)):
        Replay(2, 5).restore({}, damage)
