"""VeLO: an LSTM per tensor that mixes the small MLP updating the tensor's parameters out of a bank of them.

Owns the hypernetwork of Metz et al. 2022: what the LSTM sees of a tensor, the mixing of the bank and the step-size
factor. The per-parameter half is ``per_parameter``'s, the LSTM ``recurrent``'s. Never looks at the gradients itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.checks import at_least
from lopt import kernels, loss_features, recurrent, trace
from lopt.accumulators import Decays, as_vector, init_accumulators, safe_rsqrt
from lopt.base import Argument, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import STEP_MULT, clipped_log, init_weights, mlp_entries, moments
from lopt.per_parameter import Network, PerParameterRule

MLP = mlp_entries(30, 4, 4, 3)
"""One per-parameter MLP, its third output unused; theta holds a bank of them under the same names."""
NUM_RANKS = 5
NUM_INPUTS = len(recurrent.FRACTIONS) + loss_features.NUM_FEATURES + NUM_RANKS + 7
LSTM_STATE = ("lstm_hidden", "lstm_cell")
BANK_MULT = 100.0


class Velo(PerParameterRule):
    """p <- p - 0.001 c d exp(0.001 a) rms(p), (d, a) = MLP(30 normalised columns).

    The tensor's LSTM gives c, of either sign, and the MLP's weights: 100 mean_k(control_k bank_k). ``lstm_size`` 512
    and ``bank_size`` 256 are VeLO, 64 and 32 VeLO-S. Source: hyper_v2.py of learned_optimization (digest 1.6).

    ``compat=True`` is the original as the published VeLO weights were trained with it. ``compat=False`` mends what it
    calls ``var_rms``, three of the LSTM's inputs: here each is the variance of the second moments v over the tensor;
    there the mean squared distance of v from the mean of the *momentum* of one of three decays. Theta has the same
    shape under both and can be read under either.

    No setting brings back the rest of the original's defects: its dead mix layer has no part in the step (see
    ``recurrent``), and only weights older than the published VeLO want losses averaged as if ten steps were declared,
    or an LSTM that never leaves its first state.
    """

    name = "velo"
    paper = "Metz et al. 2022, VeLO: Training versatile learned optimizers by scaling up, arXiv:2211.09760"
    needs_loss = needs_horizon = True
    columns = kernels.VELO_COLUMNS
    diag_eps = 0.0
    max_gradient = 1000.0
    parameter_scaled = True
    jax_names = recurrent.JAX_NAMES | {
        "controls.w": "rnn_params/rnn_to_controls/w",
        "controls.b": "rnn_params/rnn_to_controls/b",
        "mlp.w0": tuple(f"ff_mod_stack/w0__{i}" for i in range(len(kernels.VELO_COLUMNS))),
        **{f"mlp.{leaf}": f"ff_mod_stack/{leaf}" for leaf in ("b0", "w1", "b1", "w2", "b2")},
    }

    def __init__(self, lstm_size: int = 512, bank_size: int = 256, compat: bool = False) -> None:
        at_least("lstm_size", lstm_size, 1)
        at_least("bank_size", bank_size, 1)
        self.lstm_size, self.bank_size, self.compat = lstm_size, bank_size, compat
        self.spec = ThetaSpec(
            (
                *(ThetaEntry(entry.name, (bank_size, *entry.shape)) for entry in MLP),
                *recurrent.entries(NUM_INPUTS, lstm_size),
                ThetaEntry("controls.w", (lstm_size, bank_size)),
                ThetaEntry("controls.b", (bank_size,)),
            )
        )

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"lstm_size": self.lstm_size, "bank_size": self.bank_size, "compat": self.compat}

    def init_theta(self, generator: torch.Generator) -> Theta:
        rules = [init_weights(ThetaSpec(MLP), generator) for _ in range(self.bank_size)]
        rest = ThetaSpec(self.spec.entries[len(MLP) :])
        return {name: torch.stack([rule[name] for rule in rules]) for name in rules[0]} | init_weights(rest, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {
            "iteration": torch.zeros_like(num_steps),
            "num_steps": num_steps.clone(),
            **loss_features.init(num_steps),
        }
        for name, p in params.items():
            state |= init_accumulators(name, p)
            state[f"lstm_hidden/{name}"] = theta["lstm.hidden"].clone()
            state[f"lstm_cell/{name}"] = theta["lstm.cell"].clone()
        return state

    def network(
        self,
        theta: Theta,
        state: State,
        params: Params,
        grads: Params,
        loss: Tensor,
        decays: Decays | None = None,
        statistics: Tensor | None = None,
    ) -> tuple[Network, State]:
        """``statistics``: the ``tensor_statistics``, where this process has only parts of the tensors."""
        new_state = {
            "iteration": state["iteration"] + 1,
            "num_steps": state["num_steps"],
            **loss_features.update(state, loss),
        }
        if statistics is None:
            served = kernels.serves(self, params, [theta["mlp.w0"]])
            statistics = kernels.tensor_statistics(state, params) if served else tensor_statistics(state, params)
        x = self._inputs(state, new_state, params, statistics)
        hidden, cell = (recurrent.rows(state, kind, params) for kind in LSTM_STATE)
        hidden, cell, step_size = recurrent.advance(theta, x, hidden, cell)
        trace.note("step_factor", step_size)
        for kind, rows in zip(LSTM_STATE, (hidden, cell), strict=True):
            new_state |= recurrent.per_tensor(kind, params, rows)
        weights, biases = _mixed(theta, recurrent.linear(hidden, theta["controls.w"], theta["controls.b"]))
        return Network(weights, biases, decays or self.decays(theta), STEP_MULT * step_size), new_state

    def _inputs(self, state: State, losses: State, params: Params, statistics: Tensor) -> Tensor:
        """What the LSTM sees of every tensor: (P, T, 30), in the original's order (by name).

        ``state`` is that before the step, ``losses`` the buffer with this step's loss.
        """
        p_square, m_mean, v_mean, m_variance, v_variance = torch.split(statistics, [1, 3, 1, 3, 1], dim=-1)
        fraction = recurrent.fraction_features(state["iteration"], state["num_steps"])
        time = torch.cat([fraction, loss_features.features(losses)], dim=-1).unsqueeze(1)
        ranks = [sum(size > 1 for size in p.shape[1:]) for p in params.values()]
        rank = torch.tensor([[float(rank == k) for k in range(NUM_RANKS)] for rank in ranks], device=time.device)
        # relative to the size of the parameters; the original scales v as it does m, though v goes with the square
        scale = safe_rsqrt(p_square)
        v_spread = v_variance.expand_as(m_variance)
        if self.compat:
            v_spread = v_spread + (v_mean - m_mean).square()
        blocks = [
            time.expand(-1, len(params), -1),
            _magnitude(v_mean * scale),
            rank.expand(len(time), -1, -1),
            _magnitude(m_variance * scale.square()),
            _magnitude(v_spread * scale.square()),
        ]
        return torch.cat(blocks, dim=-1)


def tensor_statistics(state: State, params: Params) -> Tensor:
    """Of each tensor and its accumulators *before* this step's gradient: (P, T, 9).

    These are the mean of p^2; the means over the tensor of the three momenta m and of v; the variances of m and of v.
    """
    rows = []
    for name, p in params.items():
        p_square = as_vector(p).flatten(1).square().mean(-1, keepdim=True)
        (m_mean, m_variance), (v_mean, v_variance) = (
            [moment.view(len(p), -1) for moment in moments(state[f"{kind}/{name}"].flatten(0, 1))] for kind in "mv"
        )
        rows.append(torch.cat([p_square, m_mean, v_mean, m_variance, v_variance], dim=-1))
    return torch.stack(rows, dim=1)


def _magnitude(x: Tensor) -> Tensor:
    return clipped_log(10 * x) * 0.5


def _mixed(theta: Theta, controls: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases (P, T, ...) of every tensor's MLP: the bank's K rules weighed by ``controls`` (P, T, K)."""
    bank = torch.cat([theta[entry.name].flatten(2) for entry in MLP], dim=-1)
    mixed = torch.einsum("ptk,pkn->ptn", controls, bank) * (BANK_MULT / bank.shape[1])
    parts = torch.split(mixed, [entry.size for entry in MLP], dim=-1)
    leaves = [part.reshape(*part.shape[:2], *entry.shape) for part, entry in zip(parts, MLP, strict=True)]
    return leaves[0::2], leaves[1::2]
