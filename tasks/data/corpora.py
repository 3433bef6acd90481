"""Text corpora as they are published, from files to one stream of bytes.

Owns: which files make up a corpus, and the formats: LM1B's archive and shards, plain text, parquet. Must never keep
anything (store.py does), split a corpus, or know token ids beyond the one that ends a document.

A stream is UTF-8 with the byte 0xFE after every document; no byte of UTF-8 is 0xFE. What is wrong with a file is a
``DataError`` that names the file and, as far as it is known, the byte. Any number of shards is accepted.
"""

from __future__ import annotations

import codecs
import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from configs.checks import did_you_mean
from tasks.data.catalogue import CATALOGUE
from tasks.data.files import DataRoot, File, reaching
from tasks.data.store import digest
from tasks.errors import DataError

END = b"\xfe"
"""After every document."""

NAMES = tuple(name for name, entry in CATALOGUE.items() if entry.kind == "text")
OWN_TEXTS = ("text", "parquet")
"""The kinds of a user's own corpora, as in ``text:PATTERN``."""

_BLOCK = 1 << 24
_ROWS = 1024
_MAGIC = b"PAR1"
_LM1B_TRAINING = re.compile(r"(^|/)news\.en-\d{5}-of-\d{5}$")
_LM1B_HELD_OUT = re.compile(r"(^|/)news\.en\.heldout-\d{5}-of-\d{5}$")

Stream = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Corpus:
    """``identity`` changes with the files. ``held_out`` is None where the corpus has no test part of its own."""

    name: str
    identity: str
    training: Stream
    held_out: Stream | None = None
    embedded: bool = False


Reader = Callable[[File], Iterator[bytes]]


def open_corpus(name: str, files: DataRoot) -> Corpus:
    """The corpus ``name``: one of NAMES (its files in the folder of that name below ``data.root``), ``text:PATTERN``
    or ``parquet:PATTERN`` (below ``data.root``, absolute, or a URL; ``*`` and ``**/`` as in a shell).

    Nothing but names and sizes is read. Raises DataError for an unknown name and for files that are not there.
    """
    kind, colon, pattern = name.partition(":")
    if colon and kind in OWN_TEXTS:
        return _of_files(name, files.matching(pattern), _text if kind == "text" else _parquet)
    if name not in NAMES:
        own = ", ".join(f"{kind}:PATTERN" for kind in OWN_TEXTS)
        raise DataError(f"corpus = {name!r}: expected one of {', '.join(NAMES)}, {own}{did_you_mean(name, NAMES)}")
    if name == "pydoc":
        return _pydoc()
    if name == "lm1b":
        return _lm1b(files)
    if name == "wikipedia":
        return _of_files(name, files.matching("wikipedia/**/*.parquet"), _parquet)
    return _of_files(name, files.matching("shakespeare/input.txt"), _text)


def _pydoc() -> Corpus:
    from pydoc_data.topics import topics  # 0.5 MB that few processes need

    documents = b"".join(topics[topic].encode() + END for topic in sorted(topics))
    return Corpus("pydoc", digest("pydoc", documents.hex()), lambda: iter((documents,)), embedded=True)


def _lm1b(files: DataRoot) -> Corpus:
    """Its shards as text, or as parquet, or the archive that they are published in; whichever is there, in this order.

    Every line of a shard is a document. An archive is read in its own order.
    """
    found = files.matching("lm1b/**")
    training = [file for file in found if _LM1B_TRAINING.search(file.path)]
    if training:
        return _of_files("lm1b", training, _lines, [file for file in found if _LM1B_HELD_OUT.search(file.path)])
    tables = [file for file in found if file.path.endswith(".parquet")]
    if tables:
        tests = [file for file in tables if "test" in file.path.rpartition("lm1b/")[2]]
        return _of_files("lm1b", [file for file in tables if file not in tests], _parquet, tests)
    archives = [file for file in found if file.path.endswith(".tar.gz")][:1]
    if not archives:
        expected = "news.en-00001-of-00100 and its kin, *.parquet, or the published .tar.gz"
        raise DataError(f"lm1b: expected {expected}, found {found[0].name}")
    return _of_files("lm1b", archives, partial(_archive, _LM1B_TRAINING), archives, partial(_archive, _LM1B_HELD_OUT))


