"""Flax's msgpack files: what learned_optimization and the authors of Celo save.

Owns the bytes: a tree of string-keyed maps whose leaves are arrays (msgpack extension 1) or numpy scalars (extension
3), each packed as (shape, dtype, buffer). Treats every file as hostile: sizes are bounded by what is really there,
types come from a list, and only ``CheckpointError`` leaves. Never knows what the arrays mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from lopt.checkpoint import CheckpointError

Array = npt.NDArray[Any]

DTYPES = ("float32", "int32", "int64")
"""Everything an original writes: weights, and the step of a checkpoint."""
MAX_LEAVES = 1024
MAX_DEPTH = 16
MAX_DIMENSIONS = 8
_ARRAY, _SCALAR = 1, 3
_CHECKPOINT = {"params", "gen_id", "step"}


def leaves(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays by path (parts joined by ``/``), and ``gen_id`` and ``step`` of a learned_optimization ``params_*`` file.

    Raises ``CheckpointError`` naming the field, what was found and what was expected.
    """
    try:
        tree = msgpack.unpackb(
            data,
            ext_hook=_array,
            object_pairs_hook=_map,
            max_map_len=MAX_LEAVES,
            max_array_len=0,
            max_str_len=4096,
            max_bin_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"damaged flax msgpack file: {error or type(error).__name__}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"the file holds one {type(tree).__name__}: expected a map of arrays")
    facts: dict[str, Any] = {}
    if tree.keys() == _CHECKPOINT:  # learned_optimization's ParameterCheckpoint
        facts = {name: _fact(name, tree[name]) for name in ("gen_id", "step")}
        tree = tree["params"]
    return _flatten(tree), facts


def _fact(name: str, value: Any) -> str | int:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind == "i":
        return int(value.item())
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise CheckpointError(f"{name} is {type(value).__name__}: expected a text or a whole number")
    return value


def _flatten(tree: Any) -> dict[str, Array]:
    """Without recursion: how deep a file nests is the file's choice."""
    found: dict[str, Array] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        name = "/".join(path)
        if isinstance(value, np.ndarray):
            if name in found:
                raise CheckpointError(f"leaf {name!r} is there twice")
            found[name] = value
        elif not isinstance(value, Mapping):
            raise CheckpointError(f"leaf {name!r} is {type(value).__name__}: expected an array")
        elif len(path) == MAX_DEPTH:
            raise CheckpointError(f"leaf {name!r:.200} lies deeper than {MAX_DEPTH} maps")
        else:
            waiting += [((*path, key), child) for key, child in value.items()]
        if len(found) + len(waiting) > MAX_LEAVES:
            raise CheckpointError(f"more than {MAX_LEAVES} leaves")
    return found


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise CheckpointError(f"a map's key is {type(key).__name__}: expected a text")
        if key in result:
            raise CheckpointError(f"key {key!r:.200} is there twice in one map")
        result[key] = value
    return result


def _array(code: int, packed: bytes) -> Array:
    """One extension value; the buffer's length decides, not what the shape promises."""
    if code not in (_ARRAY, _SCALAR):
        raise CheckpointError(f"msgpack extension {code}: expected {_ARRAY} (array) or {_SCALAR} (scalar)")
    parts = msgpack.unpackb(packed, max_array_len=MAX_DIMENSIONS, max_map_len=0, max_ext_len=0)
    if not isinstance(parts, list) or len(parts) != 3:
        raise CheckpointError("an array is not packed as (shape, dtype, buffer)")
    shape, dtype, buffer = parts
    if dtype not in DTYPES:
        raise CheckpointError(f"an array has dtype {dtype!r:.80}: expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(f"an array has shape {shape!r:.80}: expected positive whole numbers")
    if not isinstance(buffer, bytes):
        raise CheckpointError(f"an array's buffer is {type(buffer).__name__}: expected bytes")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(buffer) != expected:
        raise CheckpointError(f"an array of shape {tuple(shape)} has {len(buffer)} bytes: expected {expected}")
    return np.frombuffer(buffer, np.dtype(dtype).newbyteorder("<")).reshape(shape)
