"""Small convolutional nets that classify images: VeLO's family (appendix C.3.2) and the form of the fixed Conv tasks.

Owns: their static config, its distribution, the initialisation and the loss. Must never read files or augment data.

Facts after google/learned_optimization (tasks/fixed/conv.py, tasks/parametric/image_conv.py): 3x3 convolutions with
bias and SAME padding, each followed by the activation and then the norm (layer_norm: over the channels of each
position); the mean over all positions; a linear layer. Parameters are conv0/w, conv0/b, norm0/scale, norm0/offset, ...,
head/w, head/b. Where the paper draws "one initialization function for all tensors", the code leaves the head at
haiku's; here it is drawn for the head as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from configs.checks import ConfigError, at_least, one_of
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.activations import ACTIVATIONS, activate, draw_activation
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import CLASSIFIER_NORMALIZERS, ImageStatic, check_widths, classifier_meta_loss
from tasks.families.initializers import INITIALIZERS, draw_initializer
from tasks.families.layers import (
    batch_norm,
    conv,
    conv_as_product,
    conv_params,
    cross_entropy,
    layer_norm,
    linear,
    linear_params,
    norm_params,
)
from tasks.static import DYNAMIC, Work

KERNEL = 3
WINDOW_BYTES = 1 << 20
"""The most that the windows of a convolution may take to be copied out: about a core's own cache."""
NORMS = ("none", "layer_norm", "batch_norm")


@dataclass(frozen=True, kw_only=True)
class ImageConv(ImageStatic, kind="image_conv"):
    """Convolutions with the output channels ``hidden``, of which the first ``strided`` have stride 2.

    ``normalizer``: see ``classifier_meta_loss``.
    """

    hidden: tuple[int, ...] = (16, 32)
    strided: int = 1
    activation: str = "relu"
    initializer: str = "haiku"
    norm: str = "none"
    normalizer: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_classes", self.classes, 2)
        check_widths("hidden", self.hidden)
        if not 0 <= self.strided <= len(self.hidden):
            raise ConfigError("strided", self.strided, f"0 to {len(self.hidden)}, the number of convolutions")
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("initializer", self.initializer, INITIALIZERS)
        one_of("norm", self.norm, NORMS)
        one_of("normalizer", self.normalizer, CLASSIFIER_NORMALIZERS)

    @property
    def stages(self) -> tuple[int, ...]:
        """The channels of the image and then of every convolution's output."""
        return (self.channels, *self.hidden)

    def build(self, library: Library) -> Task:
        return ImageConvTask(self, library)

    def work(self) -> Work:
        head = self.stages[-1] * self.classes
        parameters = head + self.classes
        flops, kept, side = head, self.pixels, self.image_size
        for layer, (channels, out) in enumerate(pairwise(self.stages)):
            side = math.ceil(side / 2) if layer < self.strided else side
            parameters += channels * out * KERNEL**2 + out + (0 if self.norm == "none" else 2 * out)
            flops += channels * out * KERNEL**2 * side**2
            kept += (2 + (self.norm != "none")) * out * side**2
        return Work(parameters, 2 * self.batch_size * flops, self.batch_size * (kept + 2 * self.classes))


class ImageConvTask(Task):
    """One ``ImageConv`` on its data."""

    def __init__(self, config: ImageConv, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
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
        params: Params = {}
        for layer, (channels, out) in enumerate(pairwise(config.stages)):
            name = f"conv{layer}"
            params.update(conv_params(generator, name, channels, out, KERNEL, config.initializer, dynamic))
            if config.norm != "none":
                params.update(norm_params(f"norm{layer}", out))
        head = linear_params(generator, "head", config.stages[-1], config.classes, config.initializer, dynamic)
        return {**params, **head}

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """Mean cross entropy (nats) of ``batch``: image (B, C, H, W) in [0, 1], label (B,) int64."""
        config = self.config
        x = batch["image"]
        for layer in range(len(config.hidden)):
            convolve = conv_as_product if self._as_product(layer, x) else conv
            x = convolve(params, f"conv{layer}", x, stride=2 if layer < config.strided else 1)
            x = activate(config.activation, x, dynamic)
            if config.norm == "layer_norm":
                x = layer_norm(params, f"norm{layer}", x, axis=1)
            elif config.norm == "batch_norm":
                x = batch_norm(params, f"norm{layer}", x)
        return cross_entropy(linear(params, "head", x.mean((2, 3))), batch["label"])

    def _as_product(self, layer: int, x: Tensor) -> bool:
        """Whether the convolution of ``x`` (B, C, H, W) is faster so: compiled, on a CPU, its windows small."""
        stride = 2 if layer < self.config.strided else 1
        windows = KERNEL**2 * x.nbytes // stride**2
        return torch.compiler.is_compiling() and x.device.type == "cpu" and windows <= WINDOW_BYTES

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        return self.meta_loss(loss)


def draw(rng: np.random.Generator, pool: Pool) -> ImageConv:
    """A config of VeLO's distribution (C.3.2), in which the code has the paper's ranges.

    Where fewer layers are drawn than are to have stride 2, all of them have it.
    """
    layers = int(rng.integers(4))
    return ImageConv(
        hidden=(log_integer(rng, 4, 64),) * layers,
        strided=min(int(rng.integers(3)), layers),
        image_size=log_integer(rng, 4, 32),
        batch_size=log_integer(rng, 4, 512),
        dataset=choice(rng, pool.images),
        activation=DYNAMIC,
        initializer=DYNAMIC,
        normalizer="parametric",
    )
