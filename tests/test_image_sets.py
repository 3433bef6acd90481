"""Food-101, image folders, npz and parquet: whole files, damaged ones, and what is kept."""

import contextlib
import io

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig
from tasks.data import Library
from tasks.data.folders import decode
from tasks.data.tables import _rows
from tasks.errors import DataError
from tasks.random import keys
from tests.image_files import (
    RNG,
    config,
    encoded,
    everything,
    flat_image,
    flipped,
    food101_set,
    hub_images,
    imagenet_set,
    levels,
    load,
    npz,
    table,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


# ---- Food-101 and folders


def colors(split):
    """The mean level of every image of a split, and the labels."""
    images, labels = everything(split)
    return (images.mean((1, 2, 3)) * 255 / 3).round().int().tolist(), labels.tolist()


def test_food101_is_read_as_unpacked_and_its_classes_are_mixed(tmp_path):
    write(tmp_path / "food101", food101_set(classes=3, training=10, test=2))
    food = load(tmp_path, "food101", 8)
    assert [split.num_examples for split in (food.train, food.outer_valid, food.test)] == [24, 3, 6]
    numbers, labels = colors(food.test)
    assert sorted(numbers) == [10, 11, 22, 23, 34, 35]
    for split in (food.train, food.outer_valid, food.test):
        numbers, labels = colors(split)
        assert labels == [number // 12 for number in numbers]
    assert colors(food.train)[0] != sorted(colors(food.train)[0])
    assert everything(food.train)[0].shape == (24, 3, 8, 8)
    assert everything(load(tmp_path, "food101", 8, grey=True).train)[0].shape == (24, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"food-101/meta/train.txt": None}, r"food-101/meta/train\.txt: expected such a file below data\.root"),
        ({"food-101/meta/test.txt": b""}, r"meta/test\.txt: expected lines class/image, found none in 0 bytes"),
        ({"food-101/meta/test.txt": b"a/1\nb2\n"}, r"meta/test\.txt: line at byte 4: expected class/image, found 'b2'"),
        ({"food-101/meta/test.txt": b"../1\n"}, r"meta/test\.txt: line at byte 0: expected class/image"),
        ({"food-101/images/food_01/1009.jpg": None}, r"images.*FileNotFoundError.*food_01/1009\.jpg"),
        ({"food-101/images/food_01/1009.jpg": b""}, r"food_01/1009\.jpg: not an image, or damaged within its 0 bytes"),
        (
            {"food-101/images/food_01/1009.jpg": b"GIF8"},
            r"food_01/1009\.jpg: not an image, or damaged within its 4 bytes",
        ),
    ],
)
def test_a_damaged_food101_is_named(tmp_path, changes, message):
    files = food101_set()
    for name, data in changes.items():
        files.pop(name)
        files |= {} if data is None else {name: data}
    write(tmp_path / "food101", files)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "food101", 8)


def test_food101_without_its_images_folder_is_missing(tmp_path):
    lists = {name: data for name, data in food101_set().items() if "meta" in name}
    write(tmp_path / "food101", lists)
    assert "food-101/images beside meta" in Library(config(tmp_path)).missing("food101")


def class_folders(prefix="", classes=("ant", "bee"), count=10, form="PNG"):
    return {
        f"{prefix}{name}/{index:03}.{form.lower()}": encoded(flat_image(3 * (count * kind + index)), form)
        for kind, name in enumerate(classes)
        for index in range(count)
    }


