"""Recurrences along a sequence as one differentiable function each, with their gradients written by hand.

Owns: what happens between the inputs' products and the states, for all particles at once, and its backward pass.
Must never know parameters' names, tokens or losses.

Autograd would record some ten operations per step and replay thirty, each through vmap's and grad's layers. By hand,
a step is seven forward and six back on plain tensors, and what needs no order along the time (the factors of the
backward pass, the gradients of the weights) is computed for all steps at once.

Everywhere P is the particles, S the steps, B the sequences and H the width of the state. ``plain`` is each recurrence's
definition in ordinary operations; second derivatives are taken of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class Recurrence(NamedTuple):
    """A recurrence from drives (P, S, B, kH), weights (P, H, kH) and first states (P, B, H), in this order.

    ``plain(*inputs)``: the states (P, S, B, H). ``forward(*inputs)``: the same and what ``backward(states, *kept,
    *inputs, gradient of the states)`` needs to give the gradients of the inputs.
    """

    plain: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensors]]
    backward: Callable[..., Tensors]
    inputs: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The states (S, B, H) of one particle, whose inputs have no P; vmap adds it."""
        states: Tensor = _Forward.apply(self, *(x.unsqueeze(0) for x in inputs))[0]  # type: ignore[no-untyped-call]
        return states.squeeze(0)


def _merged(function: Any, recurrence: Recurrence, size: int, dims: tuple[int | None, ...], args: Tensors) -> Any:
    """``function`` under vmap: the new dimension becomes part of P."""
    args = tuple(
        (x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(args, dims, strict=True)
    )
    outs = tuple(out.unflatten(0, (size, -1)) for out in function.apply(recurrence, *args))
    return outs, (0,) * len(outs)


class _Forward(torch.autograd.Function):
    """States and what is kept; only the states have gradients."""

    @staticmethod
    def forward(recurrence: Recurrence, *inputs: Tensor) -> Tensors:
        states, kept = recurrence.forward(*inputs)
        return states, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.recurrence = inputs[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
        gradients = _Backward.apply(ctx.recurrence, *ctx.saved_tensors, gradient)  # type: ignore[no-untyped-call]
        return None, *gradients

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], recurrence: Recurrence, *inputs: Tensor) -> Any:
        return _merged(_Forward, recurrence, info.batch_size, in_dims[1:], inputs)


class _Backward(torch.autograd.Function):
    """The gradients of the inputs: a function of the inputs and of the states' gradient, which has derivatives too."""

    @staticmethod
    def forward(recurrence: Recurrence, *args: Tensor) -> Tensors:
        return recurrence.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.recurrence = inputs[0]
        ctx.given = len(inputs) - 1
        ctx.save_for_backward(*inputs[-1 - ctx.recurrence.inputs :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        def first(*args: Tensor) -> Tensors:
            pull: Callable[[Tensor], Tensors] = torch.func.vjp(ctx.recurrence.plain, *args[:-1])[1]
            return pull(args[-1])

        second = torch.func.vjp(first, *ctx.saved_tensors)[1](gradients)
        return None, *[None] * (ctx.given - len(second)), *second

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], recurrence: Recurrence, *args: Tensor) -> Any:
        return _merged(_Backward, recurrence, info.batch_size, in_dims[1:], args)


def _before(first: Tensor, states: Tensor) -> Tensor:
    """The states that each step started from, (P, S, B, H)."""
    return torch.cat([first.unsqueeze(1), states[:, :-1]], 1)


