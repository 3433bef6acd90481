"""Adam behind the same contract, so that it can be a baseline and be swept as a batch of particles.

Owns Adam (Kingma & Ba 2015) with bias correction and nothing else. theta is its learning rate: particles with
different learning rates are a tuning sweep in one batch, which ``torch.optim.Adam`` cannot do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.accumulators import align
from lopt.base import LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaSpec


class Adam(LearnedOptimizer):
    """p <- p - lr m_hat / (sqrt(v_hat) + eps)."""

    name = "adam"
    paper = "Kingma & Ba 2015, Adam: A method for stochastic optimization, arXiv:1412.6980"
    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self) -> None:
        self.spec = ThetaSpec((ThetaEntry("learning_rate", ()),))

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"learning_rate": torch.tensor(1e-3)}

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps)}
        for name, p in params.items():
            state |= {f"m/{name}": torch.zeros_like(p), f"v/{name}": torch.zeros_like(p)}
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        iteration = state["iteration"] + 1
        new_params: Params = {}
        new_state: State = {"iteration": iteration}
        for name, p in params.items():
            m = self.beta1 * state[f"m/{name}"] + (1 - self.beta1) * grads[name]
            v = self.beta2 * state[f"v/{name}"] + (1 - self.beta2) * grads[name].square()
            m_hat = m / align(1 - self.beta1**iteration, p)
            v_hat = v / align(1 - self.beta2**iteration, p)
            new_params[name] = p - align(theta["learning_rate"], p) * m_hat / (v_hat.sqrt() + self.eps)
            new_state |= {f"m/{name}": m, f"v/{name}": v}
        return new_params, new_state
