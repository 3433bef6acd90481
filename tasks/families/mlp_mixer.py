"""MLP-mixers that classify images: fixed tasks only, no family of VeLO's distribution.

Owns: their static config, initialisation, loss and cost. Must never read data or know augmentations.

Facts after the ``vision_transformer`` package (models_mixer.py), which google/learned_optimization builds these tasks
from: non-overlapping patches as tokens, blocks of a GELU MLP across the tokens and one across the channels, each after
a layer normalisation (epsilon 1e-6) and with a residual; a last normalisation, the mean over the tokens, and a linear
head that starts at zero, so that the first loss is log C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.checks import ConfigError, at_least
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.image import ImageStatic, clipped_meta_loss
from tasks.families.layers import cross_entropy, linear, norm_params
from tasks.families.vit import embed_patches, lecun_normal, patch_params, token_norm
from tasks.static import Work


@dataclass(frozen=True, kw_only=True)
class MlpMixer(ImageStatic, kind="mlp_mixer"):
    """A mixer of ``layers`` blocks, ``width`` channels per token; the inner widths of its two kinds of MLP."""

    patch_size: int = 4
    width: int = 32
    layers: int = 2
    tokens_mlp_dim: int = 16
    channels_mlp_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_classes", self.classes, 2)
        for name in ("patch_size", "width", "layers", "tokens_mlp_dim", "channels_mlp_dim"):
            at_least(name, getattr(self, name), 1)
        if self.image_size % self.patch_size:
            raise ConfigError("patch_size", self.patch_size, f"a divisor of image_size = {self.image_size}")

    @property
    def tokens(self) -> int:
        """The patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def linears(self) -> dict[str, tuple[int, int]]:
        """A block's linear maps, each with its (in, out)."""
        return {
            "tokens0": (self.tokens, self.tokens_mlp_dim),
            "tokens1": (self.tokens_mlp_dim, self.tokens),
            "channels0": (self.width, self.channels_mlp_dim),
            "channels1": (self.channels_mlp_dim, self.width),
        }

    def build(self, library: Library) -> Task:
        return MlpMixerTask(self, library)

    def work(self) -> Work:
        kernel, head = self.patch_size**2 * self.channels * self.width, self.width * self.classes
        block = 4 * self.width + sum(fan_in * fan_out + fan_out for fan_in, fan_out in self.linears().values())
        products = 2 * self.tokens * self.width * (self.tokens_mlp_dim + self.channels_mlp_dim)
        kept = 6 * self.tokens * self.width + 2 * (
            self.width * self.tokens_mlp_dim + self.tokens * self.channels_mlp_dim
        )
        return Work(
            parameters=kernel + self.width + self.layers * block + 2 * self.width + head + self.classes,
            flops=2 * self.batch_size * (self.tokens * kernel + self.layers * products + head),
            activations=self.batch_size * (self.pixels + 2 * self.tokens * self.width + self.layers * kept),
        )


class MlpMixerTask(Task):
    """One MLP-mixer on one data set."""

    def __init__(self, config: MlpMixer, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
        self._meta_loss = clipped_meta_loss(config.classes)
        self.worst_loss = self._meta_loss.worst

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """flax's default for all matrices but the head, which is zero, as are all biases."""
        config = self.config
        width = config.width
        params = patch_params(generator, "embedding", config.channels, width, config.patch_size)
        for index in range(config.layers):
            params |= norm_params(f"block{index}/norm0", width) | norm_params(f"block{index}/norm1", width)
            for layer, (fan_in, fan_out) in config.linears().items():
                params[f"block{index}/{layer}/w"] = lecun_normal(generator, (fan_in, fan_out), fan_in)
                params[f"block{index}/{layer}/b"] = torch.zeros(fan_out)
        params |= norm_params("norm", width)
        return {**params, "head/w": torch.zeros(width, config.classes), "head/b": torch.zeros(config.classes)}

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """Mean cross entropy (nats) of ``batch``: image (B, C, H, W) in [0, 1], label (B,) int64."""
        x = embed_patches(params, "embedding", batch["image"])
        for index in range(self.config.layers):
            name = f"block{index}"
            mixed = _mlp(params, f"{name}/tokens", token_norm(params, f"{name}/norm0", x).transpose(1, 2))
            x = x + mixed.transpose(1, 2)
            x = x + _mlp(params, f"{name}/channels", token_norm(params, f"{name}/norm1", x))
        return cross_entropy(linear(params, "head", token_norm(params, "norm", x).mean(1)), batch["label"])

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """10 loss / log 2C, clipped to [0, 10]."""
        return self._meta_loss(loss)


def _mlp(params: Params, name: str, x: Tensor) -> Tensor:
    """Two linear maps of the last axis with GELU (the tanh approximation, JAX's default) between them."""
    return linear(params, f"{name}1", F.gelu(linear(params, f"{name}0", x), approximate="tanh"))
