"""JAX peers of four task families for ``inner_loop.py --families``: vmap(grad) of the loss, Celo phase 1, jit + scan.

    python benchmarks/jax_families.py [--particles 16] [--repeats 7] [--tune]          prints one JSON object
    python benchmarks/jax_families.py --serve                                          JSON lines in, JSON lines out

The models are those of ``tasks/families/{image_conv,rnn_lm,transformer_lm,vit}.py`` at the sizes of ``inner_loop.py``'s
``FAMILIES``, on parameters of the same names and layout; their losses are compared with the reference's before speeds.
Runs under any Python with jax; imports nothing of paceline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax_peer import Problem, Start, Timed, Variant, drawn, image_data, image_problem, random_start, serve, written
from jax_rules import Array, Tree

RULE = "celo/1"
EXAMPLES, TOKENS, VOCABULARY, UNKNOWN, CLASSES = 1149, 1_000_000, 256, 2, 10
LENGTH = 32
LAYERS, VIT_WIDTH, VIT_MLP, VIT_HEADS, PATCH = 2, 32, 64, 2, 2
WIDTH, HEADS, HEAD_SIZE = 64, 8, 32


def linear(params: Tree, name: str, x: Array) -> Array:
    return x @ params[f"{name}/w"] + params[f"{name}/b"]


def layer_norm(params: Tree, name: str, x: Array, eps: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * (lax.rsqrt(variance + eps) * params[f"{name}/scale"]) + params[f"{name}/offset"]


def cross_entropies(logits: Array, label: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], -1)[..., 0]


def attention(params: Tree, name: str, x: Array, heads: int, causal: bool) -> Array:
    batch, length, _ = x.shape
    q, k, v = (
        linear(params, f"{name}/{part}", x).reshape(batch, length, heads, -1) for part in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return linear(params, f"{name}/output", mixed.reshape(batch, length, -1))


def conv(x: Array, kernel: Array, stride: int) -> Array:
    """SAME convolution of (B, H, W, C) as one product: XLA's grouped convolutions, which vmap makes of lax's, take ten
    times as long on a CPU."""
    out, channels, size, _ = kernel.shape
    side = x.shape[1]
    result = -(-side // stride)
    total = max((result - 1) * stride + size - side, 0)
    edge = (total // 2, total - total // 2)
    padded = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    reach = stride * (result - 1) + 1
    windows = [padded[:, i : i + reach : stride, j : j + reach : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(windows, -1) @ kernel.transpose(2, 3, 1, 0).reshape(size**2 * channels, out)


def conv_loss(params: Tree, image: Array, label: Array) -> Array:
    """3x3 convolutions, the first with stride 2, relu, the mean over positions, a linear head."""
    x = image.transpose(0, 2, 3, 1)
    for layer, stride in enumerate((2, 1)):
        x = jax.nn.relu(conv(x, params[f"conv{layer}/w"], stride) + params[f"conv{layer}/b"])
    return cross_entropies(linear(params, "head", x.mean((1, 2))), label).mean()


def rnn_loss(params: Tree, obs: Array, target: Array, unroll: int = 4) -> Array:
    """An LSTM with gates i, f, o, g; the products with the inputs of all steps are one."""
    x = params["embedding/w"][obs]
    inputs, size = x.shape[-1], params["core/h0"].shape[0]
    drives = jnp.swapaxes(x @ params["core/w"][:inputs] + params["core/b"], 0, 1)
    recurrent = params["core/w"][inputs:]
    start = tuple(jnp.broadcast_to(params[f"core/{name}"], (len(obs), size)) for name in ("h0", "c0"))

    def step(carry: tuple[Array, Array], drive: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        i, f, o, g = jnp.split(drive + h @ recurrent, 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    _, states = lax.scan(step, start, drives, unroll=unroll)
    return cross_entropies(linear(params, "readout", jnp.swapaxes(states, 0, 1)), target).mean()


def transformer_loss(params: Tree, obs: Array, target: Array) -> Array:
    x = params["embedding/w"][obs]
    y = layer_norm(params, "layer0/norm0", x, 1e-5)
    x = x + attention(params, "layer0/attention", y, HEADS, causal=True)
    y = layer_norm(params, "layer0/norm1", x, 1e-5)
    x = x + linear(params, "layer0/mlp1", jax.nn.gelu(linear(params, "layer0/mlp0", y)))
    return cross_entropies(linear(params, "readout", layer_norm(params, "norm", x, 1e-5)), target).mean()


def vit_loss(params: Tree, image: Array, label: Array) -> Array:
    batch, channels, side, _ = image.shape
    count = side // PATCH
    patches = image.reshape(batch, channels, count, PATCH, count, PATCH).transpose(0, 2, 4, 1, 3, 5)
    kernel = params["embedding/w"]
    patches = patches.reshape(batch, count**2, -1) @ kernel.reshape(len(kernel), -1).T + params["embedding/b"]
    token = jnp.broadcast_to(params["class_token"], (batch, 1, kernel.shape[0]))
    x = jnp.concatenate([token, patches], 1) + params["position"]
    for name in (f"block{index}" for index in range(LAYERS)):
        y = layer_norm(params, f"{name}/norm0", x, 1e-6)
        x = x + attention(params, f"{name}/attention", y, VIT_HEADS, causal=False)
        y = layer_norm(params, f"{name}/norm1", x, 1e-6)
        x = x + linear(params, f"{name}/mlp1", jax.nn.gelu(linear(params, f"{name}/mlp0", y)))
    return cross_entropies(linear(params, "head", layer_norm(params, "norm", x[:, 0], 1e-6)), label).mean()


def linear_shapes(name: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/w": (fan_in, fan_out), f"{name}/b": (fan_out,)}


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/scale": (width,), f"{name}/offset": (width,)}


def block_shapes(name: str, width: int, inner: int, wide: int) -> dict[str, tuple[int, ...]]:
    shapes = norm_shapes(f"{name}/norm0", width) | norm_shapes(f"{name}/norm1", width)
    for part in ("query", "key", "value"):
        shapes |= linear_shapes(f"{name}/attention/{part}", width, inner)
    shapes |= linear_shapes(f"{name}/attention/output", inner, width)
    return shapes | linear_shapes(f"{name}/mlp0", width, wide) | linear_shapes(f"{name}/mlp1", wide, width)


class Family(NamedTuple):
    """``loss(params, image, label)`` or ``loss(params, obs, target)`` of one particle; ``variant`` is the fastest."""

    loss: Callable[..., Array]
    batch_size: int
    shapes: dict[str, tuple[int, ...]]
    variant: Variant


FAMILIES = {
    "image_conv": Family(
        conv_loss,
        64,
        {"conv0/w": (16, 1, 3, 3), "conv0/b": (16,), "conv1/w": (32, 16, 3, 3), "conv1/b": (32,)}
        | linear_shapes("head", 32, CLASSES),
        Variant("unrolled", "map"),
    ),
    "rnn_lm": Family(
        rnn_loss,
        16,
        {"embedding/w": (VOCABULARY, 32), "core/w": (64, 128), "core/b": (128,), "core/h0": (32,), "core/c0": (32,)}
        | linear_shapes("readout", 32, VOCABULARY),
        Variant("unrolled", "vmap"),
    ),
    "transformer_lm": Family(
        transformer_loss,
        8,
        {"embedding/w": (VOCABULARY, WIDTH)}
        | block_shapes("layer0", WIDTH, HEADS * HEAD_SIZE, 4 * WIDTH)
        | norm_shapes("norm", WIDTH)
        | linear_shapes("readout", WIDTH, VOCABULARY),
        Variant("unrolled", "vmap"),
    ),
    "vit": Family(
        vit_loss,
        32,
        {"embedding/w": (VIT_WIDTH, 1, PATCH, PATCH), "embedding/b": (VIT_WIDTH,)}
        | {"class_token": (1, 1, VIT_WIDTH), "position": (1, (8 // PATCH) ** 2 + 1, VIT_WIDTH)}
        | block_shapes("block0", VIT_WIDTH, VIT_WIDTH, VIT_MLP)
        | block_shapes("block1", VIT_WIDTH, VIT_WIDTH, VIT_MLP)
        | norm_shapes("norm", VIT_WIDTH)
        | linear_shapes("head", VIT_WIDTH, CLASSES),
        Variant("unrolled", "vmap"),
    ),
}  # fmt: skip
VARIANTS = [Variant(mlp, over) for mlp in ("unrolled", "dot") for over in ("vmap", "map")]


def problem(family: Family, data: Tree) -> Problem:
    """A draw is a seed, from which the indices of a batch are made within the scan."""
    if "image" in data:
        return image_problem(data, family.batch_size, family.loss)
    tokens = jnp.asarray(data["tokens"])

    def fetch(draw: Array) -> tuple[Array, ...]:
        starts = drawn(draw, family.batch_size, len(tokens) - LENGTH)
        ids = tokens[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)
        ids = jnp.where(ids < VOCABULARY, ids, UNKNOWN)
        return ids[:, :-1], ids[:, 1:]

    return Problem(fetch, family.loss)


def family_timed(name: str, path: str, start: Start, variant: Variant | None = None) -> Timed:
    family = FAMILIES[name]
    chosen = variant or family.variant
    return Timed(problem(family, start.data), written(RULE, chosen.mlp), chosen.over, chosen.unroll, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="JSON lines in, JSON lines out")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="time all variants, not only the best known")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(family_timed)
        return
    rng, found = np.random.default_rng(0), {}
    texts = {"tokens": rng.integers(3, VOCABULARY, TOKENS, dtype=np.uint8)}
    for name in chosen.families:
        data = image_data(rng, EXAMPLES) if name in ("image_conv", "vit") else texts
        start = random_start(RULE, FAMILIES[name].shapes, data, chosen.particles)
        for variant in VARIANTS if chosen.tune else [FAMILIES[name].variant]:
            running = family_timed(name, "jax", start, variant)
            rate = statistics.median(running.steps_per_second(0.5) for _ in range(chosen.repeats))
            found[f"{name} {'/'.join(map(str, variant))}"] = rate
            if chosen.tune:
                print(name, *variant, round(rate), f"{running.first_seconds:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps({"jax": jax.__version__, "particles": chosen.particles, "steps_per_second": found}))


if __name__ == "__main__":
    main()
