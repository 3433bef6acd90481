"""MATLAB 5 files (level 5 MAT), as far as numeric arrays go.

Owns: that format. Every length is checked before it is used, so damaged bytes end in a ``DataError`` with a byte
offset; ``scipy.io.loadmat`` (1.17) ends some of them in a segmentation fault, which would take a worker down.
Format: MathWorks, "MAT-File Format" (R2023a), chapter 1.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_COMPLEX = 0x0800
# Storage types of data elements (table 1-1) and array classes (table 1-3), as NumPy types without byte order.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {
    6: "f8",
    7: "f4",
    8: "i1",
    9: "u1",
    10: "i2",
    11: "u2",
    12: "i4",
    13: "u4",
    14: "i8",
    15: "u8",
}


def _elements(data: memoryview, order: str, base: int, file: str) -> Iterator[tuple[int, memoryview, int]]:
    """The data elements of a buffer: storage type, payload, and the payload's byte offset (``base`` added)."""
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise DataError(f"{file}: truncated tag at byte {base + at}: expected 8 bytes, found {len(data) - at}")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # small element: type and size in four bytes, up to four bytes of data after them
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            if size > 4:
                raise DataError(f"{file}: small element at byte {base + at}: expected at most 4 bytes, found {size}")
            at += 8
        else:
            at = start + size
            if kind != _COMPRESSED:
                at += -size % 8
        if len(data) - start < size:
            raise DataError(
                f"{file}: truncated element at byte {base + start}: expected {size} bytes, found {len(data) - start}"
            )
        yield kind, data[start : start + size], base + start


def _inflate(data: memoryview, offset: int, file: str) -> memoryview:
    stream = zlib.decompressobj()
    try:
        inflated = stream.decompress(data)
    except zlib.error as error:
        raise DataError(f"{file}: damaged compressed element at byte {offset}: {error}") from error
    if not stream.eof:
        raise DataError(f"{file}: truncated compressed element at byte {offset}")
    return memoryview(inflated)


def _matrix(data: memoryview, order: str, offset: int, file: str) -> tuple[str, NDArray[Any]] | None:
    """Name and array of a matrix element; None if it is not a real numeric array."""
    parts = list(_elements(data, order, offset, file))
    sizes = [len(payload) for _, payload, _ in parts[:3]]
    if len(parts) < 3 or sizes[0] != 8 or sizes[1] % 4 or sizes[1] == 0:
        raise DataError(f"{file}: matrix at byte {offset}: expected flags, dimensions and a name")
    (flags,) = struct.unpack_from(f"{order}I", parts[0][1])
    shape = struct.unpack(f"{order}{sizes[1] // 4}i", parts[1][1])
    name = bytes(parts[2][1]).decode("latin-1")
    dtype = _CLASSES.get(flags & 0xFF)
    if dtype is None or flags & _COMPLEX:
        return None
    if len(parts) != 4 or parts[3][0] not in _TYPES:
        raise DataError(f"{file}: matrix {name!r} at byte {offset}: expected one block of numbers")
    stored, values, start = parts[3]
    source = np.dtype(order + _TYPES[stored])
    expected = math.prod(shape) * source.itemsize
    if min(shape) < 0 or len(values) != expected:
        raise DataError(
            f"{file}: matrix {name!r} at byte {start}: expected {expected} bytes for shape {shape}, found {len(values)}"
        )
    with np.errstate(invalid="ignore"):  # MATLAB stores a class in a narrower type, never in a wider one
        array = np.frombuffer(values, source).astype(dtype)
    try:
        return name, array.reshape(shape, order="F")
    except ValueError as error:  # more dimensions, or larger ones beside an empty one, than NumPy has
        raise DataError(f"{file}: matrix {name!r} at byte {offset}: {error}") from error


def read_matlab(data: bytes, file: str) -> dict[str, NDArray[Any]]:
    """The real numeric arrays of a MATLAB 5 file, compressed or not, by name; everything else in it is left out."""
    if len(data) < _HEADER or data[126:128] not in (b"IM", b"MI"):
        raise DataError(
            f"{file}: not a MATLAB 5 file: expected a {_HEADER}-byte header with IM or MI at byte 126, "
            f"found {data[126:128]!r} in {len(data)} bytes"
        )
    order = "<" if data[126:128] == b"IM" else ">"
    arrays = {}
    for kind, payload, offset in _elements(memoryview(data)[_HEADER:], order, _HEADER, file):
        if kind == _COMPRESSED:
            inner = list(_elements(_inflate(payload, offset, file), order, 0, f"{file} (inflated at byte {offset})"))
        else:
            inner = [(kind, payload, offset)]
        for element, content, at in inner:
            if element != _MATRIX:
                raise DataError(
                    f"{file}: element at byte {at}: expected a matrix (type {_MATRIX}), found type {element}"
                )
            named = _matrix(content, order, at, file)
            if named:
                arrays[named[0]] = named[1]
    return arrays
