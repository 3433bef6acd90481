"""The curriculum: what the horizon and the size of tasks are at which meta-step (VeLO D.3).

Owns the interpolation between the points of a schedule. Never draws a horizon or a task.
"""

from __future__ import annotations

import numpy as np

from configs.schema import EstimatorConfig, TaskConfig


def horizon_at(config: EstimatorConfig, version: int) -> tuple[int, int]:
    """The bounds, both included, of the horizons that are drawn at meta-step ``version``."""
    points = config.horizon_schedule
    if not points:
        return config.horizon_low, config.horizon_high
    versions = [point.version for point in points]
    low = np.interp(version, versions, [point.low for point in points])
    high = np.interp(version, versions, [point.high for point in points])
    return round(float(low)), round(float(high))


def size_at(config: TaskConfig, version: int) -> float:
    """The factor of ``time.max_seconds`` for tasks that are drawn at meta-step ``version``."""
    points = config.size_schedule
    if not points:
        return 1.0
    return float(np.interp(version, [point.version for point in points], [point.factor for point in points]))
