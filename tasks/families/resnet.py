"""Residual networks that classify images (VeLO, appendix C.3.5).

Owns: their static config, distribution, initialisation, loss and cost. Must never read data or know augmentations.

Facts after google/learned_optimization (tasks/resnet.py, a fork of haiku's): a stem convolution, perhaps a max pool of
3 with stride 2, then four groups of bottleneck blocks (1x1, 3x3, 1x1 convolutions; the first two have a quarter of the
block's width) with strides 1, 2, 2, 2, each group's first block with a projected shortcut; global average pooling and a
linear head that starts at zero, so that the first loss is log C. Convolutions have no bias and SAME padding; batch
normalisation always uses the batch's own statistics. Version 1 normalises after each convolution (and starts the last
scale of each block at zero); version 2 normalises before. Blocks use relu: ``activation`` is that of the stem (version
1) or before the pooling (version 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.checks import ConfigError, at_least, one_of
from tasks.base import IDENTITY, Batch, Dynamic, Params, Task
from tasks.data.library import Library
from tasks.families.activations import ACTIVATIONS, activate, draw_activation
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import ImageStatic, clipped_meta_loss
from tasks.families.layers import batch_norm, conv, conv_params, cross_entropy, linear, max_pool, norm_params
from tasks.static import DYNAMIC, Work

PATTERNS = ((1, 1, 1, 1), (1, 2, 4, 8), (1, 2, 2, 4), (1, 2, 2, 2), (1, 2, 4, 4))
"""Widths of the four groups in units of the first."""

_STRIDES = (1, 2, 2, 2)


class _Convolution(NamedTuple):
    """A convolution's name, channels in and out, kernel size, and the side (pixels) of what comes out."""

    name: str
    channels: int
    out: int
    kernel: int
    side: int


class _Block(NamedTuple):
    """One residual block: its channels in and out, the side (pixels) of what comes in, and the stride of conv1."""

    name: str
    channels: int
    width: int
    side: int
    stride: int
    projected: bool

    @property
    def side_out(self) -> int:
        """Pixels of what comes out."""
        return math.ceil(self.side / self.stride)

    def path(self) -> list[_Convolution]:
        """conv0, conv1 and conv2."""
        inner = self.width // 4
        return [
            _Convolution(f"{self.name}/conv0", self.channels, inner, 1, self.side),
            _Convolution(f"{self.name}/conv1", inner, inner, 3, self.side_out),
            _Convolution(f"{self.name}/conv2", inner, self.width, 1, self.side_out),
        ]

    def convolutions(self) -> list[_Convolution]:
        """The path's and, if the shortcut is projected, shortcut."""
        shortcut = _Convolution(f"{self.name}/shortcut", self.channels, self.width, 1, self.side_out)
        return [*self.path(), shortcut] if self.projected else self.path()


@dataclass(frozen=True, kw_only=True)
class ResNet(ImageStatic, kind="resnet"):
    """A bottleneck ResNet of ``version`` 1 or 2, with ``blocks`` and ``widths`` (channels out) of its four groups."""

    version: int = 1
    stem_channels: int = 16
    stem_kernel: int = 3
    stem_stride: int = 2
    max_pool: bool = True
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    widths: tuple[int, ...] = (16, 32, 64, 128)
    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("num_classes", self.classes, 2)
        if self.version not in (1, 2):
            raise ConfigError("version", self.version, "1 or 2")
        for name in ("stem_channels", "stem_kernel", "stem_stride"):
            at_least(name, getattr(self, name), 1)
        for name, least in (("blocks", 1), ("widths", 4)):  # a quarter of the width is the bottleneck's
            values = getattr(self, name)
            if len(values) != len(_STRIDES):
                raise ConfigError(name, list(values), "four numbers, one for each group")
            for group, value in enumerate(values):
                at_least(f"{name}[{group}]", value, least)
        one_of("activation", self.activation, ACTIVATIONS)

    def stem(self) -> _Convolution:
        """The first convolution."""
        side = math.ceil(self.image_size / self.stem_stride)
        return _Convolution("stem", self.channels, self.stem_channels, self.stem_kernel, side)

    def structure(self) -> Iterator[_Block]:
        """The blocks of all groups, first to last."""
        _, _, channels, _, side = self.stem()
        side = math.ceil(side / 2) if self.max_pool else side
        for group, (blocks, width, stride) in enumerate(zip(self.blocks, self.widths, _STRIDES, strict=True)):
            for index in range(blocks):
                first = index == 0
                block = _Block(f"group{group}/block{index}", channels, width, side, stride if first else 1, first)
                yield block
                channels, side = width, block.side_out

    def convolutions(self) -> list[_Convolution]:
        """All of them, the stem first."""
        return [self.stem(), *(layer for block in self.structure() for layer in block.convolutions())]

    def norms(self) -> dict[str, int]:
        """The batch normalisations and their channels: of what a convolution gives (version 1) or gets (version 2)."""
        if self.version == 1:
            return {f"{layer.name}_norm": layer.out for layer in self.convolutions()}
        inside = (layer for block in self.structure() for layer in block.path())
        return {**{f"{layer.name}_norm": layer.channels for layer in inside}, "norm": self.widths[-1]}

    def build(self, library: Library) -> Task:
        return ResNetTask(self, library)

    def work(self) -> Work:
        convolutions = self.convolutions()
        weights = [layer.channels * layer.out * layer.kernel**2 for layer in convolutions]
        head = self.widths[-1] * self.classes
        area = sum(weight * layer.side**2 for weight, layer in zip(weights, convolutions, strict=True))
        # Each convolution keeps its input, as does each normalisation and each activation: three times an output.
        kept = self.pixels + sum(3 * layer.out * layer.side**2 for layer in convolutions)
        return Work(
            parameters=sum(weights) + 2 * sum(self.norms().values()) + head + self.classes,
            flops=2 * self.batch_size * (area + head),
            activations=self.batch_size * kept,
        )


