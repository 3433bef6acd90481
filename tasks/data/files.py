"""Where data files lie: any fsspec URL, with a cache for what is not local.

Owns: finding files below ``data.root`` (or elsewhere, for a user's own), and reading one whole file.
Must never look into a file: readers.py, folders.py, npz.py and tables.py do.

A file that is not local is downloaded once for each state it is in (its size, and ETag or time) and kept in
``store.Cache``, which checks it at every read. S3 endpoints and credentials come from ``data.options`` and the
environment (``FSSPEC_S3_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from configs.schema import DataConfig
from tasks.data.store import Cache, digest
from tasks.errors import DataError

_BLOCK = 1 << 24
_AT_ONCE = 64  # small files that a remote filesystem is asked for together


@dataclass(frozen=True)
class File:
    """A file that is there. Its methods raise DataError if it cannot be reached."""

    system: Any
    path: str
    cache: Cache

    @property
    def name(self) -> str:
        """The full path or URL, for messages."""
        return _name(self.system, self.path)

    @property
    def state(self) -> str:
        """A digest that changes when the file does."""
        with reaching(self.name):
            return digest(self.name, self.system.ukey(self.path))

    @property
    def size(self) -> int:
        """Its bytes."""
        with reaching(self.name):
            return int(self.system.info(self.path)["size"])

    def open(self) -> BinaryIO:
        """For reading at any place; nothing is kept. Reading raises what the filesystem raises."""
        with reaching(self.name):
            stream: BinaryIO = self.system.open(self.path, "rb")
        return stream

    def read(self) -> bytes:
        """The whole content."""
        if isinstance(self.system, LocalFileSystem):
            with reaching(self.name):
                return Path(self.path).read_bytes()
        return self.cache.kept(f"file-{self.state}", self._blocks).tobytes()

    def _blocks(self) -> Iterator[bytes]:
        with reaching(self.name):
            expected, found = self.system.info(self.path)["size"], 0
            with self.system.open(self.path, "rb") as stream:
                while block := stream.read(_BLOCK):
                    found += len(block)
                    yield block
        if expected is not None and found != expected:
            raise DataError(f"{self.name}: expected {expected} bytes, the download gave {found}")


class DataRoot:
    """The files below ``data.root``, one folder for each data set, and those that a path or URL of its own names."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.cache = Cache(config.cache)

    def find(self, candidates: Sequence[str]) -> File:
        """The first of ``candidates`` that exists: paths below the root, absolute paths or URLs.

        Raises DataError if none exists, or the root is not set or cannot be reached.
        """
        for candidate in candidates:
            file = self.get(candidate)
            if file is not None:
                return file
        where = "" if _elsewhere(candidates[0]) else f" below data.root = {self.config.root!r}"
        raise DataError(f"{' or '.join(candidates)}: expected such a file{where}, found none")

    def get(self, path: str) -> File | None:
        """The file at ``path``, None if there is none. Raises DataError for what cannot be reached, or is a folder."""
        system, full = self.resolve(path)
        with reaching(_name(system, full)):
            if not system.exists(full):
                return None
            if system.isdir(full):
                raise DataError(f"{_name(system, full)}: expected a file, found a folder")
        return File(system, full, self.cache)

    def matching(self, pattern: str) -> list[File]:
        """The files that ``pattern`` matches, in order; ``*`` and ``**/`` are as in a shell.

        Raises DataError if there are none.
        """
        system, full = self.resolve(pattern)
        name = _name(system, full)
        with reaching(name):
            if system.isdir(full):
                raise DataError(f"{name}: expected a file, or a pattern such as {pattern.rstrip('/')}/*, not a folder")
            try:
                names = {full: {"type": "file"}} if system.exists(full) else system.glob(full, detail=True)
            except ValueError as error:
                raise DataError(f"{name}: {error}") from error
        found = sorted(path for path, info in names.items() if info["type"] == "file")
        if not found:
            raise DataError(f"{name}: expected files, found none")
        return [File(system, path, self.cache) for path in found]

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder at ``path``."""
        system, full = self.resolve(path)
        with reaching(_name(system, full)):
            return bool(system.isdir(full))

    def listing(self, folder: str) -> tuple[list[str], str]:
        """The paths of all files below ``folder``, relative to it and in order, and a digest of their states.

        Raises DataError if the folder is not there.
        """
        system, full = self.resolve(folder)
        name = _name(system, full)
        with reaching(name):
            if not system.isdir(full):
                raise DataError(f"{name}: expected a folder, found none")
            found = system.find(full, detail=True)
        base = full.rstrip("/") + "/"
        state = hashlib.sha256(name.encode())
        for path in sorted(found):
            state.update(repr((path, sorted((key, str(value)) for key, value in found[path].items()))).encode())
        return [path.removeprefix(base) for path in sorted(found)], state.hexdigest()[:32]

    def read_each(self, folder: str, paths: Sequence[str]) -> Iterator[tuple[bytes, str]]:
        """Content and full name of the files ``paths`` below ``folder``, one after the other; nothing is kept."""
        system, full = self.resolve(folder)
        for start in range(0, len(paths), _AT_ONCE):
            whole = [f"{full.rstrip('/')}/{path}" for path in paths[start : start + _AT_ONCE]]
            with reaching(_name(system, full)):
                contents = system.cat_ranges(whole, None, None, on_error="raise")
            yield from zip(contents, (_name(system, path) for path in whole), strict=True)

    def resolve(self, path: str) -> tuple[Any, str]:
        """The filesystem of ``path``, and the path on it."""
        root, options = self.config.root, dict(self.config.options)
        if "region" in options:  # s3fs hands it on to its client alone
            options["client_kwargs"] = {"region_name": options.pop("region")}
        if _elsewhere(path):
            if split_protocol(path)[0] != split_protocol(root or "")[0]:
                options = {}  # they are those of the root's client
            root = path
        elif root is None:
            raise DataError(
                f"data.root = None: expected the folder or URL that holds {path} (digits, glyphs and pydoc need none)"
            )
        try:
            system, base = url_to_fs(str(Path(root).expanduser()) if "://" not in root else root, **options)
        except (ValueError, ImportError, TypeError) as error:
            raise DataError(f"data.root = {self.config.root!r}, path {path!r}: {error}") from error
        return system, base if root is path else f"{base.rstrip('/')}/{path}"


def _elsewhere(path: str) -> bool:
    """Whether ``path`` does not lie below the root."""
    return "://" in path or path.startswith(("/", "~"))


def _name(system: Any, path: str) -> str:
    name: str = path if isinstance(system, LocalFileSystem) else system.unstrip_protocol(path)
    return name


@contextmanager
def reaching(name: str) -> Iterator[None]:
    """What a filesystem raises as a DataError that names the file."""
    try:
        yield
    except _failures() as error:
        raise DataError(f"{name}: {type(error).__name__}: {error}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What filesystems raise; the clients' own errors are imported here because that is slow and seldom needed."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    return OSError, ClientError, BotoCoreError
