"""Downloads that can be cut off at any point, from http(s) and from any other fsspec URL.

Owns: how a transfer goes on where it ended, what makes it begin again, which failures are tried again, and the check of
size and checksum. Must never put a file where readers look for it (inventory.py does, when it is whole).

What has arrived lies in a ``.part`` file; ``.part.json`` beside it says of which state of which URL it is a part (ETag,
or else the time of the last change, and the size). A transfer goes on only if the server confirms that state: with
``If-Range`` and the same ETag in its answer (RFC 9110, sections 13.1.5 and 14.2). Without such a mark, or without
support for ranges, it begins again.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from fsspec.core import url_to_fs
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

from tasks.errors import DataError

TRIES = 5
FIRST_WAIT = 1.0
"""Seconds before the second try; doubled for each further one, up to 30."""

Report = Callable[[int, int | None], None]
"""Told how many bytes are there, and of how many if that is known."""

_CHUNK = 1 << 20
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


class InterruptedTransferError(Exception):
    """A transfer ended early for a reason that may pass."""


@dataclass(frozen=True)
class _State:
    """Which state of which URL a part belongs to, and the size and SHA-256 that the server states for the whole.

    ``mark`` changes when the content does; None if nothing says so.
    """

    url: str
    mark: str | None
    total: int | None
    sha256: str | None = None


class _Part:
    """The bytes that have arrived, in order, of a file that is being fetched; nobody else may write them meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note = path.with_name(f"{path.name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path}: another process is fetching it") from None

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def state(self, url: str) -> _State | None:
        """The state that what is there belongs to, None if there is nothing of use."""
        try:
            found = _State(**json.loads(self.note.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.url == url and self.size > 0 else None

    def begin(self, state: _State) -> None:
        """Throw away what is there; what follows belongs to ``state``."""
        self._file.truncate(0)
        written = self.note.with_name(f"{self.note.name}.new")
        written.write_text(json.dumps(asdict(state)))
        written.replace(self.note)

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def discard(self) -> None:
        """Throw everything away."""
        self._file.truncate(0)
        self.note.unlink(missing_ok=True)

    def close(self) -> None:
        if self.size == 0:
            self.path.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)
        os.fsync(self._file.fileno())
        self._file.close()


def download(url: str, path: Path, size: int | None, sha256: str | None, report: Report) -> str:
    """Bring the file at ``url`` to ``path``, going on with what is there; returns its SHA-256 in hex.

    When it returns, ``path`` is whole: of ``size`` bytes and with the checksum ``sha256`` as far as these are given.
    Raises DataError if it cannot be had, is not what was expected, or broke off TRIES times; what had arrived by then
    stays, except after a wrong checksum.
    """
    transfer = _over_http if url.startswith(("http://", "https://")) else _over_fsspec
    part = _Part(path)
    retrying = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(multiplier=FIRST_WAIT, max=30) + wait_random(0, FIRST_WAIT),
        retry=retry_if_exception_type(InterruptedTransferError),
        reraise=True,
    )
    try:
        retrying(transfer, url, part, size, report)
        state = part.state(url)
        return _checked(url, part, size, sha256 or (state.sha256 if state else None))
    except InterruptedTransferError as error:
        kept = f"{part.size} bytes are kept in {path}, run the command again to go on"
        raise DataError(f"{url}: {error}; tried {TRIES} times, {kept}") from error
    finally:
        part.close()


def finish(path: Path) -> None:
    """Forget what was noted of the part at ``path``, which has been moved into place."""
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(url: str, part: _Part, size: int | None, sha256: str | None) -> str:
    if size is not None and part.size != size:
        arrived = part.size
        part.discard()
        raise DataError(f"{url}: expected {size} bytes, found {arrived}; what was fetched is thrown away")
    found = file_sha256(part.path)
    if sha256 is not None and found != sha256:
        part.discard()
        raise DataError(f"{url}: expected SHA-256 {sha256}, found {found}; what was fetched is thrown away")
    return found