def test_a_folder_of_classes_is_split_and_its_labels_are_the_folders_in_order(tmp_path):
    write(tmp_path / "mine", class_folders() | {"readme.txt": b"not an image", "ant/notes.md": b""})
    own = load(tmp_path, "folder:mine", 8)
    assert [split.num_examples for split in (own.train, own.outer_valid, own.test)] == [12, 2, 4]
    assert everything(own.train)[0].shape == (12, 3, 8, 8)
    seen = []
    for split in (own.train, own.outer_valid, own.test):
        numbers, labels = colors(split)
        assert labels == [number // 10 for number in numbers]
        seen += numbers
    assert len(set(seen)) == 18
    assert seen != sorted(seen)  # mixed


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path):
    write(tmp_path / "mine", class_folders("train/") | class_folders("test/", ("bee",), 3, "BMP"))
    own = load(tmp_path, f"folder:{tmp_path}/mine", 8)
    assert [split.num_examples for split in (own.train, own.outer_valid, own.test)] == [16, 2, 3]
    assert colors(own.test)[1] == [1, 1, 1]
    assert colors(own.train)[0] != sorted(colors(own.train)[0])  # mixed


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b""}, r"mine: expected images \(\.bmp.*\) in one folder for each class, found none"),
        ({"a.png": b""}, r"mine: image a\.png: expected class/image"),
        ({"ant/deep/a.png": b""}, r"mine: image ant/deep/a\.png: expected class/image"),
        (
            {"train/a.png": b"", "test/a.png": b""},
            r"mine: image train/a\.png: expected train/ or test/, then class/image",
        ),
        (
            {**class_folders("train/"), **class_folders("test/", ("bee", "cow"), 1)},
            r"mine/test: expected only classes that mine/train has, found cow",
        ),
    ],
)
def test_a_folder_that_is_not_one_of_classes_is_refused(tmp_path, files, message):
    write(tmp_path / "mine", files)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "folder:mine", 8)
    assert "mine" in Library(config(tmp_path)).missing("folder:mine")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected a folder, found none"):
        load(tmp_path, "folder:nowhere", 8)


def test_images_of_every_kind_become_three_channels_of_eight_bits():
    image = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encoded(image), "f")[0].transpose(1, 2, 0), image)
    grey = decode(encoded(image[..., 0]), "f")
    assert grey.shape == (1, 3, 9, 7)
    assert (grey == grey[:, :1]).all()
    alpha = np.concatenate([image, np.full((9, 7, 1), 200, np.uint8)], axis=2)
    np.testing.assert_array_equal(decode(encoded(alpha), "f")[0].transpose(1, 2, 0), image)
    with pytest.raises(DataError, match=r"f: pixels of mode I.*expected 8 bits"):
        decode(encoded(image[..., 0].astype(np.uint16) * 256), "f")


IMAGES = {
    form: encoded(RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8), form)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_truncated_image_is_refused_by_its_file(form):
    data = IMAGES[form]
    for cut in (1, 9, 50, len(data) // 2):
        with pytest.raises(DataError, match=rf"^f: not an image, or damaged within its {cut} bytes"):
            decode(data[:cut], "f")


def test_a_png_with_a_damaged_length_and_an_image_too_large_to_be_true_are_refused():
    picture = bytearray(IMAGES["PNG"])
    picture[picture.index(b"IDAT") - 1] = 1
    with pytest.raises(DataError, match=r"^f: .*SyntaxError: broken PNG file"):
        decode(bytes(picture), "f")
    bitmap = bytearray(IMAGES["BMP"])
    bitmap[18:26] = b"\xff\xff\x0f\0\xff\xff\x0f\0"
    with pytest.raises(DataError, match=r"^f: .*DecompressionBombError"):
        decode(bytes(bitmap), "f")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(IMAGES)),
    st.lists(st.tuples(st.one_of(st.integers(0, 120), st.integers(0, 5000)), st.integers(0, 255)), max_size=4),
)
def test_no_damage_to_an_image_does_worse_than_a_data_error(form, flips):
    data = bytearray(IMAGES[form])
    for at, value in flips:
        data[at % len(data)] = value
    with contextlib.suppress(DataError):
        pixels = decode(bytes(data), "f")
        assert pixels.dtype == np.uint8
        assert pixels.shape[:2] == (1, 3)


# ---- npz


