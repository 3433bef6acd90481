"""Owns the numbers an optimizer is judged by: final-loss score and speed-up, aggregated over tasks x seeds.

Pure numpy and scipy. Definitions: Celo (arXiv 2501.12670), section 4 and appendix A.3, with the aggregates of rliable
(Agarwal et al. 2021). Both scores are relative to tuned Adam, so 1 is "as good as tuned Adam" and larger is better.
A run that diverged scores 0 on both, the worst there is; it must never be left out, or failing would pay.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter
from scipy.stats import trim_mean

from evaluator.results import TaskResult, Yardstick, a_number, check_fields, parse_object

Array = npt.NDArray[np.float64]

CRITERIA = ("final_loss", "speedup")
SMOOTHING = 0.9  # Celo A.3
LOSS_FLOOR = float(np.finfo(np.float32).eps)  # a float32 loss below this is rounding noise, and 0 has no ratio


def smooth(curve: npt.ArrayLike, coefficient: float = SMOOTHING) -> Array:
    """Exponential moving average along the last axis, started at the first value: y_t = c y_{t-1} + (1 - c) x_t."""
    values = np.asarray(curve, dtype=np.float64)
    if values.shape[-1] == 0:
        raise ValueError("curve is empty: expected at least one loss")
    filtered, _ = lfilter([1 - coefficient], [1, -coefficient], values, axis=-1, zi=coefficient * values[..., :1])
    return np.asarray(filtered, dtype=np.float64)


def final_loss_score(loss: float, adam_loss: float) -> float:
    """L_adam / L_opt (eq. 11), 0 for a non-finite ``loss``. Losses below `LOSS_FLOOR` count as `LOSS_FLOOR`."""
    _check_adam(adam_loss)
    if not np.isfinite(loss):
        return 0.0
    if loss < 0:
        raise ValueError(f"loss = {loss}: expected a loss >= 0, a ratio of losses has no meaning otherwise")
    return max(adam_loss, LOSS_FLOOR) / max(loss, LOSS_FLOOR)


def speedup_score(curve: npt.ArrayLike, adam_loss: float) -> float:
    """T / T_opt (eq. 12): T steps over the first step whose smoothed loss is <= ``adam_loss``, 0 if none is.

    ``curve`` (T,) holds raw training losses; ``adam_loss`` is the last value of tuned Adam's smoothed curve. A curve
    with a non-finite loss scores 0, also where it had reached ``adam_loss`` before.
    """
    _check_adam(adam_loss)
    losses = np.asarray(curve, dtype=np.float64)
    if not np.isfinite(losses).all():
        return 0.0
    reached = np.flatnonzero(smooth(losses) <= adam_loss)
    return float(losses.size / (reached[0] + 1)) if reached.size else 0.0


def _check_adam(loss: float) -> None:
    if not (np.isfinite(loss) and loss >= 0):
        raise ValueError(f"adam_loss = {loss}: expected a finite loss >= 0, tuned Adam is the yardstick")


@dataclass(frozen=True)
class Aggregate:
    """What a tasks x seeds matrix of scores comes to."""

    iqm: float
    median: float
    optimality_gap: float


def aggregate(scores: npt.ArrayLike) -> Aggregate:
    """Aggregates of ``scores`` (tasks, seeds), as rliable 1.2.0 defines them on the transposed matrix.

    IQM: mean of what is left of all scores without the lowest and highest quarter (each rounded down to whole
    scores). Median: over tasks, of the mean over seeds. Optimality gap: 1 - mean(min(score, 1)).
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(f"scores of shape {matrix.shape}: expected finite scores of shape (tasks, seeds), not empty")
    return Aggregate(
        iqm=float(trim_mean(matrix, 0.25, axis=None)),
        median=float(np.median(matrix.mean(axis=1))),
        optimality_gap=float(1.0 - np.minimum(matrix, 1.0).mean()),
    )


@dataclass(frozen=True)
class Scores:
    """A checkpoint's scores under both criteria."""

    final_loss: Aggregate
    speedup: Aggregate

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, data: str | bytes) -> Self:
        """Scores from ``data``; `ResultError` names the offending field."""
        fields = parse_object(data, "scores")
        check_fields(fields, dict.fromkeys(CRITERIA, _an_aggregate))
        return cls(**{criterion: Aggregate(**fields[criterion]) for criterion in CRITERIA})


def _an_aggregate(field: str, value: object) -> None:
    numbers = value if isinstance(value, dict) else {}
    check_fields(
        {f"{field}.{name}": number for name, number in numbers.items()},
        {f"{field}.{name}": a_number for name in Aggregate.__dataclass_fields__},
    )


def score_matrix(results: Iterable[TaskResult], yardsticks: Mapping[str, Yardstick]) -> dict[str, Array]:
    """{criterion: scores (tasks, seeds)} of one checkpoint; rows in order of task name, columns in order of seed.

    The final-loss score takes the test split's loss (the suite asks about tasks the optimizer never saw), the
    speed-up the training curve. The yardstick is one number per task and criterion: tuned Adam's mean over its seeds.
    ValueError: mixed checkpoints, a task without yardstick or of another length, or not the same seeds for all tasks.
    """
    rows: dict[str, list[TaskResult]] = defaultdict(list)
    for result in results:
        rows[result.task].append(result)
    _check_rows(rows, yardsticks)
    matrices: dict[str, list[list[float]]] = {criterion: [] for criterion in CRITERIA}
    for task in sorted(rows):
        yardstick = yardsticks[task]
        adam_test_loss = float(np.mean(yardstick.test_losses))
        adam_train_loss = float(smooth(yardstick.curves)[:, -1].mean())
        ordered = sorted(rows[task], key=lambda result: result.seed)
        matrices["final_loss"].append(
            [0.0 if run.diverged else final_loss_score(run.test_loss, adam_test_loss) for run in ordered]
        )
        matrices["speedup"].append(
            [0.0 if run.diverged else speedup_score(run.curve, adam_train_loss) for run in ordered]
        )
    return {criterion: np.array(matrix) for criterion, matrix in matrices.items()}


def score(results: Iterable[TaskResult], yardsticks: Mapping[str, Yardstick]) -> Scores:
    """The `Scores` of one checkpoint from its complete results; ValueError as in `score_matrix`."""
    matrices = score_matrix(results, yardsticks)
    return Scores(**{criterion: aggregate(matrices[criterion]) for criterion in CRITERIA})


def _check_rows(rows: Mapping[str, Sequence[TaskResult]], yardsticks: Mapping[str, Yardstick]) -> None:
    checkpoints = {run.checkpoint for runs in rows.values() for run in runs}
    if len(checkpoints) != 1:
        raise ValueError(f"results of checkpoints {sorted(checkpoints)}: expected those of one checkpoint")
    seeds = {task: sorted(run.seed for run in runs) for task, runs in rows.items()}
    first = next(iter(seeds.values()))
    for task, runs in rows.items():
        if task not in yardsticks:
            raise ValueError(f"task {task!r} has no yardstick: expected one of {sorted(yardsticks)}")
        if seeds[task] != first or len(set(first)) != len(first):
            raise ValueError(f"task {task!r} has seeds {seeds[task]}: expected {sorted(set(first))} once each")
        steps = len(yardsticks[task].curves[0])
        for run in runs:
            if len(run.curve) != steps:
                raise ValueError(f"task {task!r}, seed {run.seed}: {len(run.curve)} steps, its yardstick has {steps}")
