"""The fixed convolutional classifiers, by their published names.

Owns: those names with exactly the models, data and batch sizes of google/learned_optimization's tasks/fixed/conv.py,
all of that file. (The name Conv_imagenet32_16_32x64x64 speaks of 16 pixels, but its images have 32.)
"""

from __future__ import annotations

from functools import partial

from tasks.families.image_conv import ImageConv
from tasks.static import StaticConfig

_cifar10 = partial(ImageConv, dataset="cifar10", image_size=32, batch_size=128, strided=1, activation="relu")
_cifar100 = partial(ImageConv, dataset="cifar100", image_size=32, batch_size=128, strided=1, activation="relu")
_imagenet16 = partial(ImageConv, dataset="imagenet16", image_size=16, batch_size=128, strided=1, activation="relu")
_imagenet32 = partial(ImageConv, dataset="imagenet32", image_size=32, batch_size=128, strided=1, activation="relu")

_WIDTHS = (32, 64, 64)

TASKS: dict[str, StaticConfig] = {
    "Conv_Cifar10_8_16x32": _cifar10(image_size=8, hidden=(16, 32)),
    "Conv_Cifar10_16_32x64x64": _cifar10(image_size=16, hidden=_WIDTHS),
    "Conv_Cifar10_32x64x64": _cifar10(hidden=_WIDTHS),
    "Conv_Cifar100_32x64x64": _cifar100(hidden=_WIDTHS),
    "Conv_Cifar100_32x64x64_BS32": _cifar100(hidden=_WIDTHS, batch_size=32),
    "Conv_Cifar100_32x64x64_Tanh": _cifar100(hidden=_WIDTHS, activation="tanh"),
    "Conv_Cifar10_32x64x64_Tanh": _cifar10(hidden=_WIDTHS, activation="tanh"),
    "Conv_imagenet32_16_32x64x64": _imagenet32(hidden=_WIDTHS),
    "Conv_imagenet16_16_64x128x128x128": _imagenet16(hidden=(64, 128, 128, 128)),
    "Conv_Cifar10_32x64x64_batchnorm": _cifar10(hidden=_WIDTHS, norm="batch_norm"),
    "Conv_Cifar10_32x64x64_layernorm": _cifar10(hidden=_WIDTHS, norm="layer_norm"),
}