SMALL = RNG.integers(0, 256, (20, 5, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("image", "label", "layout"),
    [
        ("image", "label", lambda images: images),
        ("images", "labels", lambda images: images.transpose(0, 3, 1, 2)),
        ("x", "y", lambda images: images[..., :1]),
        ("x", "y", lambda images: images[..., 0]),
        ("x", "y", lambda images: images[..., :1].transpose(0, 3, 1, 2)),
    ],
)
def test_any_npz_in_any_layout(tmp_path, compressed, image, label, layout):
    for labels in (LABELS, LABELS[:, None].astype(np.uint8)):
        arrays = {f"test_{image}": layout(SMALL), f"test_{label}": labels}
        arrays |= {f"train_{image}": layout(SMALL)[::-1].copy(), f"train_{label}": labels, "else": np.ones(3)}
        write(tmp_path, {"a.npz": npz(compressed, **arrays)})
        test = load(tmp_path, "npz:a.npz", 5).test
        wide = SMALL if layout(SMALL).size == SMALL.size else np.broadcast_to(SMALL[..., :1], SMALL.shape)
        np.testing.assert_array_equal(levels(test), wide)
        assert everything(test)[1].tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npz(image=SMALL), r"a\.npz: expected arrays image and label, or train_image.*found image"),
        (npz(train_image=SMALL, train_label=LABELS), "expected arrays image and label.*found train_image, train_label"),
        (npz(image=SMALL, label=LABELS.astype(float)), r"a\.npz:label: expected whole numbers \(n,\), found float64"),
        (npz(image=SMALL, label=LABELS - 1), r"a\.npz:label: label -1 of example 0 out of range: expected at least 0"),
        (
            npz(image=SMALL, label=LABELS[:-1]),
            r"a\.npz:image: expected one label for each of its images, found 20 and 19",
        ),
        (npz(image=SMALL / 255, label=LABELS), r"a\.npz:image: expected uint8 images .*found float64 \('n', 5, 5, 3\)"),
        (npz(image=SMALL[..., :2], label=LABELS), r"a\.npz:image: expected uint8 images .*\('n', 5, 5, 2\)"),
        (npz(image=np.array([[print]]), label=LABELS), r"a\.npz:image\.npy: an array of pickled objects"),
        (npz(image=SMALL, label=LABELS)[:-30], r"a\.npz: truncated or damaged: BadZipFile"),
        (b"", r"a\.npz: truncated or damaged: BadZipFile"),
    ],
)
def test_an_npz_of_the_wrong_kind_is_refused(tmp_path, data, message):
    write(tmp_path, {"a.npz": data})
    with pytest.raises(DataError, match=message):
        load(tmp_path, "npz:a.npz", 5)


# ---- parquet


def png_column():
    return hub_images([encoded(image) for image in SMALL])


@pytest.mark.parametrize(
    ("column", "exact"),
    [
        (png_column, SMALL),
        (lambda: [encoded(image) for image in SMALL], SMALL),
        (lambda: SMALL.reshape(20, 75).tolist(), SMALL),
        (lambda: SMALL.tolist(), SMALL),
        (lambda: SMALL[..., 0].tolist(), SMALL[..., :1]),
        (lambda: SMALL[..., 0].reshape(20, 25).tolist(), SMALL[..., :1]),
    ],
)
def test_any_parquet_with_encoded_or_raw_images(tmp_path, column, exact):
    write(tmp_path / "a", {"train-0.parquet": table(column(), LABELS), "test-0.parquet": table(column(), LABELS)})
    test = load(tmp_path, "parquet:a/*.parquet", 5).test
    np.testing.assert_array_equal(levels(test), np.broadcast_to(exact, SMALL.shape))
    assert everything(test)[1].tolist() == LABELS.tolist()


