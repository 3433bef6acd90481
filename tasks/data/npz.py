"""NumPy's .npz files, without unpickling, and image sets in them.

Owns: the zip archive of .npy members, and ``npz:PATH``. Must never unpickle or evaluate: arrays of objects are refused.
Format: NumPy enhancement proposal 1.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tasks.data.files import DataRoot, File
from tasks.data.sources import Chunk, Images, Source, check_count, check_labels
from tasks.errors import DataError

_VERSIONS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
"""How an .npy file begins, and the bytes of the header's length after that."""
_LONGEST_HEADER = 1 << 16
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?(?:b1|[iu][1248]|f[248]|c8|c16|O))', 'fortran_order': (True|False), "
    rb"'shape': \((\d+, ?|(?:\d+, ?)*\d+|)\), ?\}\s*"
)
_BLOCK = 1 << 24  # bytes of an array read at a time
_PICKLE = b"\x80"  # how every pickle of protocol 2 and above begins
_IMAGES = ("image", "images", "x")
_LABELS = ("label", "labels", "y")


class Npz:
    """The arrays of an .npz file by name; ``file`` is what messages call it. Raises DataError for what is damaged."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self.file = file
        with damage(file):
            start = stream.read(4)
            stream.seek(0)
            if start[:1] == _PICKLE:
                raise DataError(
                    f"{file}: pickled data at byte 0, which is never loaded because it can run any code: expected .npz"
                )
            self._archive = zipfile.ZipFile(stream)
        self.names = [name.removesuffix(".npy") for name in self._archive.namelist()]

    def array(self, name: str) -> NDArray[Any]:
        """The whole array ``name``."""
        return np.concatenate(list(self.rows(name)))

    def rows(self, name: str) -> Iterator[NDArray[Any]]:
        """Consecutive rows of the array ``name``, some megabytes at a time; one empty array if it has none."""
        if name not in self.names:
            raise DataError(f"{self.file}: expected an array {name}, found {', '.join(self.names) or 'none'}")
        member = name if name in self._archive.namelist() else f"{name}.npy"
        place = f"{self.file}:{member}"
        at = self._archive.getinfo(member).header_offset
        with damage(f"{place} (a member at byte {at})"), self._archive.open(member) as stream:
            shape, dtype = _header(stream, place)
            size = dtype.itemsize * math.prod(shape[1:])
            block = max(1, _BLOCK // max(1, size))
            for start in range(0, max(1, shape[0]), block):
                count = min(block, shape[0] - start)
                data = stream.read(count * size)
                if len(data) != count * size:
                    raise DataError(
                        f"{place}: expected {count * size} bytes for rows {start} to {start + count} of shape {shape}, "
                        f"found {len(data)}"
                    )
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
            if stream.read(1):  # to its end, so that zip's checksum is compared
                raise DataError(f"{place}: expected its end after shape {shape}, found more bytes")


def _header(stream: Any, place: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the .npy array that begins here; read without NumPy, which evaluates it as Python."""
    magic = stream.read(8)
    if magic not in _VERSIONS:
        raise DataError(f"{place}: byte 0: expected the magic string of .npy 1.0 or 2.0, found {magic!r}")
    length = int.from_bytes(stream.read(_VERSIONS[magic]), "little")
    text = stream.read(min(length, _LONGEST_HEADER))
    match = _HEADER.fullmatch(text)
    if match is None:
        raise DataError(
            f"{place}: byte {8 + _VERSIONS[magic]}: expected the header of an array of numbers, found {text!r}"
        )
    kind, fortran, sizes = (group.decode() for group in match.groups())
    if kind.endswith("O"):
        raise DataError(f"{place}: an array of pickled objects, which are never loaded: expected numbers")
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    if not shape or (fortran == "True" and len(shape) > 1):
        raise DataError(f"{place}: shape {shape}, column order {fortran}: expected rows in C order")
    return shape, np.dtype(kind)


@contextmanager
def damage(place: str) -> Iterator[None]:
    """What zip, deflate, NumPy's header and the filesystem say of damaged bytes, as a DataError."""
    try:
        yield
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{place}: truncated or damaged: {type(error).__name__}: {error}") from error


def open_npz(path: str, root: DataRoot) -> Source:
    """``npz:PATH``: arrays ``image`` and ``label``, or the same with ``train_`` and ``test_`` before them.

    Their plurals and ``x``, ``y`` do as well. Images are uint8, (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w);
    labels are whole numbers from 0, (n,) or (n, 1). Without a test part, a fifth of the examples is kept for it.
    """
    file = root.find((path,))
    with file.open() as stream:
        names = Npz(stream, file.name).names
    training, test, whole = (_named(names, part) for part in ("train_", "test_", ""))
    if training and test:
        return Source(partial(_chunks, file, *training), partial(_chunks, file, *test), in_class_order=True)
    if whole:
        return Source(partial(_chunks, file, *whole), None, in_class_order=True)
    raise DataError(
        f"{file.name}: expected arrays image and label, or train_image, train_label, test_image and test_label, "
        f"found {', '.join(names) or 'none'}"
    )


def _named(names: list[str], prefix: str) -> tuple[str, str] | None:
    """The arrays of images and labels whose names begin with ``prefix``, if both are there."""
    found = [next((prefix + name for name in known if prefix + name in names), None) for known in (_IMAGES, _LABELS)]
    return (found[0], found[1]) if found[0] and found[1] else None


def _chunks(file: File, image: str, label: str) -> Iterator[Chunk]:
    with file.open() as stream:
        npz = Npz(stream, file.name)
        yield from labelled(npz, image, label, lambda rows: _channels_first(rows, f"{file.name}:{image}"))


def labelled(
    npz: Npz,
    image: str,
    label: str,
    layout: Callable[[NDArray[Any]], Images],
    classes: int | None = None,
    first: int = 0,
) -> Iterator[Chunk]:
    """The rows of the array ``image``, brought to (n, channels, h, w) by ``layout``, with those of ``label``.

    Raises DataError for labels that are not whole numbers from ``first`` (of ``classes``), and for unequal counts.
    """
    labels = npz.array(label)
    if labels.dtype.kind not in "iu" or labels.shape[1:] not in ((), (1,)):
        raise DataError(f"{npz.file}:{label}: expected whole numbers (n,), found {labels.dtype} {labels.shape}")
    checked = check_labels(labels.reshape(-1), classes, f"{npz.file}:{label}", first=first)
    at = 0
    for rows in npz.rows(image):
        images = layout(rows)
        yield check_count(images, checked[at : at + len(images)], f"{npz.file}:{image}")
        at += len(images)
    if at != len(checked):
        raise DataError(f"{npz.file}: expected one label for each image, found {len(checked)} and {at}")


def _channels_first(images: NDArray[Any], place: str) -> Images:
    """(n, channels, h, w) of any of the layouts."""
    if images.dtype == np.uint8 and images.ndim == 3:
        return images[:, None]
    if images.dtype == np.uint8 and images.ndim == 4:
        if images.shape[3] in (1, 3):
            return np.moveaxis(images, 3, 1)
        if images.shape[1] in (1, 3):
            return images
    raise DataError(
        f"{place}: expected uint8 images (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w), "
        f"found {images.dtype} {('n', *images.shape[1:])}"
    )
