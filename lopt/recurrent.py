"""The recurrent half of VeLO and Celo: an LSTM that looks at the whole of training, over any number of rows.

Owns its layers (as haiku defines them), its part of theta, and how the time left looks to it. A row is what one LSTM
state belongs to: a tensor in VeLO, the training itself in Celo. Never knows what the rows' inputs mean or what is made
of the outputs, and holds no state.

Source: hyper_v2.py of learned_optimization (digest 1.6). Its first mix layer is computed and overwritten there; the
weights are kept as frozen entries ``dead.mix.*``, so that published checkpoints convert without loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lopt.base import State, Theta, ThetaEntry

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
JAX_NAMES = {
    "mix.w": "rnn_params/linear_1/w",
    "mix.b": "rnn_params/linear_1/b",
    "input.w": "rnn_params/linear_2/w",
    "input.b": "rnn_params/linear_2/b",
    "lstm.w": "rnn_params/rnn/linear/w",
    "lstm.b": "rnn_params/rnn/linear/b",
    "lstm.hidden": "lstm_init_state/hidden",
    "lstm.cell": "lstm_init_state/cell",
    "step_size.w": "rnn_params/step_size/w",
    "step_size.b": "rnn_params/step_size/b",
    "dead.mix.w": "rnn_params/linear/w",
    "dead.mix.b": "rnn_params/linear/b",
}
"""Where the originals keep these entries."""
LSTM_JAX_NAMES = {name: path for name, path in JAX_NAMES.items() if name.startswith("lstm.")}


def entries(inputs: int, size: int, frozen: bool = False) -> tuple[ThetaEntry, ...]:
    """The LSTM's part of theta, for ``inputs`` numbers per row and ``size`` LSTM units."""
    return (
        ThetaEntry("mix.w", (inputs, size), frozen),
        ThetaEntry("mix.b", (size,), frozen),
        ThetaEntry("input.w", (inputs, size), frozen),
        ThetaEntry("input.b", (size,), frozen),
        ThetaEntry("lstm.w", (2 * size, 4 * size), frozen),
        ThetaEntry("lstm.b", (4 * size,), frozen),
        ThetaEntry("lstm.hidden", (size,), frozen),
        ThetaEntry("lstm.cell", (size,), frozen),
        ThetaEntry("step_size.w", (size, 1), frozen),
        ThetaEntry("step_size.b", (1,), frozen),
        ThetaEntry("dead.mix.w", (inputs, size), frozen=True),
        ThetaEntry("dead.mix.b", (size,), frozen=True),
    )


def fraction_features(iteration: Tensor, num_steps: Tensor) -> Tensor:
    """tanh(10 (t/T - s)) for nine points s of the way: (P,), (P,) -> (P, 9)."""
    fraction = iteration / num_steps.to(torch.float32)
    return torch.tanh((fraction.unsqueeze(-1) - torch.tensor(FRACTIONS, device=fraction.device)) * 10)


def advance(theta: Theta, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every row: inputs (P, N, n), LSTM state (P, N, H) twice -> (new hidden, new cell, step size (P, N)).

    Rows hear of each other through the maximum of their mix layers.
    """
    mixed = torch.relu(linear(x, theta["mix.w"], theta["mix.b"])).amax(1, keepdim=True)
    x = linear(x, theta["input.w"], theta["input.b"]) + mixed
    hidden, cell = lstm(theta["lstm.w"], theta["lstm.b"], x, hidden, cell)
    return hidden, cell, linear(hidden, theta["step_size.w"], theta["step_size.b"]).squeeze(-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows x (P, N, n), weight (P, n, k), bias (P, k) -> (P, N, k)."""
    return torch.baddbmm(bias.unsqueeze(1), x, weight)


def lstm(weight: Tensor, bias: Tensor, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step as haiku's: gates i, g, f, o of one linear layer on [x, h], forget bias + 1.

    x (P, N, n), hidden and cell (P, N, H), weight (P, n + H, 4 H), bias (P, 4 H) -> new hidden, new cell.
    """
    i, g, f, o = linear(torch.cat([x, hidden], dim=-1), weight, bias).chunk(4, dim=-1)
    cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def rows(state: State, kind: str, names: Iterable[str]) -> Tensor:
    """What the state holds of every tensor under ``kind/name``, (P, n) each, as rows (P, N, n)."""
    return torch.stack([state[f"{kind}/{name}"] for name in names], dim=1)


def per_tensor(kind: str, names: Iterable[str], leaves: Tensor) -> State:
    """The inverse of ``rows``."""
    return {f"{kind}/{name}": leaf for name, leaf in zip(names, leaves.unbind(1), strict=True)}


def lstm_entries(inputs: int, size: int) -> tuple[ThetaEntry, ...]:
    """An LSTM's weights and its state before the first step, for ``inputs`` numbers per row."""
    return (
        ThetaEntry("lstm.w", (inputs + size, 4 * size)),
        ThetaEntry("lstm.b", (4 * size,)),
        ThetaEntry("lstm.hidden", (size,)),
        ThetaEntry("lstm.cell", (size,)),
    )
