"""Rules that update every parameter by itself: SGD, momentum, and the family of Adam.

Owns their arithmetic. Never couples two parameters, so that a tensor may be cut anywhere.

Textbook values are torch.optim's where it has the rule (but SGD's rate is optax's), else those of the paper's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lopt.base import Argument, State
from lopt.hand_designed.rule import (
    HandDesigned,
    Hyperparameter,
    Value,
    Values,
    correction,
    decay,
    ema,
    learning_rate,
)

BETAS = (decay("beta1", 0.9), decay("beta2", 0.999))


class SGD(HandDesigned):
    """p <- p - lr g. Textbook: lr 0.01."""

    name = "sgd"
    paper = "Robbins & Monro 1951, A stochastic approximation method, doi:10.1214/aoms/1177729586"
    elementwise = True
    hyperparameters = (learning_rate(0.01),)

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        return p - h["learning_rate"] * g, {}


class SGDM(HandDesigned):
    """m <- momentum m + g; p <- p - lr m, or with ``nesterov`` p <- p - lr (g + momentum m). Textbook: lr 0.01, 0.9."""

    name = "sgdm"
    paper = "Sutskever et al. 2013, On the importance of initialization and momentum in deep learning, ICML"
    elementwise = True
    hyperparameters = (learning_rate(0.01), decay("momentum", 0.9))
    slots = ("m",)

    def __init__(self, nesterov: bool = False, log_space: bool = False) -> None:
        super().__init__(log_space)
        self.nesterov = nesterov

    @property
    def arguments(self) -> dict[str, Argument]:
        return super().arguments | {"nesterov": self.nesterov}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        m = h["momentum"] * s["m"] + g
        return p - h["learning_rate"] * (g + h["momentum"] * m if self.nesterov else m), {"m": m}


class Adam(HandDesigned):
    """p <- p - lr m_hat / (sqrt(v_hat) + eps). Textbook: lr 0.001, betas 0.9 and 0.999, eps 1e-8."""

    name = "adam"
    paper = "Kingma & Ba 2015, Adam: A method for stochastic optimization, arXiv:1412.6980"
    elementwise = True
    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (learning_rate(1e-3), *BETAS, Hyperparameter("eps", 1e-8))
    slots = ("m", "v")

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        """Both bias corrections as factors of the rate and of eps (the end of the paper's section 2)."""
        root = correction(h["beta2"], state["iteration"]).sqrt()
        rate = h["learning_rate"] * root / correction(h["beta1"], state["iteration"])
        return {"minus_rate_t": -rate, "eps_hat": h["eps"] * root}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        m, v = ema(s["m"], g, h["beta1"]), ema(s["v"], g.square(), h["beta2"])
        return self.moved(h, p, m, v), {"m": m, "v": v}

    def moved(self, h: Mapping[str, Value], p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        """p - lr m_hat / (sqrt(v_hat) + eps)."""
        return torch.addcdiv(p, h["minus_rate_t"] * m, v.sqrt() + h["eps_hat"])


class AdamW(Adam):
    """p <- (1 - lr weight_decay) p, then Adam. Textbook: as Adam, weight decay 0.01."""

    name = "adamw"
    paper = "Loshchilov & Hutter 2019, Decoupled weight decay regularization, arXiv:1711.05101"
    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = (
        *Adam.hyperparameters,
        Hyperparameter("weight_decay", 0.01),
    )

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        return super().step(h, p * (1 - h["learning_rate"] * h["weight_decay"]), g, s)


class RAdam(Adam):
    """Adam whose step is multiplied by r(t), and by sqrt(v_hat) + eps while the variance is intractable.

    p <- p - lr m_hat r(t) sqrt(1 - beta2^t) / (sqrt(v) + eps) where rho(t) > 5, else p <- p - lr m_hat. Textbook: as
    Adam.
    """

    name = "radam"
    paper = "Liu et al. 2020, On the variance of the adaptive learning rate and beyond, arXiv:1908.03265"

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        t, beta2 = state["iteration"], h["beta2"]
        corrected = correction(beta2, t)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * (1 - corrected) / corrected
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return {
            "rate": h["learning_rate"] / correction(h["beta1"], t),
            "tractable": length > 5,
            "rectified": (square * corrected).clamp_min(0).sqrt(),
        }

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        m, v = ema(s["m"], g, h["beta1"]), ema(s["v"], g.square(), h["beta2"])
        adaptive = h["rectified"] / (v.sqrt() + h["eps"])
        return p - h["rate"] * m * torch.where(torch.as_tensor(h["tractable"]), adaptive, 1), {"m": m, "v": v}


class RMSProp(HandDesigned):
    """m <- momentum m + g / (sqrt(v) + eps); p <- p - lr m. Textbook: lr 0.01, v's decay 0.99, momentum 0, eps 1e-8."""

    name = "rmsprop"
    paper = "Tieleman & Hinton 2012, Lecture 6.5: RMSProp, Coursera: Neural networks for machine learning"
    elementwise = True
    hyperparameters = (
        learning_rate(0.01), decay("decay", 0.99), decay("momentum", 0.0), Hyperparameter("eps", 1e-8),
    )  # fmt: skip
    slots = ("m", "v")

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        v = ema(s["v"], g.square(), h["decay"])
        m = h["momentum"] * s["m"] + g / (v.sqrt() + h["eps"])
        return p - h["learning_rate"] * m, {"m": m, "v": v}


class Adagrad(HandDesigned):
    """v <- v + g^2; p <- p - lr g / (sqrt(v) + eps). Textbook: lr 0.01, v starts at 0, eps 1e-10."""

    name = "adagrad"
    paper = "Duchi et al. 2011, Adaptive subgradient methods for online learning, JMLR 12"
    elementwise = True
    hyperparameters = (
        learning_rate(0.01), Hyperparameter("initial_accumulator", 0.0, "linear"), Hyperparameter("eps", 1e-10),
    )  # fmt: skip

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        return {"v": (torch.zeros_like(p) + h["initial_accumulator"]).clamp_min(0)}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        v = s["v"] + g.square()
        return p - h["learning_rate"] * g / (v.sqrt() + h["eps"]), {"v": v}


class AdaBelief(Adam):
    """Adam with v <- beta2 v + (1 - beta2) (g - m)^2 + eps. Textbook: as Adam, eps 1e-16 (algorithm 2)."""

    name = "adabelief"
    paper = "Zhuang et al. 2020, AdaBelief optimizer: Adapting stepsizes by the belief, arXiv:2010.07468"
    hyperparameters = (learning_rate(1e-3), *BETAS, Hyperparameter("eps", 1e-16))

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        m = ema(s["m"], g, h["beta1"])
        v = ema(s["v"], (g - m).square(), h["beta2"]) + h["eps"]
        return self.moved(h, p, m, v), {"m": m, "v": v}


class Yogi(Adam):
    """Adam with v <- v - (1 - beta2) sign(v - g^2) g^2, where m and v start at 1e-6.

    Bias-corrected and with that start, as every library (optax, TensorFlow Addons, pytorch_optimizer) has it and
    algorithm 2 has not. Textbook: lr 0.01, betas as Adam, eps 1e-3.
    """

    name = "yogi"
    paper = "Zaheer et al. 2018, Adaptive methods for nonconvex optimization, NeurIPS"
    hyperparameters = (
        learning_rate(0.01), *BETAS, Hyperparameter("eps", 1e-3), Hyperparameter("initial_accumulator", 1e-6),
    )  # fmt: skip

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        start = torch.zeros_like(p) + h["initial_accumulator"]
        return {"m": start, "v": start.clone()}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        square = g.square()
        m = ema(s["m"], g, h["beta1"])
        v = s["v"] - (1 - h["beta2"]) * torch.sign(s["v"] - square) * square
        return self.moved(h, p, m, v), {"m": m, "v": v}
