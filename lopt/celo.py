"""Celo: a small MLP update rule scaled to each tensor, and a learned global step-size schedule.

Owns the optimizer of Moudgil et al. 2025 ("Celo: Training versatile learned optimizers on a compute diet") in its two
phases: phase 1 trains the update rule (the schedule is 1), phase 2 the schedule (the rule is frozen).

The original runs its schedule LSTM once per tensor although its inputs (time and loss) are global; here it runs once.
Its dead weights (a mix layer whose output is overwritten, controls under a softmax over one entry) are kept as frozen
entries, so that published checkpoints convert without loss, and are never computed with. Digest 1.7.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from configs.checks import ConfigError
from lopt import kernels, recurrent, schedule
from lopt.accumulators import Decays, init_accumulators
from lopt.base import Argument, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import STEP_MULT, init_weights
from lopt.per_parameter import Network, PerParameterRule

NUM_COLUMNS = 30
HIDDEN = 4


class Celo(PerParameterRule):
    """p <- p - lr(t, losses) 0.001 d exp(0.001 a) rms(p), (d, a) = MLP(30 normalised columns). Celo, section 3."""

    name = "celo"
    paper = "Moudgil et al. 2025, Celo: Training versatile learned optimizers on a compute diet, arXiv:2501.12670"
    columns = kernels.VELO_COLUMNS
    diag_eps = 0.0
    max_gradient = 1000.0
    parameter_scaled = True
    jax_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
        **recurrent.JAX_NAMES,
        "mlp.w0": tuple(f"ff_mod_stack/w0__{i}" for i in range(len(kernels.VELO_COLUMNS))),
        **{f"mlp.{leaf}": f"ff_mod_stack/{leaf}" for leaf in ("b0", "w1", "b1", "w2", "b2")},
        "dead.controls.w": "rnn_params/rnn_to_controls/w",
        "dead.controls.b": "rnn_params/rnn_to_controls/b",
    }

    def __init__(self, phase: int) -> None:
        if phase not in (1, 2):
            raise ConfigError("phase", phase, "1 (update rule) or 2 (schedule)")
        self.phase = phase
        self.needs_loss = self.needs_horizon = phase == 2
        rule = phase == 1
        self.spec = ThetaSpec(
            (
                ThetaEntry("mlp.w0", (NUM_COLUMNS, HIDDEN), frozen=not rule),
                ThetaEntry("mlp.b0", (HIDDEN,), frozen=not rule),
                ThetaEntry("mlp.w1", (HIDDEN, HIDDEN), frozen=not rule),
                ThetaEntry("mlp.b1", (HIDDEN,), frozen=not rule),
                ThetaEntry("mlp.w2", (HIDDEN, 3), frozen=not rule),
                ThetaEntry("mlp.b2", (3,), frozen=not rule),
                *schedule.entries(frozen=rule),
                ThetaEntry("dead.controls.w", (schedule.SIZE, 1), frozen=True),
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
            state |= schedule.init(theta, num_steps)
        for name, p in params.items():
            state |= init_accumulators(name, p)
        return state

    def network(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor, decays: Decays | None = None
    ) -> tuple[Network, State]:
        new_state: State = {"iteration": state["iteration"] + 1}
        factor = torch.full_like(loss, STEP_MULT)
        if self.phase == 2:
            schedule_state, lr = self.schedule(theta, state, loss)
            new_state |= schedule_state
            factor = factor * lr
        weights = [theta["mlp.w0"], theta["mlp.w1"], theta["mlp.w2"]]
        biases = [theta["mlp.b0"], theta["mlp.b1"], theta["mlp.b2"]]
        return Network(weights, biases, decays or self.decays(theta), factor), new_state

    def schedule(self, theta: Theta, state: State, loss: Tensor) -> tuple[State, Tensor]:
        """The learned step-size factor (P,) of this inner step, from the fraction of training done and the losses."""
        return schedule.update(theta, state, loss)
