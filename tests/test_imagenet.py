"""Downsampled ImageNet and the .npz reader under it: whole files, damaged ones, and what is never unpickled."""

import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import Library
from tasks.data.imagenet import _batch
from tasks.data.npz import Npz
from tasks.errors import DataError
from tests.image_files import (
    RNG,
    config,
    everything,
    flipped,
    imagenet_batch,
    imagenet_set,
    levels,
    load,
    npz,
    write,
    zipped,
)

NPY = b"\x93NUMPY\x01\x00"


@pytest.mark.parametrize("form", ["zip", "zip with a folder", "loose"])
@pytest.mark.parametrize(("side", "parts"), [(16, 1), (32, 1), (64, 2)])
def test_imagenet_round_trips_from_its_archives_or_loose(tmp_path, side, parts, form):
    files, training, test = imagenet_set(side, 3, parts, "a/b/" if form == "zip with a folder" else "")
    if form == "loose":
        loose = {}
        for data in files.values():
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                loose |= {name: archive.read(name) for name in archive.namelist()}
        files = loose
        assert "train_data_batch_10.npz" in files
    write(tmp_path / f"imagenet{side}", files)
    loaded = load(tmp_path, f"imagenet{side}", side)
    np.testing.assert_array_equal(levels(loaded.train), training[0][:24])
    assert everything(loaded.train)[1].tolist() == training[1][:24].tolist()
    np.testing.assert_array_equal(levels(loaded.outer_valid), training[0][27:])
    np.testing.assert_array_equal(levels(loaded.test), test[0])
    assert everything(loaded.test)[1].tolist() == test[1].tolist()


def batch(data, side=16):
    return list(_batch(io.BytesIO(data), "b.npz", side))


def test_a_batch_of_more_than_one_block_is_whole(monkeypatch):
    monkeypatch.setattr("tasks.data.npz._BLOCK", 5 * 768 + 1)
    data, images, labels = imagenet_batch(12)
    chunks = batch(data)
    assert [len(chunk.labels) for chunk in chunks] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate([chunk.images for chunk in chunks]), images.transpose(0, 3, 1, 2))
    assert np.concatenate([chunk.labels for chunk in chunks]).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"labels": np.arange(12)}, r"b\.npz:labels: label 0 of example 0 out of range: expected 1 to 1000"),
        ({"labels": np.full(12, 1001)}, r"b\.npz:labels: label 1001 of example 0"),
        ({"labels": np.ones(12)}, r"b\.npz:labels: expected whole numbers \(n,\), found float64 \(12,\)"),
        ({"labels": np.ones((3, 4), int)}, r"b\.npz:labels: expected whole numbers \(n,\), found int64 \(3, 4\)"),
        ({"labels": np.ones(11, int)}, r"b\.npz:data: expected one label for each of its images, found 12 and 11"),
        ({"labels": np.ones(13, int)}, r"b\.npz: expected one label for each image, found 13 and 12"),
        (
            {"data": np.zeros((12, 768), np.float32)},
            r"b\.npz:data: expected uint8 \(n, 768\), found float32 \('n', 768\)",
        ),
        (
            {"data": np.zeros((12, 3072), np.uint8)},
            r"b\.npz:data: expected uint8 \(n, 768\), found uint8 \('n', 3072\)",
        ),
        ({"data": np.zeros((0, 768), np.uint8), "labels": np.ones(0, int)}, r"found 0 and 0"),
        ({"data": np.zeros(12, np.uint8)}, r"expected uint8 \(n, 768\), found uint8"),
        ({"data": np.array([{}] * 12)}, r"b\.npz:data\.npy: an array of pickled objects, which are never loaded"),
        ({"labels": np.array([print])}, r"b\.npz:labels\.npy: an array of pickled objects, which are never loaded"),
        ({"data": np.asfortranarray(np.ones((12, 768), np.uint8))}, r"b\.npz:data\.npy: .*expected rows in C order"),
    ],
)
def test_imagenet_arrays_of_the_wrong_kind_are_refused(overrides, message):
    with pytest.raises(DataError, match=message):
        batch(imagenet_batch(**overrides)[0])


def test_a_batch_without_an_array_is_refused():
    with pytest.raises(DataError, match=r"b\.npz: expected an array labels, found data"):
        batch(npz(data=np.zeros((3, 768), np.uint8)))


def test_the_pickled_form_is_refused_before_anything_is_loaded(tmp_path):
    pickled = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins"
    with pytest.raises(DataError, match=r"b\.npz: pickled data at byte 0, which is never loaded.*expected \.npz"):
        batch(pickled)
    for name in ("train_data_batch_1", "Imagenet16_train.zip"):
        write(tmp_path / name / "imagenet16", {name: pickled})
        wanted = rf"imagenet16/{name}: the pickled form, .*expected Imagenet16_train_npz\.zip, which image-net\.org has"
        with pytest.raises(DataError, match=wanted):
            load(tmp_path / name, "imagenet16", 16)
        assert "pickled form" in Library(config(tmp_path / name)).missing("imagenet16")


