"""Owns the JSON records of a run's folder: manifest (a checkpoint), pointer (LATEST) and lease (who may write).

Everything read is validated by hand, field by field; a record that does not pass raises ``DamagedCheckpointError``
and is never used in part. Pure: no storage, no clock.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from learner.storage import StoreError

SCHEMA = 1
BLOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CHECKPOINT_NAME = re.compile(r"(\d{12})\.(\d{6})")


class DamagedCheckpointError(StoreError):
    """What was stored is missing or not what was written; the message names file, expected and found."""


@dataclass(frozen=True)
class BlobRef:
    """Content-addressed bytes: hex SHA-256 and size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """One manifest: what theta and its company were at ``version``, written by ``incarnation``.

    ``parent`` is the name of the checkpoint it continues; ``meta`` is any JSON object.
    """

    version: int
    incarnation: int
    blobs: dict[str, BlobRef]
    meta: dict[str, Any]
    parent: str | None
    name: str


@dataclass(frozen=True)
class Pointer:
    """LATEST: the checkpoint to resume from (None: none yet) and the highest incarnation that may move it."""

    checkpoint: str | None
    incarnation: int


@dataclass(frozen=True)
class Owner:
    """Who asks for a run: one launch (all lives of its learner actor), a host name and a process id."""

    launch: str
    host: str
    pid: int


@dataclass(frozen=True)
class Lease:
    """The right to write a run, held by one incarnation of its learner.

    ``renewed`` is in seconds of the caller's clock; ``token`` is unique to this acquisition; ``machine`` and
    ``process_start`` tell whether the owner's process still lives (None: cannot be told).
    """

    incarnation: int
    owner: Owner
    renewed: float
    token: str
    machine: str | None
    process_start: int | None
    released: bool = False


def checkpoint_name(version: int, incarnation: int) -> str:
    return f"{version:012d}.{incarnation:06d}"


def checkpoint_key(name: str) -> tuple[int, int]:
    """(incarnation, version) of a checkpoint: the order in which they are newer."""
    version, _, incarnation = name.partition(".")
    return int(incarnation), int(version)


def manifest_path(name: str) -> str:
    return f"manifests/{name}.json"


def blob_path(blob: BlobRef) -> str:
    return f"blobs/{blob.digest}"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Canonical JSON with its own digest; ValueError or TypeError if ``meta`` is not JSON (NaN is not)."""
    body = {key: value for key, value in asdict(checkpoint).items() if key != "name"} | {"schema": SCHEMA}
    return _encode(body | {"digest": digest(_encode(body))})


def decode_checkpoint(path: str, data: bytes, name: str) -> Checkpoint:
    fields = _Fields(path, data)
    written = fields.take("digest", "a hex SHA-256", _is_digest)
    if fields.digest != written:
        raise DamagedCheckpointError(f"{path}: expected SHA-256 {written}, found {fields.digest}")
    blobs = fields.take("blobs", "an object of {digest, size}", _are_blobs)
    checkpoint = Checkpoint(
        version=fields.take("version", "an integer >= 0", lambda value: _is_integer(value, 0)),
        incarnation=fields.take("incarnation", "an integer >= 1", lambda value: _is_integer(value, 1)),
        blobs={key: BlobRef(blob["digest"], blob["size"]) for key, blob in blobs.items()},
        meta=fields.take("meta", "an object", lambda value: isinstance(value, dict)),
        parent=fields.take("parent", "a checkpoint name or null", _is_name_or_none),
        name=name,
    )
    if checkpoint_name(checkpoint.version, checkpoint.incarnation) != name:
        raise DamagedCheckpointError(
            f"{path}: version, incarnation = {checkpoint.version}, {checkpoint.incarnation}: expected those of its name"
        )
    return checkpoint


def encode_pointer(pointer: Pointer) -> bytes:
    return _encode(asdict(pointer) | {"schema": SCHEMA})


def decode_pointer(path: str, data: bytes) -> Pointer:
    fields = _Fields(path, data)
    return Pointer(
        checkpoint=fields.take("checkpoint", "a checkpoint name or null", _is_name_or_none),
        incarnation=fields.take("incarnation", "an integer >= 1", lambda value: _is_integer(value, 1)),
    )


def encode_lease(lease: Lease) -> bytes:
    return _encode(asdict(lease) | {"schema": SCHEMA})


def decode_lease(path: str, data: bytes) -> Lease:
    fields = _Fields(path, data)
    owner = fields.take("owner", "an object of {launch, host, pid}", _is_owner)
    return Lease(
        incarnation=fields.take("incarnation", "an integer >= 1", lambda value: _is_integer(value, 1)),
        owner=Owner(owner["launch"], owner["host"], owner["pid"]),
        renewed=fields.take("renewed", "a finite number", _is_number),
        token=fields.take("token", "a string", lambda value: isinstance(value, str)),
        machine=fields.take("machine", "a string or null", lambda value: value is None or isinstance(value, str)),
        process_start=fields.take(
            "process_start", "an integer or null", lambda value: value is None or _is_integer(value, 0)
        ),
        released=fields.take("released", "true or false", lambda value: isinstance(value, bool)),
    )


class _Fields:
    """A JSON object whose fields are taken out one by one, each with what is expected of it."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        try:
            self.record: Any = json.loads(data, parse_constant=_finite, parse_float=_finite)
            if not isinstance(self.record, dict):
                raise TypeError("not an object")
            body = {key: value for key, value in self.record.items() if key != "digest"}
            self.digest = digest(_encode(body))
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{path}: expected JSON, found {data[:40]!r} ({error})") from error
        schema = self.take("schema", "an integer >= 1", lambda value: _is_integer(value, 1))
        if schema > SCHEMA:
            raise StoreError(
                f"{path}: schema = {schema}: written by a newer paceline (this one reads {SCHEMA}); upgrade"
            )

    def take(self, field: str, expected: str, valid: Callable[[Any], bool]) -> Any:
        value = self.record.get(field)
        if field not in self.record or not valid(value):
            found = repr(value)[:80] if field in self.record else "nothing"
            raise DamagedCheckpointError(f"{self.path}: {field} = {found}: expected {expected}")
        return value


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _is_integer(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_name_or_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and CHECKPOINT_NAME.fullmatch(value) is not None)


def _are_blobs(value: object) -> bool:
    return isinstance(value, dict) and all(
        BLOB_NAME.fullmatch(key)
        and isinstance(blob, dict)
        and _is_digest(blob.get("digest"))
        and _is_integer(blob.get("size"), 0)
        for key, blob in value.items()
    )


def _is_owner(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("launch"), str)
        and isinstance(value.get("host"), str)
        and _is_integer(value.get("pid"), 1)
    )
