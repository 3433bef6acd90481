"""Vision transformers that classify images (VeLO, appendix C.3.8).

Owns: their static config, distribution, initialisation, loss and cost, and the parts that the MLP-mixer shares: patches
and the layers as flax has them. Must never read data or know augmentations.

Facts after the ``vision_transformer`` package (models_vit.py), which google/learned_optimization builds these tasks
from: non-overlapping patches through one convolution with VALID padding, so that pixels beyond the last whole patch
are not seen; a class token that starts at zero, learned positions that start at N(0, 0.02); blocks that normalise
before attention and before a GELU MLP; a last normalisation; and a linear head on the class token, which starts at
zero, so that the first loss is log C. Layer normalisation has epsilon 1e-6. Dropout (always on, as the originals
measure every loss in training mode) comes after the positions, after attention, and twice in the MLP.

Where the image is smaller than a patch the original has no patches and trains a class token that sees nothing: refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.checks import ConfigError, at_least
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.attention import attention, attention_layers, attention_work
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import ImageStatic, check_below_one, clipped_meta_loss
from tasks.families.layers import cross_entropy, dropout, linear, norm_params
from tasks.random import fold
from tasks.static import Work


def patch_params(generator: torch.Generator, name: str, channels: int, out: int, patch_size: int) -> Params:
    """A kernel ``name/w`` (out, channels, patch_size, patch_size) and ``name/b``, zero."""
    shape = (out, channels, patch_size, patch_size)
    return {f"{name}/w": lecun_normal(generator, shape, channels * patch_size**2), f"{name}/b": torch.zeros(out)}


def embed_patches(params: Params, name: str, image: Tensor) -> Tensor:
    """(B, C, H, W) to (B, patches, out), row by row: the convolution whose stride is its kernel, as one product."""
    kernel = params[f"{name}/w"]
    batch, channels, *sides = image.shape
    size = kernel.shape[-1]
    rows, columns = (side // size for side in sides)
    whole = image[:, :, : rows * size, : columns * size].reshape(batch, channels, rows, size, columns, size)
    patches = whole.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * size**2)
    return patches @ kernel.flatten(1).T + params[f"{name}/b"]


def lecun_normal(generator: torch.Generator, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """flax's default: a normal cut off at 2 sigma whose deviation is 1/sqrt(fan_in) after the cut (haiku: before)."""
    sigma = fan_in**-0.5 / 0.87962566103423978
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


def token_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Each token (..., D) normalised, with flax's epsilon, which is a tenth of haiku's."""
    return F.layer_norm(x, x.shape[-1:], params[f"{name}/scale"], params[f"{name}/offset"], 1e-6)


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(ImageStatic, kind="vit"):
    """A ViT of ``layers`` blocks, ``width`` channels per token; ``dropout`` and ``attention_dropout`` are rates."""

    patch_size: int = 4
    width: int = 32
    heads: int = 2
    layers: int = 2
    mlp_dim: int = 64
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_classes", self.classes, 2)
        for name in ("patch_size", "width", "heads", "layers", "mlp_dim"):
            at_least(name, getattr(self, name), 1)
        if self.patch_size > self.image_size:
            raise ConfigError("patch_size", self.patch_size, f"at most image_size = {self.image_size}")
        if self.width % self.heads:
            raise ConfigError("width", self.width, f"a multiple of heads = {self.heads}")
        for name in ("dropout", "attention_dropout"):
            check_below_one(name, getattr(self, name))

    @property
    def tokens(self) -> int:
        """The whole patches of an image and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def build(self, library: Library) -> Task:
        return VisionTransformerTask(self, library)

    def work(self) -> Work:
        batch, tokens, width, mlp = self.batch_size, self.tokens, self.width, self.mlp_dim
        attending = attention_work(batch, tokens, width, width, self.heads)
        kernel, head = self.patch_size**2 * self.channels * width, width * self.classes
        block = attending.parameters + 4 * width + 2 * width * mlp + width + mlp
        return Work(
            parameters=kernel + width + (1 + tokens) * width + self.layers * block + 2 * width + head + self.classes,
            flops=2 * batch * ((tokens - 1) * kernel + head)
            + self.layers * (attending.flops + 4 * batch * tokens * width * mlp),
            activations=batch * (self.pixels + tokens * width)
            + self.layers * (attending.activations + batch * tokens * (4 * width + 3 * mlp)),
        )


