"""How weights start: the initializers of VeLO's appendix C.2.1, and haiku's default for the fixed tasks.

Owns: the distributions of initial weights and the drawing of initializer and scale per particle.
Must never be used inside a loss: it reads its dynamic config as Python numbers and draws from a torch.Generator.

The paper has three kinds, each times a scale; google/learned_optimization's parametric_utils.py draws from five (the
normal one twice, and both variance-scaled ones take the scale's square root). Here it is the paper's three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks.base import IDENTITY, Dynamic
from tasks.static import DYNAMIC

KINDS = ("orthogonal", "uniform", "normal")
"""What a particle draws from, in the order of ``dynamic["initializer"]``."""

INITIALIZERS = (DYNAMIC, "haiku", *KINDS)
"""The values of a static config's field ``initializer``."""

SCALES = (0.5, 2.0)


def draw_initializer(generator: torch.Generator, n: int, initializer: str) -> Dynamic:
    """``initializer`` (n,) int64 and ``initializer_scale`` (n,) float32 on [0.5, 2); {} unless it is dynamic."""
    if initializer != DYNAMIC:
        return {}
    low, high = SCALES
    return {
        "initializer": torch.randint(len(KINDS), (n,), generator=generator),
        "initializer_scale": low + (high - low) * torch.rand(n, generator=generator),
    }


def weight(
    generator: torch.Generator,
    shape: tuple[int, ...],
    fan_in: int,
    initializer: str = "haiku",
    dynamic: Dynamic = IDENTITY,
) -> Tensor:
    """Initial weights of one particle, float32 on the CPU: (fan_in, out) of a linear map, or (out, ...) of a kernel.

    ``haiku``: normal with sigma = 1/sqrt(fan_in) cut off at 2 sigma (so that their deviation is 0.88 sigma).
    ``orthogonal``: the (fan_in, out) matrix has orthonormal rows or columns, whichever are fewer. ``uniform``: on
    +-sqrt(3/fan_in). ``normal``: sigma = 1/sqrt(fan_in). ``dynamic``: the kind and scale in ``dynamic``, haiku's
    without them.
    """
    kind, scale = initializer, 1.0
    if initializer == DYNAMIC:
        kind = KINDS[int(dynamic["initializer"])] if "initializer" in dynamic else "haiku"
        scale = float(dynamic.get("initializer_scale", 1.0))
    sigma = fan_in**-0.5
    out = torch.empty(shape)
    if kind == "haiku":
        torch.nn.init.trunc_normal_(out, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)
    elif kind == "uniform":
        out.uniform_(-math.sqrt(3) * sigma, math.sqrt(3) * sigma, generator=generator)
    elif kind == "normal":
        out.normal_(std=sigma, generator=generator)
    else:
        out = _orthogonal(generator, fan_in, out.numel() // fan_in, shape)
    return out * scale


def _orthogonal(generator: torch.Generator, fan_in: int, fan_out: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform (Haar) among the matrices with orthonormal rows or columns (Saxe, McClelland & Ganguli 2014)."""
    tall = (max(fan_in, fan_out), min(fan_in, fan_out))
    q, r = torch.linalg.qr(torch.randn(tall, generator=generator))
    q *= torch.where(r.diagonal() < 0, -1.0, 1.0)  # without this, QR's signs would not be random
    # The first dimension is fan_in in a linear map and fan_out in a kernel, so it says which way the matrix lies.
    out: Tensor = (q if len(q) == shape[0] else q.T).reshape(shape)
    return out
