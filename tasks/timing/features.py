"""Static configs as named numbers, for models of what they cost.

Owns: which numbers describe a config. Must never build a task, read data, or know how the numbers are used.

After VeLO (arXiv:2211.09760, appendix C.4), which also flattens the nested config to key-value pairs; here the keys
keep their names and the values are joined by the work that ``StaticConfig.work`` gives by formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache

import numpy as np
import numpy.typing as npt

from tasks.data.loading import stored_side
from tasks.families.image import ImageStatic
from tasks.static import StaticConfig

Features = dict[str, float]
Matrix = npt.NDArray[np.float64]

WORK = ("log_parameters", "log_flops", "log_activations")
"""The features that every config has: natural logarithms of one more than ``static.work()``'s numbers."""

_DATA = {"dataset", "corpus", "vocabulary"}
"""Where the data comes from costs nothing; what it costs by its shape are features of their own."""


def features(static: StaticConfig) -> Features:
    """The named numbers of a config: its work, its fields, and ``task.``-like prefixes for configs inside it.

    A number is itself, a bool 0 or 1, a text ``field=text`` with the value 1, a tuple its ``.length``, ``.sum`` and
    ``.max``. What a config does not have (None, an empty tuple's largest entry) is left out.
    """
    work = static.work()
    sizes = (work.parameters, work.flops, work.activations)
    found = {name: math.log1p(size) for name, size in zip(WORK, sizes, strict=True)}
    _collect(static, "", found)
    return found


def matrix(rows: Sequence[Mapping[str, float]], names: Iterable[str]) -> Matrix:
    """(len(rows), number of ``names``): each feature in its column, NaN where a row lacks it; others are ignored."""
    columns = {name: column for column, name in enumerate(names)}
    values = np.full((len(rows), len(columns)), np.nan)
    for row, found in enumerate(rows):
        for name, value in found.items():
            column = columns.get(name)
            if column is not None:
                values[row, column] = value
    return values


def _collect(static: StaticConfig, prefix: str, found: Features) -> None:
    if prefix:
        found[f"{prefix}kind={static.kind}"] = 1.0
    if isinstance(static, ImageStatic):
        found[f"{prefix}channels"] = float(static.channels)
        found[f"{prefix}classes"] = float(static.classes)
        found[f"{prefix}enlarged"] = float(stored_side(static.dataset, static.image_size) < static.image_size)
    for name in _field_names(type(static)):
        value = getattr(static, name)
        if isinstance(value, StaticConfig):
            _collect(value, f"{prefix}{name}.", found)
        elif isinstance(value, str):
            found[f"{prefix}{name}={value}"] = 1.0
        elif isinstance(value, tuple):
            found[f"{prefix}{name}.length"] = float(len(value))
            found[f"{prefix}{name}.sum"] = float(sum(value))
            if value:
                found[f"{prefix}{name}.max"] = float(max(value))
        elif value is not None:
            found[f"{prefix}{name}"] = float(value)


@cache
def _field_names(cls: type[StaticConfig]) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cls) if item.name not in _DATA)
