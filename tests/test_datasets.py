"""Data sets: splits, sampling, the published file formats whole and damaged, roots and the cache."""

import contextlib
import gzip
import io
import struct
import tarfile
import time

import fsspec
import numpy as np
import pytest
import scipy.io
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig
from tasks import DataError, generator
from tasks.datasets import ImageDataset, load_datasets
from tasks.files import DataRoot
from tasks.matlab import read_matlab
from tasks.readers import read_cifar, read_idx_images, read_idx_labels, read_svhn

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


# ---- digits, splits, sampling


def test_digits_need_no_root_and_have_the_documented_splits():
    digits = load_datasets("digits", 8, DataConfig())
    assert [split.num_examples for split in (digits.train, digits.outer_valid, digits.test)] == [1149, 144, 360]
    for split in (digits.train, digits.outer_valid, digits.test):
        images, labels = everything(split)
        assert images.shape == (split.num_examples, 8, 8)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert torch.bincount(labels, minlength=10).min() >= 0.05 * split.num_examples  # every class in every split
    # Golden: the order is part of every published number.
    assert digits.test.labels[:12].tolist() == load_datasets("digits", 4, DataConfig()).test.labels[:12].tolist()
    assert digits.train.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]


def test_no_image_of_one_digits_split_is_in_another():
    digits = load_datasets("digits", 8, DataConfig())
    train, valid, test = (fingerprints(split) for split in (digits.train, digits.outer_valid, digits.test))
    assert (len(train), len(valid), len(test)) == (1149, 144, 360)
    assert not train & test
    assert not train & valid
    assert not valid & test


def test_what_is_sampled_from_train_is_never_in_test():
    digits = load_datasets("digits", 8, DataConfig())
    drawn = digits.train.sample(generator(0), (20_000,))["image"]
    seen = {image.numpy().tobytes() for image in drawn}
    assert len(seen) > 0.99 * 1149
    assert not seen & fingerprints(digits.test)


def test_file_splits_are_the_first_80_and_last_10_percent_and_the_test_file(tmp_path):
    files = idx_set(100, 20)
    images = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), dtype=np.uint8)
    files["train-images-idx3-ubyte"] = idx(images)
    write(tmp_path / "mnist", files)
    mnist = load_datasets("mnist", 28, config(tmp_path))
    values = [
        (everything(split)[0][:, 0, 0] * 255).round().int().tolist() for split in (mnist.train, mnist.outer_valid)
    ]
    assert values == [list(range(80)), list(range(90, 100))]
    assert mnist.test.num_examples == 20


@pytest.mark.parametrize("shape", [(64,), (8, 64), (3, 2, 16), ()])
def test_a_batch_has_the_leading_shape_asked_for(shape):
    batch = load_datasets("digits", 8, DataConfig(), shift=1, noise=0.1).train.sample(generator(0), shape)
    assert batch["image"].shape == (*shape, 8, 8)
    assert batch["label"].shape == shape
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    assert batch["image"].is_contiguous()


def test_a_batch_depends_on_the_generator_alone():
    train = load_datasets("digits", 8, DataConfig(), shift=2, noise=0.1).train
    first, again, other = (train.sample(generator(key), (4, 16)) for key in ("a", "a", "b"))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])


def test_images_keep_their_labels_and_every_example_is_drawn():
    images = torch.arange(50.0)[:, None, None].expand(50, 3, 3) / 100
    labels = torch.arange(50) % 7
    batch = ImageDataset(images, labels).sample(generator(0), (2000,))
    which = (batch["image"][:, 1, 1] * 100).round().long()
    assert torch.equal(batch["label"], labels[which])
    assert len(which.unique()) == 50


def test_shift_moves_the_image_and_fills_with_zeros():
    image = torch.rand(1, 5, 5, generator=generator(0)) + 0.1
    batch = ImageDataset(image, torch.zeros(1, dtype=torch.int64), shift=2).sample(generator(1), (400,))["image"]
    wanted = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.zeros((5, 5), dtype=np.float32)
            for row in range(5):
                for column in range(5):
                    if 0 <= row - down < 5 and 0 <= column - right < 5:
                        moved[row, column] = image[0, row - down, column - right]
            wanted[moved.tobytes()] = (down, right)
    assert {wanted[drawn.numpy().tobytes()] for drawn in batch} == set(wanted.values())
    assert len(wanted) == 25


def test_noise_is_gaussian_of_the_given_standard_deviation():
    images = torch.full((3, 8, 8), 0.5)
    batch = ImageDataset(images, torch.zeros(3, dtype=torch.int64), noise=0.2).sample(generator(0), (500,))
    residual = batch["image"] - 0.5
    assert residual.std() == pytest.approx(0.2, rel=0.02)
    assert abs(residual.mean()) < 0.005
    assert (images == 0.5).all()  # the data set itself stays clean


