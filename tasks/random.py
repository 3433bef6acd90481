"""Counter-based random numbers as tensor operations: what is drawn depends on a key and on nothing else.

Owns: the map from 64-bit keys (int64 tensors) to random bits, integers, uniforms and normals, on any device, also
under ``torch.func.vmap``. Must never keep state, touch torch's generators, the clock or the system's randomness.

Every key is the seed of a SplitMix64 stream (Steele, Lea & Flood, OOPSLA 2014): number i is ``mix(key + (i+1) gamma)``.
Integers are the same bits on every device; normals are equal up to the rounding of log, sqrt and cos.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tasks.keys import encode


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The logical right shift; torch's ``>>`` on int64 copies the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64; ``x``, which must be nobody else's, is overwritten."""
    x ^= _shifted(x, 30)
    x *= _MIX1
    x ^= _shifted(x, 27)
    x *= _MIX2
    x ^= _shifted(x, 31)
    return x


@cache
def tag_bits(tag: int | str) -> int:
    """What ``fold`` mixes into a key for ``tag``, as a signed 64-bit number."""
    return _signed(int.from_bytes(hashlib.blake2b(encode((tag,)), digest_size=8).digest(), "little"))


def keys(n: int, *key: int | str, device: torch.device | str = "cpu") -> Tensor:
    """``n`` keys (n,) int64 that depend on the whole of ``key``. Raises TypeError for parts neither int nor str."""
    seed = _signed(int.from_bytes(hashlib.blake2b(encode(key), digest_size=8).digest(), "little"))
    return bits(torch.tensor(seed, device=device), n)


def fold(key: Tensor, tag: int | str) -> Tensor:
    """Keys of the shape of ``key`` for the purpose ``tag``, independent of those for any other purpose."""
    return _mix(_mix(key + _GAMMA) ^ tag_bits(tag))


def fold_each(key: Tensor, tags: Sequence[int | str]) -> Tensor:
    """``fold(key, tag)`` of every tag, one after the other: (len(tags), *key.shape)."""
    each = torch.tensor([tag_bits(tag) for tag in tags], device=key.device)
    return _mix(_mix(key + _GAMMA) ^ each.view(-1, *[1] * key.ndim))


def bits(key: Tensor, count: int) -> Tensor:
    """(*key.shape, count) int64 with 64 random bits each."""
    counter = torch.arange(1, count + 1, device=key.device) * _GAMMA
    return _mix(key.unsqueeze(-1) + counter)


def integers(key: Tensor, high: int, shape: tuple[int, ...]) -> Tensor:
    """(*key.shape, *shape) int64, uniform on [0, high); ``high`` up to 2**31 (its bias is below high / 2**32)."""
    return ((_shifted(bits(key, math.prod(shape)), 32) * high) >> 32).reshape((*key.shape, *shape))


def uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(*key.shape, *shape) float32, uniform on [0, 1) with 24 bits."""
    return (_shifted(bits(key, math.prod(shape)), 40).float() * 2.0**-24).reshape((*key.shape, *shape))


def normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(*key.shape, *shape) float32, standard normal; magnitudes end at 6.7.

    Box & Muller (1958): each 64 bits give two, whose radius comes from the upper and whose angle from the lower half.
    """
    count = math.prod(shape)
    drawn = bits(key, (count + 1) // 2)
    radius = _shifted(drawn, 32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (drawn & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)
    return pairs[..., :count].reshape((*key.shape, *shape))
