"""``paceline train``: preflight, launch, supervise, hand over.

Owns the order of these steps and what is printed at the end. Every fault that the user can mend leaves as one
paragraph and exit code 1, with nothing left running.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
from pathlib import Path

import numpy as np
from rich.console import Console

import tasks
from configs.schema import Config
from deploy import cluster, control_server, credentials
from deploy.config import to_yaml
from deploy.panel import StatusDisplay
from deploy.results import export_optimizer, score_all, usage, write_report
from deploy.run import Run
from deploy.status import StatusSnapshot
from learner.checkpoints import CheckpointStore
from learner.start import build_lopt, initial_theta
from worker.paths import choose
from worker.unroll import CPU


def preflight(config: Config, console: Console) -> CheckpointStore:
    """Find what is wrong before anything is started: the store, the data, the optimizer to start from.

    Raises ``StoreError``, ``tasks.DataError``, ``tasks.NothingFits``, ``lopt.CheckpointError`` or ``ConfigError``.
    """
    store = CheckpointStore(config.storage.root, config.run.name, config.storage.options)
    store.check()
    rule = build_lopt(config)
    initial_theta(rule, config)
    library = tasks.Library(config.task.data)
    distribution = tasks.TaskDistribution(config.task, library)
    for warning in distribution.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    paths: dict[str, list[str]] = {}
    for family in distribution.families:
        drawn = distribution.build(distribution.draw(np.random.default_rng(config.run.seed), family).static)
        if config.cluster.worker_gpus == 0:  # which GPUs the workers have is not known here
            paths.setdefault(choose(config.worker.path, drawn, rule, CPU, None).name, []).append(family)
    for path, families in paths.items():
        console.print(f"{path} path: {', '.join(families)}", markup=False, highlight=False)
    for name, task in config.evaluation.tasks.items():
        tasks.resolve_task(task.task, name, f"evaluation.tasks.{name}.task").build(library)
    return store


def train(config: Config, console: Console) -> int:
    """Run to the end; returns the exit code (130 after Ctrl-C)."""
    store = preflight(config, console)
    expected = math.ceil(config.cluster.num_workers / config.meta_optimizer.meta_batch)
    if config.run.mode == "async" and config.meta_optimizer.max_staleness < expected:
        console.print(
            f"warning: {config.cluster.num_workers} workers make meta-gradients about {expected} versions stale, and "
            f"meta_optimizer.max_staleness = {config.meta_optimizer.max_staleness} drops them: raise it or meta_batch",
            style="yellow",
        )
    return asyncio.run(_train(config, store, console))


async def _train(config: Config, store: CheckpointStore, console: Console) -> int:
    directory = Path(config.run.log_dir) / config.run.name
    directory.mkdir(parents=True, exist_ok=True)
    with StatusDisplay(console) as display:
        async with cluster.connected(config.cluster, config.run.name):
            run = Run(config, lambda status: _publish(directory, status, display))
            _stop_on_signals(run)
            run.start()
            await run.wait_until_held()
            (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            server, port = await control_server.start(
                run,
                config.cluster.control_host,
                config.cluster.control_port,
                credentials.create(directory / "control", config.cluster.control_host),
            )
            control_server.announce(directory, config.run.name, config.cluster.control_host, port)
            try:
                outcome = await run.supervise()
                await run.finish(evaluate=outcome in ("finished", "time is up"))
            finally:
                control_server.withdraw(directory)
                _targets(directory).unlink(missing_ok=True)
                await server.stop()
    _hand_over(config, store, outcome, console)
    if run.chief_status is not None:
        for problem in filter(None, [*run.chief_status.dead, run.chief_status.problem]):
            console.print(f"not evaluated: {problem}", style="yellow", markup=False, soft_wrap=True)
    return 130 if outcome == "interrupted" else 0


def _stop_on_signals(run: Run) -> None:
    """The first Ctrl-C or SIGTERM stops the run with a checkpoint; a second one ends the launcher as it stands."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        run.interrupted.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)


def _publish(directory: Path, status: StatusSnapshot, display: StatusDisplay) -> None:
    """Show the status, and tell Prometheus where the ports are when they change."""
    display.show(status)
    ports = {"learner": status.learner_metrics_port, "evaluator": status.evaluator_metrics_port}
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"run": status.run, "room": room}}
        for room, port in ports.items()
        if port
    ]
    path, text = _targets(directory), json.dumps(targets, indent=2)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _targets(directory: Path) -> Path:
    """Beside the run's directory: Prometheus takes a wildcard only in a path's last part."""
    return directory.with_name(f"{directory.name}.targets.json")


def _hand_over(config: Config, store: CheckpointStore, outcome: str, console: Console) -> None:
    """The closing words: checkpoint, scores, report, and how to use the result."""
    checkpoint = store.latest()
    if checkpoint is None:
        console.print(f"{outcome} before the first checkpoint: nothing to hand over")
        return
    optimizer = export_optimizer(config, store, checkpoint)
    report = write_report(config, store, checkpoint, outcome, optimizer)
    scored = score_all(config, store)
    console.print(f"\n[bold]{outcome}[/bold] after meta-step {checkpoint.version} of {config.run.meta_steps}")
    console.print(
        f"checkpoint  {config.storage.root}/{config.run.name}/manifests/{checkpoint.name}.json", soft_wrap=True
    )
    if 0 in scored and max(scored) > 0:
        newest = max(scored)
        console.print(f"scores      on tasks it never saw, tuned Adam = 1, more is better (version {newest}):")
        for label, version in (("untrained", 0), ("trained", newest)):
            both = scored[version][0]
            console.print(
                f"            {label:9}  final loss IQM {both.final_loss.iqm:.3f}   speed-up IQM {both.speedup.iqm:.3f}"
                f"   optimality gap {both.final_loss.optimality_gap:.3f}",
                soft_wrap=True,
            )
    console.print(f"report      {report}", soft_wrap=True)
    if checkpoint.version < config.run.meta_steps:
        console.print("the same command continues from here")
    console.print(f"\n{usage(optimizer)}", highlight=False, markup=False, soft_wrap=True)
