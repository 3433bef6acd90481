"""The evaluator as Ray actors: a chief that watches the store, and evaluators that train under its checkpoints.

Owns the coming and going of work and results. Scores nothing by itself (``scores``), trains nothing (``training``) and
keeps nothing that cannot be found in the store again: results are files, created exclusively, one per
(checkpoint digest, task, seed), so that work may be done twice and a result exists once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

import lopt
import tasks
from configs.schema import Config, EvaluationConfig
from evaluator.metrics import CriterionScores, EvaluatorMetrics, EvaluatorSnapshot
from evaluator.queue import Books, EvaluationQueue, Item
from evaluator.results import ResultError, TaskResult, Yardstick
from evaluator.scores import Scores, score
from evaluator.training import train_one, tune_adam
from learner.checkpoints import Checkpoint, CheckpointStore, StoreError

POLL_SECONDS = 1.0
EVALUATION_SECONDS = 6 * 3600.0
"""How long one evaluation may take before its evaluator is replaced: long, because workers leave it little time."""
MAX_WAITING = 4


@dataclass(frozen=True)
class ChiefStatus:
    """What the chief knows: scores by version, the queue's books, dead letters, and whether nothing is left to do."""

    scores: dict[int, Scores]
    books: Books
    dead: list[str]
    idle: bool
    metrics_port: int
    problem: str


def suite_id(config: EvaluationConfig) -> str:
    """Name of the suite with a digest of what it means, so that results of another definition are not mixed in."""
    meaning = json.dumps(
        {name: [_static(config, name).to_dict(), task.num_steps] for name, task in config.tasks.items()}
    )
    return f"{config.suite}-{hashlib.sha256(meaning.encode()).hexdigest()[:8]}"


def _static(config: EvaluationConfig, name: str) -> tasks.StaticConfig:
    return tasks.resolve_task(config.tasks[name].task, name, f"evaluation.tasks.{name}.task")


def result_path(config: EvaluationConfig, item: Item) -> str:
    """Where the result of ``item`` lies in the store."""
    return f"results/{suite_id(config)}/{item.checkpoint}/{item.task}/{item.seed}.json"


def yardstick_path(config: EvaluationConfig, task: str) -> str:
    """Where tuned Adam's result on ``task`` lies in the store."""
    return f"yardsticks/{suite_id(config)}/{config.seeds}/{task}.json"


