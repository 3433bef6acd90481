"""MLP auto-encoders of images: VeLO's family (appendix C.3.3) and the form of the fixed ImageMLPAE tasks.

Owns: their static config, its distribution, and the loss. Must never read files or augment data.

Facts after google/learned_optimization (tasks/fixed/image_mlp_ae.py, tasks/parametric/image_mlp_ae.py): the MLP's last
layer has as many outputs as there are pixels; the loss is their mean squared distance. Parameters are w0, b0, ....
With ``log_loss`` it is the mean logarithm of errors; the paper does not say of which, and the code averages over axis 1
of (B, H, W, C) before the logarithm: the error of a column of pixels, in each color. So it is here, as VeLO saw it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.checks import ConfigError, one_of
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.activations import ACTIVATIONS, draw_activation
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import ImageStatic, MetaLoss, check_widths
from tasks.families.initializers import INITIALIZERS, draw_initializer
from tasks.families.layers import wide
from tasks.families.mlp import mlp, mlp_flops, mlp_params, mlp_size
from tasks.families.switches import centered, check_switch, draw_switch, pick, switch
from tasks.static import DYNAMIC, Work

FLOOR = 1e-8
"""Added to an error before its logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class MlpAe(ImageStatic, kind="mlp_ae"):
    """An MLP with the hidden widths ``hidden`` that reproduces its input.

    ``center_data``: pixels on [-1, 1] rather than [0, 1]. ``constrain_output``: by a sigmoid (tanh if centered).
    ``normalizer``: ``fixed`` is the loss clipped to [0, 1], ``parametric`` 10 plus half the log error clipped to
    [-12, 1].
    """

    hidden: tuple[int, ...] = (32,)
    activation: str = "relu"
    initializer: str = "haiku"
    log_loss: bool | str = False
    center_data: bool | str = False
    constrain_output: bool | str = True
    normalizer: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths("hidden", self.hidden)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("initializer", self.initializer, INITIALIZERS)
        for name in ("log_loss", "center_data", "constrain_output"):
            check_switch(name, getattr(self, name))
        one_of("normalizer", self.normalizer, ("fixed", "parametric"))
        if self.log_loss and self.normalizer == "fixed":
            raise ConfigError("normalizer", self.normalizer, "parametric, for a loss that may be a logarithm")

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every layer, from pixels to pixels."""
        return (self.pixels, *self.hidden, self.pixels)

    def build(self, library: Library) -> Task:
        return MlpAeTask(self, library)

    def work(self) -> Work:
        return Work(
            parameters=mlp_size(self.widths),
            flops=mlp_flops(self.widths, self.batch_size),
            activations=self.batch_size * (2 * sum(self.hidden) + 3 * self.pixels),
        )


class MlpAeTask(Task):
    """One ``MlpAe`` on its data."""

    def __init__(self, config: MlpAe, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
        parametric = MetaLoss(1.0, low=-12.0, shift=-20.0, scale=0.5)
        self.meta_loss = parametric if config.normalizer == "parametric" else MetaLoss(1.0)
        self.worst_loss = self.meta_loss.worst

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """Of the static config's ``dynamic`` fields, each (n,): int64, but ``initializer_scale`` and the switches."""
        config = self.config
        return {
            **draw_activation(generator, n, config.activation),
            **draw_initializer(generator, n, config.initializer),
            **draw_switch(generator, n, "log_loss", config.log_loss),
            **draw_switch(generator, n, "center_data", config.center_data),
            **draw_switch(generator, n, "constrain_output", config.constrain_output),
        }

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        return mlp_params(generator, "", self.config.widths, self.config.initializer, dynamic)

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """Of ``batch``: image (B, C, H, W) in [0, 1]. All leaves may have the particles in front, as then the loss."""
        config = self.config
        center = switch("center_data", config.center_data, dynamic)
        image = centered(center, batch["image"])
        layers = len(config.hidden) + 1
        out = mlp(params, "", image.flatten(-3), layers, config.activation, dynamic).reshape(image.shape)
        out = pick(
            switch("constrain_output", config.constrain_output, dynamic),
            lambda: pick(center, out.tanh, out.sigmoid),
            lambda: out,
        )
        columns = (out - image).square().mean(-2, dtype=wide(out))
        values = pick(switch("log_loss", config.log_loss, dynamic), (columns + FLOOR).log, lambda: columns)
        return values.mean((-3, -2, -1))

    def _forward(self, params: Params, batch: Batch, dynamic: Dynamic) -> Tensor:
        """``loss``, which takes all particles at once, without vmap (see tasks/families/mlp.py)."""
        return self.loss(params, batch, dynamic)

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        if self.config.normalizer == "fixed":
            return self.meta_loss(loss)
        logs = pick(switch("log_loss", self.config.log_loss, dynamic), lambda: loss, (loss + FLOOR).log)
        return self.meta_loss(logs)


def draw(rng: np.random.Generator, pool: Pool) -> MlpAe:
    """A config of VeLO's distribution (C.3.3), in which the code has the paper's ranges.

    The paper has the number of layers "log uniform, between 0 and 4", which cannot be; the code has it uniform.
    """
    return MlpAe(
        hidden=(log_integer(rng, 8, 128),) * int(rng.integers(5)),
        image_size=log_integer(rng, 4, 32),
        batch_size=log_integer(rng, 4, 512),
        dataset=choice(rng, pool.images),
        activation=DYNAMIC,
        initializer=DYNAMIC,
        log_loss=DYNAMIC,
        center_data=DYNAMIC,
        constrain_output=DYNAMIC,
        normalizer="parametric",
    )
