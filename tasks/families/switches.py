"""Yes-or-no choices of a task that may differ from particle to particle, such as whether data is centered.

Owns: static fields that are true, false or ``dynamic``, and choosing by them. Must never know what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from configs.checks import one_of
from tasks.base import Dynamic
from tasks.static import DYNAMIC


def check_switch(field: str, value: bool | str) -> None:
    """Raise ConfigError unless ``value`` is true, false or ``dynamic``."""
    if not isinstance(value, bool):
        one_of(field, value, (DYNAMIC,))


def draw_switch(generator: torch.Generator, n: int, name: str, value: bool | str) -> Dynamic:
    """``name`` (n,) bool, each as likely; {} unless ``value`` is dynamic."""
    return {name: torch.rand(n, generator=generator) < 0.5} if value == DYNAMIC else {}


def switch(name: str, value: bool | str, dynamic: Dynamic) -> bool | Tensor:
    """What holds: the static ``value``, or if that is dynamic, ``dynamic[name]`` (*particles); False without it."""
    return value if isinstance(value, bool) else dynamic.get(name, False)


def pick(on: bool | Tensor, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """``yes()`` where ``on`` holds, else ``no()``; both (*particles, ...), if ``on`` is a tensor (*particles)."""
    if isinstance(on, bool):
        return yes() if on else no()
    one, other = yes(), no()
    return torch.where(on.reshape(on.shape + (1,) * (one.ndim - on.ndim)), one, other)


def centered(on: bool | Tensor, image: Tensor) -> Tensor:
    """Pixels in [0, 1] moved to [-1, 1] where ``on`` holds."""
    return pick(on, lambda: 2 * image - 1, lambda: image)
