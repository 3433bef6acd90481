"""Image sets in memory: splits, what is stored, sampling on the device of the keys, shift and noise, and the bound."""

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from configs.schema import DataConfig
from tasks.data import Library
from tasks.data.catalogue import CATALOGUE, channels, num_classes, own_kind
from tasks.data.images import ImageDataset, Pixels
from tasks.data.loading import load_pixels
from tasks.data.resize import convert, resize
from tasks.errors import DataError
from tasks.random import keys
from tests.image_files import (
    config,
    everything,
    fingerprints,
    grey_reference,
    idx,
    idx_set,
    imagenet_set,
    load,
    npz,
    svhn_file,
    write,
)

LIBRARY = Library(DataConfig())
CPU = torch.device("cpu")


def digits(size=8, **augmentation):
    return LIBRARY.images("digits", size, **augmentation)


def dataset(images, labels=None, **augmentation):
    """A data set of these float images (n, side, side), all of them its only split."""
    n = len(images)
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    pixels = Pixels(images[:, None], labels, torch.arange(n), n)
    return ImageDataset(pixels, range(n), images.shape[-1], **augmentation)


# ---- splits


def test_digits_need_no_root_and_have_the_documented_splits():
    splits = (digits().train, digits().outer_valid, digits().test)
    assert [split.num_examples for split in splits] == [1149, 144, 360]
    for split in splits:
        images, labels = everything(split)
        assert images.shape == (split.num_examples, 1, 8, 8)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert torch.equal(images * 16, (images * 16).round())  # sixteenths, exactly
        assert torch.bincount(labels, minlength=10).min() >= 0.05 * split.num_examples  # every class in every split
    # Golden: the order is part of every published number.
    assert everything(digits().train)[1][:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert torch.equal(everything(digits().test)[1], everything(digits(4).test)[1])


def test_no_image_of_one_digits_split_is_in_another():
    train, valid, test = (fingerprints(split) for split in (digits().train, digits().outer_valid, digits().test))
    assert (len(train), len(valid), len(test)) == (1149, 144, 360)
    assert not train & test
    assert not train & valid
    assert not valid & test


def test_what_is_sampled_from_train_is_never_in_test():
    drawn = digits().train.sample(keys(1, 0), 20_000)["image"][0]
    seen = {image.numpy().tobytes() for image in drawn}
    assert len(seen) > 0.99 * 1149
    assert not seen & fingerprints(digits().test)


def test_file_splits_are_the_first_80_and_last_10_percent_and_the_test_file(tmp_path):
    files = idx_set(100, 20)
    files["train-images-idx3-ubyte"] = idx(np.arange(100, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2))
    write(tmp_path / "mnist", files)
    mnist = load(tmp_path, "mnist", 28)
    values = [
        (everything(split)[0][:, 0, 0, 0] * 255).round().int().tolist() for split in (mnist.train, mnist.outer_valid)
    ]
    assert values == [list(range(80)), list(range(90, 100))]
    assert mnist.test.num_examples == 20


@pytest.mark.parametrize("test_part", [True, False])
def test_a_set_in_the_order_of_its_classes_is_mixed_before_it_is_split(tmp_path, test_part):
    images, labels = np.arange(200, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2), np.arange(200) // 20
    arrays = {"image": images, "label": labels}
    if test_part:
        arrays = {f"train_{name}": array for name, array in arrays.items()}
        arrays |= {"test_image": images[:30] + 50, "test_label": labels[:30]}
    write(tmp_path, {"a.npz": npz(**arrays)})
    own = load(tmp_path, "npz:a.npz", 2, grey=True)
    splits = [
        (everything(split)[0][:, 0, 0, 0] * 255).round().int() for split in (own.train, own.outer_valid, own.test)
    ]
    assert [len(split) for split in splits] == ([160, 20, 30] if test_part else [128, 16, 40])
    assert set(splits[0].tolist()).isdisjoint(splits[1].tolist())
    if not test_part:
        assert set(splits[0].tolist()).isdisjoint(splits[2].tolist())
    for split, values in zip((own.train, own.outer_valid, own.test), splits, strict=True):
        _, kinds = everything(split)
        first = 50 if test_part and split is own.test else 0
        assert torch.equal(kinds, (values - first) // 20)  # labels move with their images
    assert torch.bincount(everything(own.train)[1], minlength=10).min() >= 5  # 12.8 or 16 expected
    again = load(tmp_path, "npz:a.npz", 2, grey=True)
    assert torch.equal(everything(again.train)[0], everything(own.train)[0])


def test_too_few_examples_to_split_are_refused(tmp_path):
    write(tmp_path / "mnist", idx_set(9))
    with pytest.raises(
        DataError, match=r"mnist: expected at least 10 training examples to split.*found 9 for training"
    ):
        load(tmp_path, "mnist", 8)


# ---- what is stored


def test_pixels_at_their_native_size_are_stored_exactly_as_bytes(tmp_path):
    data, images, _ = svhn_file()
    write(tmp_path / "svhn", {"train_32x32.mat": data, "test_32x32.mat": data})
    test = load(tmp_path, "svhn", 32).test
    stored, _, _ = test.pixels.on(CPU)
    assert stored.dtype == torch.uint8
    wanted = images.transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(stored[len(wanted) :], wanted)
    batch = test.sample(keys(2, 0), 50)
    assert batch["image"].shape == (2, 50, 3, 32, 32)
    known = {image.tobytes() for image in wanted}
    assert all((image * 255).round().byte().numpy().tobytes() in known for image in batch["image"].flatten(0, 1))
    np.testing.assert_allclose(
        everything(load(tmp_path, "svhn", 32, grey=True).test)[0],
        grey_reference(images.transpose(3, 0, 1, 2)),
        atol=0.5001 / 255,
    )


def test_grey_is_bt_601_luma_in_the_nearest_level():
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [10, 20, 30]], np.uint8)
    grey = convert(np.broadcast_to(colors[:, :, None, None], (6, 3, 4, 4)), 4, True)
    assert grey.shape == (6, 1, 4, 4)
    assert grey[:, 0, 0, 0].tolist() == [76, 150, 29, 255, 0, 18]  # 76.2, 149.7, 29.1, 255, 0, 18.2
    assert np.ptp(grey, axis=(1, 2, 3)).tolist() == [0] * 6


