"""nn_adam: Adam whose hyper-parameters an LSTM steers, for every tensor on its own.

Owns NNAdam, the hyper-parameter controller of Metz et al. 2022 ("Practical tradeoffs between memory, compute, and
performance in learned optimizers"): 6,856 meta-parameters with 32 LSTM units, 21,896 with the 64 of the Celo paper.
Never looks at losses or horizons; tensors do not hear of each other.

The hyper-parameters live in the state as the controller sees them: 0.1 log of the rate, of 1 - beta1, of 1 - beta2 and
of epsilon, in this order. A step is made with the ones at hand, then the LSTM moves them.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from configs.checks import at_least
from lopt.accumulators import align, as_vector, decayed
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import clipped_log, init_weights, moments
from lopt.recurrent import LSTM_JAX_NAMES, linear, lstm, lstm_entries, per_tensor, rows

INITIAL = {"rate": 1e-4, "one_minus_beta1": 1 - 0.9, "one_minus_beta2": 1 - 0.999, "epsilon": 1e-8}
LOWEST = (1e-8, math.exp(-10), math.exp(-10), 1e-11)
HIGHEST = (1e3, 1.0, 1.0, 1e4)
NUM_FEATURES = 19
CONTROL_MULT = 0.01
MAX_GRADIENT = 1000.0


class NNAdam(LearnedOptimizer):
    """p <- p - lr (1 + eps) m / (eps + sqrt(v + 1e-10)), (lr, beta1, beta2, eps) moved by an LSTM. Digest 1.3.

    The factor 1 + eps makes a large eps SGD with momentum at a bounded rate.
    """

    name = "nn_adam"
    paper = "Metz et al. 2022, Practical tradeoffs ... in learned optimizers, arXiv:2203.11860"
    jax_names: ClassVar[dict[str, str]] = {
        **LSTM_JAX_NAMES,
        "controls.w": "rnn_to_controls_params/rnn_to_controls/w",
        "controls.b": "rnn_to_controls_params/rnn_to_controls/b",
        "initial.rate": "per_layer_lr",
        "initial.one_minus_beta1": "per_layer_beta1",
        "initial.one_minus_beta2": "per_layer_beta2",
        "initial.epsilon": "per_layer_epsilon",
    }

    def __init__(self, lstm_size: int = 32) -> None:
        at_least("lstm_size", lstm_size, 1)
        self.lstm_size = lstm_size
        self.spec = ThetaSpec(
            (
                *lstm_entries(NUM_FEATURES, lstm_size),
                ThetaEntry("controls.w", (lstm_size, len(INITIAL))),
                ThetaEntry("controls.b", (len(INITIAL),)),
                *(ThetaEntry(f"initial.{name}", ()) for name in INITIAL),
            )
        )

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"lstm_size": self.lstm_size}

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Adam at its usual hyper-parameters (rate 1e-4): the controls start at zero."""
        theta = init_weights(self.spec, generator)
        theta["controls.w"].zero_()
        return theta | {f"initial.{name}": torch.tensor(0.1 * math.log(value)) for name, value in INITIAL.items()}

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        initial = torch.stack([theta[f"initial.{name}"] for name in INITIAL], dim=-1)
        state: State = {}
        for name, param in params.items():
            zeros = torch.zeros_like(as_vector(param)).unsqueeze(1)
            state |= {f"m/{name}": zeros, f"v/{name}": zeros.clone(), f"hyper/{name}": initial.clone()}
            state |= {f"lstm_{part}/{name}": theta[f"lstm.{part}"].clone() for part in ("hidden", "cell")}
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        hyper = rows(state, "hyper", params)
        rate, beta1, beta2, epsilon = _natural(hyper)
        bounded_rate = rate * (1 + epsilon)
        new_params: Params = {}
        new_state: State = {}
        statistics = []
        for i, (name, param) in enumerate(params.items()):
            p, g = as_vector(param), as_vector(grads[name]).clamp(-MAX_GRADIENT, MAX_GRADIENT)
            m = decayed(state[f"m/{name}"], g, beta1[:, i, None])
            v = decayed(state[f"v/{name}"], g.square(), beta2[:, i, None])
            step = align(bounded_rate[:, i], v) / (align(epsilon[:, i], v) + torch.sqrt(v + 1e-10)) * m
            new_params[name] = param - step.reshape(param.shape)
            new_state |= {f"m/{name}": m, f"v/{name}": v}
            statistics.append(_statistics(p, g, m, v))
        ranks = [param.ndim - 1 for param in params.values()]
        x = _features(torch.stack(statistics, dim=1), hyper, ranks)
        hidden, cell = (rows(state, kind, params) for kind in ("lstm_hidden", "lstm_cell"))
        hidden, cell = lstm(theta["lstm.w"], theta["lstm.b"], x, hidden, cell)
        controls = linear(hidden, theta["controls.w"], theta["controls.b"])
        hyper = _controlled(*_natural(hyper + CONTROL_MULT * controls))
        for kind, leaves in (("hyper", hyper), ("lstm_hidden", hidden), ("lstm_cell", cell)):
            new_state |= per_tensor(kind, params, leaves)
        return new_params, new_state


def _natural(hyper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rate, beta1, beta2 and epsilon of hyper-parameters (..., 4) as the state holds them, within their bounds."""
    lowest, highest = (torch.tensor(bound, device=hyper.device) for bound in (LOWEST, HIGHEST))
    rate, one_minus_beta1, one_minus_beta2, epsilon = torch.exp(10 * hyper).clamp(lowest, highest).unbind(-1)
    return rate, 1 - one_minus_beta1, 1 - one_minus_beta2, epsilon


def _controlled(rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor) -> Tensor:
    """The inverse. Like the original it rounds 1 - beta to what a float32 beta tells of it."""
    return 0.1 * torch.log(torch.stack([rate, 1 - beta1, 1 - beta2, epsilon], dim=-1))


def _statistics(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Means of g, |g|, m, p, v and variances of g, m, p, v over one tensor: (P, 9)."""
    means, variances = zip(*(moments(x) for x in (g, m, p, v)), strict=True)
    return torch.stack([means[0], g.abs().flatten(1).mean(1), *means[1:], *variances], dim=-1)


def _features(statistics: Tensor, hyper: Tensor, ranks: list[int]) -> Tensor:
    """What the LSTM sees of every tensor: (P, T, 9) and hyper-parameters (P, T, 4) -> (P, T, 19)."""
    rate, one_minus_beta1, one_minus_beta2, epsilon = (hyper.clamp(-5, 5) * 0.2).unbind(-1)
    is_vector, is_scalar = (
        torch.tensor([1.0 if rank == expected else -1.0 for rank in ranks], device=hyper.device).expand_as(rate)
        for expected in (1, 0)
    )
    g, abs_g, m, p, v, *variances = (clipped_log(statistics) * 0.5).unbind(-1)
    sign_g, _, sign_m, sign_p, sign_v, *_ = torch.sign(statistics).unbind(-1)
    seen = [
        one_minus_beta1, one_minus_beta2, epsilon, is_vector, is_scalar, rate,
        g, sign_g, abs_g, m, sign_m, p, sign_p, v, sign_v, *variances,
    ]  # fmt: skip
    return torch.stack(seen, dim=-1)
