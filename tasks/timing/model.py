"""Predicts how long a config's inner step takes, and whether it runs at all, from a table of measurements.

Owns: the fit, which happens when a family is first asked for and takes about a second; nothing fitted is stored.
Must never measure, nor decide what is quick enough.

VeLO (appendix C.4) trains a set network per family; gradient-boosted trees on the same measurements predict better
(benchmarks/tasks.py compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.schema import ConfigError
from tasks.augmentations.augmented import AugmentedStatic
from tasks.augmentations.es_gradient import EsGradient
from tasks.augmentations.reduced_batch import ReducedBatch
from tasks.errors import DataError
from tasks.static import StaticConfig, static_from_json
from tasks.timing.features import WORK, Features, Matrix, features, matrix
from tasks.timing.table import Row, read_table, table_path

Vector = npt.NDArray[np.float64]

_MINIMUM = 20
"""Rows that ran below which a kind has no model of its own."""


class Prediction(NamedTuple):
    """``seconds`` (n,) per inner step and particle, and whether each ``runs`` (n,) on the device of the table."""

    seconds: Vector
    runs: npt.NDArray[np.bool_]


class TimeModel:
    """The measurements of one table, and what follows from them for other configs; ``source`` is for messages."""

    def __init__(self, rows: Sequence[Row], source: str) -> None:
        self.source = source
        self._rows: dict[str, list[tuple[Features, Row]]] = {}
        for row in rows:
            if row.static:
                kind, found = _described(row, source)
                self._rows.setdefault(kind, []).append((found, row))
        self._models: dict[str, _Model] = {}
        if sum(row.ran for row in rows) < _MINIMUM:
            raise DataError(f"{source}: fewer than {_MINIMUM} configs ran, too few to predict from")

    def predict(self, statics: Sequence[StaticConfig]) -> Prediction:
        """The prediction for each config, in its order.

        An augmented task costs what the one inside costs, at its reduced batch size if that is the augmentation, and
        2 n + 1 forward passes instead of one forward and backward if its gradient is by evolution strategies with n
        pairs. A kind that was not measured is priced by its work alone, as the other kinds' work was.
        """
        seconds = np.empty(len(statics))
        runs = np.empty(len(statics), dtype=bool)
        priced = [_without_augmentations(static) for static in statics]
        for kind in {static.kind for static, _ in priced}:
            chosen = [index for index, (static, _) in enumerate(priced) if static.kind == kind]
            predicted = self._model(kind).predict([features(priced[index][0]) for index in chosen])
            seconds[chosen], runs[chosen] = predicted
        return Prediction(seconds * [factor for _, factor in priced], runs)

    def _model(self, kind: str) -> _Model:
        if kind not in self._models:
            rows = self._rows.get(kind, [])
            own = sum(row.ran for _, row in rows) >= _MINIMUM
            if not own:
                rows = [pair for pairs in self._rows.values() for pair in pairs]
            self._models[kind] = _Model([found for found, _ in rows], [row for _, row in rows], not own)
        return self._models[kind]


class _Model:
    """Boosted trees for log seconds (what a line through the work leaves of it), and for whether a config runs."""

    def __init__(self, found: Sequence[Features], rows: Sequence[Row], work_only: bool) -> None:
        # Here, because it takes about a second, which whoever samples nothing need not wait for.
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        self.names = list(WORK) if work_only else sorted({name for row in found for name in row})
        inputs = matrix(found, self.names)
        ran = np.array([row.ran for row in rows])
        logs = np.log([row.seconds for row in rows if row.ran])
        self.line = _line(matrix(found, WORK)[ran], logs)
        self.trees = HistGradientBoostingRegressor(random_state=0)
        self.trees.fit(inputs[ran], logs - _along(self.line, matrix(found, WORK)[ran]))
        self.runs = None if ran.all() else HistGradientBoostingClassifier(random_state=0).fit(inputs, ran)

    def predict(self, found: Sequence[Features]) -> Prediction:
        inputs = matrix(found, self.names)
        seconds: Vector = np.exp(self.trees.predict(inputs) + _along(self.line, matrix(found, WORK)))
        runs = np.ones(len(found), dtype=bool) if self.runs is None else self.runs.predict(inputs)
        return Prediction(seconds, runs)


def _line(inputs: Matrix, targets: Vector) -> Vector:
    """The least-squares coefficients (inputs, then 1) of ``targets``."""
    solution = np.linalg.lstsq(np.c_[inputs, np.ones(len(inputs))], targets, rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)


def _along(line: Vector, inputs: Matrix) -> Vector:
    """The line's values; added up in one order, so that a row's does not depend on the others, as BLAS' would."""
    values: Vector = np.full(len(inputs), line[-1])
    for coefficient, column in zip(line[:-1], inputs.T, strict=True):
        values += coefficient * column
    return values


def _without_augmentations(static: StaticConfig) -> tuple[StaticConfig, float]:
    """The task that is trained in the end, and how many times its own step the augmentations make of it."""
    factor = 1.0
    while isinstance(static, AugmentedStatic):
        if isinstance(static, EsGradient):
            factor = (2 * static.pairs + 1) / 3  # a backward pass takes about two forward ones
        static = static.reduced() if isinstance(static, ReducedBatch) else static.task
    return static, factor


def _described(row: Row, source: str) -> tuple[str, Features]:
    try:
        static = static_from_json(row.static)
    except (ConfigError, ValueError) as error:
        place = f"{source}: the {row.family} config {row.digest} of column static is none"
        raise DataError(f"{place}: {error}; measure a new table with `paceline tasks time`") from error
    return static.kind, features(static)


@cache
def load_model(table: str) -> TimeModel:
    """The model of a table that ships (``cpu``) or of a file; once per process.

    Raises ConfigError if there is no such table, and DataError if it is damaged.
    """
    path: Path = table_path(table)
    return TimeModel(read_table(path), str(path))
