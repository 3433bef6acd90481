"""Owns the report of a run: from plain numbers to one self-contained HTML page.

The page needs no network and no script. Whatever is missing (a run that ended after three meta-steps, no evaluation
yet) is said in a sentence. Must never read storage or the clock: the caller fills `ReportData`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from evaluator import figures
from evaluator.figures import Series
from evaluator.queue import Books
from evaluator.results import TaskResult, Yardstick
from evaluator.scores import Scores

LEVEL = 0.02  # scores within 2 % of 1 are called level with tuned Adam: less than seeds differ by


@dataclass(frozen=True)
class TaskPanel:
    """One evaluation task: results of the newest scored checkpoint, of the untrained start, and tuned Adam."""

    task: str
    trained: Sequence[TaskResult] = ()
    untrained: Sequence[TaskResult] = ()
    yardstick: Yardstick | None = None


@dataclass(frozen=True)
class ReportData:
    """All that a report shows; everything but the name of the run may be missing.

    ``state`` is what became of the run ("finished", "running", "interrupted"), ``written`` when the report was
    written, in words. Counts are over the whole run: meta-gradients ``received`` and ``applied`` by family,
    ``dropped`` by family and reason, ``waiting`` now, inner steps by family. Series: ``meta_loss`` by family over
    meta-steps; ``throughput`` (meta-gradients per second) and ``workers`` (such as alive, desired) over seconds since
    the start; ``schedule`` by label, learning-rate multiplier over the fraction of training. ``staleness`` counts
    meta-gradients by staleness. ``scores`` are by version, 0 being the untrained start. ``evaluations`` are the
    queue's books. ``usage`` is Python that uses the result, ``config`` the resolved configuration as YAML.
    """

    run: str
    lopt: str = "learned optimizer"
    state: str = "running"
    written: str = ""
    meta_steps: int = 0
    planned_meta_steps: int | None = None
    seconds: float | None = None
    workers_replaced: int = 0
    received: Mapping[str, int] = field(default_factory=dict)
    applied: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    waiting: int = 0
    inner_steps: Mapping[str, int] = field(default_factory=dict)
    meta_loss: Mapping[str, Series] = field(default_factory=dict)
    scores: Mapping[int, Scores] = field(default_factory=dict)
    tasks: Sequence[TaskPanel] = ()
    evaluations: Books | None = None
    schedule: Mapping[str, Series] = field(default_factory=dict)
    staleness: Mapping[int, int] = field(default_factory=dict)
    throughput: Series | None = None
    workers: Mapping[str, Series] = field(default_factory=dict)
    config: str = ""
    usage: str = ""


def render(data: ReportData) -> str:
    """The page, a complete HTML document; the same data give the same text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"count": _count, "duration": _duration, "loss": _loss}
    template = environment.from_string(files("evaluator").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        data=data,
        verdict=_verdict(data),
        books=_books(data),
        staleness=_staleness(data.staleness),
        newest=max(data.scores, default=None),
        tasks=[_task_row(position, panel) for position, panel in enumerate(data.tasks)],
        figures=_figures(data),
        roles=[{"label": label, **figures.role_legend(role)} for role, label in figures.ROLES.items()],
        legend=lambda names: [{"label": name, **figures.legend(index)} for index, name in enumerate(names)],
    )


def _verdict(data: ReportData) -> dict[str, str]:
    """How the trained optimizer compares with tuned Adam and with its untrained start, in two sentences."""
    newest = max(data.scores, default=None)
    if newest is None:
        return {"kind": "open", "title": "Not scored yet", "text": "No checkpoint of this run has a complete score."}
    scores = data.scores[newest]
    score, speedup = scores.final_loss.iqm, scores.speedup.iqm
    if newest == 0:
        text = f"Only the untrained start has been scored: final-loss score {score:.2f}, where tuned Adam has 1."
        return {"kind": "open", "title": "Not scored yet", "text": text}
    if score > 1 + LEVEL:
        kind, title = "good", "Better than tuned Adam"
    elif score >= 1 - LEVEL:
        kind, title = "level", "Level with tuned Adam"
    else:
        kind, title = "behind", "Behind tuned Adam"
    text = f"After {_count(newest)} meta-steps, {data.lopt} has a final-loss score of {score:.2f}; tuned Adam has 1"
    if 0 in data.scores:
        untrained = data.scores[0].final_loss.iqm
        text += f" and the untrained start {untrained:.2f}"
        if score <= untrained * (1 + LEVEL):
            kind, title = "behind", f"{title}, and meta-training has not helped"
    if speedup >= 1:
        reach = f"{speedup:.2f}: tuned Adam's final training loss takes it about {100 / speedup:.0f} % of the steps"
    elif speedup > 0:
        reach = f"{speedup:.2f}: some runs never reach tuned Adam's final training loss"
    else:
        reach = "0: most runs never reach tuned Adam's final training loss"
    return {"kind": kind, "title": title, "text": f"{text}. Its speed-up is {reach}."}


