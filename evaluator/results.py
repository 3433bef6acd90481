"""Owns what the evaluator stores: one `TaskResult` per (checkpoint, task, seed) and one `Yardstick` per task, as JSON.

Results are read back from storage, so every field is validated: nothing here may let a missing field, a wrong type,
a NaN or an unknown name through. It must never compute a score or import torch.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from configs.checks import did_you_mean

DIGITS = 6  # significant digits of a stored loss: more than float32 training reproduces across machines


class ResultError(ValueError):
    """A stored result that cannot be trusted; says field, value and expectation."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} = {str(value)[:80]!r}: expected {expected}")
        self.field = field


def rounded(values: Iterable[float]) -> list[float]:
    """``values`` with `DIGITS` significant digits, which keeps a stored curve small and its text stable."""
    return [float(f"{value:.{DIGITS}g}") for value in values]


def parse_object(data: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object without NaN or infinity; `ResultError` naming ``what`` otherwise."""

    def refuse(constant: str) -> None:
        raise ResultError(what, constant, "finite numbers only")

    try:
        value = json.loads(data, parse_constant=refuse)
    except ResultError:
        raise
    except (ValueError, RecursionError) as error:
        raise ResultError(what, data, f"JSON ({error})") from error
    if not isinstance(value, dict):
        raise ResultError(what, value, "a JSON object")
    return value


def check_fields(fields: Mapping[str, Any], checks: Mapping[str, Callable[[str, Any], None]]) -> None:
    """Exactly the fields of ``checks``, each accepted by its check; `ResultError` otherwise."""
    for name in fields:
        if name not in checks:
            raise ResultError(name, fields[name], f"no such field{did_you_mean(name, checks)}")
    for name, check in checks.items():
        if name not in fields:
            raise ResultError(name, None, "a value, but the field is missing")
        check(name, fields[name])


def a_number(field: str, value: Any) -> None:
    """A finite int or float (bool is neither)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ResultError(field, value, "a finite number")


def _not_negative(field: str, value: Any) -> None:
    """A finite number >= 0; losses are, because scores are ratios of losses."""
    a_number(field, value)
    if value < 0:
        raise ResultError(field, value, "a number >= 0")


def _a_count(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ResultError(field, value, "an integer >= 0")


def _a_name(field: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ResultError(field, value, "a non-empty string")


def _a_flag(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ResultError(field, value, "true or false")


def _losses(field: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ResultError(field, value, "a non-empty list of losses")
    for position, loss in enumerate(value):
        _not_negative(f"{field}[{position}]", loss)


def _curves(field: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ResultError(field, value, "a non-empty list of curves, one per seed")
    for position, curve in enumerate(value):
        _losses(f"{field}[{position}]", curve)
    if len({len(curve) for curve in value}) > 1:
        raise ResultError(field, [len(curve) for curve in value], "curves of one length")


def _sweep(field: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ResultError(field, value, "a non-empty list of [learning rate, mean test loss or null]")
    for position, row in enumerate(value):
        if not isinstance(row, list) or len(row) != 2:
            raise ResultError(f"{field}[{position}]", row, "[learning rate, mean test loss or null]")
        a_number(f"{field}[{position}][0]", row[0])
        if row[1] is not None:
            _not_negative(f"{field}[{position}][1]", row[1])


@dataclass(frozen=True)
class TaskResult:
    """One task trained once by one checkpoint's optimizer.

    ``curve`` holds the raw training loss of each inner step (before that step's update); ``train_loss`` and
    ``test_loss`` are the final losses on fresh batches of the two splits. A non-finite loss is stored as the task's
    ``worst_loss``; ``diverged`` says that a final loss was one. ``checkpoint`` is the digest of the checkpoint.
    ``seconds`` is what the evaluation took, None where nobody measured.
    """

    task: str
    seed: int
    version: int
    checkpoint: str
    curve: list[float]
    train_loss: float
    test_loss: float
    diverged: bool
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            vars(self),
            {
                "task": _a_name,
                "seed": _a_count,
                "version": _a_count,
                "checkpoint": _a_name,
                "curve": _losses,
                "train_loss": _not_negative,
                "test_loss": _not_negative,
                "diverged": _a_flag,
                "seconds": lambda field, value: None if value is None else _not_negative(field, value),
            },
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, data: str | bytes) -> Self:
        """The result in ``data``; `ResultError` names the field that is missing, unknown, mistyped or not finite."""
        fields = parse_object(data, "task result")
        _exactly(fields, cls.__dataclass_fields__)
        return cls(**fields)


@dataclass(frozen=True)
class Yardstick:
    """Tuned Adam on one task: the best learning rate of a sweep and how it trained, one curve and loss per seed.

    ``sweep`` lists [learning rate, mean test loss over seeds], None where a seed diverged.
    """

    task: str
    learning_rate: float
    sweep: list[list[float | None]]
    curves: list[list[float]]
    test_losses: list[float]

    def __post_init__(self) -> None:
        check_fields(
            vars(self),
            {
                "task": _a_name,
                "learning_rate": a_number,
                "sweep": _sweep,
                "curves": _curves,
                "test_losses": _losses,
            },
        )
        if len(self.curves) != len(self.test_losses):
            raise ResultError("test_losses", len(self.test_losses), f"one per curve, {len(self.curves)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, data: str | bytes) -> Self:
        """The yardstick in ``data``; `ResultError` as in `TaskResult.from_json`."""
        fields = parse_object(data, "yardstick")
        _exactly(fields, cls.__dataclass_fields__)
        return cls(**fields)


def _exactly(fields: Mapping[str, Any], names: Iterable[str]) -> None:
    check_fields(fields, dict.fromkeys(names, lambda field, value: None))
