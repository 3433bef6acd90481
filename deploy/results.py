"""What a run leaves behind: the exported optimizer, the report and the closing words.

Owns how journal, checkpoints and evaluation results become ``ReportData``. Never trains or scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lopt
from configs.schema import Config, LoptConfig
from deploy.config import to_yaml
from evaluator.actor import read_results
from evaluator.figures import Series
from evaluator.report import ReportData, TaskPanel, render
from evaluator.scores import Scores, score
from learner.checkpoints import Checkpoint, CheckpointStore
from learner.journal import JOURNAL

OPTIMIZER = "optimizer.safetensors"
REPORT = "report.html"


def export_optimizer(config: Config, store: CheckpointStore, checkpoint: Checkpoint) -> Path:
    """Put the checkpoint's optimizer, with its scores, beside the run, in storage and locally; returns the local path.

    Scores are there once the evaluation of this checkpoint is complete.
    """
    rule, theta, provenance = lopt.decode(store.read(checkpoint, "theta"))
    scored = score_all(config, store).get(checkpoint.version)
    if scored is not None:
        suite = {"tasks": [*config.evaluation.tasks], "seeds": config.evaluation.seeds}
        provenance = provenance | {"scores": asdict(scored[0]) | suite}
    data = lopt.encode(rule, theta, provenance)
    store.put(OPTIMIZER, data)
    path = Path(config.run.log_dir) / config.run.name / OPTIMIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def usage(path: Path) -> str:
    """The three lines of Python that use the result."""
    return (
        "import lopt\n"
        f'opt = lopt.load("{path}")(model.parameters(), num_steps=1000)\n'
        "loss = opt.step(closure)  # or: loss.backward(); opt.step(loss=loss)"
    )


def write_report(config: Config, store: CheckpointStore, checkpoint: Checkpoint, state: str, optimizer: Path) -> Path:
    """Render the report of the run as it stands after ``checkpoint``; returns its path."""
    directory = Path(config.run.log_dir) / config.run.name
    journal = [line for line in read_journal(directory / JOURNAL) if line["version"] <= checkpoint.version]
    scored = score_all(config, store)
    everything: dict[str, dict[str, Any]] = checkpoint.meta["learner"]["books"]
    books = {family: account for family, account in everything.items() if account["received"]}
    data = ReportData(
        run=config.run.name,
        lopt=_named(config.lopt),
        state=state,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        meta_steps=checkpoint.version,
        planned_meta_steps=config.run.meta_steps,
        seconds=_busy_seconds(journal),
        workers_replaced=journal[-1]["workers"]["replaced"] if journal else 0,
        received={family: account["received"] for family, account in books.items()},
        applied={family: account["applied"] for family, account in books.items()},
        dropped={family: _nonzero(account["dropped"]) for family, account in books.items()},
        waiting=sum(account["waiting"] for account in books.values()),
        inner_steps={family: account["inner_steps"] for family, account in books.items()},
        meta_loss=_meta_loss(journal),
        scores={version: scores for version, (scores, _) in scored.items()},
        tasks=_task_panels(config, store, scored),
        schedule=_schedule(store, checkpoint),
        staleness=_staleness(journal),
        throughput=_over_time(journal, lambda line: line["meta_gradients_per_second"]),
        workers={
            "desired": _over_time(journal, lambda line: line["workers"]["desired"]),
            "alive": _over_time(journal, lambda line: line["workers"]["alive"]),
        },
        config=to_yaml(config),
        usage=usage(optimizer),
    )
    path = directory / REPORT
    path.write_text(render(data), encoding="utf-8")
    return path


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The run's meta-steps in order. Steps that a restart undid are left out: the newest life of a version counts."""
    if not path.exists():
        return []
    by_version: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a learner that was killed while writing leaves half a line
        by_version[line["version"]] = line
    return [by_version[version] for version in sorted(by_version)]


def score_all(config: Config, store: CheckpointStore) -> dict[int, tuple[Scores, str]]:
    """Scores and theta digest of every version whose evaluation is complete."""
    expected = len(config.evaluation.tasks) * config.evaluation.seeds
    found = {}
    for checkpoint in store.list():
        digest = checkpoint.blobs["theta"].digest
        results, yardsticks = read_results(store, config.evaluation, digest)
        if expected and len(results) == expected:
            found[checkpoint.version] = (score(results, yardsticks), digest)
    return found


def _task_panels(config: Config, store: CheckpointStore, scored: dict[int, tuple[Scores, str]]) -> list[TaskPanel]:
    if not scored:
        return []
    trained, yardsticks = read_results(store, config.evaluation, scored[max(scored)][1])
    untrained = read_results(store, config.evaluation, scored[0][1])[0] if 0 in scored else []
    return [
        TaskPanel(
            task,
            [result for result in trained if result.task == task],
            [result for result in untrained if result.task == task],
            yardsticks.get(task),
        )
        for task in config.evaluation.tasks
    ]


def _schedule(store: CheckpointStore, checkpoint: Checkpoint) -> dict[str, Series]:
    """What the learned schedule answers to losses that fall as 1/(1 + 10 t/T), over the fraction of training."""
    rule, theta, _ = lopt.decode(store.read(checkpoint, "theta"))
    if not isinstance(rule, lopt.Celo) or rule.phase != 2:
        return {}
    num_steps = 300
    thetas = {name: leaf.unsqueeze(0) for name, leaf in theta.items()}
    state = rule.init_particles(thetas, {}, torch.tensor([num_steps]))
    rates = []
    for t in range(num_steps):
        loss = torch.tensor([2.3 / (1 + 10 * t / num_steps)])
        schedule, rate = rule.schedule(thetas, state, loss)
        state = schedule | {"iteration": state["iteration"] + 1}
        rates.append(float(rate))
    return {"falling losses": ([t / num_steps for t in range(num_steps)], rates)}


def _named(chosen: LoptConfig) -> str:
    """``celo(phase=1)``: the learned optimizer as one would build it."""
    return f"{chosen.name}({', '.join(f'{name}={value}' for name, value in chosen.arguments.items())})"


def _nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _meta_loss(journal: list[dict[str, Any]]) -> dict[str, Series]:
    families = sorted({family for line in journal for family in line["meta_loss"]})
    return {
        family: _series((line["version"], line["meta_loss"][family]) for line in journal if family in line["meta_loss"])
        for family in families
    }


def _staleness(journal: list[dict[str, Any]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for line in journal:
        for age, count in line["staleness"].items():
            counts[int(age)] = counts.get(int(age), 0) + count
    return counts


def _over_time(journal: list[dict[str, Any]], value: Any) -> Series:
    return _series(zip(_busy_times(journal), (value(line) for line in journal), strict=True))


def _busy_times(journal: list[dict[str, Any]]) -> list[float]:
    """Seconds of work before each line: the gap between two launches does not count."""
    times, total = [], 0.0
    for i, line in enumerate(journal):
        if i and line["incarnation"] == journal[i - 1]["incarnation"]:
            total += max(0.0, line["time"] - journal[i - 1]["time"])
        times.append(total)
    return times


def _busy_seconds(journal: list[dict[str, Any]]) -> float | None:
    return _busy_times(journal)[-1] if journal else None


def _series(points: Iterable[tuple[float, float]]) -> Series:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]
