"""How good meta-gradient estimates are: diagnostics on demand, from estimates that have been made.

Owns the statistics and nothing else. Never estimates, draws or logs anything.

Rows are samples: repeated estimates at one theta, or what each pair alone contributes (``perturbations.contributions``
times their number).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Quality(NamedTuple):
    """Of one sample: the squared length of the expectation, the trace of the covariance, and the ratio of the two.

    ``cosine`` is that between the means of the two halves of the samples.
    """

    signal: float
    variance: float
    signal_to_noise: float
    cosine: float


def quality(samples: Tensor) -> Quality:
    """Of independent samples (m, D), m >= 2. The signal's estimate is unbiased, so it may come out below zero."""
    samples = samples.double()
    mean = samples.mean(0)
    variance = float((samples - mean).square().sum() / (len(samples) - 1))
    signal = float(mean.square().sum()) - variance / len(samples)
    first, second = (half.mean(0) for half in samples.tensor_split(2))
    cosine = float(torch.cosine_similarity(first, second, dim=0))
    return Quality(signal, variance, signal / variance if variance else float("inf"), cosine)


def by_family(samples: dict[str, Tensor]) -> dict[str, Quality]:
    """``quality`` of each task family's samples (m, D), which say whose gradients drown in noise."""
    return {family: quality(rows) for family, rows in samples.items()}


def variance_by_horizon(samples: Tensor, horizons: Tensor, edges: Sequence[int]) -> Tensor:
    """Shares (len(edges) + 1,) of the samples' variance that come from each bin of horizons; they add up to one.

    Row i of ``samples`` (m, D) belongs to a training of ``horizons[i]`` steps; bin k is [edges[k-1], edges[k]).
    """
    off = (samples.double() - samples.double().mean(0)).square().sum(1)
    bins = torch.bucketize(horizons, torch.tensor(edges), right=True)
    return torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, bins, off) / off.sum()
