"""What every reader of images gives: chunks of uint8 pixels with their labels, part by part.

Owns: those types and the check of labels. Must never open files or resize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Chunk(NamedTuple):
    """Consecutive examples of one size: images (n, 1 or 3, height, width), labels (n,) from 0."""

    images: Images
    labels: Labels


Chunks = Callable[[], Iterator[Chunk]]


@dataclass(frozen=True)
class Source:
    """A data set whose files were found and not yet read.

    ``test`` is None where there is no test part of its own. ``in_class_order``: the training examples are not mixed, so
    that a contiguous split would not have all classes. ``state`` is a digest of the files as they are now, for a set
    that takes so long to read that its pixels are worth keeping; None for one that does not.
    """

    training: Chunks
    test: Chunks | None
    in_class_order: bool = False
    state: str | None = None


def check_labels(
    labels: NDArray[np.integer],
    classes: int | None,
    file: str,
    offset: int | None = None,
    stride: int = 1,
    first: int = 0,
) -> Labels:
    """``labels``, of which ``first`` is the least, as int64 from 0; below ``classes`` if that is known.

    A bad one is named by its example, and by its byte ``offset + stride * index`` if ``offset`` is given.
    """
    bad = labels < first if classes is None else (labels < first) | (labels >= first + classes)
    if bad.any():
        at = int(bad.argmax())
        place = f"example {at}" if offset is None else f"example {at} (byte {offset + stride * at})"
        expected = f"at least {first}" if classes is None else f"{first} to {first + classes - 1}"
        raise DataError(f"{file}: label {labels[at]} of {place} out of range: expected {expected}")
    return labels.astype(np.int64) - first


def check_count(images: Images, labels: Labels, file: str) -> Chunk:
    """A chunk with as many labels as images, and at least one."""
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(f"{file}: expected one label for each of its images, found {len(images)} and {len(labels)}")
    return Chunk(images, labels)
