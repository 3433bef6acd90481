"""Recurrent cells: what their parameters are, how these start, and how a cell runs along a batch of sequences.

Owns: the four cells' parameters, and which recurrence (``recurrence``) they drive how. Must never know tokens, losses
or data.

Equations, layout and initial values are dm-haiku's (recurrent.py), which the originals use, and for the identity RNN
google/learned_optimization's tasks/rnn.py:

- ``vanilla``: h = relu(x W + b + h U + c), with both biases (a ReLU, where torch.nn.RNN has tanh by default).
- ``irnn``: the same with U starting as the identity (Le, Jaitly & Hinton 2015).
- ``gru``: z, r = sigmoid(x W + h U + b), a = tanh(x W + (r * h) U + b), h = (1 - z) h + z a (Chung et al. 2014). The
  reset gate acts before the product, in torch.nn.GRU after it, and there z is what 1 - z is here.
- ``lstm``: i, f, o and g from one map of (x, h); c = sigmoid(f + 1) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c).
  Of haiku's the gates' order differs, which no optimizer can tell.

The initial state is a parameter that starts at zero. The products with the inputs of all steps are one large product,
so that along the time only that with the state remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.base import Params
from tasks.families.initializers import weight
from tasks.families.layers import affine, linear, linear_params
from tasks.families.recurrence import GRU, LSTM, RELU

TRUNCATED_STD = 0.87962566103423978
"""Of a standard normal cut off at two; haiku's VarianceScaling makes up for it, its Linear's default does not."""


class Cell(NamedTuple):
    """``init(generator, inputs, hidden)``; ``unroll(params, x)``: (B, S, inputs) to the states (B, S, hidden).

    ``gates``: how many times ``hidden`` the maps are wide. ``vectors``: of size ``hidden``, biases and initial states.
    """

    init: Callable[[torch.Generator, int, int], Params]
    unroll: Callable[[Params, Tensor], Tensor]
    gates: int
    vectors: int

    def parameters(self, inputs: int, hidden: int) -> int:
        """How many numbers ``init`` draws."""
        return self.gates * hidden * (inputs + hidden) + self.vectors * hidden

    def flops(self, inputs: int, hidden: int) -> int:
        """Of the products for one token."""
        return 2 * self.gates * hidden * (inputs + hidden)


def _vanilla_init(generator: torch.Generator, inputs: int, hidden: int) -> Params:
    return {
        **linear_params(generator, "core/input", inputs, hidden),
        **linear_params(generator, "core/hidden", hidden, hidden),
        "core/h0": torch.zeros(hidden),
    }


def _irnn_init(generator: torch.Generator, inputs: int, hidden: int) -> Params:
    return {**_vanilla_init(generator, inputs, hidden), "core/hidden/w": torch.eye(hidden)}


def _gru_init(generator: torch.Generator, inputs: int, hidden: int) -> Params:
    return {
        "core/input/w": weight(generator, (inputs, 3 * hidden), inputs) / TRUNCATED_STD,
        "core/hidden/w": weight(generator, (hidden, 3 * hidden), hidden) / TRUNCATED_STD,
        "core/b": torch.zeros(3 * hidden),
        "core/h0": torch.zeros(hidden),
    }


def _lstm_init(generator: torch.Generator, inputs: int, hidden: int) -> Params:
    return {
        **linear_params(generator, "core", inputs + hidden, 4 * hidden),
        "core/h0": torch.zeros(hidden),
        "core/c0": torch.zeros(hidden),
    }


def _start(state: Tensor, x: Tensor) -> Tensor:
    """The initial state (hidden,) of every sequence of ``x`` (B, S, inputs)."""
    return state.expand(x.shape[0], -1)


def _vanilla(params: Params, x: Tensor) -> Tensor:
    drives = linear(params, "core/input", x.transpose(0, 1)) + params["core/hidden/b"]
    return RELU(drives, params["core/hidden/w"], _start(params["core/h0"], x)).transpose(0, 1)


def _gru(params: Params, x: Tensor) -> Tensor:
    size = params["core/h0"].shape[-1]
    weights = params["core/hidden/w"].split_with_sizes((2 * size, size), 1)
    drives = affine(x.transpose(0, 1), params["core/input/w"], params["core/b"])
    return GRU(*drives.split_with_sizes((2 * size, size), -1), *weights, _start(params["core/h0"], x)).transpose(0, 1)


def _lstm(params: Params, x: Tensor) -> Tensor:
    size = params["core/h0"].shape[-1]
    inward, recurrent = params["core/w"].split_with_sizes((x.shape[-1], size))
    remember = x.new_zeros(4 * size)
    remember[size : 2 * size] = 1
    drives = affine(x.transpose(0, 1), inward, params["core/b"] + remember)
    return LSTM(drives, recurrent, *(_start(params[f"core/{name}"], x) for name in ("h0", "c0"))).transpose(0, 1)


CELLS = {
    "vanilla": Cell(_vanilla_init, _vanilla, gates=1, vectors=3),
    "gru": Cell(_gru_init, _gru, gates=3, vectors=4),
    "lstm": Cell(_lstm_init, _lstm, gates=4, vectors=6),
    "irnn": Cell(_irnn_init, _vanilla, gates=1, vectors=3),
}
