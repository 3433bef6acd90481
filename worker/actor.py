"""A worker as a Ray actor: estimate, hand over what was estimated and get theta for what is next, again.

Owns the loop and its patience with a learner that is being restarted. Decides nothing about estimates: ``core`` does.
Opens no port: what it has to say rides on its meta-gradients.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError
from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from configs.schema import Config
from lopt import LearnedOptimizer, MetaGradient
from lopt.base import Theta
from tasks import Library, TaskDistribution
from worker.core import WorkerCore
from worker.memory import keep_freed_memory

CALL_SECONDS = 60.0
PATIENCE_SECONDS = 90.0
"""How long a worker puts up with a learner that does not answer before it gives up with the reason."""
AHEAD = {"sync": 0, "async": 1}
"""How many submissions may be on their way while the next estimates are made. One hides the learner's answering time;
theta is then one submission older."""

log = logging.getLogger(__name__)


@dataclass
class _Call:
    """A call of the learner that was made; ``arguments`` to make it again."""

    method: str
    arguments: tuple[Any, ...]
    answer: Any


class Worker:
    """See the module. ``run`` is the worker's whole life; it returns why it ended.

    ``name`` identifies the worker in this launch, ``slot`` is its place in the rotation of families. In synchronous
    runs a replacement takes the name of the lost worker and goes on from where that one's last submission left it.
    """

    def __init__(self, config: Config, rule: LearnedOptimizer, name: str, slot: int, learner: Any) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")  # to Ray's log files
        self.config, self.rule, self.name, self.slot, self.learner = config, rule, name, slot, learner
        self.device = torch.device("cuda" if config.cluster.worker_gpus > 0 else "cpu")
        self.tasks = TaskDistribution(config.task, Library(config.task.data))
        for warning in self.tasks.warnings:
            log.warning(warning)

    def run(self) -> str:
        """Work until the learner says to leave."""
        while True:
            ticket = self._wait(self._call("join"))
            reason = self._work(ticket)
            if reason is not None:
                return reason

    def _work(self, ticket: Any) -> str | None:
        """Work for one incarnation of the learner; None when another one has taken over."""
        core, frozen = self._core(ticket), _tensors(ticket.theta)
        for version, flat in ticket.replay:
            self._estimate(core, self._theta(flat, frozen), version, ticket.incarnation)
        under_way: deque[_Call] = deque()
        weights = self._wait(self._exchange([], None, ticket.after))
        while True:
            if weights.leave is not None:
                for call in under_way:
                    self._wait(call)
                return str(weights.leave)
            if weights.incarnation != ticket.incarnation:
                return None
            if weights.flat is not None:
                theta = self._theta(weights.flat, frozen)
                gradients = self._estimate(core, theta, weights.version, ticket.incarnation)
                snapshot = core.snapshot() if weights.snapshot else None
                under_way.append(self._exchange(gradients, snapshot, weights.version))
                if len(under_way) <= AHEAD[self.config.run.mode]:
                    continue
            elif not under_way:
                under_way.append(self._exchange([], None, weights.version))
            weights = self._wait(under_way.popleft())

    def _core(self, ticket: Any) -> WorkerCore:
        # a synchronous run repeats itself after a restart, an asynchronous one must not draw the same noise again
        life = 0 if self.config.run.mode == "sync" else ticket.incarnation
        key = ("worker", self.config.run.seed, life, self.name)
        first = self.slot * self.config.worker.turns  # so that workers x turns tasks in a row are different ones
        core = WorkerCore(
            self.rule,
            self.tasks,
            self.config.estimator,
            first,
            key,
            self.device,
            self.config.worker.path,
            wait=self.config.run.mode == "sync",
        )
        if ticket.snapshot is not None:
            core.restore(ticket.snapshot)
        return core

    def _theta(self, flat: Any, frozen: Theta) -> Theta:
        return self.rule.spec.unflatten(torch.from_numpy(flat.copy()), frozen)

    def _estimate(self, core: WorkerCore, theta: Theta, version: int, incarnation: int) -> list[MetaGradient]:
        """The meta-gradients of the next ``worker.turns`` tasks at one theta."""
        gradients = []
        for _ in range(self.config.worker.turns):
            start = time.perf_counter()
            turn = core.estimate(theta, version)
            gradients.append(
                MetaGradient(
                    run=self.config.run.name,
                    incarnation=incarnation,
                    version=version,
                    worker=self.name,
                    sequence=core.turns,
                    family=turn.family,
                    static_digest=turn.static_digest,
                    dense=turn.estimate.gradient.numpy().astype(np.float32),
                    mean_loss=turn.estimate.mean_loss,
                    norm=float(turn.estimate.gradient.norm()),
                    inner_steps=turn.estimate.inner_steps,
                    seconds=time.perf_counter() - start,
                    compile_seconds=turn.compile_seconds,
                )
            )
        return gradients

    def _exchange(self, gradients: list[MetaGradient], snapshot: bytes | None, after: int) -> _Call:
        return self._call("exchange", gradients, snapshot, after)

    def _call(self, method: str, *arguments: Any) -> _Call:
        return _Call(method, arguments, getattr(self.learner, method).remote(self.name, *arguments))

    @retry(
        retry=retry_if_exception_type((ActorDiedError, ActorUnavailableError, GetTimeoutError)),
        wait=wait_random_exponential(multiplier=0.1, max=2.0),
        stop=stop_after_delay(PATIENCE_SECONDS),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    def _wait(self, call: _Call) -> Any:
        """The answer. Asks again while the learner is being restarted: a submission counts once, by its sequence."""
        answer, call.answer = call.answer, None
        if answer is None:
            answer = getattr(self.learner, call.method).remote(self.name, *call.arguments)
        return ray.get(answer, timeout=CALL_SECONDS)


def _tensors(leaves: dict[str, Any]) -> Theta:
    return {name: torch.from_numpy(leaf.copy()) for name, leaf in leaves.items()}
