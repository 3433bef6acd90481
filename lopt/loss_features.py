"""How the recent training losses look to a learned schedule (VeLO, Celo).

Owns the buffer of ten running means of the loss with half-lives from 10 to T steps, and the nine features made of it.
State lives under ``loss/...`` in the optimizer's state. Source: hyper_v2.py BufferLossAccumulators (digest 1.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.base import State

NUM_MEANS = 10
NUM_FEATURES = NUM_MEANS - 1


def init(num_steps: Tensor) -> State:
    """Empty buffer for horizons T (P,)."""
    exponents = torch.linspace(0, 1, NUM_MEANS, device=num_steps.device)
    halflife = 10 ** (1 + exponents * (torch.log10(num_steps.to(torch.float32)).unsqueeze(-1) - 1))
    decays = torch.exp(-1 / halflife)
    return {
        "loss/decays": decays,
        "loss/means": torch.zeros_like(decays),
        "loss/running_min": torch.full_like(decays, 999999999999.0),
        "loss/count": torch.zeros_like(num_steps),
    }


def update(state: State, loss: Tensor) -> State:
    """Take in one loss (P,), clipped to twice the largest running mean so that a spike cannot fill the buffer."""
    decays, means, count = state["loss/decays"], state["loss/means"], state["loss/count"]
    unbias = 1 - decays ** (count + 1).unsqueeze(-1)
    largest = torch.where(count == 0, loss, (means / unbias).amax(-1))
    loss = torch.minimum(2 * largest.abs(), loss)
    means = means * decays + loss.unsqueeze(-1) * (1 - decays)
    return {
        "loss/decays": decays,
        "loss/means": means,
        "loss/running_min": torch.minimum(state["loss/running_min"], means / unbias),
        "loss/count": count + 1,
    }


def features(state: State) -> Tensor:
    """Where each mean stands between its minimum and the next slower mean, in [-1, 1]: (P, 9); 0 in the first steps."""
    count = state["loss/count"].unsqueeze(-1)
    means = state["loss/means"] / (1 - state["loss/decays"] ** count)
    fast, slow, lowest = means[:, :-1], means[:, 1:], state["loss/running_min"][:, :-1]
    position = ((fast - lowest) / (slow - lowest).clamp_min(1e-8) - 1).clamp(-1, 1)
    return torch.where(count <= 2, torch.zeros_like(position), position)
