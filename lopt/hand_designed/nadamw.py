"""NAdamW with warm-up and cosine decay: the family that OptList's 1,000 configurations are drawn from.

Owns the rule and its schedule. Never holds the list: a configuration of ``opt_list.json`` is a theta, name by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lopt.base import Argument, State
from lopt.hand_designed.elementwise import BETAS
from lopt.hand_designed.rule import HandDesigned, Hyperparameter, Value, Values, correction, ema, learning_rate


class NAdamW(HandDesigned):
    """Adam with Nesterov momentum, both kinds of weight decay, and a learning rate that depends on the horizon.

    g <- g + l2_weight_decay p; lr_t = lr(t) sqrt(1 - beta2^t) / (1 - beta1^t);
    p <- p - lr_t (n / (sqrt(v) + epsilon) + adamw_weight_decay p), n = beta1 m + (1 - beta1) g with ``use_nesterov`` 1,
    n = m with 0, and in between for values in between. So epsilon is Adam's "epsilon hat", and the decoupled decay is
    bias-corrected with the step.

    lr(t), t = 0 ... num_steps: linear from 0 up to ``warmup_fraction`` of training (at most ``constant_fraction``),
    ``learning_rate`` until ``constant_fraction``, then half a cosine down to ``min_learning_rate_mult`` of it, where it
    stays. The first step of a warm-up is therefore zero.

    Textbook: lr 0.001, betas 0.9 and 0.999, epsilon 1e-8, no decay, Nesterov, 1 % warm-up, constant for half of
    training, down to 0. theta names are those of the list.

    ``compat`` reproduces learned_optimization's numbers, and with them its published baselines: there the gradient
    gets *minus* l2_weight_decay p, which drives weights away from zero (641 of the 1,000 configurations use it), and
    the warm-up lasts for the larger of both fractions, so that nothing is ever constant. (TaskSet's original has the
    first fault, but not the second.)
    """

    name = "nadamw"
    paper = "Metz et al. 2020, Using a thousand optimization tasks to learn hyperparameter search, arXiv:2002.11887"
    elementwise = True
    needs_horizon = True
    hyperparameters = (
        learning_rate(1e-3),
        *BETAS,
        Hyperparameter("epsilon", 1e-8),
        Hyperparameter("use_nesterov", 1.0, "linear"),
        Hyperparameter("adamw_weight_decay", 0.0, "linear"),
        Hyperparameter("l2_weight_decay", 0.0, "linear"),
        Hyperparameter("warmup_fraction", 0.01, "linear"),
        Hyperparameter("constant_fraction", 0.5, "linear"),
        Hyperparameter("min_learning_rate_mult", 0.0, "linear"),
    )
    slots = ("m", "v")

    def __init__(self, compat: bool = False, log_space: bool = False) -> None:
        super().__init__(log_space)
        self.compat = compat

    @property
    def arguments(self) -> dict[str, Argument]:
        return super().arguments | {"compat": self.compat}

    def schedule(self, h: Mapping[str, Value], done: Tensor) -> Tensor:
        """The factor of the learning rate after the fraction ``done`` (P,) of training."""
        done = done.clamp_max(1)
        like = torch.zeros_like(done)
        constant, warmup = h["constant_fraction"] + like, h["warmup_fraction"] + like
        rising = warmup.maximum(constant) * (warmup > 0) if self.compat else warmup.minimum(constant)
        least, tiny = h["min_learning_rate_mult"], 1e-12
        angle = math.pi * (done.maximum(constant) - constant) / (1 - constant).clamp_min(tiny)
        falling = least + (1 - least) * (torch.cos(angle) + 1) / 2
        return torch.where(done < rising, done / rising.clamp_min(tiny), falling)

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        t = state["iteration"]
        factor = self.schedule(h, (t - 1) / state["num_steps"])
        bias = correction(h["beta2"], t).sqrt() / correction(h["beta1"], t)
        return {"rate": h["learning_rate"] * factor * bias}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        l2 = h["l2_weight_decay"] * p
        g = g - l2 if self.compat else g + l2
        m, v = ema(s["m"], g, h["beta1"]), ema(s["v"], g.square(), h["beta2"])
        n = m + h["use_nesterov"] * (1 - h["beta1"]) * (g - m)
        p = p * (1 - h["rate"] * h["adamw_weight_decay"])
        return torch.addcdiv(p, -h["rate"] * n, v.sqrt() + h["epsilon"]), {"m": m, "v": v}