def test_an_archive_without_a_batch_names_it(tmp_path):
    files, _, _ = imagenet_set()
    with zipfile.ZipFile(io.BytesIO(files["Imagenet16_train_npz.zip"])) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if name != "train_data_batch_7.npz"}
    write(tmp_path / "imagenet16", files | {"Imagenet16_train_npz.zip": zipped(kept)})
    with pytest.raises(
        DataError, match=r"Imagenet16_train_npz\.zip: expected also train_data_batch_7\.npz, found train_data_batch_1"
    ):
        load(tmp_path, "imagenet16", 16)


@pytest.mark.parametrize("cut", [0, 3, 1000, -1, -30])
def test_a_truncated_imagenet_archive_is_named(tmp_path, cut):
    files, _, _ = imagenet_set(n=2)
    name = "Imagenet16_train_npz.zip"
    write(tmp_path / "imagenet16", files | {name: files[name][:cut]})
    with pytest.raises(
        DataError, match=r"Imagenet16_train_npz\.zip: (truncated or damaged: BadZipFile|.*data.npy.* in \d+ bytes)"
    ):
        load(tmp_path, "imagenet16", 16)
    assert not list((tmp_path / "cache").glob("images*"))


def test_damage_inside_an_archive_is_named_with_member_and_byte(tmp_path):
    files, _, _ = imagenet_set(n=2)
    name = "Imagenet16_train_npz.zip"
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        at = archive.getinfo("train_data_batch_2.npz").header_offset
    write(tmp_path / "imagenet16", files | {name: flipped(files[name], at + 500)})
    wanted = rf"{name}:train_data_batch_2\.npz \(a member at byte {at}\): truncated or damaged: BadZipFile: Bad CRC-32"
    with pytest.raises(DataError, match=wanted):
        load(tmp_path, "imagenet16", 16)


BATCH = {compressed: npz(compressed, data=np.ones((3, 768), np.uint8), labels=np.arange(1, 4)) for compressed in (0, 1)}


@pytest.mark.parametrize("compressed", [0, 1])
def test_every_truncation_of_a_batch_is_refused(compressed):
    whole = BATCH[compressed]
    assert [len(chunk.labels) for chunk in batch(whole)] == [3]
    for cut in [*range(0, len(whole), 7), len(whole) - 1]:
        with pytest.raises(DataError, match=r"^b\.npz: "):
            batch(whole[:cut])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_damage_to_a_batch_does_worse_than_a_data_error(compressed, flips):
    data = bytearray(BATCH[compressed])
    for at, value in flips:
        data[at % len(data)] = value
    with contextlib.suppress(DataError):
        for images, labels in batch(bytes(data)):
            assert images.shape[1:] == (3, 16, 16)
            assert images.dtype == np.uint8
            assert len(images) == len(labels)
            assert ((labels >= 0) & (labels < 1000)).all()


@pytest.mark.parametrize(
    ("magic", "header", "body", "message"),
    [
        (
            b"\x93NUMPY\x03\x00",
            "{}",
            b"",
            r"byte 0: expected the magic string of \.npy 1\.0 or 2\.0, found b'.x93NUMPY.x03",
        ),
        (b"\x93MUMPY\x01\x00", "{}", b"", r"byte 0: expected the magic string"),
        (b"\x93NUM", "", b"", r"byte 0: expected the magic string"),
        (NPY, "{'descr': __import__('os')}", b"", r"byte 10: expected the header of an array of numbers"),
        (NPY, "{'descr': '|u1', 'fortran_order': False, 'shape': (-3,), }", b"", "byte 10: expected the header"),
        (
            NPY,
            "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3,), }",
            b"",
            "byte 10: expected the header",
        ),
        (NPY, "{'descr': '<U3', 'fortran_order': False, 'shape': (3,), }", b"", "byte 10: expected the header"),
        (NPY, "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"", "pickled objects"),
        (NPY, "{'descr': '|u1', 'fortran_order': True, 'shape': (3, 2), }", b"", "expected rows in C order"),
        (NPY, "{'descr': '|u1', 'fortran_order': False, 'shape': (), }", b"1", "expected rows in C order"),
        (
            NPY,
            "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }",
            b"12",
            "expected 3 bytes for rows 0 to 3 of .*found 2",
        ),
        (
            NPY,
            "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }",
            b"12",
            "bytes for rows 0 to .*found 2",
        ),
        (
            NPY,
            "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }",
            b"1234",
            r"expected its end after shape \(3,\)",
        ),
    ],
)
def test_a_bad_npy_member_is_named_with_its_byte(magic, header, body, message):
    data = zipped({"a.npy": magic + len(header).to_bytes(2, "little") + header.encode() + body})
    with pytest.raises(DataError, match=rf"^f\.npz:a\.npy: .*{message}"):
        Npz(io.BytesIO(data), "f.npz").array("a")


@pytest.mark.parametrize("dtype", ["<i8", ">u2", "|b1", "<f4", "|u1", ">f8", "<c16"])
@pytest.mark.parametrize("shape", [(7,), (3, 2), (2, 3, 4, 5), (0, 3)])
def test_npy_headers_are_read_as_numpy_writes_them(dtype, shape):
    array = RNG.integers(0, 2, shape).astype(dtype)
    read = Npz(io.BytesIO(npz(a=array)), "f").array("a")
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype.newbyteorder("=")