def test_shrinking_agrees_with_pillows_antialiased_bilinear_filter():
    image = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    small = convert(image.transpose(2, 0, 1)[None], 16, False)
    assert np.abs(small[0].transpose(1, 2, 0).astype(int) - wanted).max() <= 1


def test_shrinking_loses_no_pixel_and_keeps_the_mean():
    pixels = np.eye(784, dtype=np.uint8).reshape(784, 1, 28, 28) * 255  # each image has one white pixel
    small = resize(torch.from_numpy(pixels).float(), 4)
    # Bilinear interpolation without antialiasing would look at 64 of the 784 pixels only.
    assert (small.sum((1, 2, 3)) > 0).all()
    assert small.mean() == pytest.approx(255 / 784, rel=1e-3)
    enlarged = everything(digits(16).train)[0]
    assert enlarged.shape == (1149, 1, 16, 16)
    assert ((enlarged >= 0) & (enlarged <= 1)).all()


def test_conversion_in_blocks_is_the_conversion_of_all(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 12, 12), dtype=np.uint8)
    whole = convert(images, 5, True)
    monkeypatch.setattr("tasks.data.resize._PIXELS", 12 * 12 * 3 * 2 + 1)
    np.testing.assert_array_equal(convert(images, 5, True), whole)


def test_grey_images_asked_for_in_color_get_three_equal_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 6), dtype=np.uint8)
    write(tmp_path, {"a.npz": npz(image=images, label=np.arange(20) % 2)})
    stored = everything(load(tmp_path, "npz:a.npz", 6).train)[0]
    assert stored.shape[1] == 3
    assert torch.equal(stored[:, 0], stored[:, 1])
    assert torch.equal(stored[:, 0], stored[:, 2])


