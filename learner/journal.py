"""The run's diary on local disk: one JSON line per meta-step, and the same numbers, thinned out, as TensorBoard events.

Owns the two files' format. Never decides what is worth writing and never reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

JOURNAL = "metrics.jsonl"
EVENT_SECONDS = 1.0
"""The least time between two TensorBoard events: a person's eye needs no more, and an event costs more than a line."""


class Journal:
    """Appends to ``<directory>/metrics.jsonl`` and ``<directory>/tensorboard``; a resumed run continues both."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # line-buffered: a killed learner leaves whole lines
        self._lines = (directory / JOURNAL).open("a", buffering=1, encoding="utf-8")
        self._events = EventFileWriter(str(directory / "tensorboard"), flush_secs=5)
        self._next_event = 0.0

    def write(self, version: int, now: float, record: Mapping[str, Any]) -> None:
        """One meta-step's numbers; nested mappings become ``a/b`` in TensorBoard, everything else stays in JSON."""
        line = {"version": version, "time": round(now, 3), **record}
        self._lines.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
        if now < self._next_event:
            return
        self._next_event = now + EVENT_SECONDS
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars("", record)]
        self._events.add_event(Event(wall_time=now, step=version, summary=Summary(value=values)))

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _scalars(prefix: str, record: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _scalars(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", float(value)))
    return found
