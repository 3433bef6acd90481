"""The image sets in the table: which files each consists of, and its parts.

Owns: the folder layout below the data root (as downloaded, one folder for each set).
Must never know the bytes inside the files (readers.py, imagenet.py, folders.py do).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tasks.data.catalogue import entry, own_kind
from tasks.data.files import DataRoot, File
from tasks.data.folders import open_folder, open_food101
from tasks.data.glyphs import open_glyphs
from tasks.data.imagenet import open_imagenet
from tasks.data.npz import open_npz
from tasks.data.readers import read_cifar, read_idx_images, read_idx_labels, read_svhn, read_tar
from tasks.data.sources import Chunk, Source, check_count
from tasks.data.tables import open_parquet

_CIFAR = {
    # folder, archive, label bytes of a record, files of the training and of the test part
    "cifar10": (
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        1,
        [f"data_batch_{index}.bin" for index in range(1, 6)],
        ["test_batch.bin"],
    ),
    "cifar100": ("cifar-100-binary", "cifar-100-binary.tar.gz", 2, ["train.bin"], ["test.bin"]),
}


def open_source(dataset: str, root: DataRoot) -> Source:
    """The image set ``dataset``, its files found but not read.

    Raises DataError for an unknown name, and for files that are not there or cannot be reached.
    """
    kind = own_kind(dataset)
    if kind is not None:
        return _OWN[kind](dataset.partition(":")[2], root)
    known = entry(dataset)
    if dataset in _CIFAR:
        return _open_cifar(dataset, root)
    if dataset == "glyphs":
        return open_glyphs()
    if dataset == "svhn":
        training, test = (partial(_svhn_chunks, root.find((f"svhn/{part}_32x32.mat",))) for part in ("train", "test"))
        return Source(training, test)
    if dataset.startswith("imagenet"):
        return open_imagenet(dataset, known.side or 0, root)
    if dataset == "food101":
        return open_food101(root)
    return _open_idx(dataset, root)


def _open_idx(dataset: str, root: DataRoot) -> Source:
    """The four files of MNIST's form in the folder ``dataset``, which may be a user's own (``idx:PATH``)."""
    training, test = (partial(_idx_chunks, _idx_files(dataset, stem, root)) for stem in ("train", "t10k"))
    return Source(training, test)


_OWN = {"folder": open_folder, "idx": _open_idx, "npz": open_npz, "parquet": open_parquet}


def _idx_files(dataset: str, stem: str, root: DataRoot) -> tuple[File, File]:
    paths = (f"{dataset}/{stem}-images-idx3-ubyte", f"{dataset}/{stem}-labels-idx1-ubyte")
    images, labels = (root.find((f"{path}.gz", path)) for path in paths)
    return images, labels


def _idx_chunks(files: tuple[File, File]) -> Iterator[Chunk]:
    images = read_idx_images(files[0].read(), 28, files[0].name)
    labels = read_idx_labels(files[1].read(), 10, files[1].name)
    yield check_count(images, labels, files[1].name)


def _open_cifar(dataset: str, root: DataRoot) -> Source:
    folder, archive, _, *parts = _CIFAR[dataset]
    found = [[root.find((f"{dataset}/{folder}/{name}", f"{dataset}/{archive}")) for name in names] for names in parts]
    training, test = (partial(_cifar_chunks, dataset, names, files) for names, files in zip(parts, found, strict=True))
    return Source(training, test)


def _cifar_chunks(dataset: str, names: list[str], files: list[File]) -> Iterator[Chunk]:
    folder, _, label_bytes, *_ = _CIFAR[dataset]
    classes = entry(dataset).classes
    if any(file.path.endswith(".tar.gz") for file in files):  # all of a part come from the archive, or none
        file = next(file for file in files if file.path.endswith(".tar.gz"))
        members = [f"{folder}/{name}" for name in names]
        for data, member in zip(read_tar(file.read(), members, file.name), members, strict=True):
            yield read_cifar(data, label_bytes, classes, f"{file.name}:{member}")
    else:
        for file in files:
            yield read_cifar(file.read(), label_bytes, classes, file.name)


def _svhn_chunks(file: File) -> Iterator[Chunk]:
    yield read_svhn(file.read(), file.name)
