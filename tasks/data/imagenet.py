"""Downsampled ImageNet (Chrabaszcz, Loshchilov & Hutter, arXiv:1707.08819) in its published .npz form.

Owns: its batch files, loose or in the zip archives that image-net.org gives out. Must never load the older form of the
same batches, which is pickled.

A batch holds ``data`` uint8 (n, 3 side^2), channels first, and ``labels`` (n,) in 1 to 1000 (and, unused, ``mean``).
The ten training batches are in random order. The test part is the validation batch; ImageNet's test labels are secret.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from tasks.data.files import DataRoot, File
from tasks.data.npz import Npz, damage, labelled
from tasks.data.sources import Chunk, Images, Source
from tasks.data.store import digest
from tasks.errors import DataError

CLASSES = 1000
_TRAINING = tuple(f"train_data_batch_{index}" for index in range(1, 11))
_TEST = ("val_data",)


def open_imagenet(dataset: str, side: int, root: DataRoot) -> Source:
    """The set in the folder ``dataset``: batches ``train_data_batch_1.npz`` to ``_10``, ``val_data.npz``, or the zips.

    Raises DataError for files that are not there, also where only the pickled form is.
    """
    parts = ("train_part1", "train_part2") if side == 64 else ("train",)
    training = _find(dataset, _TRAINING, [f"Imagenet{side}_{part}_npz.zip" for part in parts], root)
    test = _find(dataset, _TEST, [f"Imagenet{side}_val_npz.zip"], root)
    return Source(
        partial(_chunks, training, _TRAINING, side),
        partial(_chunks, test, _TEST, side),
        state=digest(*(file.state for file in (*training, *test))),
    )


def _find(dataset: str, batches: Sequence[str], archives: Sequence[str], root: DataRoot) -> list[File]:
    """The loose batches if the first of them is there, else the archives."""
    if root.get(f"{dataset}/{batches[0]}.npz"):
        return [root.find((f"{dataset}/{batch}.npz",)) for batch in batches]
    old = archives[0].replace("_npz", "")
    if not root.get(f"{dataset}/{archives[0]}"):
        for pickled in (batches[0], old):
            if root.get(f"{dataset}/{pickled}"):
                raise DataError(
                    f"{dataset}/{pickled}: the pickled form, which is never loaded because it can run any code: "
                    f"expected {' and '.join(archives)}, which image-net.org has beside it"
                )
    first = (f"{dataset}/{archives[0]}", f"{dataset}/{batches[0]}.npz")
    return [root.find(first), *(root.find((f"{dataset}/{archive}",)) for archive in archives[1:])]


def _chunks(files: Sequence[File], batches: Sequence[str], side: int) -> Iterator[Chunk]:
    missing, found = dict.fromkeys(batches), []
    for file in files:
        with file.open() as stream:
            if not file.path.endswith(".zip"):
                yield from _batch(stream, file.name, side)
                missing.pop(file.path.rpartition("/")[2].removesuffix(".npz"))
                continue
            with damage(file.name):
                archive = zipfile.ZipFile(stream)
                members = {name.rpartition("/")[2].removesuffix(".npz"): name for name in archive.namelist()}
            found.append(f"{', '.join(archive.namelist())} in {file.size} bytes")
            for batch in [batch for batch in missing if batch in members]:
                yield from _member(archive, members[batch], file.name, side)
                missing.pop(batch)
    if missing:
        names = " and ".join(file.name for file in files)
        raise DataError(
            f"{names}: expected also {', '.join(f'{batch}.npz' for batch in missing)}, found {'; '.join(found)}"
        )


def _member(archive: zipfile.ZipFile, member: str, file: str, side: int) -> Iterator[Chunk]:
    """A batch inside an archive, unpacked beside it because a zip within a zip cannot be read in place."""
    place = f"{file}:{member}"
    with TemporaryFile() as unpacked:
        with (
            damage(f"{place} (a member at byte {archive.getinfo(member).header_offset})"),
            archive.open(member) as packed,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.seek(0)
        yield from _batch(cast(BinaryIO, unpacked), place, side)


def _batch(stream: BinaryIO, file: str, side: int) -> Iterator[Chunk]:
    def layout(rows: NDArray[Any]) -> Images:
        if rows.dtype != np.uint8 or rows.shape[1:] != (3 * side * side,):
            found = f"{rows.dtype} {('n', *rows.shape[1:])}"
            raise DataError(f"{file}:data: expected uint8 (n, {3 * side * side}), found {found}")
        return rows.reshape(-1, 3, side, side)

    return labelled(Npz(stream, file), "data", "labels", layout, classes=CLASSES, first=1)
