"""The learner's state machine: verdicts, aggregation, meta-steps, and books that always balance."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
from configs.schema import MetaOptimizerConfig
from learner.core import OTHER_FAMILY, LearnerCore, MetaStepError, Verdict
from tests.quadratic import Gd

FAMILIES = ["a", "b"]


def core(ordered=False, **settings):
    defaults = {"meta_batch": 2, "max_staleness": 1, "learning_rate": 0.1}
    config = MetaOptimizerConfig(**(defaults | settings))
    rule = Gd()
    return LearnerCore(rule, rule.init_theta(None), config, run="r", incarnation=3, families=FAMILIES, ordered=ordered)


def gradient(sequence=1, dense=(1.0, 2.0), **changes):
    values = {
        "run": "r",
        "incarnation": 3,
        "version": 0,
        "worker": "w",
        "sequence": sequence,
        "family": "a",
        "static_digest": "d",
        "dense": np.array(dense, np.float32) if isinstance(dense, tuple) else dense,
        "mean_loss": 1.5,
        "norm": 2.0,
        "inner_steps": 100,
        "seconds": 0.1,
    }
    return lopt.MetaGradient(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.ACCEPTED),
        ({"run": "other"}, Verdict.WRONG_RUN),
        ({"incarnation": 2}, Verdict.WRONG_RUN),
        ({"version": 1}, Verdict.FUTURE),
        ({"sequence": 0}, Verdict.DUPLICATE),
        ({"dense": np.array([1.0, np.nan], np.float32)}, Verdict.NON_FINITE),
        ({"mean_loss": math.inf}, Verdict.NON_FINITE),
        ({"dense": np.zeros(3, np.float32)}, Verdict.MALFORMED),
        ({"dense": np.zeros(2, np.float64)}, Verdict.MALFORMED),
        ({"dense": [0.0, 0.0]}, Verdict.MALFORMED),
        ({"family": "unknown"}, Verdict.MALFORMED),
        ({"family": None}, Verdict.MALFORMED),
        ({"sequence": -1}, Verdict.MALFORMED),
        ({"version": 1.0}, Verdict.MALFORMED),
    ],
)
def test_each_submission_gets_exactly_one_verdict(changes, verdict):
    learner = core()
    assert learner.submit(gradient(sequence=0)) is Verdict.ACCEPTED
    assert learner.submit(gradient(**changes)) is verdict
    assert learner.balanced()
    if verdict is not Verdict.ACCEPTED:
        assert sum(account.dropped[verdict] for account in learner.books.values()) == 1


def test_a_gradient_older_than_max_staleness_is_stale_and_one_as_old_is_not():
    learner = core(meta_batch=1, max_staleness=1)
    for sequence in range(2):
        learner.submit(gradient(sequence, version=learner.version))
        learner.step()
    assert learner.submit(gradient(2, version=0)) is Verdict.STALE
    assert learner.submit(gradient(2, version=1)) is Verdict.ACCEPTED


def test_a_learner_that_does_not_step_is_full_in_the_end():
    learner = core(meta_batch=2)
    verdicts = [learner.submit(gradient(sequence)) for sequence in range(9)]
    assert verdicts == [Verdict.ACCEPTED] * 8 + [Verdict.FULL]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "zzz"]),
            st.integers(-1, 4),
            st.integers(0, 6),
            st.sampled_from(["r", "q"]),
            st.sampled_from([1.0, 0.0, float("nan")]),
            st.booleans(),
        ),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_books_balance_whatever_is_submitted(events):
    learner = core(meta_batch=3)
    for family, sequence, version, run, value, step in events:
        learner.submit(gradient(sequence, (value, 1.0), family=family, version=version, run=run))
        assert learner.balanced()
        if step and learner.ready():
            learner.step()
            assert learner.balanced()
    received = sum(account.received for account in learner.books.values())
    assert received == len(events)
    assert learner.books[OTHER_FAMILY].received == sum(event[0] == "zzz" for event in events)


def test_unit_normalisation_gives_every_task_the_same_weight():
    small, large = gradient(1, (1e-6, 0.0)), gradient(2, (0.0, 1e6))
    moves = []
    for normalize in ("unit", "none"):
        learner = core(normalize=normalize, clip_norm=1e9, eps=1e6)  # a huge eps makes Adam linear in the gradient
        before = learner.theta["rate"]
        for item in (small, large):
            learner.submit(item)
        learner.step()
        moves.append((learner.theta["rate"] - before).abs())
    unit, raw = moves
    torch.testing.assert_close(unit[0], unit[1])
    assert raw[1] > 1e6 * raw[0]


def test_a_zero_gradient_is_counted_and_moves_nothing_by_itself():
    learner = core(meta_batch=1)
    before = learner.theta["rate"]
    assert learner.submit(gradient(1, (0.0, 0.0))) is Verdict.ACCEPTED
    learner.step()
    torch.testing.assert_close(learner.theta["rate"], before)


def test_meta_steps_equal_torch_adamw_on_the_mean_of_unit_gradients():
    learner = core(name="adamw", weight_decay=0.1, learning_rate=0.05)
    theta = learner.theta["rate"].clone().requires_grad_()
    reference = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.1)
    random = np.random.default_rng(0)
    for step in range(5):
        vectors = random.normal(size=(2, 2)).astype(np.float32)
        for i, vector in enumerate(vectors):
            learner.submit(gradient(2 * step + i, tuple(vector), version=step))
        learner.step()
        theta.grad = torch.from_numpy((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0))
        reference.step()
    torch.testing.assert_close(learner.theta["rate"], theta.detach(), rtol=1e-6, atol=1e-7)


def test_frozen_parts_are_neither_moved_nor_decayed():
    learner = core(meta_batch=1, name="adamw", weight_decay=1.0)
    learner.submit(gradient())
    learner.step()
    torch.testing.assert_close(learner.theta["unused"], torch.ones(3), rtol=0, atol=0)


@pytest.mark.parametrize(("clip", "limit"), [({"clip_value": 0.1}, 0.1), ({"clip_norm": 0.1}, 0.1)])
def test_clipping_bounds_the_averaged_gradient(clip, limit):
    learner = core(meta_batch=1, normalize="none", eps=1e6, learning_rate=1.0, **clip)
    before = learner.theta["rate"]
    learner.submit(gradient(1, (30.0, 40.0)))
    learner.step()
    moved = (learner.theta["rate"] - before).abs() * 1e6
    size = moved.max() if "clip_value" in clip else moved.norm()
    assert float(size) == pytest.approx(limit, rel=0.1)


def test_a_step_that_would_leave_finite_numbers_changes_nothing():
    learner = core(meta_batch=1, learning_rate=3e38, beta1=0.0)
    learner.submit(gradient(1))
    learner.step()
    before = learner.theta["rate"]
    learner.submit(gradient(2, version=1))
    with pytest.raises(MetaStepError, match="meta-step 2 would make theta not finite"):
        learner.step()
    assert torch.equal(learner.theta["rate"], before)
    assert learner.balanced()


def test_arrival_order_does_not_matter_in_synchronous_runs():
    items = [gradient(1, tuple(np.random.default_rng(i).normal(size=2)), worker=f"w{i}") for i in range(7)]
    thetas = []
    for order in (items, items[::-1], items[3:] + items[:3]):
        learner = core(ordered=True, meta_batch=7)
        for item in order:
            learner.submit(item)
        learner.step()
        thetas.append(learner.theta["rate"])
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], thetas[2])


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_restored_learner_goes_on_bit_for_bit(waiting):
    def feed(learner, start, count):
        for i in range(start, start + count):
            dense = tuple(np.random.default_rng(i).normal(size=2))
            learner.submit(gradient(i, dense, version=learner.version))
            if learner.ready():
                learner.step()

    straight = core()
    feed(straight, 0, 20 + waiting)
    first = core()
    feed(first, 0, 10 + waiting)
    tensors, record = first.state()
    second = core()
    second.restore(first.theta, {k: v.clone() for k, v in tensors.items()}, record)
    feed(second, 10 + waiting, 10)
    assert torch.equal(second.theta["rate"], straight.theta["rate"])
    assert dataclasses.asdict(second.books["a"]) == dataclasses.asdict(straight.books["a"])
    assert second.balanced()
