"""The fixed MLP classifiers, by their published names.

Owns: those names with exactly the models, data and batch sizes of google/learned_optimization's
tasks/fixed/image_mlp.py, all of that file.
"""

from __future__ import annotations

from functools import partial

from tasks.families.image_mlp import ImageMlp
from tasks.static import StaticConfig

_cifar10 = partial(ImageMlp, dataset="cifar10", image_size=32, batch_size=128, activation="relu")
_cifar100 = partial(ImageMlp, dataset="cifar100", image_size=32, batch_size=128, activation="relu")
_fashion_mnist = partial(ImageMlp, dataset="fashion_mnist", image_size=28, batch_size=128, activation="relu")
_imagenet16 = partial(ImageMlp, dataset="imagenet16", image_size=16, batch_size=128, activation="relu")
_mnist = partial(ImageMlp, dataset="mnist", image_size=28, batch_size=128, activation="relu")

_DEEP = (128, 128, 128)

TASKS: dict[str, StaticConfig] = {
    "ImageMLP_Cifar10BW8_Relu32": _cifar10(image_size=8, grey=True, hidden=(32,)),
    "ImageMLP_FashionMnist_Relu128x128": _fashion_mnist(hidden=(128, 128)),
    "ImageMLP_FashionMnist8_Relu32": _fashion_mnist(image_size=8, hidden=(32,)),
    "ImageMLP_FashionMnist16_Relu32": _fashion_mnist(image_size=16, hidden=(32,)),
    "ImageMLP_FashionMnist32_Relu32": _fashion_mnist(image_size=32, hidden=(32,)),
    "ImageMLP_Cifar10_8_Relu32": _cifar10(image_size=8, hidden=(32,)),
    "ImageMLP_Imagenet16_Relu256x256x256": _imagenet16(hidden=(256, 256, 256)),
    "ImageMLP_Cifar10_128x128x128_Relu": _cifar10(hidden=_DEEP),
    "ImageMLP_Cifar100_128x128x128_Relu": _cifar100(hidden=_DEEP),
    "ImageMLP_Cifar10_128x128x128_Tanh_bs64": _cifar10(hidden=_DEEP, activation="tanh", batch_size=64),
    "ImageMLP_Cifar10_128x128x128_Tanh_bs128": _cifar10(hidden=_DEEP, activation="tanh"),
    "ImageMLP_Cifar10_128x128x128_Tanh_bs256": _cifar10(hidden=_DEEP, activation="tanh", batch_size=256),
    "ImageMLP_Mnist_128x128x128_Relu": _mnist(hidden=_DEEP),
    "ImageMLP_Cifar10_256x256_Relu": _cifar10(hidden=(256, 256)),
    "ImageMLP_Cifar10_256x256_Relu_BS32": _cifar10(hidden=(256, 256), batch_size=32),
    "ImageMLP_Cifar10_1024x1024_Relu": _cifar10(hidden=(1024, 1024)),
    "ImageMLP_Cifar10_4096x4096_Relu": _cifar10(hidden=(4096, 4096)),
    "ImageMLP_Cifar10_8192x8192_Relu": _cifar10(hidden=(8192, 8192)),
    "ImageMLP_Cifar10_16384x16384_Relu": _cifar10(hidden=(16384, 16384)),
    "ImageMLP_Cifar10_128x128x128_Relu_MSE": _cifar10(hidden=_DEEP, loss="squared"),
    "ImageMLP_Cifar10_128x128_Dropout02_Relu_MSE": _cifar10(hidden=(128, 128), dropout=0.2, loss="squared"),
    "ImageMLP_Cifar10_128x128_Dropout05_Relu_MSE": _cifar10(hidden=(128, 128), dropout=0.5, loss="squared"),
    "ImageMLP_Cifar10_128x128_Dropout08_Relu_MSE": _cifar10(hidden=(128, 128), dropout=0.8, loss="squared"),
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu": _cifar10(hidden=_DEEP, norm="layer_norm"),
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Tanh": _cifar10(hidden=_DEEP, norm="layer_norm", activation="tanh"),
    "ImageMLP_Cifar10_128x128x128_BatchNorm_Relu": _cifar10(hidden=_DEEP, norm="batch_norm"),
    "ImageMLP_Cifar10_128x128x128_BatchNorm_Tanh": _cifar10(hidden=_DEEP, norm="batch_norm", activation="tanh"),
}
