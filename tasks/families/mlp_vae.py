"""Variational auto-encoders of images made of two MLPs: VeLO's family (appendix C.3.4).

Owns: their static config, its distribution, the quantised normal likelihood and the ELBO. Must never read files or
augment data.

Facts after google/learned_optimization (tasks/parametric/image_mlp_vae.py, tasks/generative_model_utils.py): the
encoder gives mean and log deviation of a normal posterior, whose divergence from the standard normal prior is exact;
the decoder gives mean and log deviation of every pixel, clipped to [-10, 10]. Parameters are encoder/w0, encoder/b0,
..., decoder/w0, .... One difference: the original's bins are 1/255 wide also where data is centered and the 256 levels
lie 2/255 apart, so that their probabilities sum to 1/2; here they sum to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.checks import at_least, one_of
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.activations import ACTIVATIONS, draw_activation
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import ImageStatic, MetaLoss, check_widths
from tasks.families.initializers import INITIALIZERS, draw_initializer
from tasks.families.layers import wide
from tasks.families.mlp import mlp, mlp_flops, mlp_params, mlp_size
from tasks.families.switches import centered, check_switch, draw_switch, pick, switch
from tasks.random import fold, normal, uniform
from tasks.static import DYNAMIC, Work

LEVEL = 1 / 255
"""The distance of neighbouring values of an 8-bit pixel."""

CLIP = 10.0


def quantized_normal(mean: Tensor, log_sigma: Tensor, pixel: Tensor, noise: Tensor, width: Tensor) -> Tensor:
    """The log probability (nats) of ``pixel`` as one estimate of that of its bin, ``width`` wide; all broadcast.

    The bin's probability is the normal's mean density in it times its width; the estimate is of the density at one
    random place, for which ``noise`` is uniform on [0, 1). Its mean over noise is a lower bound (Theis, van den Oord &
    Bethge 2016, section 3.1).
    """
    distance = (pixel + (noise - 0.5) * width - mean) * (-log_sigma).exp()
    return width.log() - log_sigma - 0.5 * distance.square() - 0.5 * math.log(2 * math.pi)


def divergence(mean: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma) || N(0, 1)) in nats, elementwise."""
    return 0.5 * (mean.square() + (2 * log_sigma).exp() - 1) - log_sigma


@dataclass(frozen=True, kw_only=True)
class MlpVae(ImageStatic, kind="mlp_vae"):
    """MLPs with the hidden widths ``encoder`` and ``decoder`` around ``latent`` dimensions.

    ``center_data``: pixels on [-1, 1] rather than [0, 1]. ``per_dimension_loss``: the negative ELBO divided by the
    number of pixels.
    """

    encoder: tuple[int, ...] = (32,)
    decoder: tuple[int, ...] = (32,)
    latent: int = 32
    activation: str = "relu"
    initializer: str = "haiku"
    center_data: bool | str = False
    per_dimension_loss: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths("encoder", self.encoder)
        check_widths("decoder", self.decoder)
        at_least("latent", self.latent, 1)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("initializer", self.initializer, INITIALIZERS)
        check_switch("center_data", self.center_data)
        check_switch("per_dimension_loss", self.per_dimension_loss)

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """From the pixels to the latents' means and log deviations."""
        return (self.pixels, *self.encoder, 2 * self.latent)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """From the latents to the pixels' means and log deviations."""
        return (self.latent, *self.decoder, 2 * self.pixels)

    def build(self, library: Library) -> Task:
        return MlpVaeTask(self, library)

    def work(self) -> Work:
        widths = (self.encoder_widths, self.decoder_widths)
        hidden = sum(self.encoder) + sum(self.decoder)
        return Work(
            parameters=sum(mlp_size(each) for each in widths),
            flops=sum(mlp_flops(each, self.batch_size) for each in widths),
            activations=self.batch_size * (2 * hidden + 6 * self.latent + 7 * self.pixels),
        )


class MlpVaeTask(Task):
    """One ``MlpVae`` on its data."""

    def __init__(self, config: MlpVae, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
        self.meta_loss = MetaLoss(10.0)
        self.worst_loss = self.meta_loss.worst

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """Of the static config's ``dynamic`` fields, each (n,): int64, but ``initializer_scale`` and the switches."""
        config = self.config
        return {
            **draw_activation(generator, n, config.activation),
            **draw_initializer(generator, n, config.initializer),
            **draw_switch(generator, n, "center_data", config.center_data),
            **draw_switch(generator, n, "per_dimension_loss", config.per_dimension_loss),
        }

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        config = self.config
        encoder = mlp_params(generator, "encoder/", config.encoder_widths, config.initializer, dynamic)
        decoder = mlp_params(generator, "decoder/", config.decoder_widths, config.initializer, dynamic)
        return {**encoder, **decoder}

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The mean negative ELBO (nats) of ``batch``: image (B, C, H, W) in [0, 1], key () int64.

        All leaves may have the particles in front, and so has the loss then.
        """
        config, key = self.config, batch["key"]
        center = switch("center_data", config.center_data, dynamic)
        x = centered(center, batch["image"]).flatten(-3)
        examples = x.shape[-2]
        code = mlp(params, "encoder/", x, len(config.encoder) + 1, config.activation, dynamic)
        mean, log_sigma = code.chunk(2, -1)
        draws = normal(fold(key, "latent"), (examples, config.latent)).to(x.dtype)
        z = mean + log_sigma.exp() * draws
        out = mlp(params, "decoder/", z, len(config.decoder) + 1, config.activation, dynamic).clamp(-CLIP, CLIP)
        noise = uniform(fold(key, "quantization"), (examples, config.pixels)).to(x.dtype)
        level = torch.full_like(x[..., :1, :1], LEVEL)
        width = pick(center, lambda: 2 * level, lambda: level)
        pixel_mean, pixel_log_sigma = out.chunk(2, -1)
        log_p = quantized_normal(pixel_mean, pixel_log_sigma, x, noise, width).sum(-1, dtype=wide(x))
        elbo = log_p - divergence(mean, log_sigma).sum(-1, dtype=wide(x))
        return pick(self._per_dimension(dynamic), lambda: -elbo / config.pixels, lambda: -elbo).mean(-1)

    def _forward(self, params: Params, batch: Batch, dynamic: Dynamic) -> Tensor:
        """``loss``, which takes all particles at once, without vmap (see tasks/families/mlp.py)."""
        return self.loss(params, batch, dynamic)

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The loss per dimension clipped to [0, 10]."""
        per_dimension = pick(self._per_dimension(dynamic), lambda: loss, lambda: loss / self.config.pixels)
        return self.meta_loss(per_dimension)

    def _per_dimension(self, dynamic: Dynamic) -> bool | Tensor:
        return switch("per_dimension_loss", self.config.per_dimension_loss, dynamic)


def draw(rng: np.random.Generator, pool: Pool) -> MlpVae:
    """A config of VeLO's distribution (C.3.4), in which the code has the paper's ranges."""
    return MlpVae(
        encoder=(log_integer(rng, 4, 128),) * int(rng.integers(5)),
        decoder=(log_integer(rng, 4, 128),) * int(rng.integers(5)),
        latent=log_integer(rng, 2, 128),
        image_size=log_integer(rng, 4, 32),
        batch_size=log_integer(rng, 4, 512),
        dataset=choice(rng, pool.images),
        activation=DYNAMIC,
        initializer=DYNAMIC,
        center_data=DYNAMIC,
        per_dimension_loss=DYNAMIC,
    )
