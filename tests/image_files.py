"""Files of the published image formats, written independently of the readers, and what tests look at in data sets."""

import io
import struct
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import scipy.io
import torch
from PIL import Image
from pyarrow import parquet

from configs.schema import DataConfig
from tasks.data import Library

RNG = np.random.default_rng(0)
N = 30


# ---- files of the published formats, written independently of the readers


def idx(array):
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_set(n=N, test=10):
    files = {}
    for stem, count in (("train", n), ("t10k", test)):
        files[f"{stem}-images-idx3-ubyte"] = idx(RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{stem}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    return files


def cifar_file(n, classes):
    """Records of the CIFAR binaries, and the (n, 32, 32, 3) images and labels in them."""
    images = RNG.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    labels = RNG.integers(0, classes, n, dtype=np.uint8)
    coarse = [np.uint8(label // 5) for label in labels]
    records = []
    for image, label, group in zip(images, labels, coarse, strict=True):
        head = bytes([label]) if classes == 10 else bytes([group, label])
        records.append(head + b"".join(image[:, :, channel].tobytes() for channel in range(3)))
    return b"".join(records), images, labels


def tar_gz(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def svhn_file(n=N, compress=True, **overrides):
    images = RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"X": images, "y": labels, **overrides}, do_compression=compress)
    return stream.getvalue(), images, labels


def npz(compressed=True, **arrays):
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def imagenet_batch(n=12, side=16, **overrides):
    """A batch as published, and the (n, side, side, 3) images and 0-based labels in it."""
    images = RNG.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    labels = RNG.integers(1, 1001, n)
    flat = np.stack([np.concatenate([image[:, :, channel].ravel() for channel in range(3)]) for image in images])
    arrays = {"data": flat, "labels": labels, "mean": flat.mean(0)}
    return npz(**{**arrays, **overrides}), images, labels - 1


def imagenet_set(side=16, n=12, parts=1, folder=""):
    """The zip archives of a downsampled ImageNet, and its training and test images and labels."""
    names = [f"train_data_batch_{index}" for index in range(1, 11)]
    batches = [imagenet_batch(n, side) for _ in names]
    stems = ["train"] if parts == 1 else [f"train_part{index + 1}" for index in range(parts)]
    files = {}
    for part, stem in enumerate(stems):
        chosen = list(zip(names, batches, strict=True))[part * 10 // parts : (part + 1) * 10 // parts]
        files[f"Imagenet{side}_{stem}_npz.zip"] = zipped({f"{folder}{name}.npz": batch[0] for name, batch in chosen})
    test = imagenet_batch(n, side)
    files[f"Imagenet{side}_val_npz.zip"] = zipped({f"{folder}val_data.npz": test[0]})
    training = tuple(np.concatenate([batch[which] for batch in batches]) for which in (1, 2))
    return files, training, test[1:]


def zipped(files, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def encoded(image, form="PNG", **options):
    """An image (h, w, 3) or (h, w) as a file of the form."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form, **options)
    return stream.getvalue()


def flat_image(color, height=12, width=16):
    return np.full((height, width, 3), color, np.uint8)


def food101_set(classes=3, training=6, test=2):
    """A Food-101 as unpacked: every image has one color, which is its number, and its class."""
    files, lists, number = {}, {"train": [], "test": []}, 0
    for kind in range(classes):
        for part, count in (("train", training), ("test", test)):
            for _ in range(count):
                name = f"food_{kind:02}/{1000 + number}"
                lists[part].append(name)
                files[f"food-101/images/{name}.jpg"] = encoded(flat_image(number * 3, 20, 30), "JPEG", quality=95)
                number += 1
    for part, names in lists.items():
        files[f"food-101/meta/{part}.txt"] = "".join(f"{name}\n" for name in names).encode()
    return files


def table(images, labels, image="image", label="label", **options):
    """A parquet file with the two columns."""
    stream = io.BytesIO()
    parquet.write_table(pa.table({image: images, label: labels}), stream, **options)
    return stream.getvalue()


def hub_images(files):
    """The image column of the Hugging Face hub."""
    return pa.array([{"bytes": data, "path": f"{index}.png"} for index, data in enumerate(files)])


# ---- what tests look at


def grey_reference(images):
    """(n, h, w, 3) uint8 as (n, 1, h, w) grey in [0, 1], pixel by pixel."""
    return ((images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])) / 255)[:, None]


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def config(tmp_path, root=None):
    return DataConfig(root=str(root or tmp_path), cache=str(tmp_path / "cache"))


def load(tmp_path, dataset, size, grey=False, **augmentation):
    """The data set below ``tmp_path``, by a library of its own."""
    return Library(config(tmp_path)).images(dataset, size, grey, **augmentation)


def everything(dataset):
    """All images (n, channels, side, side) float32 and labels (n,) of a split, in its order."""
    images, labels, order = dataset.pixels.on(torch.device("cpu"))
    rows = order[dataset.rows.start : dataset.rows.stop]
    return images[rows] / 255 if not images.is_floating_point() else images[rows], labels[rows]


def levels(dataset):
    """The images of a split as (n, h, w, channels) uint8."""
    return (everything(dataset)[0] * 255).round().byte().permute(0, 2, 3, 1).numpy()


def flipped(data, at):
    """``data`` with the bits of one byte turned."""
    changed = bytearray(data)
    changed[at] ^= 0xFF
    return bytes(changed)


def fingerprints(dataset):
    return {image.numpy().tobytes() for image in everything(dataset)[0]}