def test_parquet_shards_of_the_hub_are_joined_in_order_and_others_left_out(tmp_path):
    parts = {f"a/data/train-{at:05}-of-00002.parquet": slice(at * 10, at * 10 + 10) for at in range(2)}
    files = {
        name: table(hub_images([encoded(image) for image in SMALL[rows]]), LABELS[rows], "img", "fine_label")
        for name, rows in parts.items()
    }
    files |= {"a/data/test-00000-of-00001.parquet": table(png_column(), LABELS, "img", "fine_label")}
    files |= {"a/data/validation-00000-of-00001.parquet": b"never opened"}
    write(tmp_path, files)
    own = load(tmp_path, "parquet:a/**/*.parquet", 5)
    assert [split.num_examples for split in (own.train, own.outer_valid, own.test)] == [16, 2, 20]
    drawn = [image.tobytes() for split in (own.train, own.outer_valid) for image in levels(split)]
    known = [image.tobytes() for image in SMALL]
    assert len(set(drawn)) == 18
    assert drawn != [image for image in known if image in drawn]  # mixed
    for split in (own.train, own.outer_valid):
        assert everything(split)[1].tolist() == [LABELS[known.index(image.tobytes())] for image in levels(split)]


def test_one_parquet_file_is_split(tmp_path):
    write(tmp_path, {"a.parquet": table(png_column(), LABELS)})
    own = load(tmp_path, "parquet:a.parquet", 5)
    assert [split.num_examples for split in (own.train, own.outer_valid, own.test)] == [12, 2, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: table(png_column(), LABELS, "picture"), "expected columns image and label, found picture, label"),
        (lambda: table(png_column(), LABELS.astype(float)), "column label: expected whole numbers, found double"),
        (
            lambda: table(png_column(), pa.array([0] * 19 + [None])),
            "row 19 of label: expected a whole number, found none",
        ),
        (lambda: table(png_column(), LABELS - 1), "row 0 of label: label -1 of example 0 out of range"),
        (lambda: table([b"x"] * 20, LABELS), "row 0 of image: not an image, or damaged within its 1 bytes"),
        (lambda: table([1.5] * 20, LABELS), "row 0 of image: expected encoded bytes or lists of pixels, found float"),
        (
            lambda: table([[1, 2, 3, 4, 5]] * 20, LABELS),
            r"row 0 of image: expected side\^2 or 3 side\^2 pixels, found 5",
        ),
        (lambda: table([[256]] * 20, LABELS), "row 0 of image: expected whole numbers from 0 to 255"),
        (lambda: table([[-1]] * 20, LABELS), "row 0 of image: expected whole numbers from 0 to 255"),
        (lambda: table([[0.5]] * 20, LABELS), "row 0 of image: expected whole numbers from 0 to 255, found float64"),
        (lambda: table([[[1, 2], [3]]] * 20, LABELS), "row 0 of image: expected rows of one length"),
        (lambda: table([[[[1, 2]]]] * 20, LABELS), r"row 0 of image: expected pixels \(h, w\) or .*found \(1, 1, 2\)"),
        (lambda: table([[[1]]] * 3 + [None], LABELS[:4]), "row 3 of image: expected encoded bytes.*found NoneType"),
        (lambda: table(pa.array([], pa.binary()), pa.array([], pa.int64())), "expected rows, found none"),
        (lambda: table(png_column(), LABELS)[:-1], "truncated or damaged: ArrowInvalid"),
        (lambda: table(png_column(), LABELS)[:100], "truncated or damaged: ArrowInvalid"),
        (lambda: b"", "truncated or damaged: ArrowInvalid"),
    ],
)
def test_a_parquet_file_of_the_wrong_kind_is_refused(tmp_path, data, message):
    write(tmp_path, {"a.parquet": data()})
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        load(tmp_path, "parquet:a.parquet", 5)


def test_parquet_files_that_are_not_there_and_tests_without_training_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a/\*\.parquet: expected files, found none"):
        load(tmp_path, "parquet:a/*.parquet", 5)
    write(tmp_path / "a", {"test.parquet": table(png_column(), LABELS)})
    with pytest.raises(DataError, match=r"test\.parquet: expected files that begin with train beside it, found none"):
        load(tmp_path, "parquet:a/*.parquet", 5)


# ---- what is kept


