"""Images as files of their own: Food-101, and any folder with one sub-folder for each class.

Owns: which files those are, and decoding. Must never resize.

Every image is decoded to three 8-bit channels; what the sub-folders are called, in alphabetical order, is the classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from PIL import Image

from tasks.data.files import DataRoot
from tasks.data.sources import Chunk, Images, Source
from tasks.data.store import digest
from tasks.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FOOD = "food101/food-101"
_PARTS = ("train", "test")
# What Pillow documents none of: all that it raised on 94,000 damaged files of seven forms.
_DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def decode(data: bytes, file: str) -> Images:
    """An encoded image as (1, 3, height, width)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB"))
    except _DAMAGE as error:
        raise DataError(
            f"{file}: not an image, or damaged within its {len(data)} bytes: {type(error).__name__}: {error}"
        ) from error
    if mode.startswith(("I", "F")):
        raise DataError(f"{file}: pixels of mode {mode}: expected 8 bits for each channel")
    return pixels.transpose(2, 0, 1)[None]


def open_food101(root: DataRoot) -> Source:
    """Food-101 as unpacked: ``food-101/meta/train.txt``, ``meta/test.txt`` and ``images/<class>/<id>.jpg``.

    The lists are in the order of the classes. Raises DataError if the lists are not there, or name no image.
    """
    listed = {part: root.find((f"{_FOOD}/meta/{part}.txt",)) for part in _PARTS}
    if not root.is_folder(f"{_FOOD}/images"):
        raise DataError(f"data.root = {root.config.root!r}: expected the folder {_FOOD}/images beside meta, found none")
    training, test = (partial(_food_chunks, root, part) for part in _PARTS)
    return Source(training, test, in_class_order=True, state=digest(*(listed[part].state for part in _PARTS)))


def _food_chunks(root: DataRoot, part: str) -> Iterator[Chunk]:
    names = {other: _food_names(root, other) for other in _PARTS}
    known = sorted({name.partition("/")[0] for listed in names.values() for name in listed})
    paths = [f"{name}.jpg" for name in names[part]]
    return _decoded(root, f"{_FOOD}/images", paths, [known.index(name.partition("/")[0]) for name in names[part]])


def _food_names(root: DataRoot, part: str) -> list[str]:
    """The lines of a list, such as ``apple_pie/1005649``."""
    file = root.find((f"{_FOOD}/meta/{part}.txt",))
    data, at, names = file.read(), 0, []
    for line in data.splitlines(keepends=True):
        name = line.decode("latin-1").strip()
        folder, slash, image = name.partition("/")
        if not (folder and slash and image) or "/" in image or ".." in name:
            raise DataError(f"{file.name}: line at byte {at}: expected class/image, found {name!r}")
        names.append(name)
        at += len(line)
    if not names:
        raise DataError(f"{file.name}: expected lines class/image, found none in {len(data)} bytes")
    return names


def open_folder(path: str, root: DataRoot) -> Source:
    """``folder:PATH``: sub-folders of images, one for each class, or two folders ``train`` and ``test`` of such.

    Without a test part, a fifth of the images is kept for it. Raises DataError for a folder without images or with
    images outside of classes, and for a class of the test part that the training part lacks.
    """
    found, state = root.listing(path)
    images = [name for name in found if name.lower().endswith(SUFFIXES)]
    parts = [[name for name in images if name.startswith(f"{part}/")] for part in _PARTS]
    if all(parts) and sum(map(len, parts)) == len(images):
        classes = _classes(path, parts[0], 2)
        if strange := sorted(set(_classes(path, parts[1], 2)) - set(classes)):
            raise DataError(f"{path}/test: expected only classes that {path}/train has, found {', '.join(strange)}")
        labels = [[classes.index(name.split("/")[1]) for name in part] for part in parts]
        training, test = (partial(_decoded, root, path, *part) for part in zip(parts, labels, strict=True))
        return Source(training, test, in_class_order=True, state=state)
    classes = _classes(path, images, 1)
    whole = partial(_decoded, root, path, images, [classes.index(name.split("/")[0]) for name in images])
    return Source(whole, None, in_class_order=True, state=state)


def _classes(path: str, images: Sequence[str], depth: int) -> list[str]:
    """The names of the folders that hold ``images``, ``depth`` folders down."""
    for name in images:
        if name.count("/") != depth:
            raise DataError(f"{path}: image {name}: expected {'train/ or test/, then ' * (depth - 1)}class/image")
    if not images:
        raise DataError(f"{path}: expected images ({', '.join(SUFFIXES)}) in one folder for each class, found none")
    return sorted({name.split("/")[depth - 1] for name in images})


def _decoded(root: DataRoot, folder: str, paths: Sequence[str], labels: Sequence[int]) -> Iterator[Chunk]:
    for (data, name), label in zip(root.read_each(folder, paths), labels, strict=True):
        yield Chunk(decode(data, name), np.array([label], np.int64))
