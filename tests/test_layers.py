"""Layers against naive formulas, and the distributions of initial weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.families.initializers import INITIALIZERS, KINDS, draw_initializer, weight
from tasks.families.layers import (
    batch_norm,
    conv,
    conv_as_product,
    conv_params,
    cross_entropies,
    cross_entropy,
    dropout,
    layer_norm,
    linear,
    linear_params,
    max_pool,
    norm_params,
    normalized,
)
from tasks.keys import generator
from tasks.random import keys


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator("layers", seed), dtype=torch.float64)


def same_windows(x, window, stride, fill):
    """(B, C, H, W) NumPy to (B, C, H', W', window, window), by TensorFlow's rule for SAME padding."""

    def padding(size):
        rest = size % stride or stride
        total = max(window - rest, 0)
        return total // 2, total - total // 2

    x = np.pad(x, ((0, 0), (0, 0), padding(x.shape[2]), padding(x.shape[3])), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (window, window), (2, 3))[:, :, ::stride, ::stride]


# ---- layers


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 3), st.booleans())
def test_convolution_and_pooling_pad_as_tensorflow_does(height, width, kernel, stride, bias):
    x, w, b = randn(2, 3, height, width), randn(4, 3, kernel, kernel, seed=1), randn(4, seed=2)
    params = {"a/w": w, "a/b": b} if bias else {"a/w": w}
    expected = np.einsum("bchwij,ocij->bohw", same_windows(x.numpy(), kernel, stride, 0.0), w.numpy())
    expected = torch.from_numpy(expected) + (b[:, None, None] if bias else 0)
    assert expected.shape == (2, 4, math.ceil(height / stride), math.ceil(width / stride))
    torch.testing.assert_close(conv(params, "a", x, stride), expected)
    torch.testing.assert_close(conv_as_product(params, "a", x, stride), expected)
    pooled = same_windows(x.numpy() - 9, kernel, stride, -np.inf).max((-2, -1))
    torch.testing.assert_close(max_pool(x - 9, kernel, stride), torch.from_numpy(pooled))


def test_a_linear_map_takes_any_leading_axes():
    params = {"a/w": randn(3, 2), "a/b": randn(2, seed=1)}
    x = randn(4, 5, 3, seed=2)
    torch.testing.assert_close(linear(params, "a", x)[1, 2], params["a/w"].T @ x[1, 2] + params["a/b"])


@pytest.mark.parametrize(
    ("norm", "shape", "axis", "over"),
    [
        (layer_norm, (6, 5), 1, (1,)),
        (layer_norm, (2, 6, 5), 2, (2,)),
        (batch_norm, (6, 5), 1, (0,)),
        (batch_norm, (2, 6, 5), 2, (0, 1)),
        (batch_norm, (6, 5, 3, 2), 1, (0, 2, 3)),
        (lambda *args: layer_norm(*args, axis=1), (6, 5, 3, 2), 1, (1,)),
    ],
)
def test_norms_are_the_formula(norm, shape, axis, over):
    x, scale, offset = 3 * randn(*shape) + 1, randn(5, seed=1), randn(5, seed=2)
    broadcast = [5 if i == axis else 1 for i in range(len(shape))]
    mean, variance = x.numpy().mean(over, keepdims=True), x.numpy().var(over, keepdims=True)
    expected = (x.numpy() - mean) / np.sqrt(variance + 1e-5)
    expected = torch.from_numpy(expected) * scale.reshape(broadcast) + offset.reshape(broadcast)
    torch.testing.assert_close(norm({"n/scale": scale, "n/offset": offset}, "n", x), expected)
    # The epsilon is seen where there is nothing to divide by.
    assert norm({"n/scale": scale, "n/offset": offset}, "n", torch.ones(shape).double()).isfinite().all()


