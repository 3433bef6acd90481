"""What Prometheus reads: names, labels, seeded zeros and counters that survive a restart of the learner."""

import math
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from configs.checks import ConfigError
from evaluator.metrics import CriterionScores, EvaluatorMetrics, EvaluatorSnapshot
from learner.metrics import LearnerMetrics, LearnerSnapshot

FAMILIES = ("digits", "letters")
REASONS = ("stale", "future", "duplicate", "non_finite", "malformed", "wrong_run", "full")
TASKS = ("digits_mlp", "letters_mlp")

LEARNER_NAMES = {
    "paceline_version": (),
    "paceline_incarnation": (),
    "paceline_meta_steps_total": (),
    "paceline_meta_loss": ("family",),
    "paceline_meta_gradients_received_total": ("family",),
    "paceline_meta_gradients_applied_total": ("family",),
    "paceline_meta_gradients_dropped_total": ("family", "reason"),
    "paceline_meta_gradients_waiting": (),
    "paceline_staleness_versions": "histogram",
    "paceline_inner_steps_total": ("family",),
    "paceline_estimate_seconds_total": ("family",),
    "paceline_compile_seconds_total": ("family",),
    "paceline_meta_gradient_norm": ("family",),
    "paceline_update_norm": (),
    "paceline_workers_desired": (),
    "paceline_workers_alive": (),
    "paceline_workers_replaced_total": (),
    "paceline_checkpoints_total": (),
    "paceline_checkpoint_seconds": "histogram",
    "paceline_checkpoint_timestamp_seconds": (),
    "paceline_paused": (),
}
EVALUATOR_NAMES = {
    "paceline_evaluations_total": ("task",),
    "paceline_evaluation_seconds": "histogram",
    "paceline_evaluation_queue_depth": (),
    "paceline_evaluation_behind_versions": (),
    "paceline_evaluated_version": (),
    "paceline_score_iqm": ("criterion",),
    "paceline_score_median": ("criterion",),
    "paceline_score_optimality_gap": ("criterion",),
    "paceline_evaluation_final_loss": ("task",),
    "paceline_evaluation_failures_total": (),
}


def exposed(text):
    """``{(sample name, label values): value}`` of an exposition, without the creation times."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def read(metrics):
    return exposed(generate_latest(metrics.registry).decode())


def names(metrics):
    """Name -> label names, or "histogram", as scraped."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            if family.type == "histogram":
                found[family.name] = "histogram"
            elif not sample.name.endswith("_created"):
                found[sample.name] = tuple(sample.labels)
    return found


def learner(snapshot=LearnerSnapshot()):  # noqa: B008  frozen
    """Metrics over a snapshot that a test may replace: ``holder[0] = ...``."""
    holder = [snapshot]
    return LearnerMetrics(lambda: holder[0], FAMILIES, REASONS), holder


def test_names_and_labels_are_frozen():
    assert names(learner()[0]) == LEARNER_NAMES
    assert names(EvaluatorMetrics(EvaluatorSnapshot, TASKS)) == EVALUATOR_NAMES


def test_every_counter_series_exists_from_the_start_at_zero():
    found = read(learner()[0])
    for name, labels in LEARNER_NAMES.items():
        if name.endswith("_total"):
            values = {(): [()], ("family",): [(f,) for f in FAMILIES]}.get(labels)
            for series in values or [(f, r) for f in FAMILIES for r in REASONS]:
                assert found[name, series] == 0
    assert found["paceline_staleness_versions_count", ()] == 0
    evaluator = read(EvaluatorMetrics(EvaluatorSnapshot, TASKS))
    assert [evaluator["paceline_evaluations_total", (task,)] for task in TASKS] == [0, 0]
    assert evaluator["paceline_evaluation_failures_total", ()] == 0


