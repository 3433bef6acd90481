"""Celo-Adam: Adam with fixed decays under Celo's learned step-size schedule.

Owns the ablation of Moudgil et al. 2025 in which only the schedule is learned. The Adafactor accumulators that the
original carries along unused are left out of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt import recurrent, schedule
from lopt.accumulators import align
from lopt.base import LearnedOptimizer, Params, State, Theta, ThetaSpec
from lopt.features import init_weights

DECAYS = (0.9, 0.999)
EPS = 1e-8
ROOT_EPS = 1e-10
STEP_MULT = 0.001
MAX_GRADIENT = 1000.0


class CeloAdam(LearnedOptimizer):
    """p <- p - 0.001 lr(t, losses) m_hat / (1e-8 + sqrt(v_hat + 1e-10)), g clipped to +-1000. Digest 1.8."""

    name = "celo_adam"
    paper = "Moudgil et al. 2025, Celo: Training versatile learned optimizers on a compute diet, arXiv:2501.12670"
    needs_loss = needs_horizon = elementwise = True
    jax_names = recurrent.JAX_NAMES

    def __init__(self) -> None:
        self.spec = ThetaSpec(schedule.entries())

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state = {"iteration": torch.zeros_like(num_steps), **schedule.init(theta, num_steps)}
        for name, p in params.items():
            state |= {f"m/{name}": torch.zeros_like(p), f"v/{name}": torch.zeros_like(p)}
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        scheduled, lr = schedule.update(theta, state, loss)
        iteration = state["iteration"] + 1
        # 1 - decay in fp32, as the original has it: the corrections then cancel the averages' own rounding
        decays = torch.tensor(DECAYS, device=loss.device)
        m_correction, v_correction = (1 - decays ** iteration.unsqueeze(-1)).unbind(-1)
        rate = STEP_MULT * lr / m_correction
        new_params: Params = {}
        new_state: State = {"iteration": iteration, **scheduled}
        for name, p in params.items():
            g = grads[name].clamp(-MAX_GRADIENT, MAX_GRADIENT)
            m = torch.lerp(state[f"m/{name}"], g, 1 - decays[0])
            v = torch.lerp(state[f"v/{name}"], g.square(), 1 - decays[1])
            root = torch.sqrt(v / align(v_correction, v) + ROOT_EPS)
            new_params[name] = p - align(rate, p) * m / (root + EPS)
            new_state |= {f"m/{name}": m, f"v/{name}": v}
        return new_params, new_state
