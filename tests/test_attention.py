"""Self-attention against torch's own, its mask, its dropout, its derivatives and its cost."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tasks.families.attention import attention, attention_layers, attention_work
from tasks.keys import generator
from tasks.random import keys

BATCH, LENGTH, WIDTH, INNER, HEADS = 2, 5, 6, 8, 4


def make(seed=0, dtype=torch.float64, inner=INNER):
    draws = generator("attention", seed)
    params = {}
    for layer, (fan_in, fan_out) in attention_layers("a", WIDTH, inner).items():
        params[f"{layer}/w"] = torch.randn(fan_in, fan_out, generator=draws, dtype=dtype)
        params[f"{layer}/b"] = torch.randn(fan_out, generator=draws, dtype=dtype)
    return params, torch.randn(BATCH, LENGTH, WIDTH, generator=draws, dtype=dtype)


def stacked(count=3, dtype=torch.float64):
    particles = [make(seed, dtype) for seed in range(count)]
    params = {name: torch.stack([one[name] for one, _ in particles]) for name in particles[0][0]}
    return params, torch.stack([x for _, x in particles])


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_attention_of_each_head(causal):
    params, x = make()
    size = INNER // HEADS

    def heads(part):
        y = F.linear(x, params[f"a/{part}/w"].T, params[f"a/{part}/b"])
        return torch.stack(y.split(size, -1), 1)  # head h is the h-th run of `size` channels

    mixed = F.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"), is_causal=causal)
    expected = F.linear(torch.cat(mixed.unbind(1), -1), params["a/output/w"].T, params["a/output/b"])
    torch.testing.assert_close(attention(params, "a", x, HEADS, causal=causal), expected)


def test_it_is_torchs_layer_of_the_same_weights():
    params, x = make(inner=WIDTH)
    layer = torch.nn.MultiheadAttention(WIDTH, 3, batch_first=True, dtype=x.dtype)
    parts = ("query", "key", "value")
    layer.load_state_dict(
        {
            "in_proj_weight": torch.cat([params[f"a/{part}/w"].T for part in parts]),
            "in_proj_bias": torch.cat([params[f"a/{part}/b"] for part in parts]),
            "out_proj.weight": params["a/output/w"].T,
            "out_proj.bias": params["a/output/b"],
        }
    )
    torch.testing.assert_close(attention(params, "a", x, 3), layer(x, x, x)[0])


def test_a_causal_position_sees_nothing_later():
    params, x = make()
    changed = x.clone()
    changed[:, 3:] += 1
    before, after = (attention(params, "a", y, HEADS, causal=True) for y in (x, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).any()
    free = attention(params, "a", changed, HEADS)
    assert not torch.isclose(free[:, :3], attention(params, "a", x, HEADS)[:, :3]).any()


@pytest.mark.parametrize("causal", [False, True])
def test_vmap_is_a_loop_over_particles(causal):
    params, x = stacked()
    key = keys(3, "vmap")

    def squared(params, x, key):
        return attention(params, "a", x, HEADS, causal=causal, key=key, rate=0.3).square().sum()

    grads, values = torch.func.vmap(torch.func.grad_and_value(squared))(params, x, key)
    for i in range(3):
        one = {name: leaf[i] for name, leaf in params.items()}
        grad, value = torch.func.grad_and_value(squared)(one, x[i], key[i])
        torch.testing.assert_close(values[i], value)
        for name, leaf in grad.items():
            torch.testing.assert_close(grads[name][i], leaf)


def test_second_derivatives_also_under_vmap():
    params, x = stacked(2)
    names = list(params)

    def batched(x, *leaves):
        particles = dict(zip(names, leaves, strict=True))
        return torch.func.vmap(lambda p, y: attention(p, "a", y, HEADS, causal=True))(particles, x)

    leaves = [leaf.requires_grad_() for leaf in (x, *params.values())]
    assert torch.autograd.gradcheck(batched, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(batched, leaves, fast_mode=True)


def test_dropout_is_a_function_of_the_key():
    params, x = make()
    one, other = keys(2, "dropout")

    def dropped(key, rate=0.5):
        return attention(params, "a", x, HEADS, key=key, rate=rate)

    assert torch.equal(dropped(one), dropped(one))
    assert not torch.isclose(dropped(one), dropped(other)).all()
    assert not torch.isclose(dropped(one), dropped(one, 0.2)).all()
    torch.testing.assert_close(dropped(one, 0.0), attention(params, "a", x, HEADS))


def test_dropout_preserves_the_expectation():
    """The output is linear in the attention weights, so its mean over many keys is what it is without dropout."""
    params, x = make()
    rate, count = 0.4, 4000
    many = torch.func.vmap(lambda key: attention(params, "a", x, HEADS, key=key, rate=rate))(keys(count, "mean"))
    error = (many.mean(0) - attention(params, "a", x, HEADS)) / (many.std(0) / math.sqrt(count))
    assert error.abs().max() < 4.5  # standard errors, of 60 numbers
    assert 0.8 < error.square().mean().sqrt() < 1.2


def test_dropout_drops_single_weights_of_each_head():
    """With one value that is 1 everywhere, a position's output counts the weights that are kept: each its own."""
    params, x = make()
    params |= {name: torch.zeros_like(params[name]) for name in ("a/query/w", "a/query/b", "a/value/w", "a/output/b")}
    params["a/value/b"] = torch.ones(INNER, dtype=x.dtype)
    params["a/output/w"] = torch.eye(INNER, WIDTH, dtype=x.dtype)
    out = attention(params, "a", x, HEADS, key=keys(1, "single")[0], rate=0.5)
    kept = out * LENGTH * 0.5  # the weights are 1 / LENGTH each, doubled where they are kept
    torch.testing.assert_close(kept, kept.round())
    assert len(kept[..., 0].unique()) > 2  # rows differ
    assert not torch.equal(kept[..., 0], kept[..., 2])  # heads differ (a head has two channels)
    assert torch.equal(kept[..., 0], kept[..., 1])
    assert not torch.equal(kept[0], kept[1])  # examples differ


@pytest.mark.parametrize("causal", [False, True])
def test_its_cost_is_counted(causal):
    params, x = make()
    work = attention_work(BATCH, LENGTH, WIDTH, INNER, HEADS)
    with FlopCounterMode(display=False) as counter:
        attention(params, "a", x, HEADS, causal=causal)
    assert work.flops == counter.get_total_flops()
    # query, key, value: 3 (6 * 8 + 8); output: 8 * 6 + 6
    assert work.parameters == sum(leaf.numel() for leaf in params.values()) == 222
    assert work.activations >= BATCH * LENGTH * (4 * INNER + 2 * HEADS * LENGTH)


def test_large_scores_stay_finite():
    params, x = make(dtype=torch.float32)
    big = {name: leaf * 1e4 for name, leaf in params.items()}
    grads, out = torch.func.grad_and_value(lambda p: attention(p, "a", x, HEADS, causal=True).mean())(big)
    assert out.isfinite()
    assert all(leaf.isfinite().all() for leaf in grads.values())
