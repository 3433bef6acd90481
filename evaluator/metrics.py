"""What the evaluator tells Prometheus: names, units and labels, and the port they are read from.

Owns: the evaluator's metric names (the dashboards and alert rules use nothing else) and their meaning.
Must never: change the evaluator, wait for it, or compute a score.

Counters count from the start of this process, because results that were found in the store at a restart are not new
work: the totals of the first look are subtracted, and ``rate`` sees an ordinary reset.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from configs.checks import ConfigError

CRITERIA = ("final_loss", "speedup")
EVALUATION_SECONDS_BUCKETS = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


@dataclass(frozen=True)
class CriterionScores:
    """The newest checkpoint's scores by one criterion, over all tasks and seeds."""

    iqm: float
    median: float
    optimality_gap: float


@dataclass(frozen=True)
class EvaluatorSnapshot:
    """The evaluator's numbers at one instant. What is not measured yet is missing and exported as NaN, never as 0."""

    evaluations: Mapping[str, int] = field(default_factory=dict)  # results written, by task
    failures: int = 0
    queue_depth: int = 0  # (checkpoint, task, seed) items still to do
    behind_versions: int = 0  # newest checkpoint's version minus evaluated_version
    evaluated_version: float = math.nan  # newest version that is completely scored
    scores: Mapping[str, CriterionScores] = field(default_factory=dict)  # by criterion, of evaluated_version
    final_loss: Mapping[str, float] = field(default_factory=dict)  # newest mean over seeds, by task


class EvaluatorMetrics(Collector):
    """The evaluator's metrics in their own registry; make it when the evaluator has looked at the store.

    ``snapshot`` is called at every scrape from the HTTP server's thread: it must return at once, and a snapshot whose
    mappings nobody writes to any more. Every series of ``tasks`` and of both criteria exists from the start.
    ``evaluation_seconds`` is fed with ``observe``.
    """

    def __init__(self, snapshot: Callable[[], EvaluatorSnapshot], tasks: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self.evaluation_seconds = Histogram(
            "paceline_evaluation_seconds",
            "Seconds that one evaluation (checkpoint, task, seed) took",
            buckets=EVALUATION_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._snapshot = snapshot
        self._tasks = tuple(tasks)
        self._start = snapshot()
        self._served: tuple[WSGIServer, threading.Thread] | None = None
        self.registry.register(self)

    def serve(self, port: int = 0, host: str = "127.0.0.1") -> int:
        """Serves ``GET /metrics`` until ``close`` and returns the port (0 lets the system choose).

        The loopback address is the default because the endpoint has neither password nor TLS. Inside a cluster give
        it the pod's address and let a network policy admit Prometheus alone. ``ConfigError`` if the port is taken.
        """
        try:
            self._served = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            expected = f"a port that is free on {host} ({error})"
            raise ConfigError("cluster.evaluator_metrics_port", port, expected) from error
        return self._served[0].server_port

    def close(self) -> None:
        """Stops serving and frees the port."""
        if self._served is not None:
            server, thread = self._served
            server.shutdown()
            server.server_close()
            thread.join()
            self._served = None

    def collect(self) -> Iterator[Metric]:
        """All metrics but the histogram, from one snapshot."""
        now = self._snapshot()
        yield from self._work(now)
        yield from self._scores(now)

    def _work(self, now: EvaluatorSnapshot) -> Iterator[Metric]:
        evaluations = CounterMetricFamily("paceline_evaluations", "Evaluations done", labels=("task",))
        for task in self._tasks:
            evaluations.add_metric((task,), now.evaluations.get(task, 0) - self._start.evaluations.get(task, 0))
        yield evaluations
        failures = now.failures - self._start.failures
        yield CounterMetricFamily("paceline_evaluation_failures", "Evaluations that ended in an error", failures)
        yield GaugeMetricFamily("paceline_evaluation_queue_depth", "Evaluations still to do", now.queue_depth)
        behind = "Versions between the newest checkpoint and the newest completely scored one"
        yield GaugeMetricFamily("paceline_evaluation_behind_versions", behind, now.behind_versions)

    def _scores(self, now: EvaluatorSnapshot) -> Iterator[Metric]:
        yield GaugeMetricFamily("paceline_evaluated_version", "Newest completely scored version", now.evaluated_version)
        iqm = GaugeMetricFamily("paceline_score_iqm", "Interquartile mean score", labels=("criterion",))
        median = GaugeMetricFamily("paceline_score_median", "Median score", labels=("criterion",))
        gap = GaugeMetricFamily("paceline_score_optimality_gap", "Mean shortfall from score 1", labels=("criterion",))
        for criterion in CRITERIA:
            scores = now.scores.get(criterion, CriterionScores(math.nan, math.nan, math.nan))
            iqm.add_metric((criterion,), scores.iqm)
            median.add_metric((criterion,), scores.median)
            gap.add_metric((criterion,), scores.optimality_gap)
        yield from (iqm, median, gap)
        loss = GaugeMetricFamily("paceline_evaluation_final_loss", "Newest mean final loss", labels=("task",))
        for task in self._tasks:
            loss.add_metric((task,), now.final_loss.get(task, math.nan))
        yield loss
