"""A worker as a Ray actor: fetch theta, estimate, submit, again.

Owns the loop and its patience with a learner that is being restarted. Decides nothing about estimates: ``core`` does.
Opens no port: what it has to say rides on its meta-gradients.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError
from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from configs.schema import Config
from lopt import LearnedOptimizer, MetaGradient
from tasks import Library, TaskDistribution
from worker.core import WorkerCore

CALL_SECONDS = 60.0
PATIENCE_SECONDS = 90.0
"""How long a worker puts up with a learner that does not answer before it gives up with the reason."""

log = logging.getLogger(__name__)


class Worker:
    """See the module. ``run`` is the worker's whole life; it returns why it ended.

    ``name`` identifies the worker in this launch, ``slot`` is its place in the rotation of families. In synchronous
    runs a replacement takes the name of the lost worker and goes on from where that one's last meta-gradient left it.
    """

    def __init__(self, config: Config, rule: LearnedOptimizer, name: str, slot: int, learner: Any) -> None:
        torch.set_num_threads(1)
        self.config, self.rule, self.name, self.slot, self.learner = config, rule, name, slot, learner
        self.device = torch.device("cuda" if config.cluster.worker_gpus > 0 else "cpu")
        self.tasks = TaskDistribution(config.task, Library(config.task.data))
        for warning in self.tasks.warnings:
            log.warning(warning)

    def run(self) -> str:
        """Work until the learner says to leave."""
        while True:
            ticket = self._call(lambda: self.learner.join.remote(self.name))
            reason = self._work(ticket)
            if reason is not None:
                return reason

    def _work(self, ticket: Any) -> str | None:
        """Work for one incarnation of the learner; None when another one has taken over."""
        frozen = {name: torch.from_numpy(leaf.copy()) for name, leaf in ticket.theta.items()}
        synchronous = self.config.run.mode == "sync"
        # a synchronous run repeats itself after a restart, an asynchronous one must not draw the same noise again
        life = 0 if synchronous else ticket.incarnation
        key = ("worker", self.config.run.seed, life, self.name)
        core = WorkerCore(self.rule, self.tasks, self.config.estimator, self.slot, key, self.device)
        after = ticket.after
        if ticket.snapshot is not None:
            core.restore(ticket.snapshot)
        while True:
            weights = self._fetch(after)
            if weights.leave is not None:
                return str(weights.leave)
            if weights.incarnation != ticket.incarnation:
                return None
            if weights.flat is None:
                continue
            start = time.perf_counter()
            theta = self.rule.spec.unflatten(torch.from_numpy(weights.flat.copy()), frozen)
            turn = core.estimate(theta, weights.version)
            gradient = MetaGradient(
                run=self.config.run.name,
                incarnation=ticket.incarnation,
                version=weights.version,
                worker=self.name,
                sequence=core.turns,
                family=turn.family,
                static_digest=turn.static_digest,
                dense=turn.estimate.gradient.numpy().astype(np.float32),
                mean_loss=turn.estimate.mean_loss,
                norm=float(turn.estimate.gradient.norm()),
                inner_steps=turn.estimate.inner_steps,
                seconds=time.perf_counter() - start,
            )
            self._submit(gradient, core.snapshot() if synchronous else None)
            after = weights.version

    def _fetch(self, after: int) -> Any:
        return self._call(lambda: self.learner.fetch.remote(self.name, after))

    def _submit(self, gradient: MetaGradient, snapshot: bytes | None) -> None:
        self._call(lambda: self.learner.submit.remote(gradient, snapshot))

    @retry(
        retry=retry_if_exception_type((ActorDiedError, ActorUnavailableError, GetTimeoutError)),
        wait=wait_random_exponential(multiplier=0.1, max=2.0),
        stop=stop_after_delay(PATIENCE_SECONDS),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    def _call(self, call: Callable[[], Any]) -> Any:
        """Ask the learner, again while it is being restarted; a repeated submission counts once, by its sequence."""
        return ray.get(call(), timeout=CALL_SECONDS)