def entries(tmp_path):
    return sorted(tmp_path.glob("cache/images-*"))


def test_what_takes_long_to_read_is_kept_by_size_and_color(tmp_path):
    write(tmp_path / "mine", class_folders())
    for size, grey in ((8, False), (8, True), (6, False)):
        load(tmp_path, "folder:mine", size, grey)
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("dataset", ["folder:mine", "food101", "imagenet16", "parquet:a.parquet"])
def test_what_is_kept_is_what_was_read_and_nothing_is_decoded_again(tmp_path, monkeypatch, dataset):
    write(tmp_path / "mine", class_folders())
    write(tmp_path / "food101", food101_set())
    write(tmp_path / "imagenet16", imagenet_set()[0])
    write(tmp_path, {"a.parquet": table(png_column(), LABELS)})
    first = load(tmp_path, dataset, 8)
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr("tasks.data.loading.convert", None)
    again = load(tmp_path, dataset, 8, shift=1)
    for split, other in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(everything(split)[0], everything(other)[0])
        assert torch.equal(everything(split)[1], everything(other)[1])
    assert (first.train.rows, first.test.rows) == (again.train.rows, again.test.rows)


def test_a_changed_image_is_another_entry(tmp_path):
    write(tmp_path / "mine", class_folders())
    load(tmp_path, "folder:mine", 8)
    (tmp_path / "mine" / "ant" / "000.png").write_bytes(encoded(flat_image(255, 9, 9)))
    changed = load(tmp_path, "folder:mine", 8)
    assert len(entries(tmp_path)) == 2
    assert 255 in np.concatenate([levels(split) for split in (changed.train, changed.outer_valid, changed.test)]) or (
        changed.train.pixels.on(torch.device("cpu"))[0].max() == 255
    )


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: flipped(data, 5), lambda data: b""])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    write(tmp_path / "mine", class_folders())
    whole = everything(load(tmp_path, "folder:mine", 8).train)
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    again = everything(load(tmp_path, "folder:mine", 8).train)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])


def test_a_set_that_ends_in_an_error_leaves_no_entry(tmp_path):
    write(tmp_path / "mine", class_folders() | {"bee/last.png": b"damaged"})
    with pytest.raises(DataError, match=r"bee/last\.png: not an image"):
        load(tmp_path, "folder:mine", 8)
    assert not list((tmp_path / "cache").iterdir())


def test_sets_lie_on_a_remote_root_as_well(tmp_path, request):
    system, place = fsspec.filesystem("memory"), request.node.name
    files = {f"mine/{name}": data for name, data in class_folders(count=40).items()}  # more than are asked for at once
    files |= {f"imagenet16/{name}": data for name, data in imagenet_set(n=2)[0].items()}
    files |= {f"food101/{name}": data for name, data in food101_set().items()}
    files |= {"a.npz": npz(image=SMALL, label=LABELS), "b/train.parquet": table(png_column(), LABELS)}
    for name, data in files.items():
        system.pipe_file(f"/{place}/{name}", data)
    write(tmp_path / "local", files)
    remote = Library(DataConfig(root=f"memory://{place}", cache=str(tmp_path / "one")))
    local = Library(DataConfig(root=str(tmp_path / "local"), cache=str(tmp_path / "two")))
    for name in ("folder:mine", "imagenet16", "food101", "npz:a.npz", "parquet:b/*.parquet"):
        assert remote.missing(name) is None
        here, there = (library.images(name, 6).train.sample(keys(1, 0), 9) for library in (local, remote))
        assert torch.equal(here["image"], there["image"])
        assert torch.equal(here["label"], there["label"])
    system.rm(f"/{place}", recursive=True)


def test_rows_of_a_table_are_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("tasks.data.tables._ROWS", 3)
    from pyarrow import parquet

    read = list(_rows(parquet.ParquetFile(io.BytesIO(table(png_column(), LABELS))), "f"))
    assert [int(chunk.labels[0]) for chunk in read] == LABELS.tolist()