@pytest.mark.parametrize("augmentation", [{"shift": 1}, {"noise": 0.05}, {"shift": 1, "noise": 0.05}])
@pytest.mark.parametrize("split", ["train", "outer_valid", "test"])
def test_the_floor_equal_examples_look_different_in_every_split(split, augmentation):
    data = getattr(load_datasets("digits", 8, DataConfig(), **augmentation), split)
    only = ImageDataset(everything(data)[0][:1], data.labels[:1], **augmentation)
    drawn = only.sample(generator(0), (64,))["image"]
    assert len({image.numpy().tobytes() for image in drawn}) == (9 if augmentation == {"shift": 1} else 64)
    clean = getattr(load_datasets("digits", 8, DataConfig()), split)
    drawn, plain = (source.sample(generator(3), (64,)) for source in (data, clean))
    assert torch.equal(drawn["label"], plain["label"])  # the same examples ...
    assert not torch.equal(drawn["image"], plain["image"])  # ... that look different


def test_data_sets_are_read_once_per_process_and_share_their_pixels(tmp_path):
    write(tmp_path / "mnist", idx_set())
    first = load_datasets("mnist", 8, config(tmp_path))
    (tmp_path / "mnist" / "train-images-idx3-ubyte").unlink()
    second = load_datasets("mnist", 8, config(tmp_path), noise=0.1)
    assert first.train.windows.data_ptr() == second.train.windows.data_ptr()


def test_shrinking_loses_no_pixel_and_keeps_the_mean(tmp_path):
    pixels = np.eye(784, dtype=np.uint8).reshape(784, 28, 28) * 255  # each image has one white pixel
    files = idx_set(30, 784)
    files["t10k-images-idx3-ubyte"] = idx(pixels)
    write(tmp_path / "mnist", files)
    small = everything(load_datasets("mnist", 4, config(tmp_path)).test)[0]
    assert small.shape == (784, 4, 4)
    assert ((small >= 0) & (small <= 1)).all()
    # Bilinear interpolation without antialiasing would look at 64 of the 784 pixels only.
    assert (small.sum((1, 2)) > 0).all()
    assert small.mean() == pytest.approx(1 / 784, rel=1e-3)
    white = everything(load_datasets("digits", 16, DataConfig()).train)[0]
    assert white.shape == (1149, 16, 16)
    assert ((white >= 0) & (white <= 1)).all()


# ---- whole files


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_round_trip_gzip_or_plain(tmp_path, dataset, packed):
    files = idx_set()
    write(
        tmp_path / dataset,
        {name + ".gz" * packed: gzip.compress(data) if packed else data for name, data in files.items()},
    )
    images, labels = everything(load_datasets(dataset, 28, config(tmp_path)).test)
    assert ((images * 255).round().byte().numpy().tobytes()) == files["t10k-images-idx3-ubyte"][16:]
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("dataset", "folder", "archive", "classes", "training", "test"),
    [
        (
            "cifar10",
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            10,
            [f"data_batch_{index}.bin" for index in (1, 2, 3, 4, 5)],
            "test_batch.bin",
        ),
        ("cifar100", "cifar-100-binary", "cifar-100-binary.tar.gz", 100, ["train.bin"], "test.bin"),
    ],
)
def test_cifar_files_round_trip_as_folder_or_archive(
    tmp_path, dataset, folder, archive, classes, training, test, packed
):
    made = {name: cifar_file(20, classes) for name in [*training, test]}
    if packed:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            for name, (data, _, _) in reversed(made.items()):
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        write(tmp_path / dataset, {archive: stream.getvalue()})
    else:
        write(tmp_path / dataset, {f"{folder}/{name}": data for name, (data, _, _) in made.items()})
    loaded = load_datasets(dataset, 32, config(tmp_path))
    images, labels = everything(loaded.test)
    np.testing.assert_allclose(images, grey_reference(made[test][1]), atol=1e-6)
    assert labels.tolist() == made[test][2].tolist()
    images, labels = everything(loaded.train)
    n = 20 * len(training) * 8 // 10
    np.testing.assert_allclose(
        images, grey_reference(np.concatenate([made[name][1] for name in training]))[:n], atol=1e-6
    )
    assert labels.tolist() == np.concatenate([made[name][2] for name in training])[:n].tolist()
    assert loaded.outer_valid.num_examples == 20 * len(training) // 10


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("label_type", [np.uint8, np.float64, np.int64])
def test_svhn_files_round_trip_and_label_10_is_the_digit_0(tmp_path, compress, label_type):
    data, images, labels = svhn_file()
    data = svhn_file(X=images, y=labels.astype(label_type), compress=compress)[0]
    write(tmp_path / "svhn", {"train_32x32.mat": data, "test_32x32.mat": data})
    read, digits = everything(load_datasets("svhn", 32, config(tmp_path)).test)
    np.testing.assert_allclose(read, grey_reference(images.transpose(3, 0, 1, 2)), atol=1e-6)
    assert digits.tolist() == (labels[:, 0] % 10).tolist()
    assert 10 not in digits


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.booleans(),
    st.text("abcXY", min_size=1, max_size=9),
)
def test_the_matlab_reader_agrees_with_what_scipy_writes(dtype, shape, compress, name):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"text": "left out", name: array, "z": np.array([[1j]])}, do_compression=compress)
    read = read_matlab(stream.getvalue(), "f.mat")
    assert list(read) == [name]
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)