class Evaluator:
    """Trains one task under one checkpoint at a time and writes the result."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(1)
        os.nice(10)  # scoring must not slow down what it watches
        self.config = config.evaluation
        self.store = CheckpointStore(config.storage.root, config.run.name, config.storage.options)
        library = tasks.Library(config.task.data)
        self.tasks = {name: _static(self.config, name).build(library) for name in self.config.tasks}

    def evaluate(self, item: Item, checkpoint: Checkpoint) -> float:
        """Make sure that the results of ``item`` and of tuned Adam on its task exist. Returns the seconds it took."""
        start = time.perf_counter()
        num_steps = self.config.tasks[item.task].num_steps
        task = self.tasks[item.task]
        yardstick = yardstick_path(self.config, item.task)
        if self.store.read_file(yardstick) is None:
            tuned = tune_adam(item.task, task, num_steps, range(self.config.seeds))
            self.store.create(yardstick, tuned.to_json().encode())
        rule, theta, _ = lopt.decode(self.store.read(checkpoint, "theta"))
        result = train_one(
            rule, theta, item.task, task, num_steps, item.seed, version=checkpoint.version, checkpoint=item.checkpoint
        )
        self.store.create(result_path(self.config, item), result.to_json().encode())
        return time.perf_counter() - start


class Chief:
    """Watches the store, hands (checkpoint, task, seed) to its evaluators, scores what is complete.

    Construct it as a named Ray actor with a finite ``max_restarts``: a restarted chief finds everything in the store.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.evaluation = config, config.evaluation
        self.store = CheckpointStore(config.storage.root, config.run.name, config.storage.options)
        self.queue = EvaluationQueue(
            list(self.evaluation.tasks),
            self.evaluation.seeds,
            max_waiting=MAX_WAITING,
            done=self._stored(),
        )
        self._scores: dict[int, Scores] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        self._final: int | None = None
        self._problem = ""
        self._done: Counter[str] = Counter()
        self._failures = 0
        self._final_loss: dict[str, float] = {}
        self._background: list[asyncio.Task[None]] = []
        self._metrics = EvaluatorMetrics(self._snapshot_metrics, list(self.evaluation.tasks))
        self._metrics_port = self._metrics.serve(config.cluster.evaluator_metrics_port)

    async def status(self) -> ChiefStatus:
        """What there is to know; the first call starts the work."""
        if not self._background:
            names = [f"evaluator-{i}" for i in range(self.config.cluster.num_evaluators)]
            self._background = [asyncio.create_task(self._employ(name)) for name in names]
            self._background.append(asyncio.create_task(self._watch()))
        for task in self._background:
            if task.done():
                task.result()  # a defect of the chief itself must not go unnoticed
        books = self.queue.books()
        dead = [f"{item.task} seed {item.seed}: {'; '.join(why)}" for item, why in self.queue.dead_letters().items()]
        idle = books.waiting == books.leased == 0 and (self._final is None or self._final_is_queued())
        return ChiefStatus(dict(self._scores), books, dead, idle, self._metrics_port, self._problem)

    async def finalize(self, version: int) -> None:
        """The run has ended at ``version``: that checkpoint is scored whatever its number is."""
        self._final = version
        await self._look()

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        """Queue new checkpoints and score complete ones; an unreachable store is reported and tried again."""
        try:
            for checkpoint in await asyncio.to_thread(self.store.list):
                self._add(checkpoint)
            for digest, checkpoint in self._checkpoints.items():
                if checkpoint.version not in self._scores and self.queue.is_complete(digest):
                    await self._score(digest, checkpoint)
        except (StoreError, ResultError) as error:
            self._problem = str(error)
        else:
            self._problem = ""

    def _add(self, checkpoint: Checkpoint) -> None:
        final = checkpoint.version == self._final
        if final or checkpoint.version % self.evaluation.every == 0:
            digest = checkpoint.blobs["theta"].digest
            self._checkpoints.setdefault(digest, checkpoint)
            self.queue.add_checkpoint(checkpoint.version, digest, final=final)

    def _final_is_queued(self) -> bool:
        return any(checkpoint.version == self._final for checkpoint in self._checkpoints.values())

    async def _employ(self, name: str) -> None:
        """Keep one evaluator at work; a lost one is replaced, its item goes back to the queue."""
        actor: Any = None
        while True:
            item = self.queue.lease(name)
            if item is None:
                await asyncio.sleep(POLL_SECONDS / 4)
                continue
            if actor is None:
                actor = ray.remote(Evaluator).options(num_cpus=0).remote(self.config)
            try:
                evaluation = actor.evaluate.remote(item, self._checkpoints[item.checkpoint])
                seconds = await asyncio.wait_for(evaluation, EVALUATION_SECONDS)
            except (RayTaskError, RayActorError, TimeoutError) as error:
                # a dead actor comes as RayActorError, an exception of the evaluation as RayTaskError
                self._failures += 1
                self.queue.fail(item, name, str(error).strip().splitlines()[-1])
                if not isinstance(error, RayTaskError):
                    ray.kill(actor)
                    actor = None
                continue
            self.queue.complete(item, name)
            self._done[item.task] += 1
            self._metrics.evaluation_seconds.observe(seconds)

    async def _score(self, digest: str, checkpoint: Checkpoint) -> None:
        results, yardsticks = await asyncio.to_thread(read_results, self.store, self.evaluation, digest)
        self._scores[checkpoint.version] = score(results, yardsticks)
        if checkpoint.version == max(self._scores):
            losses: dict[str, list[float]] = {}
            for result in results:
                losses.setdefault(result.task, []).append(result.test_loss)
            self._final_loss = {task: float(np.mean(values)) for task, values in losses.items()}

    def _stored(self) -> list[Item]:
        prefix = f"results/{suite_id(self.evaluation)}"
        found = (path.removesuffix(".json").split("/")[-3:] for path in self.store.list_files(prefix))
        return [Item(checkpoint, task, int(seed)) for checkpoint, task, seed in found]

    def _snapshot_metrics(self) -> EvaluatorSnapshot:
        books = self.queue.books()
        newest = max(self._scores, default=None)
        scores = {}
        if newest is not None:
            for criterion in ("final_loss", "speedup"):
                scores[criterion] = CriterionScores(**asdict(getattr(self._scores[newest], criterion)))
        return EvaluatorSnapshot(
            evaluations=dict(self._done),
            failures=self._failures,
            queue_depth=books.waiting + books.leased,
            behind_versions=self.queue.versions_behind(),
            evaluated_version=float("nan") if newest is None else newest,
            scores=scores,
            final_loss=self._final_loss,
        )


def read_results(
    store: CheckpointStore, config: EvaluationConfig, digest: str
) -> tuple[list[TaskResult], Mapping[str, Yardstick]]:
    """All stored results of the checkpoint with this theta digest, and the yardsticks of their tasks."""
    paths = store.list_files(f"results/{suite_id(config)}/{digest}")
    results = [TaskResult.from_json(data) for path in paths if (data := store.read_file(path)) is not None]
    yardsticks = {}
    for task in sorted({result.task for result in results}):
        data = store.read_file(yardstick_path(config, task))
        if data is not None:
            yardsticks[task] = Yardstick.from_json(data)
    return results, yardsticks
