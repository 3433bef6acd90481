"""Layers of one particle as functions of named parameters: ``linear(params, "layer0", x)`` uses layer0/w and layer0/b.

Owns: the layers that several families share, how their parameters are laid out and start, and the classification loss.
Must never keep state, read files, or use what torch.func cannot batch and differentiate twice.

As in haiku and TensorFlow, which the originals use: SAME padding (the odd pixel goes below and to the right),
normalisation with epsilon 1e-5, dropout that scales up what it keeps. Images are (B, C, H, W), linear weights
(in, out), kernels (out, in, height, width).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.base import IDENTITY, Dynamic, Params
from tasks.families.initializers import weight
from tasks.random import uniform

EPSILON = 1e-5


def linear_params(
    generator: torch.Generator,
    name: str,
    fan_in: int,
    fan_out: int,
    initializer: str = "haiku",
    dynamic: Dynamic = IDENTITY,
) -> Params:
    """``name/w`` (fan_in, fan_out) and ``name/b``, which is zero."""
    w = weight(generator, (fan_in, fan_out), fan_in, initializer, dynamic)
    return {f"{name}/w": w, f"{name}/b": torch.zeros(fan_out)}


def conv_params(
    generator: torch.Generator,
    name: str,
    channels: int,
    out: int,
    kernel: int,
    initializer: str = "haiku",
    dynamic: Dynamic = IDENTITY,
    bias: bool = True,
) -> Params:
    """``name/w`` (out, channels, kernel, kernel) and, with ``bias``, ``name/b``, which is zero."""
    w = weight(generator, (out, channels, kernel, kernel), channels * kernel**2, initializer, dynamic)
    return {f"{name}/w": w, f"{name}/b": torch.zeros(out)} if bias else {f"{name}/w": w}


def norm_params(name: str, channels: int) -> Params:
    """``name/scale`` (channels,), ones, and ``name/offset``, zeros: of layer and batch normalisation alike."""
    return {f"{name}/scale": torch.ones(channels), f"{name}/offset": torch.zeros(channels)}


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """(..., in) to (..., out)."""
    return affine(x, params[f"{name}/w"], params[f"{name}/b"])


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., in) times ``weight`` (in, out) plus ``bias`` (out,)."""
    # All leading dimensions as one: under vmap, where weights have particles in front, torch would make a product of
    # its own, and a gradient of the weights, for each of them. As F.linear it is faster than a product and a sum.
    return F.linear(x.reshape(-1, x.shape[-1]), weight.T, bias).reshape(*x.shape[:-1], len(bias))


def conv(params: Params, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """(B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride)), with a bias if there is one."""
    kernel = params[f"{name}/w"]
    return F.conv2d(_same(x, kernel.shape[-1], stride, 0.0), kernel, params.get(f"{name}/b"), stride)


def conv_as_product(params: Params, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """``conv`` as one product of all windows (B, rows, columns, height * width * in) with the kernel.

    Compiled faster than a convolution, of which vmap makes a grouped one, as long as the windows of a particle fit into
    a core's cache; eagerly slower.
    """
    kernel = params[f"{name}/w"]
    size, rows, columns = kernel.shape[-1], *(-(-side // stride) for side in x.shape[2:])
    padded = _same(x, size, stride, 0.0).permute(0, 2, 3, 1)
    reach = [slice(start, start + stride * (rows - 1) + 1, stride) for start in range(size)]
    across = [slice(start, start + stride * (columns - 1) + 1, stride) for start in range(size)]
    windows = torch.cat([padded[:, down, right] for down in reach for right in across], -1)
    y = F.linear(windows, kernel.permute(0, 2, 3, 1).flatten(1), params.get(f"{name}/b"))
    return y.permute(0, 3, 1, 2)


def max_pool(x: Tensor, window: int, stride: int) -> Tensor:
    """(B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)); what is outside the image counts for nothing."""
    return F.max_pool2d(_same(x, window, stride, float("-inf")), window, stride)


def _same(x: Tensor, window: int, stride: int, value: float) -> Tensor:
    """``x`` with TensorFlow's SAME padding."""
    before, after = zip(*(_padding(size, window, stride) for size in (x.shape[-1], x.shape[-2])), strict=True)
    return F.pad(x, (before[0], after[0], before[1], after[1]), value=value) if any(before + after) else x


def _padding(size: int, window: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def layer_norm(params: Params, name: str, x: Tensor, axis: int = -1) -> Tensor:
    """Each position normalised over its channels, which ``axis`` is (1 for images)."""
    scale, offset = params[f"{name}/scale"], params[f"{name}/offset"]
    after = x.ndim - 1 - axis % x.ndim
    if after == 0:
        return F.layer_norm(x, x.shape[-1:], scale, offset, EPSILON)
    shape = (-1,) + (1,) * after
    return normalized(x, scale.reshape(shape), offset.reshape(shape), (axis,))


def batch_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Each channel (axis 1 of images, else the last) normalised by its mean and variance over the batch."""
    images = x.ndim == 4
    shape = (-1, 1, 1) if images else (-1,)
    scale, offset = params[f"{name}/scale"].reshape(shape), params[f"{name}/offset"].reshape(shape)
    return normalized(x, scale, offset, (0, 2, 3) if images else tuple(range(x.ndim - 1)))


def normalized(x: Tensor, scale: Tensor, offset: Tensor, over: tuple[int, ...]) -> Tensor:
    """``x`` with mean 0 and variance 1 over the axes ``over``, then scaled and moved."""
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    return (x - mean) * ((variance + EPSILON).rsqrt() * scale) + offset


def dropout(x: Tensor, key: Tensor, rate: float) -> Tensor:
    """``x`` with each number dropped with probability ``rate`` and the rest divided by 1 - rate.

    ``key`` () int64 is of this place alone: ``tasks.random.fold(batch["key"], place)``. Or (*particles), as ``x`` has.
    """
    if rate == 0:
        return x
    return torch.where(uniform(key, tuple(x.shape[key.ndim :])) >= rate, x / (1 - rate), 0.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all examples, in nats, of logits (..., C) and labels (...) int64."""
    return cross_entropies(logits, labels).mean()


def wide(x: Tensor) -> torch.dtype:
    """In what losses are taken and averaged: at least float32, because bfloat16 has 8 bits for small differences."""
    return torch.promote_types(x.dtype, torch.float32)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy (...) of every example, in nats, of logits (..., C) and labels (...) int64."""
    # Under vmap this is a tenth faster (forward and backward) than F.cross_entropy.
    return -F.log_softmax(logits, -1, dtype=wide(logits)).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