class VisionTransformerTask(Task):
    """One vision transformer on one data set."""

    def __init__(self, config: VisionTransformer, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
        self._meta_loss = clipped_meta_loss(config.classes)
        self.worst_loss = self._meta_loss.worst

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """Xavier-uniform matrices, the MLPs' biases N(0, 1e-6), the others zero; patches, tokens and head as above."""
        config = self.config
        width = config.width
        params = patch_params(generator, "embedding", config.channels, width, config.patch_size)
        params["class_token"] = torch.zeros(1, 1, width)
        params["position"] = 0.02 * torch.randn(1, config.tokens, width, generator=generator)
        for index in range(config.layers):
            name = f"block{index}"
            params |= norm_params(f"{name}/norm0", width) | norm_params(f"{name}/norm1", width)
            for layer, (fan_in, fan_out) in attention_layers(f"{name}/attention", width, width).items():
                params[f"{layer}/w"] = _xavier_uniform(generator, fan_in, fan_out)
                params[f"{layer}/b"] = torch.zeros(fan_out)
            for layer, fan_in, fan_out in (("mlp0", width, config.mlp_dim), ("mlp1", config.mlp_dim, width)):
                params[f"{name}/{layer}/w"] = _xavier_uniform(generator, fan_in, fan_out)
                params[f"{name}/{layer}/b"] = 1e-6 * torch.randn(fan_out, generator=generator)
        params |= norm_params("norm", width)
        return {**params, "head/w": torch.zeros(width, config.classes), "head/b": torch.zeros(config.classes)}

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """Mean cross entropy (nats) of ``batch``: image (B, C, H, W) in [0, 1], label (B,), ``key`` () of dropout."""
        key = batch["key"]
        patches = embed_patches(params, "embedding", batch["image"])
        x = torch.cat([params["class_token"].expand(len(patches), -1, -1), patches], 1) + params["position"]
        x = self._dropped(x, key, "embedding")
        for index in range(self.config.layers):
            x = self._block(params, f"block{index}", x, key)
        return cross_entropy(linear(params, "head", token_norm(params, "norm", x[:, 0])), batch["label"])

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """10 loss / log 2C, clipped to [0, 10]."""
        return self._meta_loss(loss)

    def _block(self, params: Params, name: str, x: Tensor, key: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        rate = self.config.attention_dropout
        own = fold(key, f"{name}/attention/weights") if rate else None
        normed = token_norm(params, f"{name}/norm0", x)
        y = attention(params, f"{name}/attention", normed, self.config.heads, key=own, rate=rate)
        x = x + self._dropped(y, key, f"{name}/attention")
        y = F.gelu(linear(params, f"{name}/mlp0", token_norm(params, f"{name}/norm1", x)), approximate="tanh")
        y = linear(params, f"{name}/mlp1", self._dropped(y, key, f"{name}/mlp0"))
        return x + self._dropped(y, key, f"{name}/mlp1")

    def _dropped(self, x: Tensor, key: Tensor, place: str) -> Tensor:
        rate = self.config.dropout
        return dropout(x, fold(key, place), rate) if rate else x


def _xavier_uniform(generator: torch.Generator, fan_in: int, fan_out: int) -> Tensor:
    limit = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(fan_in, fan_out).uniform_(-limit, limit, generator=generator)


def draw(rng: np.random.Generator, pool: Pool) -> VisionTransformer:
    """VeLO's distribution. Raises ConfigError where the drawn patch is larger than the drawn image.

    Where the paper and the code differ, which is in the smallest image (4 or 8) and the channels per head (uniform or
    log-uniform), ``pool.ranges`` decides. The paper has the attention's dropout "uniform, between 0 and 0.8 on a log
    scale", which cannot start at 0; as in the code it is uniform, and on or off together with the other dropout.
    """
    paper = pool.ranges == "paper"
    heads = log_integer(rng, 1, 16)
    most = 64 if heads < 4 else 32
    per_head = int(rng.integers(8, most + 1)) if paper else log_integer(rng, 8, most)
    used = rng.random() < 0.7
    rates = rng.uniform(0, 0.8, size=2) if used else (0.0, 0.0)
    return VisionTransformer(
        dataset=choice(rng, pool.images),
        image_size=log_integer(rng, 4 if paper else 8, 64),
        batch_size=log_integer(rng, 4, 256),
        patch_size=choice(rng, (2, 4, 8, 12, 16)),
        width=per_head * heads,
        heads=heads,
        layers=log_integer(rng, 1, 16),
        mlp_dim=log_integer(rng, 32, 512),
        dropout=float(rates[0]),
        attention_dropout=float(rates[1]),
    )
