"""How families draw their static configs: what they may draw from, and the paper's distributions of numbers.

Owns: the pool of data sets and the choice of ranges. Must never use torch: configs are drawn by NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

RANGES = ("paper", "code")
"""``paper``: VeLO's appendix C.3. ``code``: google/learned_optimization's ranges where they differ from the paper."""


class Pool(NamedTuple):
    """What a family may draw from: image data sets, (corpus, vocabulary) pairs, and which published ranges."""

    images: tuple[str, ...] = ("mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet16")
    texts: tuple[tuple[str, str], ...] = (
        ("lm1b", "bytes"),
        ("lm1b", "32k"),
        ("wikipedia", "bytes"),
        ("wikipedia", "32k"),
    )
    ranges: str = "paper"


def log_integer(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number, log-uniform on [low, high], both included."""
    value = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
    return min(max(int(value), low), high)


def log_number(rng: np.random.Generator, low: float, high: float) -> float:
    """A number, log-uniform on [low, high]."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def choice(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of ``options``, each as likely."""
    return options[int(rng.integers(len(options)))]