def _over_http(url: str, part: _Part, size: int | None, report: Report) -> None:
    """One try."""
    try:
        asyncio.run(_over_http_async(url, part, size, report))
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise InterruptedTransferError(f"{type(error).__name__}: {error}") from error


async def _over_http_async(url: str, part: _Part, size: int | None, report: Report) -> None:
    state = part.state(url)
    headers = {"Accept-Encoding": "identity"}
    if state is not None and state.mark is not None:
        if state.total == part.size:
            return
        headers |= {"Range": f"bytes={part.size}-", "If-Range": state.mark}
    async with (
        aiohttp.ClientSession(timeout=_TIMEOUT, trust_env=True, auto_decompress=False) as session,
        session.get(url, headers=headers) as response,
    ):
        total = _accept(response, url, part, state, size)
        report(part.size, total)
        async for chunk in response.content.iter_chunked(_CHUNK):
            part.write(chunk)
            report(part.size, total)
        _check_size(part, total)


def _accept(
    response: aiohttp.ClientResponse, url: str, part: _Part, state: _State | None, size: int | None
) -> int | None:
    """Prepare the part for what the server sends, which has this many bytes in all if the server says so."""
    if response.status in _PASSING:
        raise InterruptedTransferError(f"HTTP {response.status} {response.reason}")
    mark = _mark(response)
    if response.status == 206 and state is not None:
        first, total = _range(response)
        if first != part.size or mark not in (None, state.mark) or total != state.total:
            part.discard()
            raise InterruptedTransferError("the file has changed on the server, beginning again")
        return total
    if response.status == 416:
        part.discard()
        raise InterruptedTransferError("the server refuses to go on, beginning again")
    if response.status != 200:
        raise DataError(f"{url}: HTTP {response.status} {response.reason}")
    total = response.content_length
    _check_offered(url, total, size)
    part.begin(_State(url, mark, total, _stated_sha256(response)))
    return total


def _mark(response: aiohttp.ClientResponse) -> str | None:
    """A strong ETag, or the time of the last change: what ``If-Range`` may hold."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _range(response: aiohttp.ClientResponse) -> tuple[int | None, int | None]:
    """The first byte that is sent, and the size of the whole."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(found[1]), int(found[2])) if found else (None, None)


def _stated_sha256(response: aiohttp.ClientResponse) -> str | None:
    """Hugging Face's hub states the SHA-256 of a large file when it sends the client on to where the file lies."""
    for answer in (*response.history, response):
        found = re.fullmatch(r'"([0-9a-f]{64})"', answer.headers.get("X-Linked-ETag", ""))
        if found:
            return found[1]
    return None


def _over_fsspec(url: str, part: _Part, size: int | None, report: Report) -> None:
    """One try from a filesystem, whose token of the file's state is the mark."""
    try:
        system, source = url_to_fs(url)
        info = system.info(source)
        now = _State(url, system.ukey(source), info["size"])
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url}: {type(error).__name__}: {error}") from error
    if part.state(url) != now:
        _check_offered(url, now.total, size)
        part.begin(now)
    report(part.size, now.total)
    try:
        with system.open(source, "rb") as file:
            file.seek(part.size)
            while chunk := file.read(_CHUNK):
                part.write(chunk)
                report(part.size, now.total)
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise InterruptedTransferError(f"{type(error).__name__}: {error}") from error
    _check_size(part, now.total)


def _check_offered(url: str, total: int | None, size: int | None) -> None:
    if size is not None and total is not None and total != size:
        raise DataError(f"{url}: expected {size} bytes, the server has {total}")


def _check_size(part: _Part, total: int | None) -> None:
    if total is None or part.size == total:
        return
    found = part.size
    if found > total:
        part.discard()
    raise InterruptedTransferError(f"the connection ended after {found} of {total} bytes")
