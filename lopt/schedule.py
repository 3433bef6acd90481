"""Celo's learned schedule: one LSTM that turns the time left and the losses so far into a step-size factor.

Owns the state of the schedule (its LSTM, the loss buffer and the horizon) and the factor made of it. Never looks at
parameters or gradients, so that it is one number for the whole model: the originals run one identical copy per tensor.
Source: Moudgil et al. 2025 and celo.py, celo_adam.py of its authors (digest 1.7, 1.8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt import loss_features, recurrent, trace
from lopt.base import State, Theta, ThetaEntry

SIZE = 64


def entries(frozen: bool = False) -> tuple[ThetaEntry, ...]:
    """The schedule's part of theta."""
    return recurrent.entries(len(recurrent.FRACTIONS) + loss_features.NUM_FEATURES, SIZE, frozen)


def init(theta: Theta, num_steps: Tensor) -> State:
    """The schedule before the first step, for horizons T (P,)."""
    return {
        "num_steps": num_steps.clone(),
        "lstm.hidden": theta["lstm.hidden"].clone(),
        "lstm.cell": theta["lstm.cell"].clone(),
        **loss_features.init(num_steps),
    }


def update(theta: Theta, state: State, loss: Tensor) -> tuple[State, Tensor]:
    """The schedule after one loss (P,), and the factor (P,) of this step; ``state`` also holds ``iteration`` (P,)."""
    losses = loss_features.update(state, loss)
    fraction = recurrent.fraction_features(state["iteration"], state["num_steps"])
    x = torch.cat([fraction, loss_features.features(losses)], dim=-1)
    hidden, cell, step_size = recurrent.advance(
        theta, x.unsqueeze(1), state["lstm.hidden"].unsqueeze(1), state["lstm.cell"].unsqueeze(1)
    )
    new = {"num_steps": state["num_steps"], "lstm.hidden": hidden.squeeze(1), "lstm.cell": cell.squeeze(1)}
    factor = torch.exp(step_size.squeeze(1)) * 0.1
    trace.note("schedule", factor)
    return losses | new, factor