# ---- damaged files


def idx_images():
    return idx(np.zeros((12, 28, 28), dtype=np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "truncated header: expected 16 bytes, found 0"),
        (lambda data: data[:10], "truncated header: expected 16 bytes, found 10"),
        (lambda data: data[:-1], "expected 9424 bytes for shape .12, 28, 28., found 9423"),
        (lambda data: data + b"x", "expected 9424 bytes for shape .12, 28, 28., found 9425"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "wrong magic number at byte 0: expected 0x00000803 .* 0x00000d03"),
        (lambda data: b"\0\0\x08\x01" + data[4:], "expected 0x00000803 .* found 0x00000801"),
        (lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:], "expected 3367254359296 bytes .*found 9424"),
        (lambda data: idx(np.zeros((12, 14, 56), dtype=np.uint8)), "expected images of 28 x 28 pixels"),
        (lambda data: gzip.compress(data)[:-9], "gzip stream is truncated or damaged"),
        (lambda data: gzip.compress(data)[:-1], "gzip stream is truncated or damaged"),
        (lambda data: bytearray_flip(gzip.compress(data), 20), "gzip stream is truncated or damaged"),
    ],
)
def test_damaged_idx_images_are_refused_by_file_and_byte(damage, message):
    with pytest.raises(DataError, match=rf"^store/train: .*{message}"):
        read_idx_images(bytes(damage(idx_images())), 28, "store/train")


def bytearray_flip(data, at):
    flipped = bytearray(data)
    flipped[at] ^= 0xFF
    return flipped


def test_an_idx_label_out_of_range_is_named_with_its_byte():
    data = idx(np.array([1, 2, 10, 3], dtype=np.uint8))
    with pytest.raises(DataError, match=r"labels: label 10 of example 2 \(byte 10\) out of range: expected 0 to 9"):
        read_idx_labels(data, 10, "labels")
    assert data[10] == 10


def test_more_images_than_labels_are_refused(tmp_path):
    write(tmp_path / "mnist", {**idx_set(30), "train-labels-idx1-ubyte": idx(np.zeros(29, dtype=np.uint8))})
    with pytest.raises(DataError, match=r"train-labels.*found 30 and 29"):
        load_datasets("mnist", 8, config(tmp_path))


def test_a_truncated_cifar_file_is_named_with_the_record_that_ends_early():
    data = cifar_file(3, 10)[0]
    with pytest.raises(DataError, match=r"f\.bin: expected whole records of 3073 bytes.*record 2 .*byte 6146"):
        read_cifar(data[:-1], 1, 10, "f.bin")
    with pytest.raises(DataError, match=r"f\.bin: .*found 0 bytes"):
        read_cifar(b"", 1, 10, "f.bin")


def test_a_cifar_label_out_of_range_is_named_with_its_byte():
    data = bytearray(cifar_file(3, 100)[0])
    data[3074 * 2 + 1] = 100
    with pytest.raises(DataError, match=r"f\.bin: label 100 of example 2 \(byte 6149\) .*0 to 99"):
        read_cifar(bytes(data), 2, 100, "f.bin")


