"""Owns the few file operations that checkpoints are built from, on a local disk and in memory.

Every write is atomic: a reader sees the whole old content or the whole new content. ``create`` and ``swap`` are
decided by the storage itself (hard link, lock, conditional request), so that of several racing writers exactly one
wins. It must never interpret what it stores, and no exception of a client library may leave it: callers see
``StoreError`` with one sentence for the user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from configs.checks import CLIENT_OPTIONS, did_you_mean

SCHEMES = ("file", "s3", "memory")
REQUEST_SECONDS = 120  # for one operation with all its retries; a big blob on a slow line still fits
TEMPORARY_SECONDS = 3600  # a temporary file older than this belongs to a writer that was killed


class StoreError(RuntimeError):
    """Storage cannot be used, or holds something unexpected; ``str()`` is one sentence for the user."""


class Storage(ABC):
    """A folder of files. Paths are relative, with ``/``; every method raises StoreError when storage fails."""

    url: str

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """The content, or None if there is no such file."""

    @abstractmethod
    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        """The content and a tag that identifies it for ``swap``; for small files."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False (and nothing written) if it does."""

    @abstractmethod
    def swap(self, path: str, tag: str | None, data: bytes) -> bool:
        """Replace the content that has this tag (None: there is no file); False if it is another one by now.

        Two writers must never pass the same ``data``: after a lost answer it is how a writer knows its own work.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write a file, whether it exists or not."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file; no error if there is none."""

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted; [] if there is no such folder."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what killed writers left behind."""


def open_storage(root: str, folder: str, options: Mapping[str, Any], deadline: float = REQUEST_SECONDS) -> Storage:
    """A folder of a root: a plain path or a ``file://``, ``s3://`` or ``memory://`` URL. Does no I/O.

    ``deadline`` bounds each operation over a network, in seconds.
    """
    scheme, separator, rest = root.partition("://")
    if not separator:
        scheme, rest = "file", root
    if scheme not in SCHEMES:
        supported = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreError(
            f"storage root {root!r}: checkpoints need exclusive creation and compare-and-swap, which are known for "
            f"{supported} and plain paths only{did_you_mean(scheme, SCHEMES)}"
        )
    for name in options:
        if name not in CLIENT_OPTIONS:
            hint = did_you_mean(name, CLIENT_OPTIONS)
            raise StoreError(f"storage option {name!r}: expected one of {', '.join(CLIENT_OPTIONS)}{hint}")
    names = [name for name in rest.split("/") if name] + [folder]
    if scheme == "s3":
        if rest.startswith("/") or len(names) == 1:
            raise StoreError(f"storage root {root!r}: expected s3://bucket or s3://bucket/folder")
        from learner.storage_s3 import S3Storage  # its client libraries take a second to import

        return S3Storage("/".join(names), options, deadline)
    if options:
        raise StoreError(f"storage options {sorted(options)}: expected none for {root!r} (they are for s3://)")
    if scheme == "memory":
        return MemoryStorage("/".join(names))
    if not rest:
        raise StoreError(f"storage root {root!r}: expected a directory")
    return LocalStorage(Path(rest).expanduser().absolute() / folder)


def content_tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LocalStorage(Storage):
    """Files below a directory. Durable: data and directory entries are synced before a write is reported done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, path: str) -> bytes | None:
        with self._errors("read"):
            try:
                return (self.root / path).read_bytes()
            except FileNotFoundError:
                return None

    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        data = self.read(path)
        return None if data is None else (data, content_tag(data))

    def create(self, path: str, data: bytes) -> bool:
        # A hard link, unlike O_EXCL on the name itself, never shows a file that is not complete yet.
        with self._errors("write"), self._temporary(path, data) as (temporary, target):
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_directory(target.parent)
            return True

    def swap(self, path: str, tag: str | None, data: bytes) -> bool:
        with self._errors("write"), self._temporary(path, data) as (temporary, target), self._lock():
            current = self.read_tagged(path)
            if (current[1] if current else None) != tag:
                return False
            os.replace(temporary, target)
            _sync_directory(target.parent)
            return True

    def put(self, path: str, data: bytes) -> None:
        with self._errors("write"), self._temporary(path, data) as (temporary, target):
            os.replace(temporary, target)
            _sync_directory(target.parent)

    def delete(self, path: str) -> None:
        with self._errors("delete"):
            (self.root / path).unlink(missing_ok=True)

    def list(self, folder: str) -> list[str]:
        with self._errors("list"):
            found = [
                str((Path(directory) / name).relative_to(self.root))
                for directory, _, names in os.walk(self.root / folder, onerror=_unless_absent)
                for name in names
            ]
        return sorted(found)

    def sweep(self) -> None:
        with self._errors("delete"):
            for path in self.list(".tmp"):
                with contextlib.suppress(FileNotFoundError):  # its writer may finish meanwhile
                    if time.time() - (self.root / path).stat().st_mtime > TEMPORARY_SECONDS:
                        (self.root / path).unlink()

    @contextlib.contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """A complete, synced file under another name, and where it is to go; gone at the end."""
        target, temporary = self.root / path, self.root / ".tmp" / secrets.token_hex(16)
        _make_directory(target.parent)
        _make_directory(temporary.parent)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.root / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it when the file is closed or the process dies
            yield

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except (NotADirectoryError, FileExistsError) as error:
            raise StoreError(f"{error.filename} is a file; storage needs a directory there") from error
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and action == "write":
                reason += "; the directory must be writable"
            raise StoreError(f"cannot {action} {error.filename or self.url}: {reason}") from error


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        with contextlib.suppress(FileExistsError):  # another writer was first
            path.mkdir()
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class MemoryStorage(Storage):
    """fsspec's in-memory file system: one per process, for tests and simulations."""

    _lock = threading.RLock()

    def __init__(self, root: str) -> None:
        self.url = f"memory://{root}"
        self._root = f"/{root}/"
        self._fs = fsspec.filesystem("memory")

    def read(self, path: str) -> bytes | None:
        with self._lock:
            try:
                return bytes(self._fs.cat_file(self._root + path))
            except FileNotFoundError:
                return None

    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        data = self.read(path)
        return None if data is None else (data, content_tag(data))

    def create(self, path: str, data: bytes) -> bool:
        return self.swap(path, None, data)

    def swap(self, path: str, tag: str | None, data: bytes) -> bool:
        with self._lock:
            current = self.read_tagged(path)
            if (current[1] if current else None) != tag:
                return False
            self.put(path, data)
            return True

    def put(self, path: str, data: bytes) -> None:
        with self._lock:
            self._fs.pipe_file(self._root + path, data)

    def delete(self, path: str) -> None:
        with self._lock, contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._root + path)

    def list(self, folder: str) -> list[str]:
        with self._lock:
            return sorted(found.removeprefix(self._root) for found in self._fs.find(self._root + folder))

    def sweep(self) -> None:
        """Nothing: memory holds no unfinished files."""
