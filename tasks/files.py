"""Where data files lie: any fsspec URL, with a local cache for what is not local.

Owns: reading one whole file below ``data.root``, and the cache folder. Must never look into a file (readers.py does).

A cached file carries the SHA-256 of its content in its name, is renamed into place only when whole, and is checked at
every read: a download that was cut off, or a file damaged since, is fetched again and never taken for whole.
S3 endpoints and credentials come from the environment (``FSSPEC_S3_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tasks.errors import DataError


@dataclass(frozen=True)
class DataRoot:
    """The folder ``root`` (fsspec URL or path) that holds one folder per data set, and the local folder ``cache``."""

    root: str
    cache: str

    def read(self, candidates: Sequence[str]) -> tuple[bytes, str]:
        """The first of ``candidates`` (paths below the root) that exists: its bytes and its full name.

        Raises DataError if none exists, the root cannot be reached or read, or the cache cannot be written.
        """
        try:
            system, base = url_to_fs(self.root)
        except (ValueError, ImportError) as error:
            raise DataError(f"data.root = {self.root!r}: {error}") from error
        for candidate in candidates:
            path = f"{base.rstrip('/')}/{candidate}"
            name = system.unstrip_protocol(path)
            try:
                if isinstance(system, LocalFileSystem):
                    return Path(path).read_bytes(), name
                return self._cached(system, path, name), name
            except FileNotFoundError:
                continue
            except OSError as error:
                raise DataError(f"{name}: {type(error).__name__}: {error}") from error
        raise DataError(f"data.root = {self.root!r}: expected a file {' or '.join(candidates)} below it, found none")

    def _cached(self, system: Any, path: str, name: str) -> bytes:
        """The file's bytes, downloaded at most once per state. Raises FileNotFoundError if it is not there."""
        size = system.info(path)["size"]
        # fsspec's token of the file's state (size and ETag or time) makes a replaced file a new entry.
        entry = hashlib.sha256(f"{name} {system.ukey(path)}".encode()).hexdigest()[:32]
        folder = Path(self.cache).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for cached in folder.glob(f"{entry}.*"):
            data = cached.read_bytes()
            if cached.name == f"{entry}.{hashlib.sha256(data).hexdigest()}":
                return data
        data = bytes(system.cat_file(path))
        if size is not None and size != len(data):
            raise DataError(f"{name}: expected {size} bytes, the download gave {len(data)}")
        with TemporaryDirectory(dir=folder, prefix="download-") as temporary:
            whole = Path(temporary, "file")
            whole.write_bytes(data)
            whole.replace(folder / f"{entry}.{hashlib.sha256(data).hexdigest()}")
        return data
