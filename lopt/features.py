"""What the per-parameter networks see, and the network itself.

Owns the input columns shared by small_fc_lopt, VeLO and Celo, their normalisation over each tensor, and the small MLP
that every parameter is passed through. Never holds state.

A column block is (P, k, *b) with b broadcastable to the tensor's shape s: columns that are constant along an axis
(Adafactor's rows and columns) are kept at size 1 there, so that the first layer multiplies them once per row or column
instead of once per parameter. The normalisers x / sqrt(mean(x^2) + 1e-5) are folded into the first layer's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lopt.accumulators import Statistics
from lopt.base import Theta, ThetaSpec

NORMALIZER_EPS = 1e-5


def columns(p: Tensor, g: Tensor, statistics: Statistics, diag_eps: float) -> dict[str, Tensor]:
    """All input columns of one tensor by name: p, g (P, *s) -> blocks (P, k, *b).

    Source: learned_optimization adafac_mlp_lopt.py and hyper_v2.py (digest 1.1, 1.6). ``diag_eps`` is what is added
    under the root of the factored momentum where nothing is factored: 1e-6 (small_fc_lopt) or 0 (VeLO, Celo).
    """
    m, v, factored = statistics.m, statistics.v, statistics.factored
    rsqrt = torch.rsqrt(v + 1e-6)
    g_block = g.unsqueeze(1)
    if factored.row_factor is None or factored.col_factor is None:
        factored_m = m * torch.rsqrt(factored.row + diag_eps)
    else:
        factored_m = m * factored.row_factor * factored.col_factor
    return {
        "g": g_block,
        "clipped_g": g_block.clamp(-0.1, 0.1),
        "p": p.unsqueeze(1),
        "m": m,
        "v": v,
        "m_rsqrt": m * rsqrt,
        "rsqrt": rsqrt,
        "factored_g": factored.g,
        "g_rsqrt": g_block * rsqrt,
        "row": factored.row,
        "col": factored.col,
        "row_rsqrt": torch.rsqrt(factored.row + 1e-8),
        "col_rsqrt": torch.rsqrt(factored.col + 1e-8),
        "factored_m": factored_m,
    }


def mlp(weights: Sequence[Tensor], biases: Sequence[Tensor], blocks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """ReLU MLP applied to every parameter of one tensor.

    weights[i] (P, n_i, n_{i+1}), the rows of weights[0] in the order of ``blocks`` (P, k, *b); biases[i] (P, n_{i+1});
    ``shape`` is (P, *s). Returns (P, n_out, prod(s)).
    """
    hidden = _first_layer(weights[0], biases[0], blocks, shape)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        hidden = torch.baddbmm(bias.unsqueeze(-1), weight.transpose(1, 2), torch.relu(hidden))
    return hidden


def _first_layer(weight: Tensor, bias: Tensor, blocks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Columns of equal shape are multiplied together: those of the tensor's own shape, of its rows, of its columns."""
    rows = torch.split(weight, [block.shape[1] for block in blocks], dim=1)
    groups: dict[torch.Size, list[int]] = {shape[1:]: []}
    for i, block in enumerate(blocks):
        groups.setdefault(block.shape[2:], []).append(i)
    out = bias.reshape(*bias.shape, *(1 for _ in shape[1:]))
    for inner, members in groups.items():
        x = torch.cat([blocks[i].flatten(2) for i in members], dim=1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + NORMALIZER_EPS)
        scaled = (torch.cat([rows[i] for i in members], dim=1) * scale).transpose(1, 2)
        out = out + (scaled @ x).reshape(*bias.shape, *inner)
    return out.flatten(2)


def init_weights(spec: ThetaSpec, generator: torch.Generator) -> Theta:
    """theta as haiku's layers start: weights (``...w*``) truncated normal, everything else zero.

    The normal is cut off at two sigma, sigma = 1 / sqrt(fan_in), and not corrected for it.
    """
    theta = {}
    for entry in spec.entries:
        leaf = torch.zeros(entry.shape)
        if entry.name.rpartition(".")[2].startswith("w"):
            sigma = entry.shape[0] ** -0.5
            torch.nn.init.trunc_normal_(leaf, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
        theta[entry.name] = leaf
    return theta
