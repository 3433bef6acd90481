"""Multi-head self-attention of one particle: the part that transformer language models and vision transformers share.

Owns: the layer's four linear maps (which they are, and what they cost) and its forward pass. Must never choose how
they are initialised (each family has its own way) or what surrounds the layer (normalisation, residual, dropout).

Facts after google/learned_optimization's tasks/transformer.py (haiku) and flax's MultiHeadDotProductAttention: query,
key, value and output are separate linear maps with bias, a query meets the keys divided by sqrt(head size), and a
causal mask puts -1e30 in place of the future. flax keeps its kernels in three dimensions; here all are (in, out).

Plain products and a softmax: scaled_dot_product_attention has no batching rule for the CPU kernel and no second
derivative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks.base import Params
from tasks.families.layers import dropout, linear
from tasks.static import Work


def attention_layers(name: str, width: int, inner: int) -> dict[str, tuple[int, int]]:
    """The layer's linear maps, each with its (in, out), in the order of their parameters (``/w``, ``/b``).

    ``width`` is that of the sequence, ``inner`` the heads' sizes together.
    """
    inward = {f"{name}/{part}": (width, inner) for part in ("query", "key", "value")}
    return {**inward, f"{name}/output": (inner, width)}


def attention_work(batch_size: int, length: int, width: int, inner: int, heads: int) -> Work:
    """The work of one layer on (batch_size, length, width), causal or not, without dropout."""
    tokens = batch_size * length
    return Work(
        parameters=4 * width * inner + 3 * inner + width,
        flops=2 * tokens * (4 * width * inner + 2 * length * inner),
        activations=tokens * (5 * inner + 2 * width + 2 * heads * length),
    )


def attention(
    params: Params,
    name: str,
    x: Tensor,
    heads: int,
    *,
    causal: bool = False,
    rate: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """Each position's mixture of all positions (with ``causal``: of those not after it); (B, S, D) to (B, S, D).

    With a ``key`` () int64, of this layer alone, each attention weight (B, heads, S, S) is dropped at ``rate``.
    """
    batch, length, _ = x.shape
    query, keys, values = (
        linear(params, f"{name}/{part}", x).reshape(batch, length, heads, -1).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    scores = (query / math.sqrt(query.shape[-1])) @ keys.transpose(-1, -2)
    if causal:
        past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = torch.where(past, scores, -1e30)
    weights = scores.softmax(-1)
    if key is not None:
        weights = dropout(weights, key, rate)
    return linear(params, f"{name}/output", (weights @ values).transpose(1, 2).flatten(2))
