"""small_fc_lopt: a small MLP over momentum, second-moment and Adafactor features of each parameter.

Owns AdafacMLPLOpt of Metz et al. 2022 ("Practical tradeoffs between memory, compute, and performance in learned
optimizers", the ``small_fc_lopt`` of PyLO), with meta-learned decays. 197 meta-parameters at hidden size 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.accumulators import (
    ADAFACTOR_DECAYS,
    MOMENTUM_DECAYS,
    RMS_DECAYS,
    as_vector,
    init_accumulators,
    update_accumulators,
)
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import columns, init_weights, mlp

COLUMNS = (
    "g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip
NUM_COLUMNS = 28
TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
STEP_MULT = 0.001
EXP_MULT = 0.001


class SmallFcLopt(LearnedOptimizer):
    """p <- p - 0.001 d exp(0.001 a), (d, a) = MLP(28 normalised columns, 11 time features). Digest 1.1."""

    name = "small_fc_lopt"
    paper = "Metz et al. 2022, Practical tradeoffs ... in learned optimizers, arXiv:2203.11860"

    def __init__(self, hidden_size: int = 4) -> None:
        inputs = NUM_COLUMNS + len(TIMESCALES)
        self.hidden_size = hidden_size
        self.spec = ThetaSpec(
            (
                ThetaEntry("mlp.w0", (inputs, hidden_size)),
                ThetaEntry("mlp.b0", (hidden_size,)),
                ThetaEntry("mlp.w1", (hidden_size, hidden_size)),
                ThetaEntry("mlp.b1", (hidden_size,)),
                ThetaEntry("mlp.w2", (hidden_size, 2)),
                ThetaEntry("mlp.b2", (2,)),
                ThetaEntry("momentum_decays", (len(MOMENTUM_DECAYS),)),
                ThetaEntry("rms_decays", (len(RMS_DECAYS),)),
                ThetaEntry("adafactor_decays", (len(ADAFACTOR_DECAYS),)),
            )
        )

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"hidden_size": self.hidden_size}

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps)}
        for name, p in params.items():
            state |= init_accumulators(name, p)
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        momentum_decays = _decay(theta["momentum_decays"], MOMENTUM_DECAYS)
        rms_decays = _decay(theta["rms_decays"], RMS_DECAYS)
        adafactor_decays = _decay(theta["adafactor_decays"], ADAFACTOR_DECAYS)
        weights = [theta["mlp.w0"][:, :NUM_COLUMNS], theta["mlp.w1"], theta["mlp.w2"]]
        time = _time_features(state["iteration"])
        # time features are the same for all parameters, so they are part of the first bias
        first_bias = theta["mlp.b0"] + (time.unsqueeze(1) @ theta["mlp.w0"][:, NUM_COLUMNS:]).squeeze(1)
        biases = [first_bias, theta["mlp.b1"], theta["mlp.b2"]]

        new_params: Params = {}
        new_state: State = {"iteration": state["iteration"] + 1}
        for name, param in params.items():
            p, g = as_vector(param), as_vector(grads[name])
            decays = (momentum_decays, rms_decays, adafactor_decays)
            accumulators, statistics = update_accumulators(name, state, g, decays)
            blocks = columns(p, g, statistics, diag_eps=1e-6)
            out = mlp(weights, biases, [blocks[column] for column in COLUMNS], p.shape)
            step = out[:, 0] * torch.exp(out[:, 1] * EXP_MULT) * STEP_MULT
            new_params[name] = param - step.reshape(param.shape)
            new_state |= accumulators
        return new_params, new_state


def _decay(offset: Tensor, initial: tuple[float, ...]) -> Tensor:
    """Decays are learned as offsets (P, K) of log(1 - decay) / 10."""
    base = torch.log(1 - torch.tensor(initial, device=offset.device)) / 10
    return 1 - torch.exp((base + offset) * 10)


def _time_features(iteration: Tensor) -> Tensor:
    """tanh(t / tau - 1) for 11 timescales: (P,) -> (P, 11)."""
    scales = torch.tensor(TIMESCALES, device=iteration.device)
    return torch.tanh(iteration.to(torch.float32).unsqueeze(-1) / scales - 1)
