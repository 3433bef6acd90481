"""Finding weights and recognising them: from a name, a path, a URL or a hub id to an optimizer and its theta.

Owns where things are looked up and which format their bytes are in; contents decide, never a file's name. Refuses
pickles: nothing is ever unpickled, whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import fsspec.core

from configs.checks import did_you_mean
from lopt.base import Argument, LearnedOptimizer, Theta, ThetaError
from lopt.checkpoint import ARCHITECTURES, KEY, CheckpointError, decode, unpack
from lopt.interchange import flax, hub, pylo
from lopt.interchange.jax import identify

PRESETS = Path(__file__).parents[1] / "presets"
MAX_BYTES = 2**28
"""Thirty times the largest published optimizer."""
Loaded = tuple[LearnedOptimizer, Theta, dict[str, Any]]
UNREADABLE = (OSError, ValueError, ImportError)
"""What file systems raise: ImportError for a protocol whose package is not installed."""
_SUFFIXES = {".safetensors", ".state", ".msgpack", ".json", ".pt", ".pth", ".bin", ".pkl", ".npz"}
_HUB_ID = r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?"


def presets() -> list[str]:
    """Names of the weights that are part of the package."""
    return sorted(path.stem for path in PRESETS.glob("*.safetensors"))


def read(
    source: str | os.PathLike[str], architecture: str | None = None, **arguments: Argument
) -> tuple[LearnedOptimizer, Theta, dict[str, Any]]:
    """The optimizer at ``source``, its theta and its provenance.

    ``source``: a preset's name; a file or directory, by path or any fsspec URL; or a repository of the Hugging Face
    hub, as ``hf://owner/name``, ``hf:owner/name`` or, where no such path exists, ``owner/name``, each with an optional
    ``@revision``. Formats: paceline's own; PyLO's config.json and safetensors; flax msgpack as the authors of Celo and
    learned_optimization write it.

    A foreign file does not name its architecture: it is found by names and shapes, or given by ``architecture`` and
    ``arguments``. Raises ``CheckpointError`` for what is missing, damaged, of another architecture, or a pickle.
    """
    source = os.fspath(source)
    place = _locate(source)
    try:
        return _parse(place, place.read(), architecture, arguments)
    except (CheckpointError, ThetaError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def from_hub(
    repo_id: str, revision: str | None = None, architecture: str | None = None, **arguments: Argument
) -> tuple[LearnedOptimizer, Theta, dict[str, Any]]:
    """``read`` of the hub's repository ``owner/name`` at ``revision`` (branch, tag or commit; the default branch)."""
    return read(f"hf://{repo_id}{f'@{revision}' if revision else ''}", architecture, **arguments)


@dataclass(frozen=True)
class _Place:
    """One file of weights. ``folder`` is what its directory is called, ``sibling`` finds another of that kind."""

    fs: fsspec.AbstractFileSystem
    path: str
    folder: str
    sibling: Callable[[str], _Place]

    def read(self) -> bytes:
        try:
            size = self.fs.size(self.path) or 0
            if size <= MAX_BYTES:
                with self.fs.open(self.path, "rb") as file:
                    data: bytes = file.read(MAX_BYTES + 1)
                size = len(data)
        except UNREADABLE as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        if size > MAX_BYTES:
            raise CheckpointError(f"{self.path} has {size} bytes or more: expected at most {MAX_BYTES}")
        return data

    def config(self) -> dict[str, Any]:
        """The config.json beside the file; empty where there is none."""
        path = f"{self.path.rpartition('/')[0]}/{pylo.CONFIG}"
        if not self.fs.exists(path):
            return {}
        try:
            config = json.loads(_Place(self.fs, path, self.folder, self.sibling).read())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{pylo.CONFIG}: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{pylo.CONFIG} holds {type(config).__name__}: expected an object")
        return config


