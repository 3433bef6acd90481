"""The multi-layer perceptron inside the MLP classifiers, auto-encoders and variational auto-encoders.

Owns: its parameters (``w0``, ``b0``, ``w1``, ...; weights (in, out)) and its forward pass, for one particle or many.
Must never know what goes in or what the output means.

These are the families of the inner loops that meta-training spends its time in, with matrices so small that
torch.func.vmap costs a third of a step. So here, and in what these families' losses are made of, tensors may have the
particles in front, alike in all of them, and a task takes them at once (``Task._forward``).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tasks.base import Dynamic, Params
from tasks.families.activations import activate
from tasks.families.initializers import weight


def mlp_params(
    generator: torch.Generator, prefix: str, widths: tuple[int, ...], initializer: str, dynamic: Dynamic
) -> Params:
    """Weights by the initializer and biases 0, of one particle; ``widths`` from the input to the output."""
    params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        params[f"{prefix}w{layer}"] = weight(generator, (fan_in, fan_out), fan_in, initializer, dynamic)
        params[f"{prefix}b{layer}"] = torch.zeros(fan_out)
    return params


def mlp_layer(params: Params, prefix: str, layer: int, x: Tensor) -> Tensor:
    """(*particles, B, in) to (*particles, B, out)."""
    w, b = params[f"{prefix}w{layer}"], params[f"{prefix}b{layer}"].unsqueeze(-2)
    return torch.baddbmm(b, x, w) if x.ndim == 3 else x @ w + b


def mlp(params: Params, prefix: str, x: Tensor, layers: int, activation: str, dynamic: Dynamic) -> Tensor:
    """(*particles, B, in) to (*particles, B, out) through ``layers`` layers, activated between them."""
    for layer in range(layers - 1):
        x = activate(activation, mlp_layer(params, prefix, layer, x), dynamic)
    return mlp_layer(params, prefix, layers - 1, x)


def mlp_size(widths: tuple[int, ...]) -> int:
    """The number of parameters, of which all but ``sum(widths[1:])`` are weights."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))


def mlp_flops(widths: tuple[int, ...], batch_size: int) -> int:
    """Of one forward pass over a batch."""
    return 2 * batch_size * sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))