def _weights_gradient(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Of products: the sum over steps and sequences of (P, S, B, n) times (P, S, B, k): (P, n, k)."""
    return inputs.flatten(1, 2).mT @ outputs.flatten(1, 2)


def _relu_plain(drives: Tensor, weight: Tensor, h: Tensor) -> Tensor:
    """h = relu(drive + h W)."""
    states = []
    for drive in drives.unbind(1):
        h = torch.relu(drive + h @ weight)
        states.append(h)
    return torch.stack(states, 1)


def _relu_forward(drives: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensors]:
    states = []
    for drive in drives.unbind(1):
        h = torch.baddbmm(drive, h, weight).relu()
        states.append(h)
    return torch.stack(states, 1), ()


def _relu_backward(states: Tensor, drives: Tensor, weight: Tensor, first: Tensor, gradient: Tensor) -> Tensors:
    dh, back, raws = torch.zeros_like(first), weight.mT.contiguous(), []
    for slope, g in zip(reversed((states > 0).to(states.dtype).unbind(1)), reversed(gradient.unbind(1)), strict=True):
        raws.append((g + dh) * slope)
        dh = raws[-1] @ back
    raw = torch.stack(raws[::-1], 1)
    return raw, _weights_gradient(_before(first, states), raw), dh


def _gru_plain(gate_drives: Tensor, drives: Tensor, gates: Tensor, candidate: Tensor, h: Tensor) -> Tensor:
    """z, r = sigmoid(gate drive + h G); h = (1 - z) h + z tanh(drive + (r h) C)."""
    states = []
    for gate_drive, drive in zip(gate_drives.unbind(1), drives.unbind(1), strict=True):
        z, r = torch.sigmoid(gate_drive + h @ gates).chunk(2, -1)
        h = torch.lerp(h, torch.tanh(drive + (r * h) @ candidate), z)
        states.append(h)
    return torch.stack(states, 1)


def _gru_forward(
    gate_drives: Tensor, drives: Tensor, gates: Tensor, candidate: Tensor, h: Tensor
) -> tuple[Tensor, Tensors]:
    states, opened, candidates = [], [], []
    for gate_drive, drive in zip(gate_drives.unbind(1), drives.unbind(1), strict=True):
        opened.append(torch.baddbmm(gate_drive, h, gates).sigmoid_())
        z, r = opened[-1].chunk(2, -1)
        candidates.append(torch.baddbmm(drive, r * h, candidate).tanh_())
        h = torch.lerp(h, candidates[-1], z)
        states.append(h)
    return torch.stack(states, 1), (torch.stack(opened, 1), torch.stack(candidates, 1))


def _gru_backward(
    states: Tensor,
    opened: Tensor,
    candidates: Tensor,
    gate_drives: Tensor,
    drives: Tensor,
    gates: Tensor,
    candidate: Tensor,
    first: Tensor,
    gradient: Tensor,
) -> Tensors:
    before = _before(first, states)
    z, r = opened.chunk(2, -1)
    slopes = opened * (1 - opened)
    to_z, to_r = slopes.chunk(2, -1)
    # the gradient of a state times these is that of z, r (through the candidate), the candidate and the state before
    factors = [(candidates - before) * to_z, before * to_r, z * (1 - candidates * candidates), 1 - z, r]
    dh, back, gates_back = torch.zeros_like(first), candidate.mT.contiguous(), gates.mT.contiguous()
    raws, gate_raws = [], []
    for g, f_z, f_r, f_a, f_h, reset in zip(*(reversed(x.unbind(1)) for x in (gradient, *factors)), strict=True):
        dh = dh + g
        raws.append(dh * f_a)
        through = raws[-1] @ back
        gate_raws.append(torch.cat([dh * f_z, through * f_r], -1))
        dh = torch.baddbmm(torch.addcmul(dh * f_h, through, reset), gate_raws[-1], gates_back)
    raw, gate_raw = torch.stack(raws[::-1], 1), torch.stack(gate_raws[::-1], 1)
    return gate_raw, raw, _weights_gradient(before, gate_raw), _weights_gradient(r * before, raw), dh


def _lstm_plain(drives: Tensor, weight: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """i, f, o = sigmoid and g = tanh of drive + h W; c = f c + i g, h = o tanh(c)."""
    size = h.shape[-1]
    states = []
    for drive in drives.unbind(1):
        gates, g = (drive + h @ weight).split_with_sizes((3 * size, size), -1)
        i, f, o = torch.sigmoid(gates).chunk(3, -1)
        c = f * c + i * torch.tanh(g)
        h = o * torch.tanh(c)
        states.append(h)
    return torch.stack(states, 1)


def _lstm_forward(drives: Tensor, weight: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensors]:
    size = h.shape[-1]
    states, cells, gates = [], [], []
    for drive in drives.unbind(1):
        gate = torch.baddbmm(drive, h, weight)
        i, f, o, g = gate.chunk(4, -1)
        gate[..., : 3 * size].sigmoid_()
        g.tanh_()
        c = torch.addcmul(f * c, i, g)
        h = o * c.tanh()
        states.append(h)
        cells.append(c)
        gates.append(gate)
    return torch.stack(states, 1), (torch.stack(cells, 1), torch.stack(gates, 1))


def _lstm_backward(
    states: Tensor,
    cells: Tensor,
    gates: Tensor,
    drives: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor,
    gradient: Tensor,
) -> Tensors:
    i, f, o, g = gates.chunk(4, -1)
    tanh_c = cells.tanh()
    # dh times `to_c` is a part of dc; (dc, dc, dh, dc) times `factors` is the gradient before the four gates
    to_c = o * (1 - tanh_c * tanh_c)
    factors = torch.stack([g * i * (1 - i), _before(c, cells) * f * (1 - f), tanh_c * o * (1 - o), i * (1 - g * g)], -2)
    dh, dc, back, raws = torch.zeros_like(h), torch.zeros_like(c), weight.mT.contiguous(), []
    for step, k, forget, factor in zip(*(reversed(x.unbind(1)) for x in (gradient, to_c, f, factors)), strict=True):
        dh = dh + step
        dc = torch.addcmul(dc, dh, k)
        raws.append((torch.stack([dc, dc, dh, dc], -2) * factor).flatten(-2))
        dh = raws[-1] @ back
        dc = dc * forget
    raw = torch.stack(raws[::-1], 1)
    return raw, _weights_gradient(_before(h, states), raw), dh, dc


RELU = Recurrence(_relu_plain, _relu_forward, _relu_backward, inputs=3)
GRU = Recurrence(_gru_plain, _gru_forward, _gru_backward, inputs=5)
LSTM = Recurrence(_lstm_plain, _lstm_forward, _lstm_backward, inputs=4)
