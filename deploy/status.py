"""A run's status: what the launcher knows, as a value, on the wire and as JSON.

Owns: the fields of a status and their translation to ``control.v1.Status`` and to JSON with stable keys.
Must never: find anything out by itself (the launcher fills it) or print.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from protos.control.v1 import control_pb2


class RunState(StrEnum):
    """What a run is doing. ``EVALUATING``: meta-training is over, the last checkpoints are being scored."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    EVALUATING = "evaluating"
    STOPPING = "stopping"
    FINISHED = "finished"


@dataclass(frozen=True)
class Drop:
    """How many meta-gradients of one task family were refused for one reason."""

    family: str
    reason: str
    count: int


@dataclass(frozen=True)
class Books:
    """Meta-gradients over the whole run: received = applied + waiting + the sum of ``dropped``."""

    received: int = 0
    applied: int = 0
    waiting: int = 0
    dropped: tuple[Drop, ...] = ()


@dataclass(frozen=True)
class SavedCheckpoint:
    """A durable checkpoint."""

    name: str
    version: int


@dataclass(frozen=True)
class Scores:
    """A checkpoint's scores by one criterion, over all tasks and seeds."""

    iqm: float
    median: float
    optimality_gap: float


@dataclass(frozen=True)
class Evaluation:
    """The newest completely scored version; a criterion without scores is None."""

    version: int
    final_loss: Scores | None = None
    speedup: Scores | None = None


@dataclass(frozen=True)
class StatusSnapshot:
    """A run at one instant. ``meta_steps`` is the target, ``version`` what is done; ports are 0 when not served."""

    run: str
    state: RunState
    version: int
    meta_steps: int
    incarnation: int
    meta_gradients_per_second: float
    mean_staleness: float  # versions
    books: Books
    workers_desired: int
    workers_alive: int
    workers_replaced: int
    elapsed_seconds: float
    learner_metrics_port: int = 0
    evaluator_metrics_port: int = 0
    meta_loss: float | None = None  # None before the first meta-step
    checkpoint: SavedCheckpoint | None = None  # the newest; None before the first
    evaluation: Evaluation | None = None  # the newest; None before the first


def status_to_json(snapshot: StatusSnapshot) -> dict[str, Any]:
    """Plain values for ``json.dumps``: the keys are the field names, always all of them; non-finite becomes None."""
    plain: dict[str, Any] = _finite(asdict(snapshot))
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # NaN is not JSON
    return value


_TO_WIRE = {state: control_pb2.RunState.Value(f"RUN_STATE_{state.name}") for state in RunState}
_FROM_WIRE = {number: state for state, number in _TO_WIRE.items()}


def encode(snapshot: StatusSnapshot) -> control_pb2.Status:
    """The status as it goes over the wire."""
    same = {name: getattr(snapshot, name) for name in _PLAIN_FIELDS}
    message = control_pb2.Status(state=_TO_WIRE[snapshot.state], books=_encode_books(snapshot.books), **same)
    if snapshot.checkpoint is not None:
        checkpoint = snapshot.checkpoint
        message.checkpoint.CopyFrom(control_pb2.SavedCheckpoint(name=checkpoint.name, version=checkpoint.version))
    if snapshot.evaluation is not None:
        message.evaluation.CopyFrom(_encode_evaluation(snapshot.evaluation))
    return message


def decode(message: control_pb2.Status) -> StatusSnapshot:
    """The status that came over the wire; ``ValueError`` for a state this version does not know."""
    if message.state not in _FROM_WIRE:
        raise ValueError(
            f"state = {message.state}: expected one of {sorted(_FROM_WIRE)}; the run is of a newer version"
        )
    same = {name: getattr(message, name) for name in _PLAIN_FIELDS}
    if not message.HasField("meta_loss"):
        same["meta_loss"] = None
    checkpoint = evaluation = None
    if message.HasField("checkpoint"):
        checkpoint = SavedCheckpoint(message.checkpoint.name, message.checkpoint.version)
    if message.HasField("evaluation"):
        evaluation = _decode_evaluation(message.evaluation)
    return StatusSnapshot(
        state=_FROM_WIRE[message.state],
        books=_decode_books(message.books),
        checkpoint=checkpoint,
        evaluation=evaluation,
        **same,
    )


_PLAIN_FIELDS = (
    "run",
    "version",
    "meta_steps",
    "incarnation",
    "meta_loss",
    "meta_gradients_per_second",
    "mean_staleness",
    "workers_desired",
    "workers_alive",
    "workers_replaced",
    "elapsed_seconds",
    "learner_metrics_port",
    "evaluator_metrics_port",
)


def _encode_books(books: Books) -> control_pb2.Books:
    dropped = [control_pb2.Drop(family=drop.family, reason=drop.reason, count=drop.count) for drop in books.dropped]
    return control_pb2.Books(received=books.received, applied=books.applied, waiting=books.waiting, dropped=dropped)


def _decode_books(message: control_pb2.Books) -> Books:
    dropped = tuple(Drop(drop.family, drop.reason, drop.count) for drop in message.dropped)
    return Books(message.received, message.applied, message.waiting, dropped)


def _encode_evaluation(evaluation: Evaluation) -> control_pb2.Evaluation:
    message = control_pb2.Evaluation(version=evaluation.version)
    for criterion in ("final_loss", "speedup"):
        scores = getattr(evaluation, criterion)
        if scores is not None:
            getattr(message, criterion).CopyFrom(control_pb2.Scores(**asdict(scores)))
    return message


def _decode_evaluation(message: control_pb2.Evaluation) -> Evaluation:
    scores = {
        criterion: Scores(*(getattr(getattr(message, criterion), name) for name in ("iqm", "median", "optimality_gap")))
        for criterion in ("final_loss", "speedup")
        if message.HasField(criterion)
    }
    return Evaluation(message.version, **scores)
