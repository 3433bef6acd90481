"""Data sets: splits, sampling, shift and noise; where they are read from, and the cache."""

import time

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from configs.schema import DataConfig
from tasks import DataError, generator
from tasks.datasets import ImageDataset, load_datasets
from tasks.files import DataRoot
from tests.image_files import config, everything, fingerprints, idx, idx_set, write

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