def test_imagenet_is_enlarged_batch_by_batch_and_not_in_memory(tmp_path):
    files, _, _ = imagenet_set()
    write(tmp_path / "imagenet16", files)
    large, native = load(tmp_path, "imagenet16", 24).train, load(tmp_path, "imagenet16", 16).train
    assert large.pixels.on(CPU)[0].shape[-1] == 16
    batch, small = (data.sample(keys(2, 0), 5) for data in (large, native))
    assert batch["image"].shape == (2, 5, 3, 24, 24)
    assert torch.equal(batch["label"], small["label"])
    wanted = torch.nn.functional.interpolate(small["image"].flatten(0, 1), (24, 24), mode="bilinear")
    torch.testing.assert_close(batch["image"].flatten(0, 1), wanted)
    assert torch.equal(load(tmp_path, "imagenet16", 24, shift=3).train.sample(keys(2, 0), 5)["label"], small["label"])


# ---- sampling


@pytest.mark.parametrize("augmentation", [{}, {"shift": 1, "noise": 0.1}])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (3, 16), (64, 64)])
def test_a_batch_has_the_shape_and_types_of_the_contract(n, size, augmentation):
    batch = digits(**augmentation).train.sample(keys(n, 0), size)
    assert batch["image"].shape == (n, size, 1, 8, 8)
    assert batch["label"].shape == (n, size)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    assert batch["image"].is_contiguous()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_a_row_of_a_batch_depends_on_its_key_alone(values, at):
    train = digits(shift=2, noise=0.1).train
    every = train.sample(torch.tensor(values), 7)
    at %= len(values)
    alone = train.sample(torch.tensor(values[at : at + 1]), 7)
    assert torch.equal(every["image"][at], alone["image"][0])
    assert torch.equal(every["label"][at], alone["label"][0])