def test_normalising_may_have_the_particles_in_front():
    x, scale, offset = randn(3, 6, 5), randn(3, 5, seed=1), randn(3, 5, seed=2)
    together = normalized(x, scale.unsqueeze(-2), offset.unsqueeze(-2), (-2,))
    alone = [batch_norm({"n/scale": scale[i], "n/offset": offset[i]}, "n", x[i]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_dropout_keeps_the_mean(rate):
    x = torch.full((200, 300), 2.0)
    out = dropout(x, keys(1, "drop")[0], rate)
    kept = out != 0
    assert kept.float().mean() == pytest.approx(1 - rate, abs=0.01)
    assert torch.allclose(out[kept], torch.tensor(2 / (1 - rate)))


def test_dropout_depends_on_the_key_alone_and_differs_between_particles():
    x, several = torch.ones(3, 50, 40), keys(3, "drop")
    together = torch.func.vmap(lambda x, key: dropout(x, key, 0.5))(x, several)
    assert torch.equal(together, dropout(x, several, 0.5))
    assert all(torch.equal(together[i], dropout(x[i], several[i], 0.5)) for i in range(3))
    assert (together[0] != together[1]).float().mean() == pytest.approx(0.5, abs=0.05)
    assert dropout(x, several, 0.0) is x


def test_cross_entropy_is_in_nats_and_a_mean_over_all_examples():
    logits, labels = randn(2, 7, 5), torch.arange(14).reshape(2, 7) % 5
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(2, 7)
    torch.testing.assert_close(cross_entropies(logits, labels), expected)
    torch.testing.assert_close(cross_entropy(logits, labels), expected.mean())
    assert cross_entropy(torch.zeros(3, 8), torch.tensor([0, 1, 7])).item() == pytest.approx(math.log(8))


def test_layers_start_with_zero_biases_and_as_the_identity():
    params = linear_params(generator(0), "a", 6, 4) | conv_params(generator(0), "c", 3, 5, 7) | norm_params("n", 9)
    assert {name: tuple(leaf.shape) for name, leaf in params.items()} == {
        "a/w": (6, 4),
        "a/b": (4,),
        "c/w": (5, 3, 7, 7),
        "c/b": (5,),
        "n/scale": (9,),
        "n/offset": (9,),
    }
    assert not any(params[name].any() for name in ("a/b", "c/b", "n/offset"))
    assert params["n/scale"].eq(1).all()
    assert list(conv_params(generator(0), "c", 3, 5, 7, bias=False)) == ["c/w"]
    # Kernels start by their whole fan-in, 3 * 7 * 7.
    many = conv_params(generator(0), "c", 3, 500, 7)["c/w"]
    assert many.std() == pytest.approx(0.8796 / math.sqrt(147), rel=0.01)


# ---- initializers


def drawn(kind, shape, fan_in, scale=1.0, seed=0):
    row = {"initializer": torch.tensor(KINDS.index(kind)), "initializer_scale": torch.tensor(scale)}
    return weight(generator("weights", seed), shape, fan_in, "dynamic", row)


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        ("haiku", stats.truncnorm(-2, 2, scale=0.05)),
        ("uniform", stats.uniform(-math.sqrt(3 / 400), 2 * math.sqrt(3 / 400))),
        ("normal", stats.norm(scale=0.05)),
    ],
)
def test_weights_have_their_distribution(kind, law):
    w = weight(generator(1), (400, 250), 400, kind)
    assert stats.kstest(w.flatten().numpy(), law.cdf).pvalue > 1e-3
    assert w.dtype == torch.float32


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_the_scale_multiplies(kind):
    torch.testing.assert_close(drawn(kind, (30, 20), 30, 1.7), 1.7 * drawn(kind, (30, 20), 30))
    assert torch.equal(drawn(kind, (30, 20), 30), weight(generator("weights", 0), (30, 20), 30, kind))


@pytest.mark.parametrize(
    ("shape", "fan_in"), [((7, 4), 7), ((4, 7), 4), ((5, 5), 5), ((4, 2, 3, 3), 18), ((30, 2, 3, 3), 18)]
)
def test_orthogonal_weights_are_orthogonal(shape, fan_in):
    w = drawn("orthogonal", shape, fan_in, scale=1.5)
    assert w.shape == shape
    matrix = w if len(shape) == 2 else w.flatten(1).T  # (fan in, out)
    assert matrix.shape[0] == fan_in
    gram = matrix.T @ matrix if fan_in >= matrix.shape[1] else matrix @ matrix.T
    torch.testing.assert_close(gram, 1.5**2 * torch.eye(len(gram)))


def test_orthogonal_weights_have_random_signs():
    corners = torch.stack([drawn("orthogonal", (4, 4), 4, seed=i) for i in range(400)])
    assert corners.mean(0).abs().max() < 4 * 0.5 / math.sqrt(400)
    assert corners.square().mean(0).sub(0.25).abs().max() < 0.08


def test_initializers_and_scales_are_drawn_uniformly():
    draws = draw_initializer(generator(3), 6000, "dynamic")
    assert draws["initializer"].bincount().tolist() == pytest.approx([2000, 2000, 2000], abs=200)
    scale = draws["initializer_scale"]
    assert 0.5 <= scale.min() < 0.51 < 1.99 < scale.max() <= 2
    assert scale.mean() == pytest.approx(1.25, abs=0.02)


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_only_a_dynamic_initializer_is_drawn(initializer):
    assert bool(draw_initializer(generator(3), 2, initializer)) == (initializer == "dynamic")


def test_a_dynamic_initializer_without_a_draw_is_haikus():
    assert torch.equal(weight(generator(1), (3, 4), 3, "dynamic"), weight(generator(1), (3, 4), 3, "haiku"))
