"""MLPs that classify images: VeLO's family (appendix C.3.1) and the form of the fixed ImageMLP tasks.

Owns: their static config, its distribution, the initialisation and the loss. Must never read files or augment data.

Parameters are w0, b0, w1, b1, ..., weights (in, out), then norm0/scale, norm0/offset, ... where there is a norm. Facts
after google/learned_optimization (tasks/fixed/image_mlp.py, tasks/parametric/image_mlp.py) and haiku's nets.MLP: pixels
enter as they are, in [0, 1]; between two layers come the norm, dropout and the activation, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.checks import at_least, one_of
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.activations import ACTIVATIONS, activate, draw_activation
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import (
    CLASSIFIER_NORMALIZERS,
    ImageStatic,
    MetaLoss,
    check_below_one,
    check_widths,
    classifier_meta_loss,
)
from tasks.families.initializers import INITIALIZERS, draw_initializer
from tasks.families.layers import cross_entropies, dropout, norm_params, normalized, wide
from tasks.families.mlp import mlp_flops, mlp_layer, mlp_params, mlp_size
from tasks.random import fold
from tasks.static import DYNAMIC, Work

NORM_AXES = {"layer_norm": -1, "batch_norm": -2}


@dataclass(frozen=True, kw_only=True)
class ImageMlp(ImageStatic, kind="image_mlp"):
    """An MLP with the hidden widths ``hidden``; ``loss`` is cross entropy or the squared distance to one-hot labels.

    ``normalizer``: see ``classifier_meta_loss``; the squared error has a meta-loss of its own.
    """

    hidden: tuple[int, ...] = (32,)
    activation: str = "relu"
    initializer: str = "haiku"
    norm: str = "none"
    dropout: float = 0.0
    loss: str = "cross_entropy"
    normalizer: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_classes", self.classes, 2)
        check_widths("hidden", self.hidden)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("initializer", self.initializer, INITIALIZERS)
        one_of("norm", self.norm, ("none", *NORM_AXES))
        check_below_one("dropout", self.dropout)
        one_of("loss", self.loss, ("cross_entropy", "squared"))
        one_of("normalizer", self.normalizer, CLASSIFIER_NORMALIZERS)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every layer, from the pixels to the logits."""
        return (self.pixels, *self.hidden, self.classes)

    def build(self, library: Library) -> Task:
        return ImageMlpTask(self, library)

    def work(self) -> Work:
        norms = 0 if self.norm == "none" else 2 * sum(self.hidden)
        kept = 2 + (self.norm != "none") + (self.dropout > 0)
        return Work(
            parameters=mlp_size(self.widths) + norms,
            flops=mlp_flops(self.widths, self.batch_size),
            activations=self.batch_size * (self.pixels + kept * sum(self.hidden) + 2 * self.classes),
        )


class ImageMlpTask(Task):
    """One ``ImageMlp`` on its data."""

    def __init__(self, config: ImageMlp, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
        if config.loss == "squared":
            self.meta_loss = MetaLoss(1.0, scale=10.0)  # 10 times the error, clipped at 1 (tasks/fixed/image_mlp.py)
        else:
            self.meta_loss = classifier_meta_loss(config.normalizer, config.classes)
        self.worst_loss = self.meta_loss.worst

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """``activation`` (n,), ``initializer`` (n,) and ``initializer_scale`` (n,), those that are dynamic."""
        return {
            **draw_activation(generator, n, self.config.activation),
            **draw_initializer(generator, n, self.config.initializer),
        }

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """Weights by the initializer, biases 0; norms start as the identity."""
        config = self.config
        params = mlp_params(generator, "", config.widths, config.initializer, dynamic)
        if config.norm != "none":
            for layer, width in enumerate(config.hidden):
                params.update(norm_params(f"norm{layer}", width))
        return params

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """Of ``batch``: image (B, C, H, W) in [0, 1], label (B,) int64; key () for dropout.

        All leaves may have the particles in front, and so has the loss then.
        """
        config = self.config
        last = len(config.hidden)
        x = batch["image"].flatten(-3)
        for layer in range(last):
            x = mlp_layer(params, "", layer, x)
            if config.norm != "none":
                scale, offset = (params[f"norm{layer}/{name}"].unsqueeze(-2) for name in ("scale", "offset"))
                x = normalized(x, scale, offset, (NORM_AXES[config.norm],))
            if config.dropout > 0:
                x = dropout(x, fold(batch["key"], layer), config.dropout)
            x = activate(config.activation, x, dynamic)
        logits = mlp_layer(params, "", last, x)
        if config.loss == "squared":
            one_hot = batch["label"].unsqueeze(-1) == torch.arange(config.classes, device=logits.device)
            return (logits - one_hot.to(logits.dtype)).square().mean((-2, -1), dtype=wide(logits))
        return cross_entropies(logits, batch["label"]).mean(-1)

    def _forward(self, params: Params, batch: Batch, dynamic: Dynamic) -> Tensor:
        """``loss``, which takes all particles at once, without vmap (see tasks/families/mlp.py)."""
        return self.loss(params, batch, dynamic)

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.meta_loss(loss)


def draw(rng: np.random.Generator, pool: Pool) -> ImageMlp:
    """A config of VeLO's distribution (C.3.1), in which the code has the paper's ranges."""
    return ImageMlp(
        hidden=(log_integer(rng, 8, 128),) * int(rng.integers(5)),
        image_size=log_integer(rng, 4, 32),
        batch_size=log_integer(rng, 4, 512),
        dataset=choice(rng, pool.images),
        activation=DYNAMIC,
        initializer=DYNAMIC,
        normalizer="parametric",
    )