def test_different_keys_draw_independently_and_every_example_is_as_likely():
    labels = torch.arange(50)
    drawn = dataset(torch.zeros(50, 1, 1), labels).sample(keys(200, "uniform"), 100)["label"]
    assert len({tuple(row.tolist()) for row in drawn}) == 200
    assert stats.chisquare(torch.bincount(drawn.flatten(), minlength=50)).pvalue > 0.001
    pairs = [(drawn[:-1], drawn[1:])]  # of consecutive keys, at the same place in the batch
    pairs += [(drawn[:, first], drawn[:, second]) for first, second in ((0, 1), (0, 99), (41, 42))]  # of one key
    for one, other in pairs:
        table = np.zeros((5, 5))
        np.add.at(table, (one // 10, other // 10), 1)
        assert stats.chi2_contingency(table).pvalue > 0.001


def test_images_keep_their_labels_and_the_rows_of_the_split_are_all_that_is_drawn():
    images = torch.arange(50.0)[:, None, None, None].expand(50, 1, 3, 3) / 100
    order = torch.from_numpy(np.random.default_rng(0).permutation(50))
    pixels = Pixels(images, torch.arange(50) % 7, order, 40)
    batch = ImageDataset(pixels, range(10, 30), 3).sample(keys(2, 0), 1000)
    which = (batch["image"][..., 0, 1, 1] * 100).round().long()
    assert torch.equal(batch["label"], which % 7)
    assert set(which.flatten().tolist()) == set(order[10:30].tolist())


def test_leaves_are_on_the_device_of_the_keys_and_copied_to_it_once():
    train = digits(shift=1, noise=0.1).train
    meta = train.sample(keys(3, 0).to("meta"), 5)  # stands for an accelerator
    assert {leaf.device.type for leaf in meta.values()} == {"meta"}
    assert meta["image"].shape == (3, 5, 1, 8, 8)
    device = torch.device("meta")
    assert train.pixels.on(device)[0] is train.pixels.on(device)[0]
    assert digits(noise=0.5).test.pixels is train.pixels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_what_the_cpu_draws():
    data = digits(shift=1).train
    cpu, gpu = data.sample(keys(8, 0), 64), data.sample(keys(8, 0, device="cuda"), 64)
    for name in cpu:
        assert torch.equal(cpu[name], gpu[name].cpu())


def test_shift_moves_the_image_and_fills_with_zeros():
    image = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    batch = dataset(image, shift=2).sample(keys(4, 1), 500)["image"].flatten(0, 2)
    wanted = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.zeros((5, 5), dtype=np.float32)
            for row in range(5):
                for column in range(5):
                    if 0 <= row - down < 5 and 0 <= column - right < 5:
                        moved[row, column] = image[0, row - down, column - right]
            wanted[moved.tobytes()] = (down, right)
    assert len(wanted) == 25
    moves = [wanted[drawn.numpy().tobytes()] for drawn in batch]
    counts = [moves.count(move) for move in wanted.values()]
    assert stats.chisquare(counts).pvalue > 0.001


def test_shift_moves_the_three_channels_of_an_image_together(tmp_path):
    write(tmp_path, {"a.npz": npz(image=RED, label=np.arange(20) % 2)})
    batch = load(tmp_path, "npz:a.npz", 6, shift=2).train.sample(keys(1, 0), 200)["image"][0]
    present = batch[:, 0] > 0
    torch.testing.assert_close(batch[:, 1], torch.where(present, 100 / 255, 0))
    torch.testing.assert_close(batch[:, 2], torch.where(present, 50 / 255, 0))
    assert len({image.numpy().tobytes() for image in present}) == 25


RED = np.broadcast_to(np.array([200, 100, 50], np.uint8), (20, 6, 6, 3))


def test_noise_is_gaussian_of_the_given_standard_deviation():
    images = torch.full((3, 8, 8), 0.5)
    data = dataset(images, noise=0.2)
    residual = (data.sample(keys(5, 0), 100)["image"] - 0.5).flatten()
    assert stats.kstest(residual.numpy() / 0.2, "norm").pvalue > 0.001
    assert len(residual.unique()) > 0.99 * len(residual)
    assert (images == 0.5).all()  # the data set itself stays clean
    assert (data.pixels.on(CPU)[0] == 0.5).all()


@pytest.mark.parametrize("augmentation", [{"shift": 1}, {"noise": 0.05}, {"shift": 1, "noise": 0.05}])
@pytest.mark.parametrize("split", ["train", "outer_valid", "test"])
def test_the_floor_equal_examples_look_different_in_every_split(split, augmentation):
    data = getattr(digits(**augmentation), split)
    images, _ = everything(data)
    drawn = dataset(images[:1, 0], **augmentation).sample(keys(1, 0), 64)["image"][0]
    assert len({image.numpy().tobytes() for image in drawn}) == (9 if augmentation == {"shift": 1} else 64)
    drawn, plain = (source.sample(keys(2, 3), 64) for source in (data, getattr(digits(), split)))
    assert torch.equal(drawn["label"], plain["label"])  # the same examples ...
    assert not torch.equal(drawn["image"], plain["image"])  # ... that look different


# ---- what stays in memory


def bytes_of(size):
    return 1797 * (4 * size * size + 16)


def test_data_sets_are_loaded_once_and_share_their_pixels(tmp_path):
    write(tmp_path / "mnist", idx_set())
    library = Library(config(tmp_path))
    first = library.images("mnist", 8)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").unlink()
    second = library.images("mnist", 8, grey=True, noise=0.1)  # grey is what MNIST is
    assert first.train.pixels is second.test.pixels
    with pytest.raises(DataError, match="train-images"):
        library.images("mnist", 9)


def test_no_more_than_the_bound_is_kept_and_the_least_recent_goes_first(monkeypatch):
    loaded = []

    def counted(dataset, size, grey, root):
        loaded.append(size)
        return load_pixels(dataset, size, grey, root)

    monkeypatch.setattr("tasks.data.library.load_pixels", counted)
    library = Library(DataConfig(), memory=bytes_of(4) + bytes_of(6) + bytes_of(8))
    for size in (4, 6, 8, 4):
        library.images("digits", size)
    assert loaded == [4, 6, 8]  # all three fit
    library.images("digits", 5)  # 6 is the least recent one
    gc.collect()
    library.images("digits", 8)
    library.images("digits", 4)
    assert loaded == [4, 6, 8, 5]
    library.images("digits", 6)
    assert loaded == [4, 6, 8, 5, 6]


def test_what_a_task_still_uses_is_not_loaded_again_and_a_copy_on_a_device_counts():
    library = Library(DataConfig(), memory=bytes_of(8) + bytes_of(4))
    held = library.images("digits", 8)
    library.images("digits", 12)  # alone larger than the bound: kept, the others go
    assert library.images("digits", 8).train.pixels is held.train.pixels
    small = library.images("digits", 4)
    assert set(library._kept) == {("digits", 8, True), ("digits", 4, True)}
    small.train.pixels.on(torch.device("meta"))
    assert small.train.pixels.bytes == 2 * bytes_of(4)
    library.images("digits", 4)
    assert set(library._kept) == {("digits", 4, True)}
    kept = held.train.pixels
    del held
    gc.collect()
    assert library.images("digits", 8).train.pixels is kept
    del kept
    library.images("digits", 20)
    gc.collect()
    assert ("digits", 8, True) not in library._in_use


# ---- names


def test_an_unknown_data_set_is_suggested():
    for ask in (num_classes, channels, LIBRARY.missing, lambda name: LIBRARY.images(name, 8)):
        with pytest.raises(DataError, match=r"'cifar-100'.*did you mean 'cifar100'"):
            ask("cifar-100")


def test_a_text_asked_for_as_images_is_refused():
    with pytest.raises(DataError, match="'pydoc' is text: expected images, one of digits, glyphs, mnist"):
        LIBRARY.images("pydoc", 8)


def test_the_catalogue_agrees_with_what_is_published():
    images = {
        name: (known.classes, known.channels, known.side) for name, known in CATALOGUE.items() if known.kind == "image"
    }
    assert images == {
        "glyphs": (26, 1, 28),
        "digits": (10, 1, 8),
        "mnist": (10, 1, 28),
        "fashion_mnist": (10, 1, 28),
        "kmnist": (10, 1, 28),
        "cifar10": (10, 3, 32),
        "cifar100": (100, 3, 32),
        "svhn": (10, 3, 32),
        "imagenet16": (1000, 3, 16),
        "imagenet32": (1000, 3, 32),
        "imagenet64": (1000, 3, 64),
        "food101": (101, 3, None),
    }
    for known in CATALOGUE.values():
        assert known.embedded != bool(known.files)
        assert known.licence
        for file in known.files:
            assert file.url.startswith(("https://", "http://"))
            assert not file.path.startswith("/")
            assert (known.kind != "image") or (file.size and len(bytes.fromhex(file.sha256)) == 32)


@pytest.mark.parametrize(
    ("name", "kind"), [("folder:a", "folder"), ("npz:/a.npz", "npz"), ("folder:", None), ("x:a", None)]
)
def test_the_users_own_sets_are_known_by_their_prefix(name, kind):
    assert own_kind(name) == kind
    if kind:
        assert channels(name) == 3
        with pytest.raises(DataError, match=r"must be given .num_classes"):
            num_classes(name)
    else:
        with pytest.raises(DataError, match="expected one of"):
            channels(name)


def test_more_classes_than_the_task_knows_are_refused(tmp_path):
    write(tmp_path, {"a.npz": npz(image=np.zeros((20, 4, 4), np.uint8), label=np.arange(20) % 3)})
    library = Library(config(tmp_path))
    assert library.images("npz:a.npz", 4, classes=3).train.num_examples == math.floor(16 * 0.8)
    with pytest.raises(DataError, match=r"npz:a\.npz: expected labels below num_classes = 2, found 2"):
        library.images("npz:a.npz", 4, classes=2)