def test_what_is_not_measured_yet_is_not_a_number_rather_than_the_best_loss():
    found = read(learner()[0]) | read(EvaluatorMetrics(EvaluatorSnapshot, TASKS))
    for name in ("paceline_meta_loss", "paceline_meta_gradient_norm"):
        assert all(math.isnan(found[name, (family,)]) for family in FAMILIES)
    for name in ("paceline_score_iqm", "paceline_score_median", "paceline_score_optimality_gap"):
        assert all(math.isnan(found[name, (criterion,)]) for criterion in ("final_loss", "speedup"))
    assert all(math.isnan(found["paceline_evaluation_final_loss", (task,)]) for task in TASKS)
    assert math.isnan(found["paceline_checkpoint_timestamp_seconds", ()])


def test_learner_values_reach_their_own_names():
    metrics, holder = learner()
    metrics.staleness.observe(3)
    metrics.checkpoint_seconds.observe(0.02)
    holder[0] = LearnerSnapshot(
        version=11, incarnation=0, received={"digits": 22}, applied={"digits": 13}, waiting=3,
        dropped={("digits", "stale"): 6}, inner_steps={"digits": 1000}, estimate_seconds={"digits": 2.5},
        compile_seconds={"digits": 7.5}, meta_loss={"digits": 1.25}, meta_gradient_norm={"digits": 7.0},
        update_norm=0.125, workers_desired=5, workers_alive=4, workers_replaced=2,
        checkpoints=9, checkpoint_timestamp=1.7e9, paused=True,
    )  # fmt: skip
    found = read(metrics)
    assert {name: value for (name, labels), value in found.items() if labels in ((), ("digits",))} | {
        "dropped": found["paceline_meta_gradients_dropped_total", ("digits", "stale")]
    } == {
        "paceline_version": 11,
        "paceline_incarnation": 0,
        "paceline_meta_steps_total": 11,
        "paceline_meta_loss": 1.25,
        "paceline_meta_gradients_received_total": 22,
        "paceline_meta_gradients_applied_total": 13,
        "dropped": 6,
        "paceline_meta_gradients_waiting": 3,
        "paceline_inner_steps_total": 1000,
        "paceline_estimate_seconds_total": 2.5,
        "paceline_compile_seconds_total": 7.5,
        "paceline_meta_gradient_norm": 7,
        "paceline_update_norm": 0.125,
        "paceline_workers_desired": 5,
        "paceline_workers_alive": 4,
        "paceline_workers_replaced_total": 2,
        "paceline_checkpoints_total": 9,
        "paceline_checkpoint_timestamp_seconds": 1.7e9,
        "paceline_paused": 1,
        "paceline_staleness_versions_count": 1,
        "paceline_staleness_versions_sum": 3,
        "paceline_checkpoint_seconds_count": 1,
        "paceline_checkpoint_seconds_sum": 0.02,
    }
    assert found["paceline_staleness_versions_bucket", ("2.0",)] == 0
    assert found["paceline_staleness_versions_bucket", ("3.0",)] == 1


def test_evaluator_values_reach_their_own_names():
    found_before = EvaluatorSnapshot(evaluations={"digits_mlp": 40}, failures=2)
    holder = [found_before]
    metrics = EvaluatorMetrics(lambda: holder[0], TASKS)
    holder[0] = EvaluatorSnapshot(
        evaluations={"digits_mlp": 42, "letters_mlp": 1}, failures=3, queue_depth=5, behind_versions=50,
        evaluated_version=100, final_loss={"letters_mlp": 0.75},
        scores={"final_loss": CriterionScores(0.9, 0.8, 0.2), "speedup": CriterionScores(3, 2, 1)},
    )  # fmt: skip
    found = read(metrics)
    assert found["paceline_evaluations_total", ("digits_mlp",)] == 2
    assert found["paceline_evaluations_total", ("letters_mlp",)] == 1
    assert found["paceline_evaluation_failures_total", ()] == 1
    assert found["paceline_evaluation_queue_depth", ()] == 5
    assert found["paceline_evaluation_behind_versions", ()] == 50
    assert found["paceline_evaluated_version", ()] == 100
    for name, values in {"iqm": (0.9, 3), "median": (0.8, 2), "optimality_gap": (0.2, 1)}.items():
        assert (
            found[f"paceline_score_{name}", ("final_loss",)],
            found[f"paceline_score_{name}", ("speedup",)],
        ) == values
    assert found["paceline_evaluation_final_loss", ("letters_mlp",)] == 0.75


