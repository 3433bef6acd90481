"""STAR: small_fc_lopt with a hand-designed step and a weight decay beside it, both of learned size.

Owns MLPNomLOpt of Harrison et al. 2022 ("A closer look at learned optimization: stability, robustness, and inductive
biases"): which estimate of the gradient the nominal step follows, what controls its size and the decay's, and how the
learned ("blackbox") step is scaled. 207 meta-parameters at hidden size 4. Never looks at losses or horizons.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import Tensor

from configs.checks import at_least, one_of
from lopt import chunked, features, kernels
from lopt.accumulators import (
    DECAYS,
    Statistics,
    align,
    as_vector,
    init_accumulators,
    learned_decays,
    update_accumulators,
)
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import EXP_MULT, TIMESCALES

NUM_COLUMNS = 28
DIAG_EPS = 1e-6
RSQRT_EPS = 1e-6
GRAD_ESTIMATORS = ("AdamAggMo", "Adam", "AggMo", "SGDM", "SGD")


class Star(LearnedOptimizer):
    """p <- (1 - w exp(0.001 c)) p - 0.001 d exp(0.001 a) - s exp(0.001 b) g_est, (d, a, b, c) = small_fc_lopt's MLP.

    Defaults are those of the original's code, under which it is small_fc_lopt. ``nominal_stepsize`` is s and
    ``weight_decay`` w. Without ``nominal_controller`` b is 1, without ``regularization_controller`` c is 0, for every
    parameter; with ``aggregate_magnitude``, ``aggregate_nom_magnitude`` and ``aggregate_reg_magnitude`` a, b and c are
    their means over the tensor. ``nominal_grad_estimator`` says what g_est is, of momenta m (decays 0.9, 0.99, 0.999)
    and the second moment v: the mean of m / sqrt(v + 1e-6) ("AdamAggMo"), its last ("Adam"), the mean of m ("AggMo"),
    its last ("SGDM"), the gradient ("SGD"). ``normalize_blackbox`` multiplies the learned step by 1 / sqrt(v + 1e-6),
    ``selfnormalize_blackbox`` by the mean of the gradient over the tensor.

    Source: adafac_nominal.py of learned_optimization; digest 1.5.
    """

    name = "star"
    paper = "Harrison et al. 2022, A closer look at learned optimization: stability, ..., arXiv:2209.11208"
    jax_names: ClassVar[dict[str, str]] = {
        **{f"mlp.{leaf}{i}": f"nn/{leaf}{i}" for i in range(3) for leaf in ("w", "b")},
        **{name: name for name in DECAYS},
    }

    def __init__(
        self,
        hidden_size: int = 4,
        nominal_stepsize: float = 0.0,
        weight_decay: float = 0.0,
        nominal_controller: bool = False,
        regularization_controller: bool = False,
        nominal_grad_estimator: str = "AdamAggMo",
        aggregate_magnitude: bool = False,
        aggregate_nom_magnitude: bool = False,
        aggregate_reg_magnitude: bool = False,
        normalize_blackbox: bool = False,
        selfnormalize_blackbox: bool = False,
    ) -> None:
        at_least("hidden_size", hidden_size, 1)
        at_least("nominal_stepsize", nominal_stepsize, 0)
        at_least("weight_decay", weight_decay, 0)
        one_of("nominal_grad_estimator", nominal_grad_estimator, GRAD_ESTIMATORS)
        self.hidden_size = hidden_size
        self.nominal_stepsize, self.weight_decay = nominal_stepsize, weight_decay
        self.nominal_controller, self.regularization_controller = nominal_controller, regularization_controller
        self.nominal_grad_estimator = nominal_grad_estimator
        self.aggregate_magnitude = aggregate_magnitude
        self.aggregate_nom_magnitude, self.aggregate_reg_magnitude = aggregate_nom_magnitude, aggregate_reg_magnitude
        self.normalize_blackbox, self.selfnormalize_blackbox = normalize_blackbox, selfnormalize_blackbox
        self.spec = ThetaSpec(
            (
                *features.mlp_entries(NUM_COLUMNS + len(TIMESCALES), hidden_size, hidden_size, 4),
                *(ThetaEntry(name, (len(initial),)) for name, initial in DECAYS.items()),
            )
        )

    @property
    def arguments(self) -> dict[str, Argument]:
        return {name: getattr(self, name) for name in inspect.signature(Star).parameters}

    def init_theta(self, generator: torch.Generator) -> Theta:
        return features.init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps)}
        for name, p in params.items():
            state |= init_accumulators(name, p)
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        weights, biases = features.mlp_layers(theta, features.time_features(state["iteration"]))
        decays = learned_decays(theta)
        new_params: Params = {}
        new_state: State = {"iteration": state["iteration"] + 1}
        for name, param in params.items():
            p, g = as_vector(param), as_vector(grads[name])
            accumulators, statistics = update_accumulators(name, state, g, decays)
            out = chunked.outputs(weights, biases, _blocks, p, g, statistics)
            new_params[name] = self._moved(p, g, statistics, out).reshape(param.shape)
            new_state |= accumulators
        return new_params, new_state

    def _moved(self, p: Tensor, g: Tensor, statistics: Statistics, out: Tensor) -> Tensor:
        """One tensor (P, *s) after its step; ``out`` is (P, 4, *s)."""
        direction, magnitude = out[:, 0], _aggregated(out[:, 1], self.aggregate_magnitude)
        step = direction * torch.exp(magnitude * EXP_MULT) * features.STEP_MULT
        if self.normalize_blackbox:
            step = step * torch.rsqrt(statistics.v[:, 0] + RSQRT_EPS)
        if self.selfnormalize_blackbox:
            step = step * _aggregated(g, True)
        moved = p - step
        # what is multiplied by zero is left out, so that it cannot make the parameters nan
        if self.weight_decay:
            control = out[:, 3] if self.regularization_controller else torch.zeros_like(p)
            control = _aggregated(control, self.aggregate_reg_magnitude)
            moved = (1 - self.weight_decay * torch.exp(control * EXP_MULT)) * p - step
        if self.nominal_stepsize:
            control = out[:, 2] if self.nominal_controller else torch.ones_like(p)
            control = _aggregated(control, self.aggregate_nom_magnitude)
            moved = moved - self.nominal_stepsize * torch.exp(control * EXP_MULT) * self._gradient(g, statistics)
        return moved

    def _gradient(self, g: Tensor, statistics: Statistics) -> Tensor:
        """The estimate g_est (P, *s) that the nominal step follows."""
        estimator, m = self.nominal_grad_estimator, statistics.m
        if estimator == "SGD":
            return g
        estimate = m.mean(1) if estimator in ("AdamAggMo", "AggMo") else m[:, -1]
        return estimate * torch.rsqrt(statistics.v[:, 0] + RSQRT_EPS) if "Adam" in estimator else estimate


def _blocks(p: Tensor, g: Tensor, statistics: Statistics) -> list[Tensor]:
    """The input columns of small_fc_lopt."""
    columns = features.columns(p, g, statistics, DIAG_EPS)
    return [columns[column] for column in kernels.SMALL_FC_COLUMNS]


def _aggregated(x: Tensor, aggregate: bool) -> Tensor:
    """x (P, *s), or its mean over the tensor, broadcastable to that."""
    return align(x.flatten(1).mean(-1), x) if aggregate else x
