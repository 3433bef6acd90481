"""The numbers an optimizer is judged by: golden values worked out by hand, rliable's definitions, invariants."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluator.results import ResultError, TaskResult, Yardstick
from evaluator.scores import (
    LOSS_FLOOR,
    Aggregate,
    Scores,
    aggregate,
    final_loss_score,
    score,
    score_matrix,
    smooth,
    speedup_score,
)

losses = st.floats(1e-3, 1e3)
matrices = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(0, 10))
)


def result(task="a", seed=0, curve=(2.0, 1.0), test_loss=1.0, diverged=False, checkpoint="c1"):
    return TaskResult(task, seed, 7, checkpoint, list(curve), test_loss, test_loss, diverged)


def yardstick(task="a", curves=((2.0, 1.0),), test_losses=(1.0,)):
    return Yardstick(task, 1e-3, [[1e-3, 1.0]], [list(c) for c in curves], list(test_losses))


def test_smoothing_starts_at_the_first_value_and_keeps_nine_tenths():
    np.testing.assert_allclose(smooth([1.0, 0.0, 0.0]), [1.0, 0.9, 0.81])
    np.testing.assert_allclose(smooth([[2.0, 3.0], [4.0, 4.0]]), [[2.0, 2.1], [4.0, 4.0]])


def test_smoothing_an_empty_curve_is_an_error():
    with pytest.raises(ValueError, match="at least one loss"):
        smooth([])


def test_half_the_loss_of_adam_is_a_score_of_two():
    assert final_loss_score(0.5, 1.0) == 2.0
    assert final_loss_score(2.0, 1.0) == 0.5


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_scores_zero(loss):
    assert final_loss_score(loss, 1.0) == 0.0
    assert speedup_score([0.1, loss, 0.1], 1.0) == 0.0


def test_a_loss_of_zero_counts_as_rounding_noise_and_stays_finite():
    assert final_loss_score(0.0, 0.0) == 1.0
    assert final_loss_score(0.0, 1.0) == 1 / LOSS_FLOOR


@pytest.mark.parametrize("adam", [math.nan, math.inf, -1.0])
def test_a_broken_yardstick_is_an_error_and_not_a_score(adam):
    with pytest.raises(ValueError, match="adam_loss"):
        final_loss_score(1.0, adam)
    with pytest.raises(ValueError, match="adam_loss"):
        speedup_score([1.0], adam)


def test_a_negative_loss_has_no_ratio():
    with pytest.raises(ValueError, match="loss = -1"):
        final_loss_score(-1.0, 1.0)


def test_speedup_counts_the_steps_until_the_smoothed_curve_reaches_adams_loss():
    curve = [1.0, 0.0, 0.0, 0.0]  # smoothed 1, .9, .81, .729
    assert speedup_score(curve, 1.0) == 4.0
    assert speedup_score(curve, 0.9) == 2.0
    assert speedup_score(curve, 0.85) == pytest.approx(4 / 3)
    assert speedup_score(curve, 0.7291) == 1.0
    assert speedup_score(curve, 0.7) == 0.0


def test_aggregates_of_a_small_matrix_by_hand():
    scores = [[0.0, 0.5], [1.0, 2.0], [3.0, 10.0]]
    # IQM: 6 scores, int(1.5) = 1 cut at each end: mean(.5, 1, 2, 3); median of task means .25, 1.5, 6.5
    # gap: 1 - mean(0, .5, 1, 1, 1, 1)
    assert aggregate(scores) == Aggregate(iqm=1.625, median=1.5, optimality_gap=pytest.approx(1 - 4.5 / 6))


@given(matrices)
def test_aggregates_equal_rliables(matrix):
    metrics = pytest.importorskip("rliable.metrics")
    ours = aggregate(matrix)
    assert ours.iqm == pytest.approx(metrics.aggregate_iqm(matrix.T))
    assert ours.median == pytest.approx(metrics.aggregate_median(matrix.T))
    assert ours.optimality_gap == pytest.approx(metrics.aggregate_optimality_gap(matrix.T))


@pytest.mark.parametrize("matrix", [[], [[]], [1.0], [[math.nan]]])
def test_only_a_finite_matrix_is_aggregated(matrix):
    with pytest.raises(ValueError, match="expected finite scores"):
        aggregate(matrix)


@given(matrices, st.randoms(use_true_random=False))
def test_aggregates_do_not_depend_on_the_order_of_tasks_or_seeds(matrix, random):
    rows, columns = list(range(matrix.shape[0])), list(range(matrix.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    shuffled, ours = aggregate(matrix[rows][:, columns]), aggregate(matrix)
    assert [shuffled.iqm, shuffled.median, shuffled.optimality_gap] == pytest.approx(
        [ours.iqm, ours.median, ours.optimality_gap]
    )


@given(losses, losses, st.floats(0.1, 10))
def test_scaling_all_losses_leaves_the_final_loss_score(loss, adam, factor):
    assert final_loss_score(loss * factor, adam * factor) == pytest.approx(final_loss_score(loss, adam))


@given(arrays(np.float64, st.integers(1, 40), elements=losses), losses, st.integers(-8, 8))
def test_scaling_all_losses_leaves_the_speedup(curve, adam, exponent):
    assert speedup_score(curve * 2.0**exponent, adam * 2.0**exponent) == speedup_score(curve, adam)


@given(st.lists(losses, min_size=2, max_size=5), st.data())
def test_a_diverged_seed_only_lowers_the_scores(test_losses, data):
    runs = [result(seed=seed, curve=(loss, loss), test_loss=loss) for seed, loss in enumerate(test_losses)]
    lost = data.draw(st.integers(0, len(runs) - 1))
    worse = [*runs[:lost], result(seed=lost, test_loss=1e-9, diverged=True), *runs[lost + 1 :]]
    before, after = score(runs, {"a": yardstick()}), score(worse, {"a": yardstick()})
    for criterion in ("final_loss", "speedup"):
        old, new = getattr(before, criterion), getattr(after, criterion)
        assert new.iqm <= old.iqm + 1e-12
        assert new.median <= old.median + 1e-12
        assert new.optimality_gap >= old.optimality_gap - 1e-12


def test_adam_scored_against_itself_is_at_one():
    curve = list(np.linspace(2.0, 0.5, 50))
    runs = [result(seed=seed, curve=curve, test_loss=0.6) for seed in range(3)]
    scores = score(runs, {"a": yardstick(curves=[curve] * 3, test_losses=[0.6] * 3)})
    assert scores.final_loss == Aggregate(iqm=1.0, median=1.0, optimality_gap=0.0)
    assert scores.speedup == Aggregate(iqm=1.0, median=1.0, optimality_gap=0.0)


def test_the_score_matrix_has_a_row_per_task_and_a_column_per_seed():
    runs = [
        result(task="b", seed=1, test_loss=0.5),
        result(task="a", seed=1, test_loss=4.0),
        result(task="b", seed=0, diverged=True),
        result(task="a", seed=0, test_loss=2.0),
    ]
    matrix = score_matrix(runs, {"a": yardstick("a", test_losses=[1.5], curves=[[2.0, 1.0]]), "b": yardstick("b")})
    np.testing.assert_allclose(matrix["final_loss"], [[0.75, 0.375], [0.0, 2.0]])
    np.testing.assert_allclose(matrix["speedup"], [[1.0, 1.0], [0.0, 1.0]])


def test_the_yardstick_is_the_mean_over_adams_seeds():
    measure = yardstick(curves=[[2.0, 2.0], [1.0, 1.0]], test_losses=[1.0, 3.0])
    matrix = score_matrix([result(curve=[2.0, 0.0], test_loss=1.0)], {"a": measure})
    assert matrix["final_loss"] == 2.0
    assert matrix["speedup"] == 0.0  # 1.8 never reaches 1.5
    assert score_matrix([result(curve=[1.5, 3.0])], {"a": measure})["speedup"] == 2.0


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "expected those of one checkpoint"),
        ([result(), result(seed=1, checkpoint="c2")], "expected those of one checkpoint"),
        ([result(task="z")], "'z' has no yardstick"),
        ([result(curve=[1.0])], "1 steps, its yardstick has 2"),
        ([result(), result()], "seeds"),
        ([result(), result(seed=1), result(task="b")], "task 'b' has seeds"),
    ],
)
def test_incomplete_results_are_not_scored(runs, message):
    with pytest.raises(ValueError, match=message):
        score(runs, {"a": yardstick(), "b": yardstick("b")})


def test_scores_survive_json():
    scores = Scores(Aggregate(1.0, 2.0, 0.25), Aggregate(0.0, 0.0, 1.0))
    assert Scores.from_json(scores.to_json()) == scores


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[]", "scores"),
        ("{", "scores"),
        ('{"final_loss": 1, "speedup": 2}', "final_loss.iqm"),
        ('{"final_loss": {"iqm": NaN}}', "scores"),
        ('{"final_loss": {"iqm": 1, "median": 1, "optimality_gap": "0"}, "speedup": {}}', "final_loss.optimality_gap"),
    ],
)
def test_damaged_scores_are_refused_by_field(text, field):
    with pytest.raises(ResultError) as caught:
        Scores.from_json(text)
    assert caught.value.field == field


GOOD = json.loads(result().to_json())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": True}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"version": "7"}, "version"),
        ({"task": ""}, "task"),
        ({"curve": []}, "curve"),
        ({"curve": [1.0, "2"]}, "curve[1]"),
        ({"curve": [1.0, None]}, "curve[1]"),
        ({"test_loss": -0.5}, "test_loss"),
        ({"train_loss": 10**400}, "train_loss"),
        ({"diverged": 0}, "diverged"),
        ({"seconds": "fast"}, "seconds"),
        ({"test_los": 1.0}, "test_los"),
    ],
)
def test_a_damaged_task_result_is_refused_by_field(change, field):
    with pytest.raises(ResultError) as caught:
        TaskResult.from_json(json.dumps({**GOOD, **change}))
    assert caught.value.field == field


def test_every_field_of_a_task_result_is_required():
    for name in GOOD:
        with pytest.raises(ResultError, match="missing"):
            TaskResult.from_json(json.dumps({key: value for key, value in GOOD.items() if key != name}))


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, b"\xff\xfe\x00", '{"curve": [Infinity]}'])
def test_what_is_no_result_at_all_is_refused(text):
    with pytest.raises(ResultError, match="task result"):
        TaskResult.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"sweep": []},
        {"sweep": [[1.0]]},
        {"sweep": [[1.0, "x"]]},
        {"curves": [[1.0], [1.0, 2.0]]},
        {"curves": [[]]},
        {"test_losses": [1.0, 2.0]},
        {"learning_rate": None},
    ],
)
def test_a_damaged_yardstick_is_refused(change):
    fields = json.loads(yardstick().to_json())
    assert Yardstick.from_json(json.dumps(fields)) == yardstick()
    with pytest.raises(ResultError):
        Yardstick.from_json(json.dumps({**fields, **change}))
