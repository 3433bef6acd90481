"""The counter-based generator: the same bits everywhere, and good ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tasks import random

KEYS = random.keys(64, "test")


def splitmix(seed, count):
    """The published algorithm (Steele, Lea & Flood 2014) in whole numbers."""
    mask, out = (1 << 64) - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@given(st.integers(-(2**63), 2**63 - 1))
def test_bits_are_those_of_splitmix64(seed):
    ours = random.bits(torch.tensor(seed), 5).tolist()
    assert [value % 2**64 for value in ours] == splitmix(seed % 2**64, 5)


def test_the_streams_of_recorded_keys_never_change():
    # Golden: a window must be computable again, on every machine and every version of torch.
    assert random.keys(2, 1, "worker").tolist() == [5805577609047743685, -1196671162017556756]
    key = random.fold(random.keys(1, 1, "worker")[0], "examples")
    assert random.integers(key, 1000, (4,)).tolist() == [59, 917, 665, 67]


def test_shapes_follow_the_keys_and_a_key_alone_gives_its_row():
    for draw in (random.normal, random.uniform, lambda key, shape: random.integers(key, 10, shape)):
        many = draw(KEYS, (3, 2))
        assert many.shape == (64, 3, 2)
        assert torch.equal(many[5], draw(KEYS[5], (3, 2)))
        assert torch.equal(many, torch.func.vmap(lambda key, draw=draw: draw(key, (3, 2)))(KEYS))
        assert draw(KEYS[0], ()).shape == ()


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(random.normal(KEYS[0], (10,))[:4], random.normal(KEYS[0], (4,)))


def test_global_generators_are_left_alone():
    before = torch.random.get_rng_state()
    random.normal(KEYS, (5,))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("high", [1, 7, 10, 1149, 2**31])
def test_integers_are_uniform_below_their_bound(high):
    drawn = random.integers(KEYS, high, (2000,)).flatten().numpy()
    assert drawn.min() >= 0
    assert drawn.max() < high
    counts = np.histogram(drawn, bins=min(high, 50), range=(0, high))[0]
    if (len(counts) > 1 and high % len(counts) == 0) or high in (7, 10):
        assert stats.chisquare(counts).pvalue > 1e-4
    assert high == 1 or len(set(drawn.tolist())) > min(high, 1000) * 0.9


def test_uniforms_and_normals_have_their_distributions():
    uniform, normal = random.uniform(KEYS, (4000,)).flatten(), random.normal(KEYS, (4000,)).flatten()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert uniform.max() < 1
    assert normal.isfinite().all()
    assert normal.dtype == uniform.dtype == torch.float32


def test_the_rarest_bits_give_finite_normals(monkeypatch):
    for word in (0, -1, 2**63 - 1, -(2**63), 0xFFFFFFFF):
        monkeypatch.setattr(random, "bits", lambda key, count, word=word: torch.full((count,), word))
        drawn = random.normal(torch.tensor(0), (2,))
        assert drawn.isfinite().all()
        assert drawn.abs().max() < 6.8


@pytest.mark.parametrize("other", ["fold", "fold number", "neighbour", "next key"])
def test_related_streams_are_uncorrelated(other):
    key = random.keys(2, "correlation")
    relatives = {
        "fold": random.fold(key[0], "x"),
        "fold number": random.fold(random.fold(key[0], 1), 2),
        "neighbour": key[0] + 1,
        "next key": key[1],
    }
    one, two = random.normal(key[0], (20000,)), random.normal(relatives[other], (20000,))
    assert abs(float((one * two).mean())) < 5 / math.sqrt(20000)


def test_folds_of_different_tags_and_keys_differ():
    tags = [*range(300), *(str(number) for number in range(300)), "examples", "model"]
    folded = torch.stack([random.fold(KEYS, tag) for tag in tags])
    assert folded.unique().numel() == folded.numel()


def test_fold_each_is_fold_of_every_tag():
    tags = [0, 7, -1, "examples", 2**40]
    assert torch.equal(random.fold_each(KEYS, tags), torch.stack([random.fold(KEYS, tag) for tag in tags]))
    by_pair = KEYS[:4].view(2, 2)
    assert torch.equal(random.fold_each(by_pair, tags)[3], random.fold(by_pair, "examples"))


def test_keys_depend_on_every_part():
    drawn = [random.keys(4, *key) for key in [(), (1,), ("1",), (1, 1), (11,), ("a", 1), (1, "a")]]
    assert torch.stack(drawn).unique().numel() == 4 * len(drawn)
    with pytest.raises(TypeError, match="expected an int or a str"):
        random.keys(1, 2.0)
