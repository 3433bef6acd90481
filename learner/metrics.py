"""What the learner tells Prometheus: names, units and labels, and the port they are read from.

Owns: the learner's metric names (the dashboards and alert rules use nothing else) and their meaning.
Must never: change the learner, wait for it, or put a worker's identity into a label.

Counters count from the start of this incarnation. The learner's books are totals over the whole run and come back
from a checkpoint that is a little older than the crash; exported as they are they would step from, say, 1000 back to
950, which Prometheus takes for a reset to zero and adds 950 to every rate. So the totals found at the first look are
subtracted, and a restart is the ordinary reset that ``rate`` and ``increase`` are made for. The run's own totals are
in the status; ``paceline_version`` is the one absolute count here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from configs.checks import ConfigError

STALENESS_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
CHECKPOINT_SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)

K = TypeVar("K")


@dataclass(frozen=True)
class LearnerSnapshot:
    """The learner's numbers at one instant; totals are over the run and may start above zero after a restart.

    A value that is not known yet is missing from its mapping (or NaN) and is exported as NaN, never as zero:
    a meta-loss of 0 would be the best possible one.
    """

    version: int = 0
    incarnation: int = 0
    received: Mapping[str, int] = field(default_factory=dict)  # by task family
    applied: Mapping[str, int] = field(default_factory=dict)  # by task family
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)  # by (task family, reason)
    waiting: int = 0
    inner_steps: Mapping[str, int] = field(default_factory=dict)  # by task family
    estimate_seconds: Mapping[str, float] = field(default_factory=dict)  # worker seconds, by task family
    compile_seconds: Mapping[str, float] = field(default_factory=dict)  # workers' compilers, by task family
    meta_loss: Mapping[str, float] = field(default_factory=dict)  # newest mean, by task family
    meta_gradient_norm: Mapping[str, float] = field(default_factory=dict)  # before normalisation, by task family
    update_norm: float = math.nan
    workers_desired: int = 0
    workers_alive: int = 0
    workers_replaced: int = 0
    checkpoints: int = 0
    checkpoint_timestamp: float = math.nan  # Unix seconds of the newest checkpoint
    paused: bool = False


class LearnerMetrics(Collector):
    """The learner's metrics in their own registry; make it when the learner has restored itself.

    ``snapshot`` is called at every scrape from the HTTP server's thread: it must return at once, and a snapshot whose
    mappings nobody writes to any more. Every series of ``families`` (and ``reasons``) exists from the start, so that
    ``rate`` sees the first event. ``staleness`` and ``checkpoint_seconds`` are fed with ``observe``.
    """

    def __init__(
        self, snapshot: Callable[[], LearnerSnapshot], families: Sequence[str], reasons: Sequence[str]
    ) -> None:
        self.registry = CollectorRegistry()
        self.staleness = Histogram(
            "paceline_staleness_versions",
            "Versions between the theta of a meta-gradient and the learner's, at submission",
            buckets=STALENESS_BUCKETS,
            registry=self.registry,
        )
        self.checkpoint_seconds = Histogram(
            "paceline_checkpoint_seconds",
            "Seconds that saving a checkpoint took",
            buckets=CHECKPOINT_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._snapshot = snapshot
        self._families = tuple(families)
        self._drops = tuple((family, reason) for family in families for reason in reasons)
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
            raise ConfigError(
                "cluster.learner_metrics_port", port, f"a port that is free on {host} ({error})"
            ) from error
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
        """All metrics but the histograms, from one snapshot."""
        now = self._snapshot()
        if now.incarnation != self._start.incarnation:  # a rollback inside this process: totals went back
            self._start = now
        yield from self._run(now)
        yield from self._meta_gradients(now)
        yield from self._pool_and_checkpoints(now)

    def _run(self, now: LearnerSnapshot) -> Iterator[Metric]:
        yield GaugeMetricFamily("paceline_version", "Meta-steps behind the current theta", now.version)
        yield GaugeMetricFamily(
            "paceline_incarnation", "Life of the learner, up at restart or rollback", now.incarnation
        )
        steps = now.version - self._start.version
        yield CounterMetricFamily("paceline_meta_steps", "Meta-steps done in this incarnation", steps)
        yield self._gauges("paceline_meta_loss", "Newest mean meta-loss", now.meta_loss)
        yield self._gauges(
            "paceline_meta_gradient_norm", "Newest norm of a meta-gradient before normalisation", now.meta_gradient_norm
        )
        yield GaugeMetricFamily("paceline_update_norm", "Norm of the last change of theta", now.update_norm)
        yield GaugeMetricFamily("paceline_paused", "1 while the run is paused", int(now.paused))

    def _meta_gradients(self, now: LearnerSnapshot) -> Iterator[Metric]:
        start = self._start
        name = "paceline_meta_gradients"
        yield self._counters(f"{name}_received", "Meta-gradients submitted", now.received, start.received)
        yield self._counters(f"{name}_applied", "Meta-gradients in a meta-step", now.applied, start.applied)
        dropped = CounterMetricFamily(f"{name}_dropped", "Meta-gradients refused", labels=("family", "reason"))
        for family, reason in _seeded(self._drops, now.dropped):
            count = now.dropped.get((family, reason), 0) - start.dropped.get((family, reason), 0)
            dropped.add_metric((family, reason), count)
        yield dropped
        yield GaugeMetricFamily(f"{name}_waiting", "Meta-gradients accepted for the next meta-step", now.waiting)
        yield self._counters("paceline_inner_steps", "Inner steps unrolled", now.inner_steps, start.inner_steps)
        yield self._counters(
            "paceline_estimate_seconds",
            "Seconds workers spent estimating",
            now.estimate_seconds,
            start.estimate_seconds,
        )
        yield self._counters(
            "paceline_compile_seconds",
            "Seconds workers' compilers took, or loading what was compiled before",
            now.compile_seconds,
            start.compile_seconds,
        )

    def _pool_and_checkpoints(self, now: LearnerSnapshot) -> Iterator[Metric]:
        yield GaugeMetricFamily("paceline_workers_desired", "Workers asked for", now.workers_desired)
        yield GaugeMetricFamily("paceline_workers_alive", "Workers that answer", now.workers_alive)
        replaced = now.workers_replaced - self._start.workers_replaced
        yield CounterMetricFamily("paceline_workers_replaced", "Lost workers replaced by new ones", replaced)
        saved = now.checkpoints - self._start.checkpoints
        yield CounterMetricFamily("paceline_checkpoints", "Checkpoints saved", saved)
        yield GaugeMetricFamily(
            "paceline_checkpoint_timestamp_seconds", "Unix time of the newest checkpoint", now.checkpoint_timestamp
        )

    def _counters(
        self, name: str, text: str, now: Mapping[str, float], start: Mapping[str, float]
    ) -> CounterMetricFamily:
        metric = CounterMetricFamily(name, text, labels=("family",))
        for family in _seeded(self._families, now):
            metric.add_metric((family,), now.get(family, 0) - start.get(family, 0))
        return metric

    def _gauges(self, name: str, text: str, now: Mapping[str, float]) -> GaugeMetricFamily:
        metric = GaugeMetricFamily(name, text, labels=("family",))
        for family in _seeded(self._families, now):
            metric.add_metric((family,), now.get(family, math.nan))
        return metric


def _seeded(seeds: Iterable[K], found: Iterable[K]) -> list[K]:
    """The seeded keys first, then those that turned up besides, each once."""
    return list(dict.fromkeys((*seeds, *found)))
