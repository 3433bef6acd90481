"""The learner as a Ray actor: the core, its checkpoints, its diary and its metrics behind a few calls.

Owns the order of things: restore, serve, step, save. Holds nothing that cannot be rebuilt from object storage, so
that Ray may restart it at any moment. Decides nothing that ``core`` can decide.

A fault that the user can mend (the store, the data, another architecture) becomes ``failure`` in the status instead
of a dead actor, so that its text reaches the user.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import os
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import lopt
from configs.checks import ConfigError
from configs.schema import Config
from learner.checkpoints import Checkpoint, CheckpointStore, DamagedCheckpointError, FencedError, Owner, StoreError
from learner.core import OTHER_FAMILY, REASONS, LearnerCore, MetaStepError, Verdict
from learner.journal import Journal
from learner.messages import LearnerStatus, PoolCounts, Ticket, Weights
from learner.metrics import LearnerMetrics, LearnerSnapshot
from learner.progress import Progress
from learner.provenance import provenance
from learner.replay import Replay
from learner.start import build_lopt, initial_theta

RENEW_SECONDS = 4.0
POLL_SECONDS = 5.0
"""How long ``exchange`` waits for news before it says that there are none."""
RETRY_SECONDS = 2.0
MAX_OUTAGE_SECONDS = 600.0
"""How long the store may refuse every checkpoint before the run ends."""
OPERATOR_SECONDS = 20.0
"""How long an operator who asks for a checkpoint waits for a store that refuses it."""


class Learner:
    """See the module. Construct it as a named Ray actor with a finite ``max_restarts``; all methods are coroutines.

    ``launch`` is the same for all lives of one ``paceline train``, so that a restarted actor takes its lease back.
    """

    def __init__(self, config: Config, config_yaml: str, launch: str) -> None:
        torch.set_num_threads(1)
        self.config, self.config_yaml = config, config_yaml
        self.failure: str | None = None
        self._changed = asyncio.Event()  # a new one for each piece of news
        self._saving = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None
        self._saves: set[asyncio.Task[None]] = set()
        self._leaving: dict[str, str] = {}
        self._synchronous = config.run.mode == "sync"
        self._replay = Replay(config.cluster.num_workers, config.storage.every)
        self._paused = self._finished = False
        self._stop_reason: str | None = None
        self._checkpoint: Checkpoint | None = None
        self._checkpoints = 0
        self._refused_since: float | None = None
        self._refusal = ""
        self._checkpoint_time = float("nan")
        self._pool = PoolCounts()
        self._progress = Progress()
        self._metrics_port = 0
        self._defect: BaseException | None = None
        try:
            self._restore(launch)
        except (StoreError, ConfigError, lopt.CheckpointError, lopt.ThetaError) as error:
            self.failure = str(error)

    # -- life ---------------------------------------------------------------------------------------------------

    def _restore(self, launch: str) -> None:
        config = self.config
        rule = build_lopt(config)
        self._store = CheckpointStore(config.storage.root, config.run.name, config.storage.options)
        self._lease = self._store.acquire(Owner(launch, socket.gethostname(), os.getpid()), time.time())
        checkpoint = self._store.latest()
        if checkpoint is None and self._store.damaged_found:
            raise DamagedCheckpointError(
                f"no checkpoint of run {config.run.name!r} is intact; restore one or choose another run.name: "
                + "; ".join(self._store.damaged_found[:3])
            )
        families = list(config.task.families)
        theta = initial_theta(rule, config) if checkpoint is None else self._read_theta(rule, checkpoint)
        self.core = LearnerCore(
            rule,
            theta,
            config.meta_optimizer,
            run=config.run.name,
            incarnation=self._lease.incarnation,
            families=families,
            ordered=self._synchronous,
        )
        if checkpoint is not None:
            self._read_state(theta, checkpoint)
        self._publish()
        self._finished = self.core.version >= config.run.meta_steps
        self._journal = Journal(Path(config.run.log_dir) / config.run.name)
        self._metrics = LearnerMetrics(self._snapshot_metrics, [*families, OTHER_FAMILY], REASONS)
        self._metrics_port = self._metrics.serve(config.cluster.learner_metrics_port)

    def _read_theta(self, rule: lopt.LearnedOptimizer, checkpoint: Checkpoint) -> lopt.Theta:
        found, theta, _ = lopt.decode(self._store.read(checkpoint, "theta"))
        if found.name != rule.name or found.spec.digest != rule.spec.digest or found.arguments != rule.arguments:
            raise ConfigError(
                "lopt",
                f"{rule.name} {rule.arguments}",
                f"{found.name} {found.arguments}, which the run's checkpoint {checkpoint.name} is of "
                "(choose another run.name, or start from it with lopt.init_from)",
            )
        return theta

    def _read_state(self, theta: lopt.Theta, checkpoint: Checkpoint) -> None:
        tensors = safetensors.torch.load(self._store.read(checkpoint, "learner"))
        try:
            self.core.restore(theta, tensors, checkpoint.meta["learner"])
            names = [blob for blob in checkpoint.blobs if blob not in ("theta", "learner")]
            self._replay.restore(
                {blob: self._store.read(checkpoint, blob) for blob in names}, checkpoint.meta["workers"]
            )
        except (KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"checkpoint {checkpoint.name}: damaged meta field {error}") from error
        self._checkpoint = checkpoint

    async def _ensure_background(self) -> None:
        if self._background is None and self.failure is None:
            self._background = asyncio.create_task(self._keep_lease())
            if self._checkpoint is None:
                await self._save_surely()  # version 0: the untrained start that evaluations compare with

    async def _keep_lease(self) -> None:
        while self.failure is None:
            await asyncio.sleep(RENEW_SECONDS)
            async with self._saving:
                try:
                    self._lease = await asyncio.to_thread(self._store.renew, self._lease, time.time())
                except FencedError as error:
                    self.failure = str(error)
                except StoreError:
                    continue  # the lease outlives several missed renewals; a save that fails is counted there

    # -- workers ------------------------------------------------------------------------------------------------

    async def join(self, worker: str) -> Ticket:
        """Everything a worker needs before its first estimate."""
        await self._ensure_background()
        if self.failure is not None:
            return Ticket(0)
        theta = {name: leaf.numpy() for name, leaf in self.core.theta.items()}
        return Ticket(self.core.incarnation, theta, *self._replay.of(worker))

    async def exchange(
        self, worker: str, gradients: list[lopt.MetaGradient], snapshot: bytes | None, after: int
    ) -> Weights:
        """Take what a worker has estimated (and its state, if it was asked for) and give it theta for what is next.

        Synchronous runs wait for a version later than ``after``, for ``POLL_SECONDS`` at most.
        """
        await self._ensure_background()
        self._take(gradients, snapshot)
        if len(self._saves) > 1:  # the store is slower than the run: no faster than it can save
            await asyncio.wait(self._saves)
        deadline = time.monotonic() + POLL_SECONDS
        while True:
            news, weights = self._changed, self._weights(worker, after)
            if weights.flat is not None or weights.leave is not None:
                return weights
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await news.wait()
            except TimeoutError:
                return weights

    def _weights(self, worker: str, after: int) -> Weights:
        """What there is for ``worker`` at this instant."""
        leave = self._why_leave(worker)
        if leave is not None:
            return Weights(0, 0, leave=leave)
        version, incarnation = self.core.version, self.core.incarnation
        if self._paused or (self._synchronous and version <= after):
            return Weights(incarnation, version)
        wanted = self._synchronous and self._replay.wants_snapshot(version)
        return Weights(incarnation, version, self._flat, snapshot=wanted)

    def _why_leave(self, worker: str) -> str | None:
        if self.failure is not None:
            return "the learner has failed"
        if self._is_over():
            return self._stop_reason or "the run is finished"
        return self._leaving.get(worker)

    def _is_over(self) -> bool:
        """Whether theta moves no more, though its last checkpoint may still be on its way."""
        return self._stop_reason is not None or self.core.version >= self.config.run.meta_steps

    def _take(self, gradients: list[lopt.MetaGradient], snapshot: bytes | None) -> None:
        """Judge meta-gradients in order and step whenever enough wait; what comes after the end does not count."""
        for gradient in gradients:
            if self.failure is not None or self._is_over():
                return
            verdict = self.core.submit(gradient)
            staleness = self.core.version - gradient.version
            if verdict in (Verdict.ACCEPTED, Verdict.STALE):
                self._metrics.staleness.observe(staleness)
            if verdict is Verdict.ACCEPTED:
                self._progress.accepted(gradient, staleness, time.monotonic())
                if self._synchronous and gradient is gradients[-1]:
                    self._replay.submitted(gradient.worker, gradient.version, snapshot)
            if self.core.ready():
                self._step()

    def _step(self) -> None:
        try:
            version = self.core.step()
        except MetaStepError as error:
            self.failure = str(error)
            return
        self._publish()
        self._journal.write(version, time.time(), self._record() | self._progress.stepped())
        if version >= self.config.run.meta_steps:
            self._in_background(self._finish())
        elif version % self.config.storage.every == 0:
            self._in_background(self._save(version, *self._capture()))
        self._announce()

    def _publish(self) -> None:
        self._flat = self.core.flat
        if self._synchronous:
            self._replay.published(self.core.version, self._flat)

    async def _finish(self) -> None:
        await self._save_surely()
        self._finished = True

    def _in_background(self, saving: Coroutine[Any, Any, None]) -> None:
        """Workers do not wait for the store. What is still on its way when this actor dies is lost with it."""
        task = asyncio.create_task(saving)
        self._saves.add(task)
        task.add_done_callback(self._saved)

    def _saved(self, task: asyncio.Task[None]) -> None:
        self._saves.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defect = error  # ``status`` raises it: a defect must not go unnoticed

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- control ------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Give out no more theta until ``resume``; what workers are computing is still taken."""
        self._paused = True
        self._announce()

    async def resume(self) -> None:
        """Undo ``pause``."""
        self._paused = False
        self._announce()

    async def drain(self, worker: str) -> None:
        """Send this worker away with its next ``exchange``."""
        self._leaving[worker] = "scaled down"
        self._announce()

    async def checkpoint(self) -> tuple[str, int]:
        """Save the present state and return its name and version."""
        version = self.core.version
        await self._save_surely(OPERATOR_SECONDS)
        if self._checkpoint is None or not self._is_saved(version):
            kept = "none" if self._checkpoint is None else self._checkpoint.name
            raise StoreError(f"version {version} could not be saved: {self.failure or self._refusal} (newest: {kept})")
        return self._checkpoint.name, self._checkpoint.version

    async def stop(self, reason: str) -> int:
        """End the run here: take no more meta-gradients, send all workers away, save. Returns the version.

        Raises ``StoreError`` if nothing can be saved; the run then goes on.
        """
        self._stop_reason = reason
        self._announce()
        try:
            _, version = await self.checkpoint()
        except StoreError:
            self._stop_reason = None
            raise
        return version

    async def close(self) -> None:
        """Let go of everything; the last call. A failed learner has nothing left to let go of but its port."""
        if self._background is not None:
            self._background.cancel()
        if self._metrics_port:
            await asyncio.to_thread(self._metrics.close)
            self._journal.close()
        if self.failure is None:
            async with self._saving:
                with contextlib.suppress(StoreError):  # a lease that cannot be released runs out by itself
                    await asyncio.to_thread(self._store.release, self._lease)

    async def status(self, pool: PoolCounts) -> LearnerStatus:
        """The run at this instant; ``pool`` is what the launcher knows."""
        await self._ensure_background()
        if self._defect is not None:
            raise self._defect
        self._pool = pool
        if self.failure is not None:
            return LearnerStatus(failure=self.failure)
        checkpoint = self._checkpoint
        return LearnerStatus(
            incarnation=self.core.incarnation,
            version=self.core.version,
            finished=self._finished,
            books=self._books(),
            balanced=self.core.balanced(),
            meta_loss=self._progress.mean_meta_loss(),
            meta_gradients_per_second=self._progress.rate(time.monotonic()),
            mean_staleness=self._progress.mean_staleness(),
            checkpoint=(checkpoint.name, checkpoint.version) if checkpoint else None,
            metrics_port=self._metrics_port,
        )

    # -- what is written down -----------------------------------------------------------------------------------

    async def _save_surely(self, seconds: float = MAX_OUTAGE_SECONDS) -> None:
        """Save until it works, the run has failed or ``seconds`` are over."""
        version, deadline = self.core.version, time.monotonic() + seconds
        while not self._is_saved(version) and self.failure is None and time.monotonic() < deadline:
            await self._save(self.core.version, *self._capture())
            if not self._is_saved(version):
                await asyncio.sleep(RETRY_SECONDS)

    def _is_saved(self, version: int) -> bool:
        return self._checkpoint is not None and self._checkpoint.version >= version

    async def _save(self, version: int, blobs: dict[str, bytes], meta: dict[str, Any]) -> None:
        """Write a checkpoint. A store that refuses is asked again later, for ``MAX_OUTAGE_SECONDS``."""
        async with self._saving:
            if self._is_saved(version):
                return  # another call saved this version, or a later one, while this one waited
            start = time.monotonic()
            try:
                self._checkpoint = await asyncio.to_thread(self._store.save, self._lease, version, blobs, meta)
                await asyncio.to_thread(self._retain, version)
            except FencedError as error:
                self.failure = str(error)
                return
            except StoreError as error:
                self._refusal = str(error)
                self._refused_since = self._refused_since or start
                if time.monotonic() - self._refused_since > MAX_OUTAGE_SECONDS:
                    self.failure = f"no checkpoint could be saved for {MAX_OUTAGE_SECONDS:.0f} s: {error}"
                return
            self._refused_since = None
            self._checkpoints += 1
            self._checkpoint_time = time.time()
            self._metrics.checkpoint_seconds.observe(time.monotonic() - start)

    def _retain(self, version: int) -> None:
        storage = self.config.storage
        scored = range(0, version + 1, self.config.evaluation.every) if self.config.evaluation.tasks else ()
        self._store.retain(storage.keep_last, storage.keep_every, scored)

    def _capture(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Blobs and meta of a checkpoint; taken without waiting, so that they belong to one instant."""
        tensors, record = self.core.state()
        origin = provenance(self.config, self.config_yaml, self.core.version)
        blobs, workers = self._replay.state()
        blobs |= {
            "theta": lopt.encode(self.core.lopt, self.core.theta, origin),
            "learner": safetensors.torch.save(tensors),
        }
        meta = {
            "config": self.config_yaml,
            "learner": record,
            "workers": workers,
            "versions": {"paceline": importlib.metadata.version("paceline"), "torch": torch.__version__},
        }
        return blobs, meta

    def _record(self) -> dict[str, Any]:
        """The learner's own part of one diary line."""
        accounts = self.core.books.values()
        return {
            "incarnation": self.core.incarnation,
            "update_norm": self.core.update_norm,
            "inner_steps": sum(account.inner_steps for account in accounts),
            "meta_gradients_per_second": self._progress.rate(time.monotonic()),
            "workers": {"desired": self._pool.desired, "alive": self._pool.alive, "replaced": self._pool.replaced},
            "received": sum(account.received for account in accounts),
            "applied": sum(account.applied for account in accounts),
            "dropped": {reason: sum(account.dropped[reason] for account in accounts) for reason in REASONS},
        }

    def _books(self) -> dict[str, dict[str, Any]]:
        return {family: dataclasses.asdict(account) for family, account in self.core.books.items()}

    def _snapshot_metrics(self) -> LearnerSnapshot:
        books = self._books()
        return LearnerSnapshot(
            version=self.core.version,
            incarnation=self.core.incarnation,
            received={family: account["received"] for family, account in books.items()},
            applied={family: account["applied"] for family, account in books.items()},
            dropped={(family, reason): n for family, a in books.items() for reason, n in a["dropped"].items()},
            waiting=sum(account["waiting"] for account in books.values()),
            inner_steps={family: account["inner_steps"] for family, account in books.items()},
            estimate_seconds=self._progress.seconds,
            compile_seconds=self._progress.compile_seconds,
            meta_loss=self._progress.meta_loss,
            meta_gradient_norm=self._progress.norms,
            update_norm=self.core.update_norm,
            workers_desired=self._pool.desired,
            workers_alive=self._pool.alive,
            workers_replaced=self._pool.replaced,
            checkpoints=self._checkpoints,
            checkpoint_timestamp=self._checkpoint_time,
            paused=self._paused,
        )
