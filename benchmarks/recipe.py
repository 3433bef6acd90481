"""The report on a meta-training in phases: what it cost, how it went, and what came out, from finished run folders.

    python benchmarks/recipe.py runs/celo_phase1 runs/celo_phase2 [--data ROOT] [--every META_STEPS] [--seeds 3]
        [--trials runs/short ...] [--processes 2] [--out docs/recipe.md] [--preset lopt/presets/NAME.safetensors]

Each folder is one run's, with ``config.yaml``, ``metrics.jsonl`` and its checkpoints, in the order of training. The
tasks are the first run's ``evaluation``; scores are those of ``evaluator.scores``, relative to tuned Adam. Results that
the runs' evaluators left in their stores are used, others are computed; all are kept in the first run's, so that a
second call only draws. ``--trials`` are shorter runs that were compared before. ``--preset`` also writes the best
checkpoint, as the report ranks them, with where it comes from and how it scored.
Owns the choice of what is compared, the page and its pictures; trains and scores with ``evaluator`` alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

import lopt
import tasks
from configs.checks import ConfigError
from configs.schema import Config, DataConfig
from deploy.config import from_yaml
from deploy.results import read_journal
from evaluator.actor import read_results, result_path, yardstick_path
from evaluator.queue import Item
from evaluator.results import TaskResult, Yardstick
from evaluator.scores import Scores, score, smooth
from evaluator.training import train_one, tune_adam
from learner.checkpoints import CheckpointStore
from learner.journal import JOURNAL

UNTRAINED, AUTHORS, ADAM = "untrained start", "Celo's authors' weights", "tuned Adam"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "font.size": 9, "legend.fontsize": 8, "legend.frameon": False, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.93", "lines.linewidth": 1.4,
}  # fmt: skip
POINTS = 500


@dataclass(frozen=True)
class Contestant:
    """An optimizer that is scored: its file, and the meta-steps of its run behind it."""

    label: str
    version: int
    data: bytes

    @property
    def digest(self) -> str:
        """Of the file, and so the name of the checkpoint's blob under which an evaluator keeps results."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Phase:
    """A finished run: its configuration, store and diary."""

    config: Config
    store: CheckpointStore
    journal: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Phase:
        """Raises OSError or ConfigError where there is no run, ValueError for one without meta-steps or checkpoints."""
        config = from_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        journal = read_journal(folder / JOURNAL)
        if not journal:
            raise ValueError(f"{folder / JOURNAL}: expected at least one meta-step")
        beside = CheckpointStore(str(folder.absolute().parent), config.run.name, {})  # a folder may have moved
        store = (
            beside if beside.list() else CheckpointStore(config.storage.root, config.run.name, config.storage.options)
        )
        if not store.list():
            raise ValueError(f"{folder}: no checkpoints, neither there nor in {config.storage.root}")
        return cls(config, store, journal)

    @property
    def name(self) -> str:
        return self.config.run.name

    def contestants(self, every: int | None) -> list[Contestant]:
        """The last checkpoint and those at multiples of ``every`` (by default where the run's evaluators scored)."""
        every = every or self.config.evaluation.every
        found = {checkpoint.version: checkpoint for checkpoint in self.store.list() if checkpoint.version}
        chosen = [found[version] for version in sorted(found) if version % every == 0 or version == max(found)]
        return [Contestant(self.name, kept.version, self.store.read(kept, "theta")) for kept in chosen]

    def last(self) -> Contestant:
        """The last checkpoint."""
        return self.contestants(self.journal[-1]["version"] + 1)[-1]

    def start(self) -> list[Contestant]:
        """The checkpoint of version 0; none if it was not kept."""
        found = [checkpoint for checkpoint in self.store.list() if checkpoint.version == 0]
        return [Contestant(UNTRAINED, 0, self.store.read(kept, "theta")) for kept in found[:1]]

    def late_loss(self) -> float:
        """Mean meta-loss of all families over the last tenth of the run."""
        late = self.journal[-max(1, len(self.journal) // 10) :]
        return float(np.mean([loss for line in late for loss in line["meta_loss"].values()]))

    def seconds(self) -> float:
        """Of work, by the diary: the time between two launches does not count."""
        pairs = zip(self.journal, self.journal[1:], strict=False)
        return math.fsum(
            max(0.0, later["time"] - line["time"])
            for line, later in pairs
            if later["incarnation"] == line["incarnation"]
        )


@dataclass(frozen=True)
class Job:
    """One training of the evaluation's ``task``: by an optimizer's file, or, where there is none, Adam's sweep."""

    config: Config
    task: str
    seed: int = 0
    contestant: Contestant | None = None


def work(job: Job) -> TaskResult | Yardstick:
    """Do a job in this process, on one thread."""
    torch.set_num_threads(1)
    entry = job.config.evaluation.tasks[job.task]
    library = _library(job.config.task.data.root, job.config.task.data.cache)
    task = tasks.resolve_task(entry.task, job.task, f"evaluation.tasks.{job.task}.task").build(library)
    if job.contestant is None:
        return tune_adam(job.task, task, entry.num_steps, range(job.config.evaluation.seeds))
    rule, theta, _ = lopt.decode(job.contestant.data)
    return train_one(
        rule, theta, job.task, task, entry.num_steps, job.seed,
        version=job.contestant.version, checkpoint=job.contestant.digest,
    )  # fmt: skip


@functools.cache
def _library(root: str | None, cache: str) -> tasks.Library:
    """Loaded once for all jobs of a process."""
    return tasks.Library(DataConfig(root=root, cache=cache))


def complete(
    config: Config, store: CheckpointStore, others: Iterable[CheckpointStore], contestants: Iterable[Contestant],
    processes: int,
) -> None:  # fmt: skip
    """Keep every result of ``contestants``, and every yardstick, in ``store``: ``others``' where these have it."""
    evaluation = config.evaluation
    jobs = {}
    for task in evaluation.tasks:
        jobs[yardstick_path(evaluation, task)] = Job(config, task)
        for contestant in contestants:
            for seed in range(evaluation.seeds):
                path = result_path(evaluation, Item(contestant.digest, task, seed))
                jobs[path] = Job(config, task, seed, contestant)
    for other in others:
        for path in jobs:
            if store.read_file(path) is None and (data := other.read_file(path)) is not None:
                store.create(path, data)
    missing = {path: job for path, job in jobs.items() if store.read_file(path) is None}
    print(f"{len(jobs) - len(missing)} results found, {len(missing)} to compute", flush=True)
    for number, (path, result) in enumerate(zip(missing, _done(list(missing.values()), processes), strict=True), 1):
        store.create(path, result.to_json().encode())
        if number % 20 == 0:
            print(f"  {number} of {len(missing)}", flush=True)


def _done(jobs: list[Job], processes: int) -> Iterable[TaskResult | Yardstick]:
    if processes == 1:
        yield from map(work, jobs)
    elif jobs:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield from pool.imap(work, jobs)


@dataclass(frozen=True)
class Judged:
    """A contestant with its results and scores."""

    contestant: Contestant
    results: list[TaskResult]
    scores: Scores


def judge(config: Config, store: CheckpointStore, contestants: Sequence[Contestant]) -> list[Judged]:
    """Scores of contestants whose results are complete, over the configured seeds."""
    judged = []
    for contestant in contestants:
        results, yardsticks = read_results(store, config.evaluation, contestant.digest)
        chosen = [result for result in results if result.seed < config.evaluation.seeds]
        judged.append(Judged(contestant, chosen, score(chosen, yardsticks)))
    return judged


def yardsticks_of(config: Config, store: CheckpointStore) -> dict[str, Yardstick]:
    found = {task: store.read_file(yardstick_path(config.evaluation, task)) for task in config.evaluation.tasks}
    return {task: Yardstick.from_json(data) for task, data in found.items() if data is not None}


# -- the page ---------------------------------------------------------------------------------------------------------


def page(
    phases: Sequence[Phase],
    config: Config,
    trials: Sequence[tuple[Phase, Judged]],
    along: Sequence[Judged],
    final: Sequence[Judged],
    adam: Mapping[str, Yardstick],
    pictures: Sequence[str],
) -> str:
    """The report as Markdown."""
    losses, scores, curves = pictures
    seeds = config.evaluation.seeds
    return "\n".join(
        [
            "# The recipe, run",
            "",
            f"Written by `benchmarks/recipe.py` from {', '.join(f'`{phase.name}`' for phase in phases)}. Scores are "
            f"Celo's: tuned Adam (best of 11 learning rates on each task) is 1, more is better; {len(adam)} tasks that "
            f"no training task is, {seeds} seeds each; a run that diverges scores 0. Final losses are on test data.",
            "",
            "## What it cost",
            "",
            *_table(_PHASE_COLUMNS, [_phase_row(phase) for phase in phases]),
            "",
            *(_trials(trials) if trials else []),
            "## Meta-losses by family",
            "",
            f"![meta-loss over meta-steps, by family]({losses})",
            "",
            "## Scores along the training",
            "",
            f"![scores of the checkpoints over meta-steps]({scores})",
            "",
            *_table(_SCORE_COLUMNS, [_score_row(judged) for judged in along]),
            "",
            "## On tasks that nobody saw",
            "",
            "The last checkpoint of each run, and the best of all by the IQM of its final losses. That one was chosen "
            "on these very tasks, which flatters it a little.",
            "",
            *_table(_SCORE_COLUMNS, [*map(_score_row, final), [ADAM, "", "1", "1", "0", "1", "1"]]),
            "",
            f"Final test losses, mean and standard deviation over {seeds} seeds (tuned Adam with its learning rate):",
            "",
            *_table(["task", *(_title(judged) for judged in final), ADAM], _loss_rows(final, adam)),
            "",
            f"![training curves on each task]({curves})",
            "",
        ]
    )


def _trials(trials: Sequence[tuple[Phase, Judged]]) -> list[str]:
    """What was compared before: settings and results of shorter runs."""
    rows = [
        [f"`{phase.name}`", phase.config.meta_optimizer.normalize, f"{phase.late_loss():.3f}", *_score_row(judged)[1:]]
        for phase, judged in trials
    ]
    return [
        "## What was compared before",
        "",
        "Shorter runs that differ in how each task's meta-gradient is normalised; the meta-loss is the mean over the "
        "last tenth of the run, of all families.",
        "",
        *_table(["run", "normalize", "meta-loss", *_SCORE_COLUMNS[1:]], rows),
        "",
    ]


_PHASE_COLUMNS = [
    "run", "meta-steps", "wall time", "inner steps", "inner steps/s", "meta-gradients", "dropped", "workers replaced",
]  # fmt: skip
_SCORE_COLUMNS = ["optimizer", "meta-steps", "final loss IQM", "median", "optimality gap", "speed-up IQM", "median"]


def _phase_row(phase: Phase) -> list[str]:
    last, seconds = phase.journal[-1], phase.seconds()
    speed = (last["inner_steps"] - phase.journal[0]["inner_steps"]) / seconds if seconds else 0.0
    return [
        f"`{phase.name}`",
        f"{last['version']:,}",
        f"{seconds / 60:.1f} min",
        f"{last['inner_steps'] / 1e6:,.1f} M",
        f"{speed:,.0f}",
        f"{last['applied']:,}",
        f"{sum(last['dropped'].values()):,}",
        f"{last['workers']['replaced']}",
    ]


def _title(judged: Judged) -> str:
    """Of a column or line; a run's name alone could mean two of its checkpoints."""
    one = judged.contestant
    return f"{one.label}, {one.version:,}" if one.version else one.label


def _score_row(judged: Judged) -> list[str]:
    loss, speed = judged.scores.final_loss, judged.scores.speedup
    numbers = (loss.iqm, loss.median, loss.optimality_gap, speed.iqm, speed.median)
    version = f"{judged.contestant.version:,}" if judged.contestant.label != AUTHORS else ""
    return [judged.contestant.label, version, *(f"{number:.3f}" for number in numbers)]


def _loss_rows(final: Sequence[Judged], adam: Mapping[str, Yardstick]) -> list[list[str]]:
    rows = []
    for task, tuned in adam.items():
        losses = [[result.test_loss for result in judged.results if result.task == task] for judged in final]
        best = f"{_spread(tuned.test_losses)} ({tuned.learning_rate:g})"
        rows.append([task, *map(_spread, losses), best])
    return rows


def _spread(losses: Sequence[float]) -> str:
    return f"{np.mean(losses):.4f} ± {np.std(losses):.4f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_meta_losses(phases: Sequence[Phase], path: Path) -> None:
    """One panel for each phase, one smoothed line for each family."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(phases), 3.0), layout="constrained", dpi=130)
        for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
            for family, colour in zip(phase.config.task.families, COLOURS, strict=False):
                lines = [line for line in phase.journal if family in line["meta_loss"]]
                if lines:
                    x, y = np.array([(line["version"], line["meta_loss"][family]) for line in lines]).T
                    y = smooth(y, min(0.999, 1 - 20 / max(len(y), 40)))
                    keep = np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int)
                    axes.plot(x[keep], y[keep], color=colour, label=family)
            axes.set_title(f"{phase.name}: meta-loss (smoothed)", loc="left", fontsize=9)
            axes.set_xlabel("meta-step")
            axes.legend()
        figure.savefig(path)


def draw_scores(phases: Sequence[Phase], along: Sequence[Judged], levels: Sequence[Judged], path: Path) -> None:
    """IQM of both criteria over the meta-steps of all phases, one after the other; ``levels`` as lines."""
    before, offsets = 0, {}
    for phase in phases:
        offsets[phase.name] = before
        before += phase.journal[-1]["version"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.0), layout="constrained", dpi=130)
        for axes, criterion in zip(figure.subplots(1, 2), ("final_loss", "speedup"), strict=True):
            for phase, colour in zip(phases, COLOURS, strict=False):
                own = [judged for judged in along if judged.contestant.label == phase.name]
                x = [offsets[phase.name] + judged.contestant.version for judged in own]
                y = [getattr(judged.scores, criterion).iqm for judged in own]
                axes.plot(x, y, "o-", markersize=3, color=colour, label=phase.name)
            for judged, dashes in zip(levels, ("--", ":"), strict=False):
                axes.axhline(getattr(judged.scores, criterion).iqm, color="0.4", linestyle=dashes, label=_title(judged))
            axes.axhline(1.0, color="#D55E00", linewidth=1, label=ADAM)
            axes.set_title(f"{criterion.replace('_', ' ')} score, IQM", loc="left", fontsize=9)
            axes.set_xlabel("meta-step, all phases")
            axes.set_ylim(bottom=0)
            axes.legend()
        figure.savefig(path)


def draw_curves(final: Sequence[Judged], adam: Mapping[str, Yardstick], path: Path) -> None:
    """One panel for each task: training loss, smoothed, mean over seeds, of each contestant and tuned Adam."""
    columns = min(3, len(adam))
    rows = -(-len(adam) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * columns, 2.3 * rows), layout="constrained", dpi=130)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(adam) :]:
            axes.set_axis_off()
        for axes, (task, tuned) in zip(panels, adam.items(), strict=False):
            lines = {_title(j): [r.curve for r in j.results if r.task == task] for j in final} | {ADAM: tuned.curves}
            for (label, curves), colour in zip(lines.items(), COLOURS, strict=False):
                mean = smooth(curves).mean(0)
                keep = np.linspace(0, len(mean) - 1, min(len(mean), POINTS)).round().astype(int)
                dashes = "--" if label == ADAM else "-"
                axes.plot(keep + 1, mean[keep], dashes, color="#D55E00" if label == ADAM else colour, label=label)
            # the untrained start may soar: what matters is between the first loss and the best
            lowest = min(float(smooth(curves).mean(0).min()) for curves in lines.values())
            axes.set_ylim(0.9 * lowest, 1.3 * np.mean(tuned.curves, 0)[0])
            axes.set_yscale("log")
            axes.set_title(task, loc="left", fontsize=8)
        panels[0].legend(fontsize=7)
        figure.savefig(path)


# -- what is kept -----------------------------------------------------------------------------------------------------


def write_preset(
    judged: Judged, phases: Sequence[Phase], config: Config, authors: Judged, path: Path
) -> None:  # fmt: skip
    """The contestant's file, with the phases behind it and the scores (also of the authors' weights) in its
    provenance."""
    rule, theta, provenance = lopt.decode(judged.contestant.data)
    suite = {"suite": config.evaluation.suite, "tasks": [*config.evaluation.tasks], "seeds": config.evaluation.seeds}
    last = [phase.name for phase in phases].index(judged.contestant.label)
    made = [{"run": phase.name, "meta_steps": phase.journal[-1]["version"]} for phase in phases[:last]]
    made.append({"run": judged.contestant.label, "meta_steps": judged.contestant.version})
    added = {
        "license": "Apache-2.0",
        "phases": made,
        "scores": asdict(judged.scores) | suite,
        "scores_of_the_authors_weights": asdict(authors.scores),
    }
    path.write_bytes(lopt.encode(rule, theta, provenance | added))


def report(
    folders: Sequence[Path],
    out: Path,
    *,
    data_root: str | None,
    trials: Sequence[Path],
    every: int | None,
    seeds: int | None,
    processes: int,
    authors: str,
    preset: Path | None,
) -> None:
    """Everything in one go; see the module."""
    phases = [Phase.read(folder) for folder in folders]
    shorter = [Phase.read(folder) for folder in trials]
    config, store = _evaluated(phases[0].config, data_root, seeds), phases[0].store
    along = [contestant for phase in phases for contestant in phase.contestants(every)]
    rule, theta, provenance = lopt.read(authors)
    others = [*phases[0].start(), Contestant(AUTHORS, 0, lopt.encode(rule, theta, provenance))]
    ends = [phase.last() for phase in shorter]
    complete(config, store, [phase.store for phase in phases[1:]], [*along, *others, *ends], processes)
    judged, compared = judge(config, store, along), judge(config, store, others)
    tried = list(zip(shorter, judge(config, store, ends), strict=True))
    adam = yardsticks_of(config, store)
    last = [[one for one in judged if one.contestant.label == phase.name][-1] for phase in phases]
    best = max(judged, key=lambda one: one.scores.final_loss.iqm)
    final = [*last, *([] if best in last else [best]), *compared]
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = [out.with_name(f"{out.stem}_{name}.png") for name in ("meta_loss", "scores", "curves")]
    draw_meta_losses(phases, pictures[0])
    draw_scores(phases, judged, compared, pictures[1])
    draw_curves(final, adam, pictures[2])
    names = [picture.name for picture in pictures]
    out.write_text(page(phases, config, tried, judged, final, adam, names), encoding="utf-8")
    print(f"wrote {out}")
    if preset is not None:
        write_preset(best, phases, config, compared[-1], preset)
        print(f"wrote {preset}: {best.contestant.label} after {best.contestant.version:,} meta-steps")


def _evaluated(config: Config, data_root: str | None, seeds: int | None) -> Config:
    """The run's configuration with its data somewhere else, or more seeds."""
    data = config.task.data if data_root is None else replace(config.task.data, root=data_root)
    evaluation = config.evaluation if seeds is None else replace(config.evaluation, seeds=seeds)
    if not evaluation.tasks:
        raise ConfigError("evaluation.tasks", {}, "tasks to score on (train with evaluation=recipe)")
    return replace(config, task=replace(config.task, data=data), evaluation=evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs, in the order of training")
    parser.add_argument("--data", metavar="ROOT", help="where the data sets lie, if elsewhere than the run's did")
    parser.add_argument("--trials", nargs="*", type=Path, default=[], help="folders of shorter runs compared before")
    parser.add_argument("--every", type=int, help="meta-steps between scored checkpoints; the run's by default")
    parser.add_argument("--seeds", type=int, help="of each task; the run's by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--authors", default="celo_authors", help="where the authors' weights are, for lopt.read")
    parser.add_argument("--out", type=Path, default=Path("docs/recipe.md"))
    parser.add_argument("--preset", type=Path, help="also write the best of all checkpoints to this file")
    chosen = parser.parse_args()
    for field in ("every", "seeds", "processes"):
        if getattr(chosen, field) is not None and getattr(chosen, field) < 1:
            parser.error(f"--{field} {getattr(chosen, field)}: expected a whole number >= 1")
    report(
        chosen.folders,
        chosen.out,
        data_root=chosen.data,
        trials=chosen.trials,
        every=chosen.every,
        seeds=chosen.seeds,
        processes=chosen.processes,
        authors=chosen.authors,
        preset=chosen.preset,
    )


if __name__ == "__main__":
    main()
