from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_STARTING: _ClassVar[RunState]
    RUN_STATE_RUNNING: _ClassVar[RunState]
    RUN_STATE_PAUSED: _ClassVar[RunState]
    RUN_STATE_EVALUATING: _ClassVar[RunState]
    RUN_STATE_STOPPING: _ClassVar[RunState]
    RUN_STATE_FINISHED: _ClassVar[RunState]
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_STARTING: RunState
RUN_STATE_RUNNING: RunState
RUN_STATE_PAUSED: RunState
RUN_STATE_EVALUATING: RunState
RUN_STATE_STOPPING: RunState
RUN_STATE_FINISHED: RunState

class Status(_message.Message):
    __slots__ = ("run", "state", "version", "meta_steps", "incarnation", "meta_loss", "meta_gradients_per_second", "mean_staleness", "books", "workers_desired", "workers_alive", "workers_replaced", "checkpoint", "evaluation", "learner_metrics_port", "evaluator_metrics_port", "elapsed_seconds")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    META_STEPS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    META_LOSS_FIELD_NUMBER: _ClassVar[int]
    META_GRADIENTS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MEAN_STALENESS_FIELD_NUMBER: _ClassVar[int]
    BOOKS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_DESIRED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_ALIVE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_REPLACED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    LEARNER_METRICS_PORT_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_METRICS_PORT_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    run: str
    state: RunState
    version: int
    meta_steps: int
    incarnation: int
    meta_loss: float
    meta_gradients_per_second: float
    mean_staleness: float
    books: Books
    workers_desired: int
    workers_alive: int
    workers_replaced: int
    checkpoint: SavedCheckpoint
    evaluation: Evaluation
    learner_metrics_port: int
    evaluator_metrics_port: int
    elapsed_seconds: float
    def __init__(self, run: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., version: _Optional[int] = ..., meta_steps: _Optional[int] = ..., incarnation: _Optional[int] = ..., meta_loss: _Optional[float] = ..., meta_gradients_per_second: _Optional[float] = ..., mean_staleness: _Optional[float] = ..., books: _Optional[_Union[Books, _Mapping]] = ..., workers_desired: _Optional[int] = ..., workers_alive: _Optional[int] = ..., workers_replaced: _Optional[int] = ..., checkpoint: _Optional[_Union[SavedCheckpoint, _Mapping]] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., learner_metrics_port: _Optional[int] = ..., evaluator_metrics_port: _Optional[int] = ..., elapsed_seconds: _Optional[float] = ...) -> None: ...

class Books(_message.Message):
    __slots__ = ("received", "applied", "waiting", "dropped")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    received: int
    applied: int
    waiting: int
    dropped: _containers.RepeatedCompositeFieldContainer[Drop]
    def __init__(self, received: _Optional[int] = ..., applied: _Optional[int] = ..., waiting: _Optional[int] = ..., dropped: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ...) -> None: ...

class Drop(_message.Message):
    __slots__ = ("family", "reason", "count")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    family: str
    reason: str
    count: int
    def __init__(self, family: _Optional[str] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class SavedCheckpoint(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("version", "final_loss", "speedup")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINAL_LOSS_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    version: int
    final_loss: Scores
    speedup: Scores
    def __init__(self, version: _Optional[int] = ..., final_loss: _Optional[_Union[Scores, _Mapping]] = ..., speedup: _Optional[_Union[Scores, _Mapping]] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("iqm", "median", "optimality_gap")
    IQM_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_FIELD_NUMBER: _ClassVar[int]
    OPTIMALITY_GAP_FIELD_NUMBER: _ClassVar[int]
    iqm: float
    median: float
    optimality_gap: float
    def __init__(self, iqm: _Optional[float] = ..., median: _Optional[float] = ..., optimality_gap: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: int
    def __init__(self, workers: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointResponse(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...