def test_a_damaged_or_incomplete_cifar_archive_is_refused(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        data = cifar_file(20, 10)[0]
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    archive = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    whole = stream.getvalue()
    write(tmp_path / "cifar10", {archive.name: whole})
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: .*did not find .*data_batch_2\.bin"):
        load_datasets("cifar10", 8, config(tmp_path))
    for cut in (0, 20, len(whole) // 2, len(whole) - 4):
        archive.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: (gzip stream|archive) is truncated or damaged"):
            load_datasets("cifar10", 8, config(tmp_path))


def test_every_truncation_of_an_svhn_file_is_refused():
    for compress in (True, False):
        data = svhn_file(3, compress)[0]
        boundary = {136 + int.from_bytes(data[132:136], "little")}  # X whole, y missing
        for cut in [*range(400), *range(400, len(data), 97), len(data) - 1, *boundary]:
            with pytest.raises(DataError, match=r"^a\.mat"):
                read_svhn(data[:cut], "a.mat")


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.one_of(st.integers(0, 300), st.integers(0, 100_000)), st.integers(0, 255)), max_size=4),
)
def test_no_damage_to_an_svhn_file_does_worse_than_a_data_error(compress, flips):
    # scipy.io.loadmat, the obvious reader, ends in a segmentation fault on some of these.
    data = bytearray(SVHN[compress])
    for at, value in flips:
        data[at % len(data)] = value
    with contextlib.suppress(DataError):
        images, labels = read_svhn(bytes(data), "a.mat")
        assert images.shape[1:] == (3, 32, 32)
        assert images.dtype == np.uint8
        assert len(labels) == len(images)
        assert set(labels) <= set(range(10))


def replaced(data, at, new):
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (132, struct.pack("<I", 1 << 30), "truncated element at byte 136: expected 1073741824 bytes"),
        (128, struct.pack("<I", 4), "element at byte 136: expected a matrix .type 14., found type 4"),
        (156, struct.pack("<I", 15), "expected flags, dimensions and a name"),
        (172, struct.pack("<i", -1), r"matrix 'X' at byte 192: expected -3072 bytes .* found 6144"),
        (172, struct.pack("<i", 3), r"matrix 'X' at byte 192: expected 9216 bytes .* found 6144"),
        (178, struct.pack("<H", 5), "small element at byte 176: expected at most 4 bytes, found 5"),
        (184, struct.pack("<I", 99), "matrix 'X' at byte 136: expected one block of numbers"),
        (126, b"??", "expected a 128-byte header with IM or MI at byte 126, found b'..' in"),
    ],
)
def test_damage_to_a_matlab_file_is_named_with_its_byte(at, new, message):
    whole = SVHN[False]
    assert struct.unpack_from("<4i", whole, 160) == (32, 32, 3, 2)
    with pytest.raises(DataError, match=rf"^a\.mat: .*{message}"):
        read_matlab(replaced(whole, at, new), "a.mat")


def test_a_compressed_matlab_element_without_its_checksum_is_refused():
    whole = SVHN[True]
    (size,) = struct.unpack_from("<I", whole, 132)
    cut = whole[:132] + struct.pack("<I", size - 4) + whole[136 : 136 + size - 4]
    with pytest.raises(DataError, match=r"a\.mat: truncated compressed element at byte 136"):
        read_matlab(cut, "a.mat")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"X": np.zeros((32, 32, 3, N))}, r"expected X as uint8 \(32, 32, 3, n\), found float64"),
        ({"X": np.zeros((N, 32, 32, 3), dtype=np.uint8)}, r"expected X as uint8 .*found uint8 \(30, 32"),
        ({"y": np.ones((1, N))}, r"expected y as \(30, 1\).*found \(1, 30\)"),
        ({"y": np.zeros((N, 1))}, r"label 0.0 of example 0 out of range: expected 1 to 10"),
        ({"y": np.full((N, 1), 11)}, r"label 11 of example 0"),
        ({"y": np.full((N, 1), np.nan)}, r"label nan of example 0"),
        ({"y": np.full((N, 1), 1.5)}, r"label 1.5 of example 0"),
        ({"y": "labels"}, r"expected a numeric array y, found only X"),
    ],
)
def test_svhn_arrays_of_the_wrong_kind_are_refused(overrides, message):
    with pytest.raises(DataError, match=rf"^a\.mat: .*{message}"):
        read_svhn(svhn_file(**overrides)[0], "a.mat")


def test_a_matlab_7_3_file_is_refused():
    with pytest.raises(DataError, match=r"a\.mat: not a MATLAB 5 file"):
        read_svhn(b"\x89HDF\r\n\x1a\n" + bytes(600), "a.mat")


SVHN = {compress: svhn_file(2, compress)[0] for compress in (True, False)}


# ---- roots and the cache


def test_without_a_root_the_error_names_the_embedded_data_sets():
    with pytest.raises(DataError, match=r"data\.root = None: .*holds mnist/ .*digits"):
        load_datasets("mnist", 8, DataConfig())


