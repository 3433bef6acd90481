"""The worker pool keeps the desired number alive, and gives up on workers that cannot work."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.pool import MAX_LOST, MAX_RAISED, End, PoolError, WorkerPool


class Fleet:
    """Workers that start and leave at once, as the pool asks."""

    def __init__(self, desired, reuse_names=False):
        self.alive, self.drained = {}, []
        self.pool = WorkerPool(desired, self.start, self.drained.append, reuse_names=reuse_names)

    def start(self, member):
        assert member.name not in self.alive
        self.alive[member.name] = member

    def tick(self, *ended):
        for name, *_ in ended:
            self.alive.pop(name)
        self.pool.reconcile(ended)


def test_lost_workers_are_replaced_in_their_slot():
    fleet = Fleet(2)
    fleet.tick()
    fleet.tick(("worker-0", End.LOST, "killed"))
    assert {member.slot for member in fleet.alive.values()} == {0, 1}
    assert set(fleet.alive) == {"worker-1", "worker-2"}
    assert fleet.pool.replaced == 1


def test_in_synchronous_runs_the_replacement_takes_the_name():
    fleet = Fleet(2, reuse_names=True)
    fleet.tick()
    fleet.tick(("worker-1", End.LOST, "killed"))
    assert set(fleet.alive) == {"worker-0", "worker-1"}
    with pytest.raises(ValueError, match="synchronous"):
        fleet.pool.scale(3)


def test_scaling_drains_the_surplus_and_their_end_is_no_loss():
    fleet = Fleet(4)
    fleet.tick()
    fleet.pool.scale(1)
    fleet.tick()
    assert fleet.pool.alive == 1
    assert len(fleet.drained) == 3
    fleet.tick(*((member.name, End.LEFT, "scaled down") for member in fleet.drained))
    assert (len(fleet.alive), fleet.pool.replaced) == (1, 0)
    fleet.pool.scale(3)
    fleet.tick()
    assert sorted(member.slot for member in fleet.alive.values()) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_worker_is_refused(workers):
    with pytest.raises(ValueError, match="at least 1"):
        Fleet(1).pool.scale(workers)


@pytest.mark.parametrize(("end", "limit"), [(End.RAISED, MAX_RAISED), (End.LOST, MAX_LOST)])
def test_workers_that_only_end_end_the_run_with_the_first_cause(end, limit):
    fleet = Fleet(1)
    fleet.tick()
    for i in range(limit - 1):
        fleet.tick((next(iter(fleet.alive)), end, "first cause" if i == 0 else "later"))
    with pytest.raises(PoolError, match="first cause"):
        fleet.tick((next(iter(fleet.alive)), end, "last"))
    assert fleet.pool.replaced == limit


def test_progress_in_between_forgives_earlier_failures():
    fleet = Fleet(1)
    fleet.tick()
    for _ in range(3 * MAX_RAISED):
        (name,) = fleet.alive
        fleet.tick((name, End.RAISED, "hiccup"))
        fleet.pool.progressed()


@given(st.lists(st.one_of(st.integers(1, 6), st.sampled_from(["lose", "leave"])), max_size=40))
@settings(max_examples=80, deadline=None)
def test_after_every_tick_as_many_as_desired_are_at_work(events):
    fleet = Fleet(2)
    fleet.tick()
    for event in events:
        if isinstance(event, int):
            fleet.pool.scale(event)
            fleet.tick()
        elif event == "lose":
            fleet.tick((next(iter(fleet.alive)), End.LOST, "killed"))
        else:
            gone = [m for m in fleet.drained if m.name in fleet.alive]
            fleet.tick(*((m.name, End.LEFT, "scaled down") for m in gone))
        fleet.pool.progressed()
        assert fleet.pool.alive == fleet.pool.desired
        staying = [m for m in fleet.alive.values() if m not in fleet.drained]
        assert sorted(m.slot for m in staying) == list(range(fleet.pool.desired))
