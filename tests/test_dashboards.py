"""Every number on a dashboard or in an alert exists in code; queries parse; alerts fire when they should."""

import json
import re
import shutil
import subprocess
from importlib import resources

import promql_parser
import pytest
import yaml

from evaluator.metrics import EvaluatorMetrics, EvaluatorSnapshot
from learner.metrics import LearnerMetrics, LearnerSnapshot

FOLDER = resources.files("deploy") / "dashboards"
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
BUILT_IN = {"up"}  # what Prometheus makes itself
LABELS_ADDED = {"run", "room", "job", "instance", "le"}  # by the scrape configuration and by histograms

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on the PATH (apt-get install prometheus)"
)


def exported():
    """``{sample name: label names}`` of everything the two rooms export."""
    learner = LearnerMetrics(LearnerSnapshot, ("digits",), ("stale",))
    evaluator = EvaluatorMetrics(EvaluatorSnapshot, ("digits",))
    found = {}
    for metrics in (learner, evaluator):
        for family in metrics.registry.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


EXPORTED = exported()


def panels():
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions():
    """``(where it stands, PromQL, texts that may name labels)`` of all queries."""
    found = [
        (panel["title"], target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]
    ]
    found += [(note["name"], note["expr"], "") for note in DASHBOARD["annotations"]["list"]]
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    return found + [(rule["alert"], rule["expr"], rule["annotations"]["summary"]) for rule in rules]


def selectors(node):
    """All vector selectors of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")] + list(getattr(node, "args", None) or [])
    return [found for child in children if child is not None for found in selectors(child)]


def queried(text):
    """All vector selectors of an expression, Grafana's variables replaced."""
    return selectors(promql_parser.parse(text.replace("$__rate_interval", "1m").replace("$run", "celo")))


@pytest.mark.parametrize(("where", "text", "legend"), expressions())
def test_every_query_parses_and_asks_for_what_is_exported(where, text, legend):
    found = queried(text)
    assert {selector.name for selector in found} == set(re.findall(r"paceline_\w+|\bup\b", text))  # none overlooked
    for selector in found:
        assert selector.name in EXPORTED.keys() | BUILT_IN, f"{where}: nothing exports {selector.name}"
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert labels <= EXPORTED.get(selector.name, set()) | LABELS_ADDED, f"{where}: {selector.name} has no {labels}"
    known = LABELS_ADDED.union(*(EXPORTED.get(selector.name, set()) for selector in found))
    assert set(re.findall(r"(?:{{|\$labels\.)(\w+)", legend)) <= known


def test_every_metric_is_shown_somewhere():
    shown = {selector.name for _, text, _ in expressions() for selector in queried(text)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in EXPORTED}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} - BUILT_IN


def test_the_dashboard_can_be_imported():
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["id"] is None  # Grafana gives it one
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert run["query"]["query"] == "label_values(paceline_version, run)"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all('run="$run"' in target["expr"] for target in panel["targets"]), panel["title"]


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_targets_come_from_the_launcher_or_from_fixed_ports():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    announced, fixed = config["scrape_configs"]
    assert announced["file_sd_configs"][0]["files"] == ["../../runs/*.targets.json"]
    assert [target["targets"] for target in fixed["static_configs"]] == [["127.0.0.1:9100"], ["127.0.0.1:9101"]]


@needs_promtool
def test_prometheus_accepts_the_configuration_and_the_rules():
    done = subprocess.run(
        ["promtool", "check", "config", str(FOLDER / "prometheus.yml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


LEARNER = '{run="celo", job="paceline", room="learner", instance="a:1"}'
FAMILY = LEARNER.replace("}", ', family="digits"}')
STALE = LEARNER.replace("}", ', family="digits", reason="stale"}')
ALERT_CASES = {  # series (value+growth x samples, one a minute), then the alerts that fire after an hour
    "a run that goes on": ({f"paceline_meta_steps_total{LEARNER}": "0+5x60", f"paceline_paused{LEARNER}": "0x60"}, []),
    "a run that stalls": (
        {f"paceline_meta_steps_total{LEARNER}": "0+5x30 150x30", f"paceline_paused{LEARNER}": "0x60"},
        ["PacelineStalled"],
    ),
    "a paused run": ({f"paceline_meta_steps_total{LEARNER}": "100x60", f"paceline_paused{LEARNER}": "1x60"}, []),
    "a run that was restarted": (
        {f"paceline_meta_steps_total{LEARNER}": "0+5x55 0 1 2 3 4", f"paceline_paused{LEARNER}": "0x60"},
        [],
    ),
    "too many stale": (
        {
            f"paceline_meta_gradients_dropped_total{STALE}": "0+4x60",
            f"paceline_meta_gradients_received_total{FAMILY}": "0+10x60",
        },
        ["PacelineStale"],
    ),
    "some stale": (
        {
            f"paceline_meta_gradients_dropped_total{STALE}": "0+2x60",
            f"paceline_meta_gradients_received_total{FAMILY}": "0+10x60",
        },
        [],
    ),
    "a starved family": (
        {
            f"paceline_meta_gradients_applied_total{FAMILY}": "7x60",
            f"paceline_meta_steps_total{LEARNER}": "0+5x60",
        },
        ["PacelineFamilyStarved"],
    ),
    "a worker short": (
        {f"paceline_workers_alive{LEARNER}": "3x60", f"paceline_workers_desired{LEARNER}": "4x60"},
        ["PacelineWorkersShort"],
    ),
    "a lost learner": ({f"up{LEARNER}": "1x50 0x10"}, ["PacelineDown"]),
    "an evaluator that hangs": (
        {f"paceline_evaluation_behind_versions{LEARNER}": "100x70", f"paceline_evaluated_version{LEARNER}": "50x70"},
        ["PacelineEvaluatorBehind"],
    ),
    "an evaluator that is busy": (
        {f"paceline_evaluation_behind_versions{LEARNER}": "100x70", f"paceline_evaluated_version{LEARNER}": "0+50x70"},
        [],
    ),
    "no checkpoint for long": (
        {f"paceline_checkpoint_timestamp_seconds{LEARNER}": "-600x60", f"paceline_paused{LEARNER}": "0x60"},
        ["PacelineCheckpointOld"],
    ),
    "no checkpoint yet": (
        {f"paceline_checkpoint_timestamp_seconds{LEARNER}": "NaN " * 60, f"paceline_paused{LEARNER}": "0x60"},
        [],
    ),
    "non-finite meta-gradients": (
        {f"paceline_meta_gradients_dropped_total{STALE}".replace("stale", "non_finite"): "0x58 1 1"},
        ["PacelineNonFinite"],
    ),
    "failing evaluations": ({f"paceline_evaluation_failures_total{LEARNER}": "0x58 1 1"}, ["PacelineEvaluationsFail"]),
}


@needs_promtool
@pytest.mark.parametrize("case", ALERT_CASES)
def test_alerts_fire_for_what_they_are_for_and_for_nothing_else(tmp_path, case):
    values, expected = ALERT_CASES[case]
    shutil.copy(str(FOLDER / "alerts.yml"), tmp_path)
    # promtool compares whole alerts, so each rule is reduced to whether it fires
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in expected]
    test = {
        "rule_files": ["alerts.yml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": text} for series, text in values.items()],
                "promql_expr_test": [{"expr": query, "eval_time": "60m", "exp_samples": samples}],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