def increase(series):
    """PromQL's ``increase`` over every sample: a counter that falls was reset to zero."""
    return sum(after - before if after >= before else after for before, after in pairwise(series))


steps = st.lists(st.integers(0, 50), min_size=1, max_size=5)


@given(first_life=steps, lost=st.integers(0, 100), second_life=steps)
def test_a_restart_from_an_older_checkpoint_adds_nothing_to_any_rate(first_life, lost, second_life):
    """Books restored from a checkpoint may be lower than those scraped last; rates must not notice."""
    total, scraped = 0, []
    for life, growth in enumerate((first_life, second_life)):
        metrics, holder = learner(snapshot_at(total, life))
        scraped.append(read(metrics))
        for step in growth:
            total += step
            holder[0] = snapshot_at(total, life)
            scraped.append(read(metrics))
        total = max(0, total - lost)  # what the newest checkpoint knows
    for series, value in snapshot_series(1).items():
        done = value * (sum(first_life) + sum(second_life))
        assert increase([scrape[series] for scrape in scraped]) == done
    assert scraped[-1]["paceline_version", ()] == max(0, sum(first_life) - lost) + sum(second_life)


def snapshot_at(total, incarnation):
    return LearnerSnapshot(
        version=total, incarnation=incarnation, received={"digits": 2 * total}, applied={"digits": total},
        dropped={("digits", "stale"): total}, inner_steps={"digits": 10 * total},
        estimate_seconds={"digits": float(total)}, compile_seconds={"digits": 3.0 * total},
        workers_replaced=total, checkpoints=total,
    )  # fmt: skip


def snapshot_series(total):
    return {
        ("paceline_meta_steps_total", ()): total,
        ("paceline_meta_gradients_received_total", ("digits",)): 2 * total,
        ("paceline_meta_gradients_applied_total", ("digits",)): total,
        ("paceline_meta_gradients_dropped_total", ("digits", "stale")): total,
        ("paceline_inner_steps_total", ("digits",)): 10 * total,
        ("paceline_estimate_seconds_total", ("digits",)): total,
        ("paceline_compile_seconds_total", ("digits",)): 3 * total,
        ("paceline_workers_replaced_total", ()): total,
        ("paceline_checkpoints_total", ()): total,
    }


def test_a_rollback_inside_the_process_is_a_reset_too():
    metrics, holder = learner(snapshot_at(0, 1))
    holder[0] = snapshot_at(100, 1)
    assert read(metrics)["paceline_meta_steps_total", ()] == 100
    holder[0] = snapshot_at(95, 2)
    assert read(metrics)["paceline_meta_steps_total", ()] == 0
    holder[0] = replace(snapshot_at(97, 2), received={"digits": 194, "intruder": 1})
    found = read(metrics)
    assert found["paceline_meta_steps_total", ()] == 2
    assert found["paceline_meta_gradients_received_total", ("intruder",)] == 1  # nothing received goes unreported


@pytest.mark.parametrize("make", [lambda: learner()[0], lambda: EvaluatorMetrics(EvaluatorSnapshot, TASKS)])
def test_metrics_are_served_until_closed_and_a_taken_port_is_a_clear_error(make):
    metrics = make()
    port = metrics.serve()
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        assert exposed(response.read().decode()).keys() == read(metrics).keys()
    with pytest.raises(ConfigError, match=rf"metrics_port = {port}: expected a port that is free on 127.0.0.1"):
        make().serve(port)
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
    assert metrics.serve(port) == port  # the port is free again
    metrics.close()
    metrics.close()
