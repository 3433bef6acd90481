"""Celo: a small MLP update rule scaled to each tensor, and a learned global step-size schedule.

Owns the optimizer of Moudgil et al. 2025 ("Celo: Training versatile learned optimizers on a compute diet") in its two
phases: phase 1 trains the update rule (the schedule is 1), phase 2 the schedule (the rule is frozen).

The original runs its schedule LSTM once per tensor although its inputs (time and loss) are global; here it runs once.
Its dead weights (a mix layer whose output is overwritten, controls under a softmax over one entry) are kept as frozen
entries, so that published checkpoints convert without loss, and are never computed with. Digest 1.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt import loss_features
from lopt.accumulators import (
    ADAFACTOR_DECAYS,
    MOMENTUM_DECAYS,
    RMS_DECAYS,
    align,
    as_vector,
    init_accumulators,
    update_accumulators,
)
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import columns, init_weights, mlp

COLUMNS = (
    "g", "clipped_g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "g_rsqrt",
    "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip
NUM_COLUMNS = 30
HIDDEN = 4
LSTM = 64
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
STEP_MULT = 0.001
EXP_MULT = 0.001
MAX_GRADIENT = 1000.0


class Celo(LearnedOptimizer):
    """p <- p - lr(t, losses) 0.001 d exp(0.001 a) rms(p), (d, a) = MLP(30 normalised columns). Celo, section 3."""

    name = "celo"
    paper = "Moudgil et al. 2025, Celo: Training versatile learned optimizers on a compute diet, arXiv:2501.12670"

    def __init__(self, phase: int) -> None:
        if phase not in (1, 2):
            raise ValueError(f"phase = {phase!r}: expected 1 (update rule) or 2 (schedule)")
        self.phase = phase
        self.needs_loss = self.needs_horizon = phase == 2
        inputs = len(FRACTIONS) + loss_features.NUM_FEATURES
        rule, schedule = phase == 1, phase == 2
        self.spec = ThetaSpec(
            (
                ThetaEntry("mlp.w0", (NUM_COLUMNS, HIDDEN), frozen=not rule),
                ThetaEntry("mlp.b0", (HIDDEN,), frozen=not rule),
                ThetaEntry("mlp.w1", (HIDDEN, HIDDEN), frozen=not rule),
                ThetaEntry("mlp.b1", (HIDDEN,), frozen=not rule),
                ThetaEntry("mlp.w2", (HIDDEN, 3), frozen=not rule),
                ThetaEntry("mlp.b2", (3,), frozen=not rule),
                ThetaEntry("mix.w", (inputs, LSTM), frozen=not schedule),
                ThetaEntry("mix.b", (LSTM,), frozen=not schedule),
                ThetaEntry("input.w", (inputs, LSTM), frozen=not schedule),
                ThetaEntry("input.b", (LSTM,), frozen=not schedule),
                ThetaEntry("lstm.w", (2 * LSTM, 4 * LSTM), frozen=not schedule),
                ThetaEntry("lstm.b", (4 * LSTM,), frozen=not schedule),
                ThetaEntry("lstm.hidden", (LSTM,), frozen=not schedule),
                ThetaEntry("lstm.cell", (LSTM,), frozen=not schedule),
                ThetaEntry("step_size.w", (LSTM, 1), frozen=not schedule),
                ThetaEntry("step_size.b", (1,), frozen=not schedule),
                ThetaEntry("dead.mix.w", (inputs, LSTM), frozen=True),
                ThetaEntry("dead.mix.b", (LSTM,), frozen=True),
                ThetaEntry("dead.controls.w", (LSTM, 1), frozen=True),
                ThetaEntry("dead.controls.b", (1,), frozen=True),
            )
        )

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"phase": self.phase}

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps)}
        if self.phase == 2:
            state |= {
                "num_steps": num_steps.clone(),
                "lstm.hidden": theta["lstm.hidden"].clone(),
                "lstm.cell": theta["lstm.cell"].clone(),
                **loss_features.init(num_steps),
            }
        for name, p in params.items():
            state |= init_accumulators(name, p)
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        new_state: State = {"iteration": state["iteration"] + 1}
        lr: Tensor | None = None
        if self.phase == 2:
            schedule_state, lr = self.schedule(theta, state, loss)
            new_state |= schedule_state
        weights = [theta["mlp.w0"], theta["mlp.w1"], theta["mlp.w2"]]
        biases = [theta["mlp.b0"], theta["mlp.b1"], theta["mlp.b2"]]

        decays = _decays(loss.device)
        new_params: Params = {}
        for name, param in params.items():
            p, g = as_vector(param), as_vector(grads[name]).clamp(-MAX_GRADIENT, MAX_GRADIENT)
            accumulators, statistics = update_accumulators(name, state, g, decays)
            blocks = columns(p, g, statistics, diag_eps=0.0)
            out = mlp(weights, biases, [blocks[column] for column in COLUMNS], p.shape)
            scale = torch.sqrt(p.flatten(1).square().mean(-1) + 1e-9)
            scale = scale * STEP_MULT if lr is None else scale * STEP_MULT * lr
            step = out[:, 0] * torch.exp(out[:, 1] * EXP_MULT) * align(scale, out[:, 0])
            new_params[name] = param - step.reshape(param.shape)
            new_state |= accumulators
        return new_params, new_state

    def schedule(self, theta: Theta, state: State, loss: Tensor) -> tuple[State, Tensor]:
        """The learned step-size factor (P,) of this inner step, from the fraction of training done and the losses."""
        new_state = loss_features.update(state, loss)
        fraction = state["iteration"] / state["num_steps"].to(torch.float32)
        scales = torch.tensor(FRACTIONS, device=loss.device)
        x = torch.cat([torch.tanh((fraction.unsqueeze(-1) - scales) * 10), loss_features.features(new_state)], dim=-1)
        mixed = torch.relu(_linear(x, theta["mix.w"], theta["mix.b"]))
        x = _linear(x, theta["input.w"], theta["input.b"]) + mixed
        hidden, cell = _lstm(theta, x, state["lstm.hidden"], state["lstm.cell"])
        lr = torch.exp(_linear(hidden, theta["step_size.w"], theta["step_size.b"]).squeeze(-1)) * 0.1
        return new_state | {"num_steps": state["num_steps"], "lstm.hidden": hidden, "lstm.cell": cell}, lr


def _decays(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Celo's decays are fixed: one row that serves all particles."""
    momentum, rms, adafactor = (
        torch.tensor([values], device=device) for values in (MOMENTUM_DECAYS, RMS_DECAYS, ADAFACTOR_DECAYS)
    )
    return momentum, rms, adafactor


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (P, n), weight (P, n, k), bias (P, k) -> (P, k)."""
    return (x.unsqueeze(1) @ weight).squeeze(1) + bias


def _lstm(theta: Theta, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM step as haiku's: gates i, g, f, o of one linear layer on [x, h], forget bias + 1."""
    gates = _linear(torch.cat([x, hidden], dim=-1), theta["lstm.w"], theta["lstm.b"])
    i, g, f, o = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell
