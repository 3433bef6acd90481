"""The published file formats of image data sets, from bytes to arrays.

Owns: IDX (MNIST and its kin), CIFAR's binary format, SVHN's MATLAB arrays, and the check of every byte count, shape
and type. Must never open files or the network (that is files.py), nor unpickle anything.

Images come out as uint8 (n, channels, height, width), labels as int64 (n,). Whatever is wrong with the bytes is a
``DataError`` that names the file. Any number of examples is accepted, so subsets in the published format work.
"""

from __future__ import annotations

import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.data.matlab import read_matlab
from tasks.data.sources import Chunk, Images, Labels, check_count, check_labels
from tasks.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UBYTE = 0x08  # the third byte of an IDX magic number; the fourth counts the dimensions


def read_gzip(data: bytes, file: str) -> bytes:
    """The content of ``data``, unpacked if it is gzip."""
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: gzip stream is truncated or damaged after {len(data)} bytes ({error})") from error


def read_tar(data: bytes, members: Sequence[str], file: str) -> list[bytes]:
    """The bytes of these regular files inside a .tar.gz."""
    found = {}
    unpacked = read_gzip(data, file)  # to its end, so that gzip's checksum is compared
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for entry in archive:
                stream = archive.extractfile(entry) if entry.isfile() and entry.name in members else None
                if stream is not None:
                    found[entry.name] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{file}: archive is truncated or damaged, {len(unpacked)} bytes unpacked ({error})") from error
    missing = [member for member in members if member not in found]
    if missing:
        raise DataError(f"{file}: expected {', '.join(members)} in the archive, did not find {', '.join(missing)}")
    return [found[member] for member in members]


def _idx(data: bytes, dimensions: int, file: str) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes with this many dimensions."""
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"{file}: truncated header: expected {header} bytes, found {len(data)}")
    if data[:4] != bytes((0, 0, _IDX_UBYTE, dimensions)):
        raise DataError(
            f"{file}: wrong magic number at byte 0: expected 0x{_IDX_UBYTE << 8 | dimensions:08x} "
            f"(unsigned bytes, {dimensions} dimensions), found 0x{data[:4].hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, offset=4))
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise DataError(f"{file}: expected {expected} bytes for shape {shape}, found {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_idx_images(data: bytes, side: int, file: str) -> Images:
    """Grey images (n, 1, side, side) of an IDX file (magic 0x00000803), gzip or plain."""
    images = _idx(read_gzip(data, file), 3, file)
    if images.shape[1:] != (side, side):
        raise DataError(f"{file}: expected images of {side} x {side} pixels (bytes 8 to 15), found {images.shape[1:]}")
    return images[:, None]


def read_idx_labels(data: bytes, classes: int, file: str) -> Labels:
    """Labels (n,) of an IDX file (magic 0x00000801), gzip or plain."""
    return check_labels(_idx(read_gzip(data, file), 1, file), classes, file, offset=8)


def read_cifar(data: bytes, label_bytes: int, classes: int, file: str) -> Chunk:
    """CIFAR's binary format: records of ``label_bytes`` labels (the last one counts) and 3 x 32 x 32 pixels."""
    record = label_bytes + 3 * 32 * 32
    if not data or len(data) % record:
        raise DataError(
            f"{file}: expected whole records of {record} bytes, found {len(data)} bytes: "
            f"record {len(data) // record} ends early (starts at byte {len(data) // record * record})"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels = check_labels(records[:, label_bytes - 1], classes, file, offset=label_bytes - 1, stride=record)
    return Chunk(records[:, label_bytes:].reshape(-1, 3, 32, 32), labels)


def read_svhn(data: bytes, file: str) -> Chunk:
    """SVHN's cropped digits: MATLAB v5 with X uint8 (32, 32, 3, n) and y (n, 1) in 1 to 10, where 10 is the digit 0."""
    content = read_matlab(data, file)
    for name in ("X", "y"):
        if name not in content:
            raise DataError(f"{file}: expected a numeric array {name}, found only {', '.join(content) or 'none'}")
    images, labels = content["X"], content["y"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise DataError(f"{file}: expected X as uint8 (32, 32, 3, n), found {images.dtype} {images.shape}")
    if labels.shape != (images.shape[3], 1):
        raise DataError(f"{file}: expected y as ({images.shape[3]}, 1), one label an image, found {labels.shape}")
    digits = labels[:, 0]
    bad = np.flatnonzero(~np.isin(digits, np.arange(1, 11)))
    if bad.size:
        raise DataError(f"{file}: label {digits[bad[0]]} of example {bad[0]} out of range: expected 1 to 10")
    return check_count(np.ascontiguousarray(images.transpose(3, 2, 0, 1)), digits.astype(np.int64) % 10, file)
