"""The image MLP: a multi-layer perceptron that classifies images.

Owns: its static config, its initialisation and its loss. Must never read files or augment data (that is datasets.py).

The parameters are w0, b0, w1, b1, ... in this order, weights (in, out). Facts after google/learned_optimization
(tasks/fixed/image_mlp.py, haiku's Linear): pixels enter as they are, in [0, 1], without mean or variance
normalisation; softmax cross entropy, mean over the batch; clipped at 1.5 log C for the meta-loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.base import Batch, Datasets, Dynamic, Params, StaticConfig, Task, TaskFamily

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class ImageMlpConfig(StaticConfig):
    """The static config of an image MLP; ``shift`` (pixels) and ``noise`` are those of its batches."""

    dataset: str
    num_classes: int
    image_size: int
    hidden: tuple[int, ...]
    activation: str
    batch_size: int
    shift: int = 0
    noise: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ImageMlpConfig:
        """The config that ``to_json`` wrote. Raises TypeError for missing or unknown fields."""
        fields = json.loads(text)
        return cls(**{**fields, "hidden": tuple(fields["hidden"])})

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every layer, from the pixels to the logits."""
        return (self.image_size**2, *self.hidden, self.num_classes)


class ImageMlpTask(Task):
    """One image MLP on one data set."""

    def __init__(self, config: ImageMlpConfig, datasets: Datasets) -> None:
        self.config = config
        self.datasets = datasets
        self.batch_size = config.batch_size
        self.worst_loss = 1.5 * math.log(config.num_classes)

    def init(self, generator: torch.Generator) -> Params:
        """Weights from a normal with sigma = 1/sqrt(fan in) cut off at 2 sigma (their std is 0.88 sigma); biases 0."""
        params = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(self.config.widths)):
            sigma = fan_in**-0.5
            weight = torch.empty(fan_in, fan_out)
            torch.nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)
            params[f"w{layer}"] = weight
            params[f"b{layer}"] = torch.zeros(fan_out)
        return params

    def loss(self, params: Params, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Mean cross entropy (nats) of ``batch``: image (B, size, size) in [0, 1], label (B,) int64."""
        activation = _ACTIVATIONS[self.config.activation]
        last = len(self.config.hidden)
        x = batch["image"].flatten(1)
        for layer in range(last + 1):
            x = x @ params[f"w{layer}"] + params[f"b{layer}"]
            if layer < last:
                x = activation(x)
        # Under vmap this is a tenth faster (forward and backward) than F.cross_entropy.
        return -F.log_softmax(x, -1).gather(-1, batch["label"][:, None]).mean()

    def normalizer(self, loss: Tensor) -> Tensor:
        """The loss clipped to [0, 1.5 log C]; NaN and both infinities count as 1.5 log C."""
        worst = self.worst_loss
        return torch.nan_to_num(loss, nan=worst, posinf=worst, neginf=worst).clamp(0.0, worst)


class ImageMlpFamily(TaskFamily):
    """A fixed family: the distribution whose one member is the image MLP of ``config``; nothing is dynamic."""

    def __init__(self, name: str, config: ImageMlpConfig, datasets: Datasets) -> None:
        self.name = name
        self.config = config
        self.datasets = datasets

    def sample_static(self, rng: np.random.Generator) -> StaticConfig:
        return self.config

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        return {}

    def build(self, static: StaticConfig, dynamic: Dynamic | None = None) -> Task:
        return ImageMlpTask(cast(ImageMlpConfig, static), self.datasets)
