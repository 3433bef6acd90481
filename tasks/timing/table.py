"""Tables of measured step times: one parquet file per device, one row per drawn config.

Owns: the columns, their checks at reading, and the tables that ship. Must never measure or predict.

A table is data from outside: nothing in it is executed, and a file that is not one of these tables, or was changed by
hand so that its rows contradict themselves, is refused with the name of the file, the column and the row.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from configs.checks import ConfigError, did_you_mean
from tasks.errors import DataError

SHIPPED = Path(__file__).parent / "tables"
REASONS = ("impossible", "memory", "slow", "not finite")
"""Why a config was refused: its fields contradict each other, it needs too much memory, it takes too long, or its loss
was not finite within 20 steps of Adam."""

_MAX_BYTES = 256 * 2**20


class Row(NamedTuple):
    """What came of one draw.

    ``family``, ``seed``, ``draw``: which draw. ``static``: the config as JSON and ``digest``: its identity, both empty
    where the draw was impossible. ``ran``: whether it took 20 steps of Adam with finite losses; if not, ``reason`` is
    one of ``REASONS``, and after a colon what exactly. ``seconds``: per inner step and particle (NaN unless it ran).
    ``bytes``: the peak of a step of all particles (0 unless it ran). ``device``, ``torch``, ``threads``, ``particles``:
    where and how; ``date``: the day.
    """

    family: str
    seed: int
    draw: int
    static: str
    digest: str
    ran: bool
    reason: str
    seconds: float
    bytes: int
    particles: int
    device: str
    torch: str
    threads: int
    date: str


_SCHEMA = pa.schema(
    [
        ("family", pa.string()),
        ("seed", pa.int64()),
        ("draw", pa.int64()),
        ("static", pa.string()),
        ("digest", pa.string()),
        ("ran", pa.bool_()),
        ("reason", pa.string()),
        ("seconds", pa.float64()),
        ("bytes", pa.int64()),
        ("particles", pa.int32()),
        ("device", pa.string()),
        ("torch", pa.string()),
        ("threads", pa.int32()),
        ("date", pa.string()),
    ]
)


def shipped_tables() -> list[str]:
    """The names of the tables that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.parquet"))


def table_path(table: str, field: str = "table") -> Path:
    """The file of a table that ships (``cpu``), or the given path. Raises ConfigError if there is neither."""
    path = Path(table).expanduser() if table.endswith(".parquet") else SHIPPED / f"{table}.parquet"
    if not path.is_file():
        names = shipped_tables()
        shipped = f"{', '.join(names)} (which ship){did_you_mean(table, names)} or " if names else ""
        raise ConfigError(field, table, f"{shipped}a .parquet file that `paceline tasks time` wrote")
    return path


def digest(static: str) -> str:
    """``StaticConfig.digest`` of the config whose JSON is ``static``."""
    return hashlib.sha256(static.encode()).hexdigest()[:16]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write ``rows``, sorted by family and draw, so that a reader sees the old file or the whole new one."""
    ordered = sorted(rows, key=lambda row: (row.family, row.seed, row.draw))
    columns = dict(zip(Row._fields, zip(*ordered, strict=True), strict=True)) if ordered else {}
    table = pa.table({name: columns.get(name, ()) for name in Row._fields}, schema=_SCHEMA)
    table = table.replace_schema_metadata({"summary": summary_text(ordered)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial, compression="zstd", compression_level=19)
    partial.replace(path)


def read_table(path: Path) -> list[Row]:
    """The rows of a table. Raises DataError naming the file, and the column and row that are wrong."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, a table of step times has at most {_MAX_BYTES}")
        # The bytes first: read_table opens a path twice, and the file may be replaced in between.
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    for item in _SCHEMA:
        if item.name not in table.column_names:
            raise DataError(f"{path}: column {item.name} is missing from this table of step times")
        column = table.column(item.name)
        if column.type != item.type:
            raise DataError(f"{path}: column {item.name} has type {column.type}, expected {item.type}")
        if column.null_count:
            raise DataError(f"{path}: column {item.name} has {column.null_count} nulls")
    columns = [table.column(item.name).to_pylist() for item in _SCHEMA]
    rows = [Row(*values) for values in zip(*columns, strict=True)]
    for index, row in enumerate(rows):
        _check(path, index, row)
    for name in ("device", "torch", "threads", "particles"):
        found = sorted({str(getattr(row, name)) for row in rows})
        if len(found) > 1:
            raise DataError(
                f"{path}: column {name} has several values ({', '.join(found[:3])}): times of one setting only"
            )
    return rows


def _check(path: Path, index: int, row: Row) -> None:
    """Raise DataError unless the row is what ``Row`` says."""
    timed = math.isfinite(row.seconds) and row.seconds > 0
    problems = {
        "family": not row.family,
        "seed": row.seed < 0,
        "draw": row.draw < 0,
        "digest": row.digest != (digest(row.static) if row.static else ""),
        "static": row.ran and not row.static,
        "reason": (row.reason == "") != row.ran or (not row.ran and row.reason.split(":")[0] not in REASONS),
        "seconds": timed != row.ran,
        "bytes": row.bytes < 0,
        "particles": row.particles < 1,
        "threads": row.threads < 1,
    }
    for name, wrong in problems.items():
        if wrong:
            raise DataError(f"{path}: row {index}: column {name} = {getattr(row, name)!r} cannot be (ran = {row.ran})")


def summary(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """How many draws of each family ran, or were refused for which reason: {family: {"ran" or reason: count}}."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.family, Counter())["ran" if row.ran else row.reason.split(":")[0]] += 1
    return {family: dict(counter) for family, counter in counts.items()}


def summary_text(rows: Iterable[Row]) -> str:
    """``summary`` as lines for people: how many draws of each family ran, and why the others did not."""
    columns = ("ran", *REASONS)
    lines = [f"{'family':16}{'draws':>8}" + "".join(f"{name:>12}" for name in columns)]
    for family, counts in sorted(summary(rows).items()):
        cells = "".join(f"{counts.get(name, 0):12}" for name in columns)
        lines.append(f"{family:16}{sum(counts.values()):8}{cells}")
    return "\n".join(lines)