def test_a_missing_root_or_file_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*mnist/train-images-idx3-ubyte\.gz or mnist/train-images-idx3-ubyte"):
        load_datasets("mnist", 8, config(tmp_path, tmp_path / "nowhere"))
    files = idx_set()
    del files["t10k-labels-idx1-ubyte"]
    write(tmp_path / "mnist", files)
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_datasets("mnist", 8, config(tmp_path))


def test_a_folder_where_a_file_should_be_is_a_data_error(tmp_path):
    (tmp_path / "svhn" / "train_32x32.mat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train_32x32\.mat: IsADirectoryError"):
        load_datasets("svhn", 8, config(tmp_path))


def test_an_unknown_protocol_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.root = 'gopher://x'"):
        load_datasets("mnist", 8, config(tmp_path, "gopher://x"))


def test_an_unknown_data_set_is_suggested():
    with pytest.raises(DataError, match=r"did you mean 'cifar100'"):
        load_datasets("cifar-100", 8, DataConfig())


def test_too_few_examples_to_split_are_refused(tmp_path):
    write(tmp_path / "mnist", idx_set(9))
    with pytest.raises(DataError, match="at least 10 training examples to split, found 9"):
        load_datasets("mnist", 8, config(tmp_path))


@pytest.fixture
def remote(request):
    """An empty folder of fsspec's in-process file system, standing for a remote one."""
    root = f"memory://{request.node.name}"
    system = fsspec.filesystem("memory")
    system.mkdir(f"/{request.node.name}")
    yield root, system
    system.rm(f"/{request.node.name}", recursive=True)


def put(remote, name, data):
    with remote[1].open(f"{remote[0]}/{name}", "wb") as stream:
        stream.write(data)


@pytest.fixture
def downloads(monkeypatch):
    """The paths downloaded so far."""
    paths = []
    original = MemoryFileSystem.cat_file

    def counted(self, path, *args, **kwargs):
        paths.append(path)
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    return paths


def test_a_remote_root_works_and_is_downloaded_once(tmp_path, remote, downloads):
    for name, data in idx_set().items():
        put(remote, f"mnist/{name}", data)
    assert load_datasets("mnist", 8, config(tmp_path, remote[0])).test.num_examples == 10
    assert len(downloads) == 4
    load_datasets("mnist", 12, config(tmp_path, remote[0]))
    assert len(downloads) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_missing_remote_file_is_named(tmp_path, remote):
    with pytest.raises(DataError, match=r"memory://.*expected a file svhn/train_32x32\.mat below it, found none"):
        load_datasets("svhn", 8, config(tmp_path, remote[0]))


def test_a_damaged_cached_file_is_fetched_again(tmp_path, remote, downloads):
    put(remote, "a", b"whole content")
    root = DataRoot(remote[0], str(tmp_path))
    assert root.read(["a"])[0] == b"whole content"
    (cached,) = tmp_path.iterdir()
    for damaged in (b"whole cont", b"", b"whole c0ntent"):
        cached.write_bytes(damaged)
        assert root.read(["a"])[0] == b"whole content"
    assert len(downloads) == 4
    assert root.read(["a"])[0] == b"whole content"
    assert len(downloads) == 4


def test_a_download_cut_off_leaves_nothing_and_is_not_taken_for_whole(tmp_path, remote, monkeypatch):
    put(remote, "a", b"whole content")
    root = DataRoot(remote[0], str(tmp_path))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path: b"whole con")
    with pytest.raises(DataError, match=r"/a: expected 13 bytes, the download gave 9"):
        root.read(["a"])
    assert not list(tmp_path.iterdir())

    def broken(self, path):
        raise ConnectionResetError("peer went away")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(DataError, match=r"memory://.*/a: ConnectionResetError: peer went away"):
        root.read(["a"])
    monkeypatch.undo()
    assert root.read(["a"])[0] == b"whole content"


def test_a_process_killed_between_write_and_rename_leaves_no_entry(tmp_path, remote):
    put(remote, "a", b"whole content")
    write(tmp_path / "download-killed", {"file": b"whole"})
    assert DataRoot(remote[0], str(tmp_path)).read(["a"])[0] == b"whole content"


def test_a_replaced_remote_file_is_a_new_entry(tmp_path, remote):
    root = DataRoot(remote[0], str(tmp_path))
    put(remote, "a", b"first")
    assert root.read(["a"])[0] == b"first"
    time.sleep(0.01)
    put(remote, "a", b"other")
    assert root.read(["a"])[0] == b"other"


def test_an_unusable_cache_folder_is_a_data_error(tmp_path, remote):
    put(remote, "a", b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"/a: \w+: .*file"):
        DataRoot(remote[0], str(tmp_path / "file")).read(["a"])
