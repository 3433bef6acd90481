"""Rules that look at a whole tensor, but treat its axes alike or one by one: norms, and factored second moments.

Owns the arithmetic of Adafactor, LAMB, LARS, SM3 and Fromage. Never looks from one tensor at another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lopt.accumulators import as_vector
from lopt.base import State
from lopt.hand_designed.elementwise import BETAS, Adam
from lopt.hand_designed.rule import (
    HandDesigned,
    Hyperparameter,
    Value,
    Values,
    added,
    correction,
    decay,
    ema,
    learning_rate,
    norm,
    ratio,
)


class Adafactor(HandDesigned):
    """Second moments factored over the last two axes, steps relative to rms(p) and clipped in rms. As torch's.

    v: decay 1 - t^beta2_decay; u = g / sqrt(v); p <- p - max(eps2, rms(p)) min(lr, 1/sqrt(t)) u / max(1, rms(u) /
    clipping_threshold). Tensors with one axis or none keep the full v. Textbook: lr 0.01, beta2_decay -0.8, eps1
    1.19e-7 (fp32's; v is at least eps1^2), eps2 1e-3, clipping threshold 1.
    """

    name = "adafactor"
    paper = "Shazeer & Stern 2018, Adafactor: Adaptive learning rates with sublinear memory cost, arXiv:1804.04235"
    hyperparameters = (
        learning_rate(0.01),
        Hyperparameter("beta2_decay", -0.8, "linear"),
        Hyperparameter("eps1", torch.finfo(torch.float32).eps),
        Hyperparameter("eps2", 1e-3),
        Hyperparameter("clipping_threshold", 1.0),
    )

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        if p.ndim < 3:
            return {"v": torch.zeros_like(p)}
        return {"row": torch.zeros_like(p[..., :1]), "col": torch.zeros_like(p[..., :1, :])}

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        t = state["iteration"]
        return {"beta2": 1 - t ** h["beta2_decay"], "rate": t.rsqrt().clamp_max(h["learning_rate"])}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        square, eps1 = g.square(), h["eps1"]
        if p.ndim < 3:
            v = ema(s["v"], square, h["beta2"])
            new = {"v": v}
        else:
            row = ema(s["row"], square.mean(-1, keepdim=True), h["beta2"])
            col = ema(s["col"], square.mean(-2, keepdim=True), h["beta2"])
            new = {"row": row, "col": col}
            v = row * col / row.mean(-2, keepdim=True).clamp_min(eps1)
        u = g * v.clamp_min(eps1**2).rsqrt()
        root = p[0].numel() ** 0.5
        size = (norm(p) / root).clamp_min(h["eps2"])
        clip = (norm(u) / (root * h["clipping_threshold"])).clamp_min(1)
        return p - h["rate"] * size / clip * u, new


class LAMB(Adam):
    """p <- p - lr |p| / |u| u, u = m_hat / (sqrt(v_hat) + eps) + weight_decay p; the ratio is 1 where a norm is 0.

    Algorithm 2 with phi(x) = x. Textbook: lr 0.001, betas as Adam, eps 1e-6, weight decay 0.01.
    """

    name = "lamb"
    paper = "You et al. 2020, Large batch optimization for deep learning: Training BERT in 76 minutes, arXiv:1904.00962"
    elementwise = False
    hyperparameters = (
        learning_rate(1e-3), *BETAS, Hyperparameter("eps", 1e-6), Hyperparameter("weight_decay", 0.01),
    )  # fmt: skip

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        t = state["iteration"]
        return {"unbias": 1 / correction(h["beta1"], t), "scale": correction(h["beta2"], t).rsqrt()}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        m, v = ema(s["m"], g, h["beta1"]), ema(s["v"], g.square(), h["beta2"])
        u = h["unbias"] * m / (h["scale"] * v.sqrt() + h["eps"]) + h["weight_decay"] * p
        return p - h["learning_rate"] * ratio(norm(p), norm(u)) * u, {"m": m, "v": v}


class LARS(HandDesigned):
    """m <- momentum m + r (g + weight_decay p), r = trust |p| / (|g| + weight_decay |p|); p <- p - lr m.

    r is 1 where |p| or the denominator is 0. Textbook: lr 1 (the paper's range from 1 to 14), momentum 0.9, weight
    decay 5e-4, trust 0.001.
    """

    name = "lars"
    paper = "You et al. 2017, Large batch training of convolutional networks, arXiv:1708.03888"
    hyperparameters = (
        learning_rate(1.0),
        decay("momentum", 0.9),
        Hyperparameter("weight_decay", 5e-4),
        Hyperparameter("trust", 1e-3),
    )
    slots = ("m",)

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        length = norm(p)
        r = ratio(h["trust"] * length, norm(g) + h["weight_decay"] * length)
        m = h["momentum"] * s["m"] + r * (g + h["weight_decay"] * p)
        return p - h["learning_rate"] * m, {"m": m}


class SM3(HandDesigned):
    """SM3-II: one accumulator per index of every axis; v is the smallest of those that cover a parameter, plus g^2.

    v = beta2 min_i acc_i + g^2 (beta2 = 1), or + (1 - beta2) g^2 (beta2 < 1); acc_i <- max of v over the other axes;
    m <- momentum m + (1 - momentum) g / sqrt(v) (0 where v is 0); p <- p - lr m. Scalars count as vectors of one
    element. Textbook: lr 0.1, momentum 0.9, beta2 1.
    """

    name = "sm3"
    paper = "Anil et al. 2019, Memory-efficient adaptive optimization, arXiv:1901.11150"
    hyperparameters = (learning_rate(0.1), decay("momentum", 0.9), Hyperparameter("beta2", 1.0, "linear"))

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        axes = range(1, max(p.ndim, 2))
        return {"m": torch.zeros_like(p)} | {f"axis{i}": torch.zeros_like(_only(as_vector(p), i)) for i in axes}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        axes = range(1, max(p.ndim, 2))
        cover = s["axis1"]
        for i in axes[1:]:
            cover = cover.minimum(s[f"axis{i}"])
        v = h["beta2"] * cover.reshape(p.shape) + added(h["beta2"]) * g.square()
        m = ema(s["m"], torch.where(v > 0, g * v.rsqrt(), 0), h["momentum"])
        new = {f"axis{i}": _largest(as_vector(v), i) for i in axes}
        return p - h["learning_rate"] * m, {"m": m} | new


def _only(p: Tensor, axis: int) -> Tensor:
    """p with every axis but the particles' and ``axis`` cut to size 1."""
    return p[tuple(slice(None) if i in (0, axis) else slice(1) for i in range(p.ndim))]


def _largest(v: Tensor, axis: int) -> Tensor:
    """The largest of v over every axis but the particles' and ``axis``, which keep size 1."""
    others = [i for i in range(1, v.ndim) if i != axis]
    return v.amax(others, keepdim=True) if others else v


class Fromage(HandDesigned):
    """p <- (p - lr |p| / |g| g) / sqrt(1 + lr^2); the ratio is 1 where a norm is 0. Textbook: lr 0.01."""

    name = "fromage"
    paper = "Bernstein et al. 2020, On the distance between two neural networks, arXiv:2002.03432"
    hyperparameters = (learning_rate(0.01),)

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        lr = h["learning_rate"]
        return (p - lr * ratio(norm(p), norm(g)) * g) / (1 + lr**2) ** 0.5, {}