def _of_files(
    name: str,
    training: Sequence[File],
    read: Reader,
    held_out: Sequence[File] = (),
    read_held_out: Reader | None = None,
) -> Corpus:
    if not training:
        raise DataError(f"corpus {name}: expected files of its training part beside {held_out[0].name}, found none")
    states = [file.state for file in (*training, *held_out)]
    return Corpus(
        name,
        digest(name, str(len(training)), *states),
        partial(_read_each, read, training),
        partial(_read_each, read_held_out or read, held_out) if held_out else None,
    )


def _read_each(read: Reader, files: Sequence[File]) -> Iterator[bytes]:
    for file in files:
        with reaching(file.name):
            yield from read(file)


def _text(file: File) -> Iterator[bytes]:
    """The whole file as one document."""
    with file.open() as stream:
        yield from _checked(stream, file.name)
    yield END


def _lines(file: File) -> Iterator[bytes]:
    """Every line that is not blank as a document, without the blanks around it."""
    with file.open() as stream:
        yield from _split(_checked(stream, file.name))


def _archive(wanted: re.Pattern[str], file: File) -> Iterator[bytes]:
    """Every line of those members of a .tar.gz that are called so, in the archive's order."""
    found = False
    with file.open() as packed:
        try:
            with gzip.open(packed) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() and wanted.search(member.name) else None
                    if content is not None:
                        found = True
                        yield from _split(_checked(content, f"{file.name}:{member.name}"))
                while unpacked.read(_BLOCK):  # to its end, so that gzip's checksum is compared
                    pass
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            at = f"near byte {packed.tell()} of {file.size}"
            raise DataError(f"{file.name}: archive is truncated or damaged {at} ({error})") from error
    if not found:
        raise DataError(f"{file.name}: expected members called {wanted.pattern}, found none")


def _checked(stream: Any, name: str) -> Iterator[bytes]:
    """The stream in blocks. Raises DataError, with the byte, at the first that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    while True:
        block = stream.read(_BLOCK)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            at = position - pending + error.start
            raise DataError(
                f"{name}: expected UTF-8, found byte {error.object[error.start]:#04x} at byte {at}"
            ) from error
        if not block:
            return
        position += len(block)
        yield block


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield b"".join(text + END for line in lines if (text := line.strip()))
    if text := rest.strip():
        yield text + END


def _parquet(file: File) -> Iterator[bytes]:
    """Every row's ``text`` as a document."""
    with file.open() as stream:
        _check_magic(stream, file)
        try:
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{file.name}: expected a column text, found {', '.join(names) or 'none'}")
            kind = table.schema_arrow.field("text").type
            if kind not in (pa.string(), pa.large_string()):
                raise DataError(f"{file.name}: expected strings in the column text, found {kind}")
            row = 0
            for batch in table.iter_batches(_ROWS, columns=["text"]):
                documents = batch.column(0).cast(pa.large_binary()).to_pylist()
                _check_documents(documents, row, file)
                row += len(documents)
                yield b"".join(document + END for document in documents if document)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.name}: parquet is truncated or damaged, {file.size} bytes ({error})") from error


def _check_magic(stream: Any, file: File) -> None:
    size = file.size
    for at in (0, size - len(_MAGIC)):
        stream.seek(max(at, 0))
        if (found := stream.read(len(_MAGIC))) != _MAGIC:
            raise DataError(
                f"{file.name}: not a whole parquet file of {size} bytes: expected {_MAGIC!r} at byte {max(at, 0)}, "
                f"found {found!r}"
            )
    stream.seek(0)


def _check_documents(documents: Sequence[bytes | None], first: int, file: File) -> None:
    for index, document in enumerate(documents):
        try:
            (document or b"").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.name}: expected UTF-8 in the column text, found byte {error.object[error.start]:#04x} at byte "
                f"{error.start} of row {first + index}"
            ) from error
