"""Readers of the published formats: whole files round trip, damaged ones are named with file and byte."""

import contextlib
import gzip
import io
import struct

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.matlab import read_matlab
from tasks.data.readers import read_cifar, read_idx_images, read_idx_labels, read_svhn
from tasks.errors import DataError
from tests.image_files import N, cifar_file, everything, flipped, idx, idx_set, levels, load, svhn_file, tar_gz, write

# ---- whole files


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_round_trip_gzip_or_plain(tmp_path, dataset, packed):
    files = idx_set()
    write(
        tmp_path / dataset,
        {name + ".gz" * packed: gzip.compress(data) if packed else data for name, data in files.items()},
    )
    images, labels = everything(load(tmp_path, dataset, 28).test)
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
    files = {f"{folder}/{name}": data for name, (data, _, _) in made.items()}
    write(tmp_path / dataset, {archive: tar_gz(dict(reversed(files.items())))} if packed else files)
    loaded = load(tmp_path, dataset, 32)
    _, labels = everything(loaded.test)
    np.testing.assert_array_equal(levels(loaded.test), made[test][1])
    assert labels.tolist() == made[test][2].tolist()
    _, labels = everything(loaded.train)
    n = 20 * len(training) * 8 // 10
    np.testing.assert_array_equal(levels(loaded.train), np.concatenate([made[name][1] for name in training])[:n])
    assert labels.tolist() == np.concatenate([made[name][2] for name in training])[:n].tolist()
    assert loaded.outer_valid.num_examples == 20 * len(training) // 10


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("label_type", [np.uint8, np.float64, np.int64])
def test_svhn_files_round_trip_and_label_10_is_the_digit_0(tmp_path, compress, label_type):
    data, images, labels = svhn_file()
    data = svhn_file(X=images, y=labels.astype(label_type), compress=compress)[0]
    write(tmp_path / "svhn", {"train_32x32.mat": data, "test_32x32.mat": data})
    test = load(tmp_path, "svhn", 32).test
    _, digits = everything(test)
    np.testing.assert_array_equal(levels(test), images.transpose(3, 0, 1, 2))
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
        (lambda data: flipped(gzip.compress(data), 20), "gzip stream is truncated or damaged"),
    ],
)
def test_damaged_idx_images_are_refused_by_file_and_byte(damage, message):
    with pytest.raises(DataError, match=rf"^store/train: .*{message}"):
        read_idx_images(bytes(damage(idx_images())), 28, "store/train")


def test_an_idx_label_out_of_range_is_named_with_its_byte():
    data = idx(np.array([1, 2, 10, 3], dtype=np.uint8))
    with pytest.raises(DataError, match=r"labels: label 10 of example 2 \(byte 10\) out of range: expected 0 to 9"):
        read_idx_labels(data, 10, "labels")
    assert data[10] == 10


def test_more_images_than_labels_are_refused(tmp_path):
    write(tmp_path / "mnist", {**idx_set(30), "train-labels-idx1-ubyte": idx(np.zeros(29, dtype=np.uint8))})
    with pytest.raises(DataError, match=r"train-labels.*found 30 and 29"):
        load(tmp_path, "mnist", 8)


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
    archive = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    whole = tar_gz({"cifar-10-batches-bin/data_batch_1.bin": cifar_file(20, 10)[0]})
    write(tmp_path / "cifar10", {archive.name: whole})
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: .*did not find .*data_batch_2\.bin"):
        load(tmp_path, "cifar10", 8)
    for cut in (0, 20, len(whole) // 2, len(whole) - 4):
        archive.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: (gzip stream|archive) is truncated or damaged"):
            load(tmp_path, "cifar10", 8)


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
