"""One run from launch to end: starts the actors, keeps them alive, steers them.

Owns the processes of a run and the answers to its operator (``RunControl``). Never computes: the learner, the workers
and the evaluators do. Losing this process ends the run's processes with it; the same command continues the run.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from configs.schema import Config
from deploy import cluster
from deploy.config import to_yaml
from deploy.control_server import ControlError
from deploy.status import Books, Drop, Evaluation, RunState, SavedCheckpoint, Scores, StatusSnapshot
from evaluator.actor import Chief, ChiefStatus
from learner.actor import Learner
from learner.messages import LearnerStatus, PoolCounts
from learner.pool import End, Member, WorkerPool
from learner.start import build_lopt
from worker.actor import Worker

TICK_SECONDS = 0.4
CALL_SECONDS = 30.0
PATIENCE_SECONDS = 120.0
MAX_RESTARTS = 20


class RunFailed(RuntimeError):  # noqa: N818  # it is an outcome
    """The run cannot go on; the text says why."""


class Run:
    """The actors of one run. Use: ``start``, then ``supervise`` until it returns, then ``finish``."""

    def __init__(self, config: Config, on_status: Callable[[StatusSnapshot], None]) -> None:
        self.config, self.on_status = config, on_status
        self.state = RunState.STARTING
        self.started = time.monotonic()
        self.interrupted = asyncio.Event()
        self.learner_status: LearnerStatus | None = None
        self.chief_status: ChiefStatus | None = None
        self._rule = build_lopt(config)
        self._workers: dict[str, Any] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._ended: list[tuple[str, End, str]] = []
        self._seen_applied = -1
        self._stopped_at: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.pool = WorkerPool(
            config.cluster.num_workers, self._start_worker, self._drain_worker, reuse_names=config.run.mode == "sync"
        )

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Create the learner and the chief; workers follow with the first tick."""
        options = {"num_cpus": 0, "max_restarts": MAX_RESTARTS}
        self.learner: Any = (
            ray.remote(Learner)
            .options(name="learner", **options)
            .remote(self.config, to_yaml(self.config), secrets.token_hex(8))
        )
        self.chief: Any = None
        if self.config.evaluation.tasks and self.config.cluster.num_evaluators:
            self.chief = ray.remote(Chief).options(name="chief", **options).remote(self.config)

    async def wait_until_held(self) -> None:
        """Wait until the learner has restored itself and holds the run. Raises ``RunFailed`` if it cannot."""
        status = await self._ask_learner()
        if status.failure is not None:
            raise RunFailed(status.failure)

    async def supervise(self) -> str:
        """Tick until the run is over; returns why: ``finished``, ``time is up``, ``stopped`` or ``interrupted``.

        Raises ``RunFailed`` with the first cause.
        """
        while True:
            status = await self._tick()
            if status.finished:
                return "finished"
            if self._stopped_at is not None:
                return "stopped"
            if self.interrupted.is_set():
                await self._stop_learner("interrupted")
                return "interrupted"
            limit = self.config.run.max_seconds
            if limit is not None and self.elapsed() > limit:
                await self._stop_learner("time is up")
                return "time is up"
            if self.state is RunState.STARTING and status.books:
                self.state = RunState.RUNNING
            await self._sleep()

    async def _sleep(self) -> None:
        try:
            await asyncio.wait_for(self.interrupted.wait(), TICK_SECONDS)
        except TimeoutError:
            return

    async def _tick(self) -> LearnerStatus:
        status = await self._ask_learner()
        if status.failure is not None:
            raise RunFailed(status.failure)
        if not status.balanced:
            raise RunFailed(f"the learner's books do not balance: {status.books}")
        applied = sum(account["applied"] for account in status.books.values())
        if applied > self._seen_applied >= 0:
            self.pool.progressed()
        self._seen_applied = applied
        if not status.finished and self._stopped_at is None:
            ended, self._ended = self._ended, []
            self.pool.reconcile(ended)
        if self.chief is not None:
            self.chief_status = await self._ask_chief()
        self.on_status(self.snapshot())
        return status

    async def _ask_learner(self) -> LearnerStatus:
        counts = PoolCounts(self.pool.desired, self.pool.alive, self.pool.replaced)
        before = self.learner_status
        status: LearnerStatus = await self._patiently("learner", lambda: self.learner.status.remote(counts))
        self.learner_status = status
        if before is not None and before.incarnation != status.incarnation:
            await self._remind_learner()
        return status

    async def _remind_learner(self) -> None:
        """A restarted learner does not know what its operator had asked for."""
        if self.state is RunState.PAUSED:
            await self._patiently("learner", lambda: self.learner.pause.remote())
        for member in self.pool.leaving:
            self._drain_worker(member)

    async def _ask_chief(self) -> ChiefStatus:
        status: ChiefStatus = await self._patiently("evaluators' chief", lambda: self.chief.status.remote())
        return status

    async def _patiently(self, who: str, call: Callable[[], Any]) -> Any:
        """The answer of an actor that may be being restarted; ``RunFailed`` if it stays away."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await asyncio.wait_for(call(), CALL_SECONDS)
            except (ActorUnavailableError, GetTimeoutError, TimeoutError) as error:
                problem = f"{who} does not answer: {_first_line(error)}"
            except ActorDiedError as error:
                if error.actor_init_failed:
                    raise RunFailed(f"{who} cannot start: {_cause(error)}") from error
                problem = f"{who} died: {_first_line(error)}"
            except RayTaskError as error:
                raise RunFailed(f"{who}: {_cause(error)}") from error
            if time.monotonic() > deadline:
                raise RunFailed(f"waited {PATIENCE_SECONDS:.0f} s; {problem}")
            await asyncio.sleep(TICK_SECONDS)

    # -- workers ------------------------------------------------------------------------------------------------

    def _start_worker(self, member: Member) -> None:
        settings = self.config.cluster
        actor = (
            ray.remote(Worker)
            .options(num_cpus=settings.worker_cpus, num_gpus=settings.worker_gpus, max_restarts=0)
            .remote(self.config, self._rule, member.name, member.slot, self.learner)
        )
        self._workers[member.name] = actor
        watcher = asyncio.create_task(self._watch_worker(member.name, actor))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _watch_worker(self, name: str, actor: Any) -> None:
        try:
            reason = await actor.run.remote()
            self._ended.append((name, End.LEFT, reason))
        except RayActorError as error:
            failed = isinstance(error, ActorDiedError) and error.actor_init_failed
            self._ended.append((name, End.RAISED if failed else End.LOST, _cause(error)))
        except RayTaskError as error:
            self._ended.append((name, End.RAISED, _cause(error)))
        finally:
            # the worker has nothing more to say; without this its process would live as long as the handle
            if ray.is_initialized():  # not when Ray was shut down over a worker that was slow to leave
                ray.kill(self._workers.pop(name, actor))

    def _drain_worker(self, member: Member) -> None:
        task = asyncio.create_task(self._patiently("learner", lambda: self.learner.drain.remote(member.name)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the operator's actions ---------------------------------------------------------------------------------

    async def status(self) -> StatusSnapshot:
        return self.snapshot()

    async def scale(self, workers: int) -> None:
        self._refuse_unless(RunState.RUNNING, RunState.PAUSED)
        problem = cluster.shortage(self.config.cluster, workers)
        if problem is not None:
            raise ControlError(f"workers = {workers}: expected {problem}")
        self.pool.scale(workers)

    async def pause(self) -> None:
        self._refuse_unless(RunState.RUNNING, RunState.PAUSED)
        await self._patiently("learner", lambda: self.learner.pause.remote())
        self.state = RunState.PAUSED

    async def resume(self) -> None:
        self._refuse_unless(RunState.RUNNING, RunState.PAUSED)
        await self._patiently("learner", lambda: self.learner.resume.remote())
        self.state = RunState.RUNNING

    async def checkpoint(self) -> tuple[str, int]:
        self._refuse_unless(RunState.RUNNING, RunState.PAUSED)
        try:
            name, version = await self._patiently("learner", lambda: self.learner.checkpoint.remote())
        except RunFailed as error:
            raise ControlError(str(error)) from error  # the operator's request failed, the run goes on
        return name, version

    async def stop(self) -> int:
        self._refuse_unless(RunState.RUNNING, RunState.PAUSED)
        before = self.state
        try:
            return await self._stop_learner("stopped")
        except RunFailed as error:
            self.state = before
            raise ControlError(str(error)) from error

    async def _stop_learner(self, reason: str) -> int:
        self.state = RunState.STOPPING
        version: int = await self._patiently("learner", lambda: self.learner.stop.remote(reason))
        self._stopped_at = version
        await self._ask_learner()
        return version

    def _refuse_unless(self, *states: RunState) -> None:
        if self.state not in states:
            raise ControlError(f"the run is {self.state}: it can do that only while {' or '.join(states)}")

    # -- the end ------------------------------------------------------------------------------------------------

    async def finish(self, *, evaluate: bool) -> None:
        """Wait for the last evaluations (as long as configured), let go of the run's lease, end the actors."""
        status = self.learner_status
        if evaluate and self.chief is not None and status is not None and status.checkpoint is not None:
            self.state = RunState.EVALUATING
            version = status.checkpoint[1]
            deadline = time.monotonic() + self.config.evaluation.final_seconds
            while time.monotonic() < deadline and not self.interrupted.is_set():
                # said again with every tick, because a chief that is restarted meanwhile does not remember it
                await self._patiently("evaluators' chief", lambda: self.chief.finalize.remote(version))
                await self._tick()
                chief = self.chief_status
                if chief is not None and chief.idle and (version in chief.scores or chief.dead or chief.problem):
                    break
                await self._sleep()
        self.state = RunState.FINISHED
        self.on_status(self.snapshot())
        await self._patiently("learner", lambda: self.learner.close.remote())

    def elapsed(self) -> float:
        """Seconds since this launch."""
        return time.monotonic() - self.started

    def snapshot(self) -> StatusSnapshot:
        """The run as the operator sees it."""
        learner, chief = self.learner_status, self.chief_status
        if learner is None:
            learner = LearnerStatus()
        return StatusSnapshot(
            run=self.config.run.name,
            state=self.state,
            version=learner.version,
            meta_steps=self.config.run.meta_steps,
            incarnation=learner.incarnation,
            meta_gradients_per_second=learner.meta_gradients_per_second,
            mean_staleness=learner.mean_staleness,
            books=_books(learner),
            workers_desired=self.pool.desired,
            workers_alive=self.pool.alive,
            workers_replaced=self.pool.replaced,
            elapsed_seconds=self.elapsed(),
            learner_metrics_port=learner.metrics_port,
            evaluator_metrics_port=chief.metrics_port if chief else 0,
            meta_loss=learner.meta_loss,
            checkpoint=SavedCheckpoint(*learner.checkpoint) if learner.checkpoint else None,
            evaluation=_evaluation(chief),
        )


def _books(learner: LearnerStatus) -> Books:
    accounts = learner.books.values()
    drops = tuple(
        Drop(family, reason, count)
        for family, account in learner.books.items()
        for reason, count in account["dropped"].items()
        if count
    )
    received, applied, waiting = (sum(a[name] for a in accounts) for name in ("received", "applied", "waiting"))
    return Books(received, applied, waiting, drops)


def _evaluation(chief: ChiefStatus | None) -> Evaluation | None:
    if chief is None or not chief.scores:
        return None
    version = max(chief.scores)
    found = chief.scores[version]
    both = (Scores(part.iqm, part.median, part.optimality_gap) for part in (found.final_loss, found.speedup))
    return Evaluation(version, *both)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cause(error: BaseException) -> str:
    """The innermost message of a remote traceback: its last line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
