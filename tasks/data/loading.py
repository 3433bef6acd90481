"""From the files of an image set to its pixels at one size, in memory.

Owns: which side a set is stored at, what of it is kept in the cache, and the order of its examples.
Must never know a file format or sample.

What takes long to read (because it is decoded, or has gigabytes) is kept in the cache as one entry: all pixels, the
labels as 8-byte integers, and a footer of three such: examples, of them for training, and side; all little-endian.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from tasks.data.catalogue import CATALOGUE
from tasks.data.files import DataRoot
from tasks.data.images import Pixels
from tasks.data.published import open_source
from tasks.data.resize import convert, resize
from tasks.data.sources import Images, Labels, Source
from tasks.data.store import digest
from tasks.errors import DataError

logger = logging.getLogger(__name__)

_FOOTER = 3 * 8
_VERSION = "1"  # to be changed with whatever changes the pixels
_DIGITS_TRAINING = 1437

Stored = tuple[Images, Labels, int]
"""Images (n, channels, side, side), labels (n,), and how many of them are for training."""


def load_pixels(dataset: str, size: int, grey: bool, root: DataRoot) -> Pixels:
    """The image set ``dataset`` for batches at ``size``, grey or in three channels.

    Raises DataError for an unknown name, and for files that are missing, unreachable, truncated or malformed.
    """
    if dataset == "digits":
        return _digits(size)
    source, side = open_source(dataset, root), stored_side(dataset, size)
    images, labels, training = _read(source, side, grey) if source.state is None else _kept(source, side, grey, root)
    order = np.arange(len(labels))
    if source.in_class_order:
        # RandomState's streams are frozen by NumPy's compatibility policy, so this order never changes.
        order[:training] = np.random.RandomState(0).permutation(training)
    if source.test is None:
        training = training * 8 // 10
    if training < 10 or training == len(labels):
        found = f"{training} for training and {len(labels) - training} for testing"
        raise DataError(f"{dataset}: expected at least 10 training examples to split, and test examples, found {found}")
    return Pixels(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(order), training)


def stored_side(dataset: str, size: int) -> int:
    """The side to store a set at: ``size``, but ImageNet's million images are not enlarged."""
    side = CATALOGUE[dataset].side if dataset.startswith("imagenet") else None
    return size if side is None else min(size, side)


def _digits(size: int) -> Pixels:
    """scikit-learn's images, in a fixed random order."""
    from sklearn.datasets import load_digits  # a second to import, which most processes need not spend

    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images = resize(torch.from_numpy(bunch.images[order].astype(np.float32) / 16)[:, None], size).clamp_(0, 1)
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    return Pixels(images, labels, torch.arange(len(labels)), _DIGITS_TRAINING)


def _chunks(source: Source, side: int, grey: bool, labels: list[list[Labels]]) -> Iterator[Images]:
    """The converted pixels of both parts, chunk by chunk; their labels are put into ``labels``, one list for each."""
    for part in (source.training, source.test):
        labels.append([])
        for images, some in part() if part else ():
            labels[-1].append(some)
            yield convert(images, side, grey)


def _read(source: Source, side: int, grey: bool) -> Stored:
    labels: list[list[Labels]] = []
    images = np.concatenate(list(_chunks(source, side, grey, labels)))
    return images, np.concatenate(labels[0] + labels[1]), sum(map(len, labels[0]))


def _kept(source: Source, side: int, grey: bool, root: DataRoot) -> Stored:
    """The stored form from the cache, put there if it is not."""
    key = f"images-{digest(_VERSION, str(source.state), str(side), str(grey))}"
    content = root.cache.kept(key, lambda: _packed(source, side, grey, root))
    n, training, _ = np.frombuffer(content[-_FOOTER:].tobytes(), "<i8")
    start = len(content) - _FOOTER - 8 * n
    labels = np.frombuffer(content[start:-_FOOTER].tobytes(), "<i8").astype(np.int64)
    return content[:start].reshape(n, -1, side, side), labels, int(training)


def _packed(source: Source, side: int, grey: bool, root: DataRoot) -> Iterator[bytes]:
    logger.info("reading images at %d x %d, which may take minutes; cache %s keeps them", side, side, root.cache.url)
    labels: list[list[Labels]] = []
    for images in _chunks(source, side, grey, labels):
        yield images.tobytes()
    both = np.concatenate(labels[0] + labels[1])
    yield both.astype("<i8").tobytes()
    yield np.array([len(both), sum(map(len, labels[0])), side], "<i8").tobytes()
