"""The evaluator's queue: newest first, leases, three attempts, one result per item, books that balance."""

from dataclasses import asdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from evaluator.queue import MAX_ATTEMPTS, Books, EvaluationQueue, Item


def queue(tasks=("t",), seeds=1, max_waiting=2, done=()):
    return EvaluationQueue(tasks, seeds, max_waiting=max_waiting, done=done)


def drain(q, worker="w"):
    items = []
    while (item := q.lease(worker)) is not None:
        assert q.complete(item, worker)
        items.append(item)
    return items


def test_a_checkpoint_becomes_tasks_times_seeds_items():
    q = queue(("t", "u"), 3)
    q.add_checkpoint(0, "c0")
    assert drain(q) == [Item("c0", task, seed) for task in "tu" for seed in range(3)]
    assert q.is_complete("c0")
    assert q.books() == Books(added=6, done=6, leased=0, waiting=0, dead=0, skipped=0)


def test_the_newest_checkpoint_comes_first():
    q = queue(max_waiting=9)
    for version in (0, 200, 100):
        q.add_checkpoint(version, f"c{version}")
    assert [item.checkpoint for item in drain(q)] == ["c200", "c100", "c0"]


def test_a_started_checkpoint_is_finished_before_a_newer_one_starts():
    q = queue(seeds=2)
    q.add_checkpoint(100, "c100")
    q.complete(q.lease("w"), "w")
    q.add_checkpoint(200, "c200")
    assert [item.checkpoint for item in drain(q)] == ["c100", "c200", "c200"]


def test_surplus_checkpoints_are_skipped_oldest_first_but_never_the_first_or_the_final_one():
    q = queue(seeds=2, max_waiting=2)
    for version in (0, 100, 200, 300):
        q.add_checkpoint(version, f"c{version}")
    q.add_checkpoint(400, "c400", final=True)
    assert q.books().skipped == 2
    assert list(dict.fromkeys(item.checkpoint for item in drain(q))) == ["c400", "c300", "c200", "c0"]
    assert q.books() == Books(added=10, done=8, leased=0, waiting=0, dead=0, skipped=2)


def test_a_started_checkpoint_is_never_skipped():
    q = queue(seeds=2, max_waiting=1)
    q.add_checkpoint(100, "c100")
    q.lease("w")
    for version in (200, 300):
        q.add_checkpoint(version, f"c{version}")
    assert {item.checkpoint for item in drain(q, "v")} == {"c100", "c300"}


def test_a_skipped_checkpoint_that_turns_out_to_be_the_last_is_evaluated_after_all():
    q = queue(max_waiting=1)
    q.add_checkpoint(100, "c100")
    q.add_checkpoint(200, "c200")
    assert q.books().skipped == 1
    q.add_checkpoint(100, "c100", final=True)
    assert q.books() == Books(added=2, done=0, leased=0, waiting=2, dead=0, skipped=0)


def test_adding_a_checkpoint_twice_changes_nothing():
    q = queue()
    q.add_checkpoint(100, "c")
    drain(q)
    q.add_checkpoint(100, "c")
    assert q.lease("w") is None
    assert q.books().added == 1


def test_results_that_are_stored_already_are_not_computed_again():
    q = queue(seeds=2, done=[Item("c", "t", 0), Item("gone", "t", 0)])
    q.add_checkpoint(5, "c")
    assert q.books() == Books(added=2, done=1, leased=0, waiting=1, dead=0, skipped=0)
    assert drain(q) == [Item("c", "t", 1)]
    assert q.is_complete("c")


def test_an_item_given_back_goes_to_another_and_only_the_first_result_counts():
    q = queue()
    q.add_checkpoint(0, "c")
    item = q.lease("slow")
    assert q.lease("fast") is None
    assert q.fail(item, "slow", "its evaluator was lost")
    assert q.lease("fast") == item
    assert q.complete(item, "slow")
    assert not q.complete(item, "fast")
    assert not q.fail(item, "fast", "too late")
    assert q.books() == Books(added=1, done=1, leased=0, waiting=0, dead=0, skipped=0)


def test_three_attempts_then_the_dead_letter_box_with_every_reason():
    q = queue()
    q.add_checkpoint(0, "c")
    item = q.lease("a")
    assert q.fail(item, "a", "boom")
    for worker, reason in (("b", "bang"), ("c", "its evaluator was lost")):
        q.lease(worker)
        assert q.fail(item, worker, reason)
    assert q.lease("d") is None
    assert q.dead_letters() == {item: ["a: boom", "b: bang", "c: its evaluator was lost"]}
    assert q.books().dead == 1
    assert not q.is_complete("c")
    assert q.complete(item, "c")  # a late result is still a result
    assert q.books().dead == 0


def test_only_the_holder_of_a_lease_can_fail_it():
    q = queue()
    q.add_checkpoint(0, "c")
    item = q.lease("a")
    assert not q.fail(item, "b", "not mine")
    assert q.books().leased == 1


def test_unknown_items_are_an_error():
    with pytest.raises(KeyError):
        queue().complete(Item("c", "t", 0), "w")


def test_how_far_evaluation_lags_behind():
    q = queue()
    assert q.versions_behind() == 0
    q.add_checkpoint(0, "c0")
    q.add_checkpoint(50, "c50")
    assert q.versions_behind() == 50
    drain(q)
    assert q.versions_behind() == 0


class QueueMachine(RuleBasedStateMachine):
    """Any mixture of workers, losses and late answers."""

    @initialize(max_waiting=st.integers(1, 3), stored=st.sets(st.tuples(st.integers(0, 12), st.integers(0, 1))))
    def start(self, max_waiting, stored):
        self.results = [Item(f"c{version}", "t", seed) for version, seed in stored]
        self.q = queue(seeds=2, max_waiting=max_waiting, done=self.results)
        self.results = set(self.results)
        self.added, self.handed_out = set(), []
        self.attempts = {}

    @rule(version=st.integers(0, 12), final=st.booleans())
    def add(self, version, final):
        self.q.add_checkpoint(version, f"c{version}", final=final)
        self.added.add(version)

    @rule(worker=st.sampled_from("ab"))
    def lease(self, worker):
        item = self.q.lease(worker)
        if item is None:
            assert self.q.books().waiting == 0
            return
        assert item not in self.results
        self.attempts[item] = self.attempts.get(item, 0) + 1
        assert self.attempts[item] <= MAX_ATTEMPTS
        self.handed_out.append((item, worker))

    @rule(data=st.data())
    def complete(self, data):
        if self.handed_out:
            item, worker = data.draw(st.sampled_from(self.handed_out))
            assert self.q.complete(item, worker) == (item not in self.results)
            self.results.add(item)

    @rule(data=st.data())
    def fail(self, data):
        if self.handed_out:
            self.q.fail(*data.draw(st.sampled_from(self.handed_out)), "boom")

    @invariant()
    def books_balance(self):
        if not hasattr(self, "q"):
            return
        books = asdict(self.q.books())
        assert books.pop("added") == sum(books.values()) == 2 * len(self.added)
        assert books["done"] == sum(item.checkpoint in {f"c{v}" for v in self.added} for item in self.results)
        assert books["dead"] == len(self.q.dead_letters())

    def teardown(self):
        if not hasattr(self, "q"):
            return
        for item, worker in self.handed_out:
            self.q.fail(item, worker, "the test is over")
        drain(self.q)
        books = self.q.books()
        assert books.waiting == books.leased == 0
        if 0 in self.added and not self.q.dead_letters():
            assert self.q.is_complete("c0")


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueueStateMachine = QueueMachine.TestCase
