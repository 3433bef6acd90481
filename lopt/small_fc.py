"""small_fc_lopt: a small MLP over momentum, second-moment and Adafactor features of each parameter.

Owns AdafacMLPLOpt of Metz et al. 2022 ("Practical tradeoffs between memory, compute, and performance in learned
optimizers", the ``small_fc_lopt`` of PyLO), with meta-learned decays. 197 meta-parameters at hidden size 4.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from configs.checks import at_least, positive
from lopt import kernels
from lopt.accumulators import DECAYS, Decays, init_accumulators, learned_decays
from lopt.base import Argument, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import STEP_MULT, TIMESCALES, init_weights, mlp_entries, mlp_layers, time_features
from lopt.per_parameter import Network, PerParameterRule

NUM_COLUMNS = 28


class SmallFcLopt(PerParameterRule):
    """p <- p - 0.001 d exp(0.001 a), (d, a) = MLP(28 normalised columns, 11 time features). Digest 1.1.

    ``step_mult`` is the 0.001; the published weights of muLO were trained with 0.01.
    """

    name = "small_fc_lopt"
    paper = "Metz et al. 2022, Practical tradeoffs ... in learned optimizers, arXiv:2203.11860"
    columns = kernels.SMALL_FC_COLUMNS
    diag_eps = 1e-6
    jax_names: ClassVar[dict[str, str]] = {
        **{f"mlp.{leaf}": f"nn/{leaf}" for leaf in ("w0", "b0", "w1", "b1", "w2", "b2")},
        **{name: name for name in DECAYS},
    }

    def __init__(self, hidden_size: int = 4, step_mult: float = STEP_MULT) -> None:
        at_least("hidden_size", hidden_size, 1)
        positive("step_mult", step_mult)
        self.hidden_size, self.step_mult = hidden_size, step_mult
        self.spec = ThetaSpec(
            (
                *mlp_entries(NUM_COLUMNS + len(TIMESCALES), hidden_size, hidden_size, 2),
                *(ThetaEntry(name, (len(initial),)) for name, initial in DECAYS.items()),
            )
        )

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"hidden_size": self.hidden_size, "step_mult": self.step_mult}

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps)}
        for name, p in params.items():
            state |= init_accumulators(name, p)
        return state

    def decays(self, theta: Theta) -> Decays:
        return learned_decays(theta)

    def network(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor, decays: Decays | None = None
    ) -> tuple[Network, State]:
        # time features are the same for all parameters, so they are part of the first bias
        weights, biases = mlp_layers(theta, time_features(state["iteration"]))
        factor = torch.full_like(loss, self.step_mult)
        new_state = {"iteration": state["iteration"] + 1}
        return Network(weights, biases, decays or self.decays(theta), factor), new_state
