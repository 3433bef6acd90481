"""Predicts how long a config's inner step takes, and whether it runs at all, from a table of measurements.

Owns: the fit, which happens when a family is first asked for and takes about a second; nothing fitted is stored.
Must never measure, nor decide what is quick enough.

VeLO (appendix C.4) trains a set network per family. On the same measurements trees are about as good at the median and
better in the tail, and need no training run (benchmarks/step_times.py compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.checks import ConfigError
from tasks.augmentations.augmented import AugmentedStatic
from tasks.augmentations.es_gradient import EsGradient
from tasks.augmentations.reduced_batch import ReducedBatch
from tasks.errors import DataError
from tasks.static import StaticConfig, static_from_json
from tasks.timing.features import WORK, Features, Matrix, features, matrix
from tasks.timing.table import Row, read_table, table_path

Vector = npt.NDArray[np.float64]
Described = tuple[Features, Row]

_MINIMUM = 20
"""Rows below which a kind has no model of its own: those that ran for its time, all for whether it runs."""


class Prediction(NamedTuple):
    """``seconds`` (n,) per inner step and particle, and whether each ``runs`` (n,) on the device of the table."""

    seconds: Vector
    runs: npt.NDArray[np.bool_]


class TimeModel:
    """The measurements of one table, and what follows from them for other configs; ``source`` is for messages."""

    def __init__(self, rows: Sequence[Row], source: str) -> None:
        self.source = source
        self._rows: dict[str, list[Described]] = {}
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
            own, every = self._rows.get(kind, []), [pair for pairs in self._rows.values() for pair in pairs]
            ran, all_ran = ([pair for pair in pairs if pair[1].ran] for pairs in (own, every))
            self._models[kind] = _Model(
                _Seconds(ran, _names(ran)) if len(ran) >= _MINIMUM else _Seconds(all_ran, WORK),
                _Runs(own, _names(own)) if len(own) >= _MINIMUM else _Runs(every, WORK),
            )
        return self._models[kind]


class _Model(NamedTuple):
    """What is predicted of one kind."""

    seconds: _Seconds
    runs: _Runs

    def predict(self, found: Sequence[Features]) -> Prediction:
        return Prediction(self.seconds.predict(found), self.runs.predict(found))


class _Seconds:
    """Seconds as a sum of what each unit of every feature costs, corrected by boosted trees.

    The sum is the bulk (so much for a step, a parameter, an operation, a layer), its coefficients are not negative, and
    it has the least squared relative error. The trees predict the logarithm of what it is wrong by.
    """

    def __init__(self, rows: Sequence[Described], names: Sequence[str]) -> None:
        # Here, because it takes about a second, which whoever samples nothing need not wait for.
        from scipy.optimize import nnls
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.names = names
        inputs = matrix([found for found, _ in rows], names)
        seconds = np.array([row.seconds for _, row in rows])
        amounts = self._amounts(inputs) / seconds[:, None]
        scale = amounts.mean(0) + 1e-300
        self.costs: Vector = nnls(amounts / scale, np.ones(len(seconds)))[0] / scale
        logs = self._log_costs(inputs)
        self.trees = HistGradientBoostingRegressor(random_state=0).fit(np.c_[inputs, logs], np.log(seconds) - logs)

    def predict(self, found: Sequence[Features]) -> Vector:
        inputs = matrix(found, self.names)
        logs = self._log_costs(inputs)
        seconds: Vector = np.exp(logs + self.trees.predict(np.c_[inputs, logs]))
        return seconds

    def _amounts(self, inputs: Matrix) -> Matrix:
        """(n, 1 + features): 1, and of each feature how much a config has; the work itself, not its logarithm."""
        plain = [
            np.expm1(column) if name in WORK else column for name, column in zip(self.names, inputs.T, strict=True)
        ]
        amounts: Matrix = np.maximum(np.nan_to_num(np.stack([np.ones(len(inputs)), *plain], 1)), 0)
        return amounts

    def _log_costs(self, inputs: Matrix) -> Vector:
        """Log seconds (n,) by the sum; added up in one order, so that a config's do not depend on the others'."""
        total = np.full(len(inputs), 1e-9)
        for cost, amount in zip(self.costs, self._amounts(inputs).T, strict=True):
            total += cost * amount
        logs: Vector = np.log(total)
        return logs


class _Runs:
    """Whether a config runs, by boosted trees."""

    def __init__(self, rows: Sequence[Described], names: Sequence[str]) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        self.names = names
        ran = np.array([row.ran for _, row in rows])
        self.always: bool | None = bool(ran[0]) if ran.min() == ran.max() else None
        if self.always is None:
            self.trees = HistGradientBoostingClassifier(random_state=0)
            self.trees.fit(matrix([found for found, _ in rows], names), ran)

    def predict(self, found: Sequence[Features]) -> npt.NDArray[np.bool_]:
        if self.always is not None:
            return np.full(len(found), self.always)
        runs: npt.NDArray[np.bool_] = self.trees.predict(matrix(found, self.names))
        return runs


def _names(rows: Sequence[Described]) -> list[str]:
    return sorted({name for found, _ in rows for name in found})


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
