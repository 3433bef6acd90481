"""What of the data sets in the table is in place below ``data.root``: putting it there, and checking it.

Owns: where a download goes, the record of checksums, unpacking, and what ``verify`` says of each file. Must never
decide how a transfer goes on (fetch.py), or read what is inside a file (the loaders do).

Every set's folder holds ``SHA256SUMS``, which ``sha256sum -c`` reads: the checksums of what was fetched, or verified
first. For a file that nobody publishes a checksum of, that is what later ones are compared with.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from configs.schema import DataConfig
from tasks.base import Datasets
from tasks.data.catalogue import Entry, RemoteFile
from tasks.data.fetch import Report, download, finish
from tasks.data.files import DataRoot, File, reaching
from tasks.data.loading import load_pixels
from tasks.data.published import open_source
from tasks.data.store import digest
from tasks.data.text import tokenized
from tasks.data.vocabulary import MAX_TRAINING_BYTES, SentencePiece
from tasks.errors import DataError

SUMS = "SHA256SUMS"
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Fetched:
    """A file in its place. ``transferred`` are the bytes that came over the network now; 0 if it was there."""

    path: str
    name: str
    size: int
    sha256: str | None
    transferred: int


@dataclass(frozen=True)
class Finding:
    """What ``verify`` says of a file, or of a whole set."""

    subject: str
    ok: bool
    message: str


def fetch(
    entry: Entry, files: DataRoot, source: str | None, only: str, report: Callable[[RemoteFile], Report]
) -> Iterator[Fetched]:
    """Bring the files of a data set whose names match ``only`` below the root, one after the other.

    ``source`` is a folder or URL that holds them under the same paths, in place of where they are published. A file
    that is there with its size is left alone. Raises DataError if the set's terms do not allow it, there is no root,
    and whatever ``download`` raises.
    """
    if entry.by_hand and source is None:
        raise DataError(
            f"{entry.name}: {entry.licence}. No command can accept that for you: {entry.by_hand} "
            f"({entry.homepage}), put them into {files.config.root or 'data.root'}/{entry.name}/, and run "
            f"`paceline data verify {entry.name}`"
        )
    if files.config.root is None:
        raise DataError(f"data.root = None: expected the folder or URL to put {entry.name} into (task.data.root=...)")
    chosen = [file for file in entry.files if fnmatch(file.path.rpartition("/")[2], only)]
    if not chosen:
        names = ", ".join(file.path.rpartition("/")[2] for file in entry.files[:3])
        raise DataError(f"{entry.name}: expected a pattern that matches some of {names}, ..., not {only!r}")
    for file in chosen:
        yield _fetch(file, files, source, report(file))


def _fetch(file: RemoteFile, files: DataRoot, source: str | None, report: Report) -> Fetched:
    recorded = _sums(file, files).get(_name(file))
    there = files.get(file.path)
    if there is not None and file.size in (None, there.size):
        return Fetched(file.path, there.name, there.size, file.sha256 or recorded, 0)
    system, target = files.resolve(file.path)
    url = file.url if source is None else f"{source.rstrip('/')}/{file.path}"
    part = Path(f"{target}.part") if _local(system) else _workplace(files) / f"{digest(url, target)}.part"
    count = _Count(report)
    with reaching(str(target)):
        sha256 = download(url, part, file.size, file.sha256 or recorded, count)
        size = part.stat().st_size
        if file.archive:
            _unpack(part, system, target)
        if _local(system):
            part.replace(target)
        else:
            system.put_file(str(part), target)
            part.unlink()
    finish(part)
    _record(file, sha256, files)
    return Fetched(file.path, str(system.unstrip_protocol(target)), size, sha256, count.transferred)


class _Count:
    """Passes a report on and adds up what came over the network, also where that was thrown away again."""

    def __init__(self, report: Report) -> None:
        self.transferred = 0
        self._report = report
        self._done: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        if self._done is not None and done > self._done:
            self.transferred += done - self._done
        self._done = done
        self._report(done, total)


def _unpack(archive: Path, system: Any, target: str) -> None:
    """Unpack a .tar.gz into the folder of its name beside ``target``, before itself is put there.

    So where the archive is in place, all that was in it is. Nothing is written outside of that folder.
    """
    name = target.rpartition("/")[2].removesuffix(".tar.gz")
    folder = f"{target.rpartition('/')[0]}/{name}"
    if _local(system) and system.exists(folder):
        return
    with TemporaryDirectory(dir=archive.parent, prefix="unpacking-") as temporary:
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{archive}: expected a .tar.gz, {type(error).__name__}: {error}") from error
        unpacked = Path(temporary, name)
        if not unpacked.is_dir():
            raise DataError(f"{archive}: expected the folder {name} in it, found {sorted(os.listdir(temporary))[:3]}")
        if _local(system):
            unpacked.replace(folder)
        else:
            system.put(f"{unpacked}/", f"{folder}/", recursive=True)


def verify(entry: Entry, files: DataRoot) -> Iterator[Finding]:
    """What is wrong, or right, with every file of a data set that is there, and then with the set as it is loaded."""
    missing = 0
    for file in entry.files:
        found = files.get(file.path)
        if found is None:
            missing += 1
        else:
            yield _verify(file, found, files)
    try:
        content = _READ[entry.kind](entry, files)
    except DataError as error:
        yield Finding(entry.name, False, str(error))
        return
    others = f" ({missing} of the {len(entry.files)} published files are not there, nor needed)" if missing else ""
    yield Finding(entry.name, True, f"{content}{others}")


def _verify(file: RemoteFile, found: File, files: DataRoot) -> Finding:
    if file.size not in (None, found.size):
        return Finding(found.name, False, f"expected {file.size} bytes, found {found.size}")
    recorded = _sums(file, files).get(_name(file))
    expected, actual = file.sha256 or recorded, _sha256(found)
    if expected is None:
        _record(file, actual, files)
        return Finding(found.name, True, f"{found.size:,} bytes; no checksum is published, {actual} recorded")
    if actual != expected:
        return Finding(found.name, False, f"expected SHA-256 {expected}, found {actual}")
    return Finding(found.name, True, f"{found.size:,} bytes, SHA-256 as {'published' if file.sha256 else 'recorded'}")


def _read_images(entry: Entry, files: DataRoot) -> str:
    if entry.embedded:
        return f"{len(load_pixels(entry.name, entry.side or 0, True, files))} images; embedded, needs nothing"
    source = open_source(entry.name, files)
    counts = [sum(len(chunk.labels) for chunk in part()) if part else 0 for part in (source.training, source.test)]
    return f"{counts[0]:,} training and {counts[1]:,} test images"


def _read_text(entry: Entry, files: DataRoot) -> str:
    splits = tokenized(entry.name, "bytes", files).splits
    found = "bytes: " + ", ".join(
        f"{len(tokens):,} {split}" for split, tokens in zip(Datasets.SPLITS, splits, strict=True)
    )
    if len(splits[0]) <= MAX_TRAINING_BYTES:  # else it takes long
        found += f"; as 32k: {tokenized(entry.name, '32k', files).size:,} ids"
    return f"{found}; embedded, needs nothing" if entry.embedded else found


def _read_vocabulary(entry: Entry, files: DataRoot) -> str:
    file = files.find([file.path for file in entry.files])
    return f"{SentencePiece(file.read(), file.name).size:,} ids"


_READ = {"image": _read_images, "text": _read_text, "vocabulary": _read_vocabulary}


def _sha256(file: File) -> str:
    content = hashlib.sha256()
    with reaching(file.name), file.open() as stream:
        while block := stream.read(_BLOCK):
            content.update(block)
    return content.hexdigest()


def _sums(file: RemoteFile, files: DataRoot) -> dict[str, str]:
    """The recorded checksums of the set that ``file`` belongs to, by file name."""
    record = files.get(_sums_path(file))
    lines = record.read().decode(errors="replace").splitlines() if record else []
    return {name: sha256 for sha256, space, name in (line.partition("  ") for line in lines) if space}


def _record(file: RemoteFile, sha256: str, files: DataRoot) -> None:
    sums = _sums(file, files) | {_name(file): sha256}
    text = "".join(f"{found}  {name}\n" for name, found in sorted(sums.items()))
    system, target = files.resolve(_sums_path(file))
    with reaching(str(target)):
        if _local(system):
            written = Path(f"{target}.new")
            written.write_text(text)
            written.replace(target)
        else:
            system.pipe_file(target, text.encode())


def _sums_path(file: RemoteFile) -> str:
    return f"{file.path.rpartition('/')[0]}/{SUMS}"


def _name(file: RemoteFile) -> str:
    return file.path.rpartition("/")[2]


def _local(system: Any) -> bool:
    return isinstance(system, LocalFileSystem)


def _workplace(files: DataRoot) -> Path:
    """A local folder for parts of what goes elsewhere."""
    cache = files.config.cache
    return Path(DataConfig().cache if "://" in cache else cache).expanduser() / "downloads"