def _locate(source: str) -> _Place:
    if source in presets():
        return _on_disk(fsspec.filesystem("file"), str(PRESETS / f"{source}.safetensors"))
    explicit = re.match(r"hf:(//)?", source)
    named = re.fullmatch(_HUB_ID, source[explicit.end() :] if explicit else source)
    if explicit and named is None:
        raise CheckpointError(f"{source!r}: expected hf://owner/name or hf://owner/name@revision")
    looks_local = Path(source).exists() or Path(source).suffix in _SUFFIXES
    if named is not None and (explicit or not looks_local):
        return _on_the_hub(named["repo"], named["revision"])
    try:
        fs, path = fsspec.core.url_to_fs(source)
        if fs.exists(path):
            return _on_disk(fs, path)
        problem = "nothing is there"
    except UNREADABLE as error:
        problem = str(error)
    if source in ARCHITECTURES:
        raise CheckpointError(
            f"{source!r} is an architecture without published weights: give its file, or make one with "
            f"lopt.Optimizer(params, lopt.build({source!r}), theta)"
        )
    names = presets()
    raise CheckpointError(
        f"{source!r} is neither a readable path or URL ({problem}), nor a preset"
        f" ({', '.join(names)}){did_you_mean(source, names)}, nor a hub id (owner/name)"
    )


def _on_disk(fs: fsspec.AbstractFileSystem, path: str) -> _Place:
    path = path.rstrip("/")
    directory = path if fs.isdir(path) else path.rpartition("/")[0]
    parent, _, folder = directory.rpartition("/")

    def sibling(name: str) -> _Place:
        return _on_disk(fs, f"{parent}/{name}")

    if directory != path:
        return _Place(fs, path, folder, sibling)
    if fs.isdir(f"{path}/{pylo.RNN}") and fs.isdir(f"{path}/{pylo.MLP}"):
        return _on_disk(fs, f"{path}/{pylo.RNN}")
    return _Place(fs, _only_weights(fs, path), folder, sibling)


def _on_the_hub(repo: str, revision: str | None) -> _Place:
    fs = fsspec.filesystem("file")
    owner, _, name = repo.partition("/")
    return _Place(
        fs,
        _only_weights(fs, hub.download(repo, revision), repo),
        name,
        lambda other: _on_the_hub(f"{owner}/{other}", revision),
    )


def _only_weights(fs: fsspec.AbstractFileSystem, directory: str, called: str | None = None) -> str:
    found: list[str] = sorted(path for path in fs.ls(directory, detail=False) if path.endswith(".safetensors"))
    if len(found) != 1:
        names = ", ".join(path.rpartition("/")[2] for path in found) or "none"
        raise CheckpointError(
            f"{called or directory}: expected one *.safetensors file (pickles are never read), found {names}"
        )
    return found[0]


def _parse(place: _Place, data: bytes, architecture: str | None, arguments: dict[str, Argument]) -> Loaded:
    if data[8:9] == b"{" and data[5:8] == b"\0\0\0":
        tensors, metadata = unpack(data)
        if KEY in metadata:
            return _own(data, architecture, arguments)
        return _from_pylo(place, data, tensors, architecture, arguments)
    if data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
        raise CheckpointError(
            "a pickle or an archive of pickles (torch.save, numpy.savez): never read, because unpickling runs code;"
            " save the tensors as safetensors"
        )
    if data[:1] and (0x80 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF)):
        leaves, facts = flax.leaves(data)
        rule, theta = identify(leaves, architecture, arguments)
        return rule, theta, _foreign(place, data, "flax msgpack") | facts
    raise CheckpointError(
        f"not a safetensors file, nor flax msgpack: it has {len(data)} bytes and starts with {data[:16]!r}"
    )


def _own(data: bytes, architecture: str | None, arguments: dict[str, Argument]) -> Loaded:
    rule, theta, provenance = decode(data)
    if architecture not in (None, rule.name):
        raise CheckpointError(f"architecture = {rule.name!r}: expected {architecture!r}")
    for name, value in arguments.items():
        if rule.arguments.get(name) != value:
            raise CheckpointError(f"{name} = {rule.arguments.get(name)!r}: expected {value!r}")
    return rule, theta, provenance


def _from_pylo(
    place: _Place, data: bytes, tensors: Theta, architecture: str | None, arguments: dict[str, Argument]
) -> Loaded:
    def twin(name: str) -> pylo.Tensors:
        return {key: tensor.numpy() for key, tensor in unpack(place.sibling(name).read())[0].items()}

    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    original = pylo.original(arrays, place.config(), place.folder, twin)
    name = architecture or original.architecture
    rule, theta = identify(original.leaves, name, original.arguments | arguments)
    return rule, theta, _foreign(place, data, "PyLO")


def _foreign(place: _Place, data: bytes, kind: str) -> dict[str, Any]:
    """Provenance of a file that brings none. Its directory stays out: files are published."""
    name = place.path.rpartition("/")[2]
    return {"source": name, "format": kind, "sha256": hashlib.sha256(data).hexdigest()}
