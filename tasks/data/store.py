"""The cache of what is derived from data sets: vocabularies, and corpora as token ids. On any fsspec URL.

Owns: the names of its entries and the check of their content. Must never know what an entry means.

An entry's file is called ``<key>.<SHA-256 of its content>``: it appears under that name only when whole, and is checked
at every opening, so that a damaged one is made again and never taken for whole. What depends on other data has their
digest in its key, so nothing here is ever out of date.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]


def digest(*parts: str) -> str:
    """32 hex digits that identify the texts ``parts``: the start of a SHA-256."""
    joined = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Cache:
    """The folder ``url``, which is made when something is put into it. Its methods raise OSError."""

    url: str

    def get(self, key: str) -> Bytes | None:
        """The content (n,) of an entry, or None if there is none that is whole.

        From a local disk it is a map of the file, which all processes share; from elsewhere it is in memory.
        """
        system, folder = self._place()
        try:
            paths = system.ls(folder, detail=False)
        except FileNotFoundError:
            return None
        for path in paths:
            if not path.startswith(f"{folder}/{key}."):
                continue
            if not isinstance(system, LocalFileSystem):
                content = np.frombuffer(bytearray(system.cat_file(path)), np.uint8)
            elif Path(path).stat().st_size:
                content = np.memmap(path, np.uint8, "c")  # writable for torch's sake; the file is never written
            else:
                content = np.empty(0, np.uint8)
            if path.endswith(f".{hashlib.sha256(content.data).hexdigest()}"):
                return content
        return None

    def kept(self, key: str, chunks: Callable[[], Iterable[bytes]]) -> Bytes:
        """The content (n,) of an entry, which is made of ``chunks()`` if it is not there.

        Where nothing can be kept it is made in memory, with a warning.
        """
        try:
            content = self.get(key)
            if content is None:
                self.put(key, chunks())
                content = self.get(key)
        except OSError as error:
            logger.warning("cache %s: %s: %s; going on without it", self.url, type(error).__name__, error)
            content = None
        return np.frombuffer(bytearray().join(chunks()), np.uint8) if content is None else content

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        """Write an entry, chunk by chunk. Of processes that do so at once each writes its own, and they are equal."""
        system, folder = self._place()
        local = isinstance(system, LocalFileSystem)
        system.makedirs(folder, exist_ok=True)
        content = hashlib.sha256()
        written = Path(folder if local else gettempdir(), f"writing-{secrets.token_hex(8)}")
        try:
            with written.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    content.update(chunk)
            target = f"{folder}/{key}.{content.hexdigest()}"
            if local:
                written.replace(target)
            else:
                system.put_file(str(written), target)
        finally:
            written.unlink(missing_ok=True)

    def _place(self) -> tuple[Any, str]:
        local = "://" not in self.url
        system, folder = url_to_fs(str(Path(self.url).expanduser()) if local else self.url)
        return system, folder.rstrip("/")