def _books(data: ReportData) -> dict[str, Any]:
    """Meta-gradients by family and drop reason, their totals, and whether they balance.

    What a family received and neither applied nor dropped waits; those must add up to ``data.waiting``, none negative.
    """
    families = sorted({*data.received, *data.applied, *data.dropped, *data.inner_steps})
    reasons = sorted({reason for by_reason in data.dropped.values() for reason in by_reason})
    rows: list[dict[str, Any]] = []
    for family in families:
        received, applied = data.received.get(family, 0), data.applied.get(family, 0)
        dropped = [data.dropped.get(family, {}).get(reason, 0) for reason in reasons]
        rows.append(
            {
                "family": family,
                "received": received,
                "applied": applied,
                "dropped": dropped,
                "waiting": received - applied - sum(dropped),
                "inner_steps": data.inner_steps.get(family, 0),
            }
        )
    total: dict[str, Any] = {
        name: sum(row[name] for row in rows) for name in ("received", "applied", "waiting", "inner_steps")
    }
    total["dropped"] = [sum(row["dropped"][column] for row in rows) for column in range(len(reasons))]
    balanced = total["waiting"] == data.waiting and all(row["waiting"] >= 0 for row in rows)
    return {"reasons": reasons, "rows": rows, "total": total, "balanced": balanced}


def _staleness(counts: Mapping[int, int]) -> str:
    total = sum(counts.values())
    if not total:
        return ""
    mean = sum(version * count for version, count in counts.items()) / total
    fresh = 100 * counts.get(0, 0) / total
    return (
        f"A meta-gradient was computed {mean:.1f} versions before it arrived, on average. {fresh:.0f} % were computed "
        f"with the newest version; the oldest was {max(counts)} behind."
    )


def _task_row(position: int, panel: TaskPanel) -> dict[str, Any]:
    """One task's final test losses (mean over seeds) and its figure."""
    curves: dict[str, list[list[float]]] = {
        "trained": [run.curve for run in panel.trained],
        "untrained": [run.curve for run in panel.untrained],
        "adam": panel.yardstick.curves if panel.yardstick else [],
    }
    some: list[list[float]] = next((runs for runs in curves.values() if runs), [[]])
    return {
        "task": panel.task,
        "num_steps": len(some[0]),
        "seeds": len(some),
        "trained": _mean([run.test_loss for run in panel.trained]),
        "untrained": _mean([run.test_loss for run in panel.untrained]),
        "adam": _mean(panel.yardstick.test_losses) if panel.yardstick else None,
        "learning_rate": panel.yardstick.learning_rate if panel.yardstick else None,
        "diverged": sum(run.diverged for run in panel.trained),
        "figure": figures.learning_curves(f"task-{position}", curves) if any(curves.values()) else None,
    }


def _figures(data: ReportData) -> dict[str, Markup | None]:
    last = max(
        (float(x[-1]) for x, _ in [*data.workers.values(), *([data.throughput] if data.throughput else [])] if len(x)),
        default=0.0,
    )
    unit, seconds = ("hours", 3600) if last > 7200 else ("minutes", 60) if last > 120 else ("seconds", 1)

    def over_time(series: Series) -> Series:
        return [second / seconds for second in series[0]], series[1]

    throughput = {"meta-gradients": over_time(data.throughput)} if data.throughput else {}
    workers = {name: over_time(series) for name, series in data.workers.items()}
    return {
        "meta_loss": figures.meta_loss(data.meta_loss) if _any(data.meta_loss) else None,
        "final_loss": figures.scores(data.scores, "final_loss", "final-loss score (IQM)") if data.scores else None,
        "speedup": figures.scores(data.scores, "speedup", "speed-up (IQM)") if data.scores else None,
        "schedule": figures.lines(
            "schedule", data.schedule, "fraction of training", "learning-rate multiplier", size=figures.WIDE
        )
        if _any(data.schedule)
        else None,
        "staleness": figures.staleness(data.staleness) if data.staleness else None,
        "throughput": figures.lines("throughput", throughput, f"{unit} since start", "meta-gradients per second")
        if _any(throughput)
        else None,
        "workers": figures.lines("workers", workers, f"{unit} since start", "workers", stairs=True)
        if _any(workers)
        else None,
    }


def _any(series: Mapping[str, Series]) -> bool:
    return any(len(x) for x, _ in series.values())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
