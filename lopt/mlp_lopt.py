"""mlp_lopt: a small MLP over the gradient, the parameter and six momenta of each parameter.

Owns MLPLOpt of Metz et al. 2019 ("Understanding and correcting pathologies in the training of learned optimizers"),
the simplest of the per-parameter rules. 1,762 meta-parameters at hidden size 32. Never looks at losses or horizons.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from configs.checks import at_least
from lopt.accumulators import as_vector, decayed
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaSpec
from lopt.features import TIMESCALES, init_weights, mlp, mlp_entries, mlp_layers, step, time_features

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
NUM_COLUMNS = 2 + len(DECAYS)


class MlpLopt(LearnedOptimizer):
    """p <- p - 0.001 d exp(0.001 a), (d, a) = MLP(8 normalised columns, 11 time features). Digest 1.2."""

    name = "mlp_lopt"
    paper = "Metz et al. 2019, Understanding and correcting pathologies ... of learned optimizers, arXiv:1810.10180"
    jax_names: ClassVar[dict[str, str]] = {
        f"mlp.{leaf}{i}": f"mlp/linear_{i}/{leaf}" for i in range(3) for leaf in ("w", "b")
    }

    def __init__(self, hidden_size: int = 32) -> None:
        at_least("hidden_size", hidden_size, 1)
        self.hidden_size = hidden_size
        self.spec = ThetaSpec(mlp_entries(NUM_COLUMNS + len(TIMESCALES), hidden_size, hidden_size, 2))

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"hidden_size": self.hidden_size}

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps)}
        for name, param in params.items():
            p = as_vector(param)
            state[f"m/{name}"] = p.new_zeros(p.shape[0], len(DECAYS), *p.shape[1:])
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        decays = torch.tensor([DECAYS], device=loss.device, dtype=theta["mlp.w0"].dtype)
        weights, biases = mlp_layers(theta, time_features(state["iteration"]))
        new_params: Params = {}
        new_state: State = {"iteration": state["iteration"] + 1}
        for name, param in params.items():
            p, g = as_vector(param), as_vector(grads[name])
            m = decayed(state[f"m/{name}"], g, decays)
            out = mlp(weights, biases, [g.unsqueeze(1), p.unsqueeze(1), m], p.shape)
            new_params[name] = param - step(out).reshape(param.shape)
            new_state[f"m/{name}"] = m
        return new_params, new_state
