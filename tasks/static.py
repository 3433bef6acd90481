"""Static configurations: what a task is compiled for, as frozen dataclasses that can be written by hand in YAML.

Owns: their registry by ``kind``, the way to and from plain dicts and JSON, and their identity (``digest``).
Must never build a model or read data.

A static config is flat or nested (an augmentation holds the config of the task it wraps); every field is a number, a
text, a bool, a tuple of numbers or another static config. ``kind`` is the dict's tag for the class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from configs.checks import ConfigError, did_you_mean

if TYPE_CHECKING:
    from tasks.base import Task
    from tasks.data import Library

KINDS: dict[str, type[StaticConfig]] = {}

DYNAMIC = "dynamic"
"""The value of a static field (such as ``activation``) that every particle draws for itself."""


class Work(NamedTuple):
    """What one inner step of one particle takes, by formula.

    ``parameters``: how many there are. ``flops``: of the forward pass over one batch, matrix products and convolutions
    only, as torch's FlopCounterMode counts them. ``activations``: floats that the backward pass keeps, roughly.
    """

    parameters: int
    flops: int
    activations: int

    @property
    def bytes(self) -> int:
        """Memory of one particle's step in fp32: parameters, gradients, Adam's two moments, and activations."""
        return 4 * (4 * self.parameters + 2 * self.activations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticConfig(ABC):
    """What a task is compiled for: frozen, hashable, printable, serialisable.

    A concrete subclass is declared ``class ImageMlp(StaticConfig, kind="image_mlp")`` and checks itself in
    ``__post_init__`` with ``configs.checks`` (ConfigError with the field's name).
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            KINDS[kind] = cls

    @abstractmethod
    def build(self, library: Library) -> Task:
        """The task. Raises DataError if its data cannot be had."""

    @abstractmethod
    def work(self) -> Work:
        """The work of one inner step, without building anything."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ``kind`` first; the inverse of ``static_from_dict``."""
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **values}

    def to_json(self) -> str:
        """One line of JSON with sorted keys; equal configs give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def digest(self) -> str:
        """16 hex digits that identify the config: the start of the SHA-256 of ``to_json()``."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, StaticConfig):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def static_from_dict(values: Mapping[str, Any], field: str = "task") -> StaticConfig:
    """The static config of ``{"kind": ..., **fields}``; fields that are left out have their defaults.

    ``field`` is the dotted path for messages. Raises ConfigError for an unknown kind, an unknown or missing field, a
    value of another type, and whatever the config itself refuses.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{field}.kind", kind, f"one of {', '.join(sorted(KINDS))}{did_you_mean(str(kind), KINDS)}")
    cls = KINDS[kind]
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name == "kind":
            continue
        if name not in known:
            raise ConfigError(f"{field}.{name}", value, f"a field of {kind}{did_you_mean(name, known)}")
        arguments[name] = _typed(value, hints[name], f"{field}.{name}")
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ConfigError(f"{field}.{name}", None, f"a value, which {kind} needs")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{field}.{error.field}", error.value, error.expected) from error


def static_from_json(text: str) -> StaticConfig:
    """The config that ``to_json`` wrote."""
    return static_from_dict(json.loads(text))


def _typed(value: Any, hint: Any, field: str) -> Any:
    """``value`` as the type ``hint``; a whole number serves as a float, a list as a tuple, a dict as a config."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            (item, *_) = typing.get_args(option)
            return tuple(_typed(entry, item, f"{field}[{index}]") for index, entry in enumerate(value))
        if isinstance(option, type) and issubclass(option, StaticConfig) and isinstance(value, Mapping):
            return static_from_dict(value, field)
        if option is float and type(value) in (int, float):
            if not math.isfinite(value):
                raise ConfigError(field, value, "a finite number")
            return float(value)
        if type(value) is option or (isinstance(value, StaticConfig) and isinstance(value, option)):
            return value
        if option is type(None) and value is None:
            return None
    raise ConfigError(field, value, " or ".join(_called(option) for option in options))


def _called(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    return "a list" if typing.get_origin(hint) is tuple else "a task (a mapping with kind)"
