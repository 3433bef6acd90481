"""Rules that precondition by matrices: Shampoo (inverse roots of second moments) and Muon (orthogonalised momentum).

Owns their arithmetic, batched over particles and blocks. A particle that has diverged never disturbs another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.checks import at_least, one_of
from lopt.base import Argument, State
from lopt.celo2 import newton_schulz
from lopt.hand_designed.elementwise import BETAS, AdamW
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
)

GRAFTS = ("none", "sgd", "adam", "adagrad", "rmsprop", "rmsprop_normalized", "adagrad_normalized", "sqrt_n")


class Shampoo(HandDesigned):
    """Every axis of a gradient is multiplied by an inverse root of its second moment, blockwise; the length is grafted.

    Of each block G (axes of at most ``block_size``; neighbouring small axes are merged up to it) and each axis i of its
    k: S_i <- beta2 S_i + (1 - beta2) G_i G_i^T (+ without 1 - beta2 where beta2 = 1), S_i(0) = matrix_eps I, and
    G <- G x_i (S_i + matrix_eps max_eigenvalue(S_i) I)^(-1 / 2k). The result d gets the length of the update u of
    ``graft``: g (sgd), g / (sqrt(v) + diagonal_eps) with Adagrad's, RMSProp's or Adam's bias-corrected v (adagrad,
    rmsprop, adam; the first two also of g / |g|: ..._normalized), or sign(g) (sqrt_n); with none it keeps its own.
    Then, with x = d, but x = u during the first ``start`` steps: x <- x + weight_decay p, m_x <- beta1 m_x + x, and
    p <- p - lr (x + beta1 m_x). Both momenta are kept throughout. As distributed_shampoo, except that roots are exact
    (eigenvalues in fp64) and fresh at every step. Scalars take u.

    Textbook: lr 0.01 (that of the graft), betas 0.9 and 0.999, matrix_eps 1e-6, diagonal_eps 1e-10, no decay.
    """

    name = "shampoo"
    paper = "Anil et al. 2020, Scalable second order optimization for deep learning, arXiv:2002.09018"
    hyperparameters = (
        learning_rate(0.01),
        *BETAS,
        Hyperparameter("matrix_eps", 1e-6),
        Hyperparameter("diagonal_eps", 1e-10),
        Hyperparameter("weight_decay", 0.0, "linear"),
    )

    def __init__(self, graft: str = "sgd", block_size: int = 128, start: int = 5, log_space: bool = False) -> None:
        one_of("graft", graft, GRAFTS)
        at_least("block_size", block_size, 1)
        at_least("start", start, 0)
        super().__init__(log_space)
        self.graft, self.block_size, self.start = graft, block_size, start

    @property
    def arguments(self) -> dict[str, Argument]:
        return super().arguments | {"graft": self.graft, "block_size": self.block_size, "start": self.start}

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        slots = {"m": torch.zeros_like(p), "graft_m": torch.zeros_like(p)}
        if self.graft not in ("none", "sgd", "sqrt_n"):
            slots["v"] = torch.zeros_like(p)
        shape = merged(p.shape[1:], self.block_size)
        sizes = [min(n, self.block_size) for n in shape]
        blocks = prod(-(-n // b) for n, b in zip(shape, sizes, strict=True))
        for i, b in enumerate(sizes):
            eye = torch.eye(b, dtype=p.dtype, device=p.device).expand(p.shape[0], blocks, b, b)
            slots[f"second{i}"] = eye * _of_matrices(h["matrix_eps"])
        return slots

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        t = state["iteration"]
        return {"correction2": correction(h["beta2"], t) + (h["beta2"] == 1), "started": t > self.start}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        u, new = self._grafted(h, g, s)
        d, second = self._preconditioned(h, g, s)
        if not second:
            d = u
        elif self.graft != "none":
            d = d * (norm(u) / (norm(d) + 1e-16))
        d, u = d + h["weight_decay"] * p, u + h["weight_decay"] * p
        m, graft_m = h["beta1"] * s["m"] + d, h["beta1"] * s["graft_m"] + u
        step = torch.where(torch.as_tensor(h["started"]), d + h["beta1"] * m, u + h["beta1"] * graft_m)
        return p - h["learning_rate"] * step, {"m": m, "graft_m": graft_m} | new | second

    def _grafted(self, h: Mapping[str, Value], g: Tensor, s: State) -> tuple[Tensor, State]:
        """The update that gives the length, and its accumulator."""
        if self.graft in ("none", "sgd"):
            return g, {}
        if self.graft == "sqrt_n":
            return g.sign(), {}
        if self.graft.endswith("_normalized"):
            g = g / (norm(g) + 1e-16)
        if self.graft.startswith("adagrad"):
            v = s["v"] + g.square()
        else:
            v = h["beta2"] * s["v"] + added(h["beta2"]) * g.square()
        root = (v / h["correction2"] if self.graft == "adam" else v).sqrt()
        return g / (root + h["diagonal_eps"]), {"v": v}

    def _preconditioned(self, h: Mapping[str, Value], g: Tensor, s: State) -> tuple[Tensor, State]:
        """g with every axis preconditioned, and the second moments (P, blocks, b, b); nothing for scalars."""
        shape = merged(g.shape[1:], self.block_size)
        sizes = [min(n, self.block_size) for n in shape]
        if not shape:
            return g, {}
        x = to_blocks(g.reshape(-1, *shape), sizes)
        beta2, eps = _of_matrices(h["beta2"]), _of_matrices(h["matrix_eps"])
        blocks, new = x, {}
        for i in range(len(sizes)):
            unfolded = blocks.movedim(i + 2, 2).flatten(3) if len(sizes) > 1 else blocks.unsqueeze(-1)
            square = unfolded @ unfolded.mT
            second = beta2 * s[f"second{i}"] + added(beta2) * square
            root = inverse_root(second, 2 * len(sizes), eps)
            x = torch.einsum("pkij,pkj...->pki...", root, x.movedim(i + 2, 2)).movedim(2, i + 2)
            new[f"second{i}"] = second
        return from_blocks(x, shape, sizes).reshape(g.shape), new


def _of_matrices(value: Value) -> Value:
    """A hyper-parameter shaped for (P, blocks, b, b)."""
    return value.reshape(-1, 1, 1, 1) if isinstance(value, Tensor) else value


def merged(shape: tuple[int, ...], largest: int) -> list[int]:
    """``shape`` with neighbouring axes multiplied together as long as they stay within ``largest``; no axes of 1."""
    out: list[int] = []
    for n in shape:
        if n == 1:
            continue
        if out and out[-1] * n <= largest:
            out[-1] *= n
        else:
            out.append(n)
    return out


def to_blocks(x: Tensor, sizes: list[int]) -> Tensor:
    """x (P, *s) cut into blocks (P, K, *sizes); the last of an axis is filled up with zeros, which stay zero."""
    x = F.pad(x, [n for d, b in zip(x.shape[:0:-1], reversed(sizes), strict=True) for n in (0, -d % b)])
    pairs = [(d // b, b) for d, b in zip(x.shape[1:], sizes, strict=True)]
    k = len(sizes)
    x = x.reshape(x.shape[0], *(n for pair in pairs for n in pair))
    return x.permute(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2)).flatten(1, k)


def from_blocks(x: Tensor, shape: list[int], sizes: list[int]) -> Tensor:
    """The inverse of ``to_blocks``: (P, K, *sizes) -> (P, *shape)."""
    counts = [-(-d // b) for d, b in zip(shape, sizes, strict=True)]
    k = len(sizes)
    x = x.reshape(x.shape[0], *counts, *sizes).permute(0, *(axis for i in range(k) for axis in (1 + i, 1 + k + i)))
    x = x.reshape(x.shape[0], *(c * b for c, b in zip(counts, sizes, strict=True)))
    return x[(slice(None), *(slice(d) for d in shape))]


def inverse_root(matrix: Tensor, p: int, eps: Value) -> Tensor:
    """(M + eps max_eigenvalue(M) I)^(-1/p) of symmetric M (..., n, n); NaN where M holds one that is not finite."""
    finite = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    # eigh raises for the whole batch where one matrix is not finite
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix.double(), eye))
    values = values.clamp_min(0).unsqueeze(-2)
    powers = (values + eps * values.amax(-1, keepdim=True).clamp_min(1e-16)) ** (-1 / p)
    return torch.where(finite, (vectors * powers) @ vectors.mT, torch.nan).to(matrix.dtype)


class Muon(AdamW):
    """p <- (1 - lr weight_decay) p - lr 0.2 sqrt(max(rows, columns)) NS(n), n = momentum m + (1 - momentum) g.

    m <- momentum m + (1 - momentum) g; NS: five quintic Newton-Schulz iterations, which bring all singular values near
    1. For tensors with two axes and more, of which the first is the rows, the rest the columns (out x in of torch's
    layers); the others go to AdamW. The factor is Liu et al. 2025's (arXiv:2502.16982; torch's
    ``adjust_lr_fn="match_rms_adamw"``): one learning rate then suits both halves, and no layout of weights is favoured.
    In the precision of the parameters (torch's iterates in bf16).

    Textbook: lr 0.001, momentum 0.95, weight decay 0.1; AdamW's betas and eps.
    """

    name = "muon"
    paper = "Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io"
    elementwise = False
    hyperparameters = (
        learning_rate(1e-3),
        *BETAS,
        Hyperparameter("eps", 1e-8),
        Hyperparameter("weight_decay", 0.1),
        decay("momentum", 0.95),
    )

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        return super().init_slots(h, p) if p.ndim < 3 else {"m": torch.zeros_like(p)}

    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        if p.ndim < 3:
            return super().step(h, p, g, s)
        m = ema(s["m"], g, h["momentum"])
        direction = newton_schulz(ema(m, g, h["momentum"]).flatten(2))
        scale = 0.2 * max(direction.shape[1:]) ** 0.5
        p = p * (1 - h["learning_rate"] * h["weight_decay"])
        return p - h["learning_rate"] * scale * direction.reshape(p.shape), {"m": m}
