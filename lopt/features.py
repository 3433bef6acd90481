"""What the per-parameter networks see, and the network itself.

Owns the input columns shared by small_fc_lopt, VeLO and Celo, their normalisation over each tensor, and the small MLP
that every parameter is passed through. Never holds state.

A column block is (P, k, *b) with b broadcastable to the tensor's shape s: columns that are constant along an axis
(Adafactor's rows and columns) are kept at size 1 there, so that the first layer multiplies them once per row or column
instead of once per parameter. The normalisers x / sqrt(mean(x^2) + 1e-5) are folded into the first layer's weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lopt.accumulators import Statistics, safe_rsqrt
from lopt.base import Theta, ThetaEntry, ThetaSpec

NORMALIZER_EPS = 1e-5
STEP_MULT = 0.001
EXP_MULT = 0.001
TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
_TIMESCALES = torch.tensor(TIMESCALES)


def columns(
    p: Tensor, g: Tensor, statistics: Statistics, diag_eps: float, rsqrt_eps: float = 1e-6
) -> dict[str, Tensor]:
    """All input columns of one tensor by name: p, g (P, *s) -> blocks (P, k, *b).

    Source: learned_optimization adafac_mlp_lopt.py and hyper_v2.py (digest 1.1, 1.6). ``diag_eps`` is what is added
    under the root of the factored momentum where nothing is factored: 1e-6 (small_fc_lopt) or 0 (VeLO, Celo);
    ``rsqrt_eps`` under that of the second moment: 1e-6, but 1e-8 in Celo2.
    """
    m, v, factored = statistics.m, statistics.v, statistics.factored
    rsqrt = torch.rsqrt(v + rsqrt_eps)
    g_block = g.unsqueeze(1)
    if factored.row_factor is None or factored.col_factor is None:
        factored_g = g_block * safe_rsqrt(factored.row + 1e-9)
        factored_m = m * torch.rsqrt(factored.row + diag_eps)
    else:
        factored_g = g_block * factored.row_factor * factored.col_factor
        factored_m = m * factored.row_factor * factored.col_factor
    return {
        "g": g_block,
        "clipped_g": g_block.clamp(-0.1, 0.1),
        "p": p.unsqueeze(1),
        "m": m,
        "v": v,
        "m_rsqrt": m * rsqrt,
        "rsqrt": rsqrt,
        "factored_g": factored_g,
        "g_rsqrt": g_block * rsqrt,
        "row": factored.row,
        "col": factored.col,
        "row_rsqrt": torch.rsqrt(factored.row + 1e-8),
        "col_rsqrt": torch.rsqrt(factored.col + 1e-8),
        "factored_m": factored_m,
    }


def mlp(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    blocks: Sequence[Tensor],
    shape: torch.Size,
    eps: float = NORMALIZER_EPS,
    scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """ReLU MLP applied to every parameter of one tensor.

    weights[i] (P, n_i, n_{i+1}), the rows of weights[0] in the order of ``blocks`` (P, k, *b); biases[i] (P, n_{i+1});
    ``shape`` is (P, *s); ``eps`` is the normalisers'. ``scales`` are the normalisers (P, k, 1) of each block where
    ``blocks`` are a part of the tensor only; otherwise they come from the blocks. Returns (P, n_out, prod(s)).
    """
    hidden = _first_layer(weights[0], biases[0], blocks, shape, eps, scales)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        hidden = torch.baddbmm(bias.unsqueeze(-1), weight.transpose(1, 2), torch.relu(hidden))
    return hidden


def square_sums(block: Tensor) -> tuple[Tensor, int]:
    """Sum of squares (P, k, 1) of each column of a block (P, k, *b), and how many numbers it is over."""
    x = block.flatten(2)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square(), x.shape[-1]


def normalizer(mean_square: Tensor, eps: float = NORMALIZER_EPS) -> Tensor:
    """What a column is multiplied by, so that its mean square over the tensor becomes one."""
    return torch.rsqrt(mean_square + eps)


def _first_layer(
    weight: Tensor,
    bias: Tensor,
    blocks: Sequence[Tensor],
    shape: torch.Size,
    eps: float,
    scales: Sequence[Tensor] | None,
) -> Tensor:
    """Columns of equal shape are multiplied together: those of the tensor's own shape, of its rows, of its columns."""
    rows = torch.split(weight, [block.shape[1] for block in blocks], dim=1)
    groups: dict[torch.Size, list[int]] = {shape[1:]: []}
    for i, block in enumerate(blocks):
        groups.setdefault(block.shape[2:], []).append(i)
    out = bias.reshape(*bias.shape, *(1 for _ in shape[1:]))
    for inner, members in groups.items():
        x = torch.cat([blocks[i].flatten(2) for i in members], dim=1)
        if scales is None:
            sums, count = square_sums(x)
            scale = normalizer(sums / count, eps)
        else:
            scale = torch.cat([scales[i] for i in members], dim=1)
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


def time_features(iteration: Tensor) -> Tensor:
    """tanh(t / tau - 1) for 11 timescales: (P,) -> (P, 11)."""
    scales = _TIMESCALES.to(iteration.device)
    return torch.tanh(iteration.to(torch.float32).unsqueeze(-1) / scales - 1)


def clipped_log(x: Tensor) -> Tensor:
    """log |x| in [-5, 5]: how large a statistic of a whole tensor is."""
    return torch.log(x.abs() + 1e-8).clamp(-5, 5)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over all of a tensor: (P, *s) -> (P,), (P,)."""
    x = x.flatten(1)
    mean = x.mean(1)
    # a norm takes a fraction of the time of torch.var_mean
    return mean, torch.linalg.vector_norm(x - mean.unsqueeze(1), dim=1).square() / x.shape[1]


def mlp_entries(*sizes: int) -> tuple[ThetaEntry, ...]:
    """The part of theta of an ``mlp`` with these layer sizes: mlp.w0, mlp.b0, mlp.w1, ..."""
    layers = enumerate(itertools.pairwise(sizes))
    return tuple(
        entry
        for i, (fan_in, fan_out) in layers
        for entry in (ThetaEntry(f"mlp.w{i}", (fan_in, fan_out)), ThetaEntry(f"mlp.b{i}", (fan_out,)))
    )


def mlp_layers(theta: Theta, constants: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of an ``mlp`` whose last inputs (P, k) are the same for a whole tensor.

    Those inputs become part of the first bias.
    """
    first = theta["mlp.w0"]
    columns = first.shape[1] - constants.shape[1]
    bias = theta["mlp.b0"] + (constants.to(first.dtype).unsqueeze(1) @ first[:, columns:]).squeeze(1)
    later = range(1, sum(name.startswith("mlp.w") for name in theta))
    return [first[:, :columns], *(theta[f"mlp.w{i}"] for i in later)], [bias, *(theta[f"mlp.b{i}"] for i in later)]


def step(out: Tensor) -> Tensor:
    """0.001 d exp(0.001 a) of the direction d and magnitude a, the first two outputs: (P, n_out, n) -> (P, n)."""
    return out[:, 0] * torch.exp(out[:, 1] * EXP_MULT) * STEP_MULT
