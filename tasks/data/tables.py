"""Image sets in parquet files, as the Hugging Face hub has them: ``parquet:PATH``.

Owns: which columns are the image and the label, and their forms. Must never resize.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tasks.data.files import DataRoot, File
from tasks.data.folders import decode
from tasks.data.sources import Chunk, Images, Source, check_labels
from tasks.data.store import digest
from tasks.errors import DataError

_IMAGES = ("image", "img", "images")
_LABELS = ("label", "labels", "fine_label")
_ROWS = 256  # read at a time


def open_parquet(pattern: str, root: DataRoot) -> Source:
    """``parquet:PATTERN``: the files that the pattern matches, such as ``PATH/*.parquet``, in the order of their names.

    Where names begin with ``test``, these files are the test part and those that begin with ``train`` the training
    part; else a fifth of all rows is kept for testing. The column ``image`` (``img``, ``images``) holds encoded images,
    as bytes or {bytes, path}, or pixels as lists of 0 to 255: flat (square, 1 or 3 channels, channels last), (h, w) or
    (h, w, channels). The column ``label`` (``labels``, ``fine_label``) holds whole numbers from 0.
    """
    files = root.matching(pattern)
    training, test = ([file for file in files if _begins(file, part)] for part in ("train", "test"))
    if test and not training:
        raise DataError(f"{test[0].name}: expected files that begin with train beside it, found none")
    used = (*training, *test) if test else files
    return Source(
        partial(_chunks, training if test else files),
        partial(_chunks, test) if test else None,
        in_class_order=True,
        state=digest(str(len(training)), *(file.state for file in used)),
    )


def _begins(file: File, part: str) -> bool:
    return file.path.rpartition("/")[2].startswith(part)


def _chunks(files: Sequence[File]) -> Iterator[Chunk]:
    for file in files:
        with file.open() as stream:
            try:
                yield from _rows(parquet.ParquetFile(stream), file.name)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file.name}: truncated or damaged: {type(error).__name__}: {error}") from error


def _rows(table: Any, file: str) -> Iterator[Chunk]:
    columns = table.schema_arrow.names
    image, label = (next((name for name in names if name in columns), None) for names in (_IMAGES, _LABELS))
    if image is None or label is None:
        raise DataError(f"{file}: expected columns image and label, found {', '.join(columns) or 'none'}")
    kind = table.schema_arrow.field(label).type
    if not pa.types.is_integer(kind):
        raise DataError(f"{file}: column {label}: expected whole numbers, found {kind}")
    at = 0
    for batch in table.iter_batches(_ROWS, columns=[image, label]):
        for value, number in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True):
            place = f"{file}: row {at} of {image}"
            if number is None:
                raise DataError(f"{file}: row {at} of {label}: expected a whole number, found none")
            labels = check_labels(np.array([number]), None, f"{file}: row {at} of {label}")
            yield Chunk(_image(value, place), labels)
            at += 1
    if at == 0:
        raise DataError(f"{file}: expected rows, found none")


def _image(value: object, place: str) -> Images:
    """(1, channels, h, w) of a cell."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return decode(value, place)
    if not isinstance(value, list):
        raise DataError(f"{place}: expected encoded bytes or lists of pixels, found {type(value).__name__}")
    try:
        pixels = np.array(value)
    except ValueError as error:
        raise DataError(f"{place}: expected rows of one length: {error}") from error
    if pixels.dtype.kind not in "iu" or not pixels.size or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(f"{place}: expected whole numbers from 0 to 255, found {pixels.dtype} {pixels.shape}")
    if pixels.ndim == 1:
        channels = 1 if math.isqrt(len(pixels)) ** 2 == len(pixels) else 3
        side = math.isqrt(len(pixels) // channels)
        if side * side * channels != len(pixels):
            raise DataError(f"{place}: expected side^2 or 3 side^2 pixels, found {len(pixels)}")
        pixels = pixels.reshape(side, side, channels)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise DataError(f"{place}: expected pixels (h, w) or (h, w, 1 or 3), found {pixels.shape}")
    return pixels.astype(np.uint8).transpose(2, 0, 1)[None]
