"""Files of the published image formats, written independently of the readers, and what tests look at in data sets."""

import io
import struct

import numpy as np
import scipy.io

from configs.schema import DataConfig

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


def svhn_file(n=N, compress=True, **overrides):
    images = RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"X": images, "y": labels, **overrides}, do_compression=compress)
    return stream.getvalue(), images, labels


def grey_reference(images):
    """(n, 32, 32, 3) uint8 as grey in [0, 1], pixel by pixel."""
    return (images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])) / 255


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def config(tmp_path, root=None):
    return DataConfig(root=str(root or tmp_path), cache=str(tmp_path / "cache"))


def everything(dataset):
    """All images and labels of a split, as they lie in memory."""
    return dataset.windows[:, 0, 0], dataset.labels


def fingerprints(dataset):
    return {image.numpy().tobytes() for image in everything(dataset)[0]}
