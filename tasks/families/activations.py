"""The activation functions of VeLO's appendix C.2.2, also with another one for every particle.

Owns: the eleven functions with their derivatives, and applying each to the particles that drew it.
Must never let one particle's numbers touch another's.

The paper lists SiLU and swish as two of the eleven, which they are not: that function has twice the weight.
google/learned_optimization (parametric_utils.py) has relu twice as well, and leaky_relu with the slope -0.5; here it
is 0.01 (Maas et al. 2013). GELU is the tanh approximation, which is JAX's default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.base import Dynamic
from tasks.static import DYNAMIC

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
_LEAK = 0.01
_GELU_A, _GELU_B = math.sqrt(2 / math.pi), 0.044715
_ATEN = torch.ops.aten  # for its fused backward kernels


class _Curve(NamedTuple):
    """Elementwise, a function of x, its first derivative times a second argument, and its second derivative."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]

    def scaled(self, order: int, x: Tensor, scale: Tensor) -> Tensor:
        """The ``order``-th derivative times ``scale``, but the function itself as it is."""
        if order == 0:
            return self.value(x)
        return self.first(x, scale) if order == 1 else scale * self.second(x)


def _selu_second(x: Tensor) -> Tensor:
    return torch.where(x > 0, 0.0, _SELU_SCALE * _SELU_ALPHA * x.exp())


def _tanh_second(x: Tensor) -> Tensor:
    y = x.tanh()
    return -2 * y * (1 - y**2)


def _sigmoid_second(x: Tensor) -> Tensor:
    y = x.sigmoid()
    return y * (1 - y) * (1 - 2 * y)


def _silu_second(x: Tensor) -> Tensor:
    y = x.sigmoid()
    return y * (1 - y) * (2 + x * (1 - 2 * y))


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_second(x: Tensor) -> Tensor:
    y = (_GELU_A * (x + _GELU_B * x**3)).tanh()
    slope, bend = _GELU_A * (1 + 3 * _GELU_B * x**2), _GELU_A * 6 * _GELU_B * x
    return (1 - y**2) * (slope + x * (0.5 * bend - y * slope**2))


_SILU = _Curve(F.silu, lambda x, s: _ATEN.silu_backward(s, x), _silu_second)
_CURVES = {
    "relu": _Curve(F.relu, lambda x, s: _ATEN.threshold_backward(s, x, 0), torch.zeros_like),
    "relu6": _Curve(F.relu6, lambda x, s: _ATEN.hardtanh_backward(s, x, 0, 6), torch.zeros_like),
    "selu": _Curve(F.selu, lambda x, s: _ATEN.elu_backward(s, _SELU_ALPHA, _SELU_SCALE, 1.0, False, x), _selu_second),
    "tanh": _Curve(torch.tanh, lambda x, s: _ATEN.tanh_backward(s, x.tanh()), _tanh_second),
    "sigmoid": _Curve(torch.sigmoid, lambda x, s: _ATEN.sigmoid_backward(s, x.sigmoid()), _sigmoid_second),
    "silu": _SILU,
    "swish": _SILU,
    "gelu": _Curve(_gelu, lambda x, s: _ATEN.gelu_backward(s, x, approximate="tanh"), _gelu_second),
    "leaky_relu": _Curve(F.leaky_relu, lambda x, s: _ATEN.leaky_relu_backward(s, x, _LEAK, False), torch.zeros_like),
    "cos": _Curve(torch.cos, lambda x, s: -s * x.sin(), lambda x: -x.cos()),
    "sin": _Curve(torch.sin, lambda x, s: s * x.cos(), lambda x: -x.sin()),
}

KINDS = tuple(_CURVES)
"""What a particle draws from, in the order of ``dynamic["activation"]``."""

ACTIVATIONS = (DYNAMIC, *KINDS)
"""The values of a static config's field ``activation``."""


def draw_activation(generator: torch.Generator, n: int, activation: str) -> Dynamic:
    """``activation`` (n,) int64, an index into KINDS; {} unless it is dynamic."""
    if activation != DYNAMIC:
        return {}
    return {"activation": torch.randint(len(KINDS), (n,), generator=generator)}


def activate(name: str, x: Tensor, dynamic: Dynamic) -> Tensor:
    """The activation ``name`` of ``x``, or if that is ``dynamic`` the one that ``dynamic`` says (relu if it does not).

    ``x`` (*lead, ...) is of one particle, or of as many as ``dynamic["activation"]`` (*lead) has.
    """
    if name != DYNAMIC:
        return _CURVES[name].value(x)
    if "activation" not in dynamic:
        return F.relu(x)
    index = dynamic["activation"]
    if torch.compiler.is_compiling():
        return _selected(x, index, x, 0)
    y: Tensor = _PerParticle.apply(x, index, x, 0)  # type: ignore[no-untyped-call]
    return y


def _selected(x: Tensor, index: Tensor, scale: Tensor, order: int) -> Tensor:
    """All eleven for every particle, and from these its own: no value of ``index`` must be known to the CPU."""
    index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
    out = torch.zeros_like(x)
    for kind, curve in enumerate(_CURVES.values()):
        out = torch.where(index == kind, curve.scaled(order, x, scale), out)
    return out


def _each(x: Tensor, index: Tensor, scale: Tensor, order: int) -> Tensor:
    """Its own one for every particle."""
    curves = list(_CURVES.values())
    kinds, shape = index.flatten().tolist(), (index.numel(), -1)
    rows = zip(kinds, x.reshape(shape).unbind(), scale.reshape(shape).unbind(), strict=True)
    return torch.stack([curves[kind].scaled(order, *row) for kind, *row in rows]).reshape(x.shape)


class _PerParticle(torch.autograd.Function):
    """``scale`` times the ``order``-th derivative at ``x`` (both (*lead, ...)) of what ``index`` (*lead) says.

    Of order 0, the functions themselves, ``scale`` plays no part. An autograd.Function because under vmap a tensor's
    values cannot be read, except in a Function's ``vmap``; and then every derivative must be one too. On a GPU reading
    them would wait for all that is queued there, and computing all eleven is cheap, so there it is done as the
    originals do.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, scale: Tensor, order: int) -> Tensor:
        return (_each if x.device.type == "cpu" else _selected)(x, index, scale, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        x, index, scale, ctx.order = inputs
        ctx.save_for_backward(x, index, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, index, scale = ctx.saved_tensors
        if ctx.order == 0:
            return _PerParticle.apply(x, index, grad, 1), None, None, None  # type: ignore[no-untyped-call]
        if ctx.order == 2:
            raise NotImplementedError("dynamic activations can be differentiated twice, not three times")
        by_x = _PerParticle.apply(x, index, grad * scale, 2)  # type: ignore[no-untyped-call]
        by_scale = _PerParticle.apply(x, index, grad, 1)  # type: ignore[no-untyped-call]
        return by_x, None, by_scale, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        (x, index, scale, order), index_dim = inputs, in_dims[1]
        lead = index.ndim if index_dim is None else 0
        index = index if index_dim is None else index.movedim(index_dim, 0)
        x, scale = (
            (each.expand(info.batch_size, *each.shape) if dim is None else each.movedim(dim, 0)).movedim(0, lead)
            for each, dim in ((x, in_dims[0]), (scale, in_dims[2]))
        )
        return _PerParticle.apply(x, index, scale, order), lead  # type: ignore[no-untyped-call]
