"""The letters drawn from fonts: what they are, that they repeat themselves, and that they can be learned."""

import numpy as np
import torch

from configs.schema import DataConfig
from tasks.data import Library
from tasks.data.catalogue import CATALOGUE
from tasks.data.glyphs import CLASSES, FACES, SIDE, VARIANTS, open_glyphs


def library(tmp_path):
    return Library(DataConfig(cache=str(tmp_path / "cache")))


def test_every_class_has_as_many_pictures_and_none_is_empty_or_cut_off():
    chunks = list(open_glyphs().training())
    images, labels = (np.concatenate(part) for part in zip(*chunks, strict=True))
    assert images.shape == (len(labels), 1, SIDE, SIDE)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2 * len(FACES) * VARIANTS] * CLASSES
    assert str(f"{len(labels):,}") in CATALOGUE["glyphs"].title
    ink = images.astype(float).sum((1, 2, 3)) / 255
    assert ink.min() > 10
    edge = np.concatenate([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], -1)
    assert (edge.max((1, 2)) < 128).mean() > 0.99
    again = np.concatenate([chunk.images for chunk in open_glyphs().training()])
    assert np.array_equal(images, again)


def test_pictures_of_one_letter_differ_and_of_one_class_look_alike():
    chunks = list(open_glyphs().training())
    for chunk in chunks[::100]:
        assert len({image.tobytes() for image in chunk.images}) == VARIANTS
    means = np.stack([chunk.images.mean(0).ravel() for chunk in chunks[:52]]).astype(float)
    assert np.linalg.norm(means[0] - means[1]) > 100


def test_the_set_is_kept_in_the_cache_with_all_classes_in_each_split(tmp_path):
    data = library(tmp_path).images("glyphs", 8, grey=True)
    assert [split.num_examples for split in (data.train, data.outer_valid, data.test)] == [9784, 1223, 3058]
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    again = library(tmp_path).images("glyphs", 8, grey=True)
    assert kept.stat().st_mtime_ns == before
    cpu = torch.device("cpu")
    for one, other in zip(data.train.pixels.on(cpu), again.train.pixels.on(cpu), strict=True):
        assert torch.equal(one, other)
    _, labels, order = data.train.pixels.on(cpu)
    for split in (data.train, data.outer_valid, data.test):
        assert len(labels[order[split.rows.start : split.rows.stop]].unique()) == CLASSES


def test_letters_can_be_told_apart_at_eight_pixels(tmp_path):
    data = library(tmp_path).images("glyphs", 8, grey=True)
    images, labels, order = data.train.pixels.on(torch.device("cpu"))
    pixels = images[order].flatten(1).float() / 255
    labels = labels[order]
    train, test = data.train.rows.stop, data.test.rows.start
    centres = torch.stack([pixels[:train][labels[:train] == label].mean(0) for label in range(CLASSES)])
    found = torch.cdist(pixels[test:], centres).argmin(1)
    accuracy = float((found == labels[test:]).float().mean())
    assert 0.3 < accuracy < 0.95, "the nearest mean knows some, and not all"
