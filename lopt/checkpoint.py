"""A learned optimizer as one self-contained file.

Owns the file format: safetensors for theta, with the architecture, its arguments and constants and the provenance as
JSON in the header. Treats every file as hostile: only ``CheckpointError`` leaves. Never unpickles, never finds files
(``lopt.interchange`` does), never knows about runs, manifests or retention (``learner`` does).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from configs.checks import did_you_mean
from lopt.base import Argument, LearnedOptimizer, Theta, ThetaError
from lopt.celo import Celo
from lopt.celo2 import Celo2
from lopt.celo_adam import CeloAdam
from lopt.constants import constants
from lopt.hand_designed import HAND_DESIGNED
from lopt.mlp_lopt import MlpLopt
from lopt.mulo import MuLO
from lopt.nn_adam import NNAdam
from lopt.rnn_mlp import RnnMlp
from lopt.small_fc import SmallFcLopt
from lopt.star import Star
from lopt.velo import Velo

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had no constants."""
KEY = "paceline"
"""The field of safetensors' metadata that holds the header."""
_KINDS: tuple[type[LearnedOptimizer], ...] = (
    SmallFcLopt, MuLO, Star, Velo, Celo, Celo2, CeloAdam, MlpLopt, NNAdam, RnnMlp, *HAND_DESIGNED,
)  # fmt: skip
ARCHITECTURES = {kind.name: kind for kind in _KINDS}


class CheckpointError(ValueError):
    """A file that is not a learned optimizer's; names the file's field, what was found and what was expected."""


def build(name: str, **arguments: Argument) -> LearnedOptimizer:
    """The architecture ``name``. Raises ``CheckpointError`` for unknown names and arguments."""
    if name not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES) + did_you_mean(name, ARCHITECTURES)
        raise CheckpointError(f"architecture {name!r}: expected one of {expected}")
    try:
        return ARCHITECTURES[name](**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"architecture {name!r} does not take {arguments}: {error}") from error


def header(lopt: LearnedOptimizer, provenance: dict[str, Any]) -> dict[str, Any]:
    """What a file says about its theta, as JSON."""
    return {
        "format": FORMAT,
        "architecture": lopt.name,
        "arguments": lopt.arguments,
        "constants": constants(lopt),
        "provenance": provenance,
    }


def encode(lopt: LearnedOptimizer, theta: Theta, provenance: dict[str, Any]) -> bytes:
    """The file's bytes; ``provenance`` is JSON (run, version, config, scores, ...). Equal input gives equal bytes."""
    lopt.spec.check(theta)
    text = json.dumps(header(lopt, provenance), sort_keys=True, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in theta.items()}
    return safetensors.torch.save(tensors, {KEY: text})


def decode(data: bytes) -> tuple[LearnedOptimizer, Theta, dict[str, Any]]:
    """The inverse: (optimizer, theta, provenance). Raises ``CheckpointError`` for anything that is not such a file."""
    theta, metadata = unpack(data)
    if KEY not in metadata:
        raise CheckpointError(f"safetensors metadata has no field {KEY!r}: not a learned optimizer's checkpoint")
    try:
        stated = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged metadata field {KEY!r}: {error}") from error
    if not isinstance(stated, dict) or stated.get("format") not in READABLE:
        found = stated.get("format") if isinstance(stated, dict) else stated
        raise CheckpointError(f"format = {found!r:.80}: expected one of {READABLE}")
    name = _field(stated, "architecture", str)
    arguments, provenance = _field(stated, "arguments", dict), _field(stated, "provenance", dict)
    if not all(isinstance(value, int | float | str) for value in arguments.values()):
        raise CheckpointError(f"arguments = {arguments!r:.200}: expected numbers and texts")
    lopt = build(name, **arguments)
    try:
        lopt.spec.check(theta)
    except ThetaError as error:
        raise CheckpointError(str(error)) from error
    if stated["format"] > 1:
        _check_constants(lopt, _field(stated, "constants", dict))
    return lopt, theta, provenance


def unpack(data: bytes) -> tuple[Theta, dict[str, str]]:
    """Tensors and metadata of a safetensors file that holds nothing but fp32. Raises ``CheckpointError``."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"not a safetensors file: {error}") from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] != "F32" or 0 in entry["shape"]:
            found = f"{entry['dtype']} of shape {entry['shape']}"
            raise CheckpointError(f"tensor {name!r:.200} is {found}: expected F32 and no empty axis")
        tensors[name] = torch.from_numpy(np.frombuffer(bytearray(entry["data"]), "<f4").reshape(entry["shape"]))
    # deserialize drops the metadata, which the header holds behind an 8-byte length
    length = int.from_bytes(data[:8], "little")
    return tensors, json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _check_constants(lopt: LearnedOptimizer, stated: dict[str, Any]) -> None:
    """Weights are only worth something with the constants that they were trained with."""
    ours = constants(lopt)
    for name, value in stated.items():
        if name not in ours:
            raise CheckpointError(f"constants: {lopt.name} has no {name!r:.80}{did_you_mean(name, ours)}")
        if value != ours[name]:
            raise CheckpointError(f"constants[{name!r}] = {value!r:.200}: this code computes with {ours[name]!r:.200}")


def _field(stated: dict[str, Any], name: str, kind: type[Any]) -> Any:
    value = stated.get(name)
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a text"
        raise CheckpointError(f"metadata field {name!r} = {value!r:.80}: expected {expected}")
    return value