class ResNetTask(Task):
    """One ResNet on one data set."""

    def __init__(self, config: ResNet, library: Library) -> None:
        self.config = config
        self.datasets = config.images(library)
        self.batch_size = config.batch_size
        self._meta_loss = clipped_meta_loss(config.classes)
        self.worst_loss = self._meta_loss.worst

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        return draw_activation(generator, n, self.config.activation)

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """Kernels by haiku's default, scales one, offsets zero; zero are the head and version 1's last scales."""
        config = self.config
        width, classes = config.widths[-1], config.classes
        params: Params = {}
        for name, channels, out, kernel, _ in config.convolutions():
            params |= conv_params(generator, name, channels, out, kernel, bias=False)
        for name, channels in config.norms().items():
            params |= norm_params(name, channels)
            if config.version == 1 and name.endswith("conv2_norm"):
                params[f"{name}/scale"].zero_()
        return {**params, "head/w": torch.zeros(width, classes), "head/b": torch.zeros(classes)}

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """Mean cross entropy (nats) of ``batch``: image (B, C, H, W) in [0, 1], label (B,) int64."""
        config = self.config
        x = conv(params, "stem", batch["image"], config.stem_stride)
        if config.version == 1:
            x = activate(config.activation, batch_norm(params, "stem_norm", x), dynamic)
        if config.max_pool:
            x = max_pool(x, 3, 2)
        block_of = _block_v1 if config.version == 1 else _block_v2
        for block in config.structure():
            x = block_of(params, block, x)
        if config.version == 2:
            x = activate(config.activation, batch_norm(params, "norm", x), dynamic)
        return cross_entropy(linear(params, "head", x.mean((-2, -1))), batch["label"])

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """10 loss / log 2C, clipped to [0, 10]."""
        return self._meta_loss(loss)


def _block_v1(params: Params, block: _Block, x: Tensor) -> Tensor:
    """(B, channels, side, side) to (B, width, side_out, side_out): normalised after each convolution."""
    name = block.name
    shortcut = x
    if block.projected:
        projected = _pointwise(params, f"{name}/shortcut", x, block.stride)
        shortcut = batch_norm(params, f"{name}/shortcut_norm", projected)
    x = F.relu(batch_norm(params, f"{name}/conv0_norm", _pointwise(params, f"{name}/conv0", x)))
    x = F.relu(batch_norm(params, f"{name}/conv1_norm", conv(params, f"{name}/conv1", x, block.stride)))
    x = batch_norm(params, f"{name}/conv2_norm", _pointwise(params, f"{name}/conv2", x))
    return F.relu(x + shortcut)


def _block_v2(params: Params, block: _Block, x: Tensor) -> Tensor:
    """As ``_block_v1``, but normalised before each convolution, the shortcut's with conv0."""
    name = block.name
    shortcut = x
    x = F.relu(batch_norm(params, f"{name}/conv0_norm", x))
    if block.projected:
        shortcut = _pointwise(params, f"{name}/shortcut", x, block.stride)
    x = _pointwise(params, f"{name}/conv0", x)
    x = conv(params, f"{name}/conv1", F.relu(batch_norm(params, f"{name}/conv1_norm", x)), block.stride)
    x = _pointwise(params, f"{name}/conv2", F.relu(batch_norm(params, f"{name}/conv2_norm", x)))
    return x + shortcut


def _pointwise(params: Params, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A 1x1 convolution as a product of matrices: with kernels per particle up to three times as fast as conv2d."""
    return torch.einsum("oc,bchw->bohw", params[f"{name}/w"].flatten(1), x[:, :, ::stride, ::stride])


def draw(rng: np.random.Generator, pool: Pool) -> ResNet:
    """VeLO's distribution: version 1, widths by one of the patterns, every particle with an activation of its own.

    The paper draws each group's blocks uniformly up to a maximum that is log-uniform; the code log-uniformly. The code
    also draws the stem's stride, 1 or 2, but its network then always takes 2, which the paper leaves unsaid.
    """
    paper = pool.ranges == "paper"
    most = log_integer(rng, 1, 10)
    blocks = [int(rng.integers(1, most + 1)) if paper else log_integer(rng, 1, most) for _ in _STRIDES]
    pattern = choice(rng, PATTERNS)
    base = log_integer(rng, 8, 256)
    return ResNet(
        dataset=choice(rng, pool.images),
        image_size=log_integer(rng, 8, 64),
        batch_size=log_integer(rng, 4, 256),
        stem_kernel=choice(rng, (3, 5, 7)),
        stem_channels=log_integer(rng, 8, 64),
        stem_stride=2 if paper else choice(rng, (1, 2)),
        max_pool=choice(rng, (True, False)),
        blocks=tuple(blocks),
        widths=tuple(base * factor for factor in pattern),
        activation=DYNAMIC,
    )
