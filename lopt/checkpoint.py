"""A learned optimizer as one self-contained file.

Owns the file format: safetensors for theta, with the architecture, its arguments and the provenance as JSON in the
header. Reads any fsspec URL. Never unpickles, never knows about runs, manifests or retention (``learner`` does).
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import fsspec
import safetensors
import safetensors.torch

from lopt.adam import Adam
from lopt.base import Argument, LearnedOptimizer, Theta, ThetaError
from lopt.celo import Celo
from lopt.small_fc import SmallFcLopt

FORMAT = 1
ARCHITECTURES: dict[str, type[LearnedOptimizer]] = {kind.name: kind for kind in (SmallFcLopt, Celo, Adam)}
PRESETS = Path(__file__).parent / "presets"


class CheckpointError(ValueError):
    """A file that is not a learned optimizer's; names the file's field, what was found and what was expected."""


def build(name: str, **arguments: Argument) -> LearnedOptimizer:
    """The architecture ``name``. Raises ``CheckpointError`` for unknown names and arguments."""
    if name not in ARCHITECTURES:
        raise CheckpointError(f"architecture {name!r}: expected one of {_choices(name, list(ARCHITECTURES))}")
    try:
        return ARCHITECTURES[name](**arguments)
    except TypeError as error:
        raise CheckpointError(f"architecture {name!r} does not take {arguments}: {error}") from error


def encode(lopt: LearnedOptimizer, theta: Theta, provenance: dict[str, Any]) -> bytes:
    """The file's bytes; ``provenance`` is JSON (run, version, config, scores, ...). Equal input gives equal bytes."""
    lopt.spec.check(theta)
    header = {"format": FORMAT, "architecture": lopt.name, "arguments": lopt.arguments, "provenance": provenance}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in theta.items()}
    return safetensors.torch.save(tensors, {"paceline": json.dumps(header, sort_keys=True)})


def decode(data: bytes) -> tuple[LearnedOptimizer, Theta, dict[str, Any]]:
    """The inverse: (optimizer, theta, provenance). Raises ``CheckpointError`` for anything that is not such a file."""
    try:
        theta = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"not a safetensors file: {error}") from error
    # safetensors.torch.load drops the metadata, which the header holds behind an 8-byte length
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("paceline")
    if text is None:
        raise CheckpointError("safetensors metadata has no field 'paceline': not a learned optimizer's checkpoint")
    try:
        header = json.loads(text)
        version, name = header["format"], header["architecture"]
        arguments, provenance = dict(header["arguments"]), dict(header["provenance"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"damaged metadata field 'paceline': {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"format = {version!r}: expected {FORMAT}")
    lopt = build(name, **arguments)
    try:
        lopt.spec.check(theta)
    except ThetaError as error:
        raise CheckpointError(str(error)) from error
    return lopt, theta, provenance


def read(path_or_name: str) -> tuple[LearnedOptimizer, Theta, dict[str, Any]]:
    """``decode`` of a preset's name, a path or any fsspec URL. Raises ``CheckpointError``."""
    preset = PRESETS / f"{path_or_name}.safetensors"
    try:
        with fsspec.open(str(preset) if preset.is_file() else path_or_name, "rb") as file:
            data = file.read()
    except (OSError, ValueError, ImportError) as error:
        presets = _choices(path_or_name, sorted(path.stem for path in PRESETS.glob("*.safetensors")))
        raise CheckpointError(
            f"{path_or_name!r} is neither a readable file or URL ({error}) nor a preset: {presets}"
        ) from error
    try:
        return decode(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path_or_name}: {error}") from error


def _choices(name: str, choices: list[str]) -> str:
    close = get_close_matches(name, choices, n=1)
    suffix = f" (did you mean {close[0]!r}?)" if close else ""
    return (", ".join(choices) or "none is installed") + suffix
