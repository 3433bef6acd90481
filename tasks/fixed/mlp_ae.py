"""The fixed MLP auto-encoders, by their published names.

Owns: those names with exactly the models, data and batch sizes of google/learned_optimization's
tasks/fixed/image_mlp_ae.py, all of that file.
"""

from __future__ import annotations

from functools import partial

from tasks.families.mlp_ae import MlpAe
from tasks.static import StaticConfig

_cifar10 = partial(MlpAe, dataset="cifar10", image_size=32, activation="relu", constrain_output=True)
_fashion_mnist = partial(MlpAe, dataset="fashion_mnist", image_size=28, activation="relu", constrain_output=True)
_mnist = partial(MlpAe, dataset="mnist", image_size=28, activation="relu", constrain_output=True)

TASKS: dict[str, StaticConfig] = {
    "ImageMLPAE_Cifar10_32x32x32_bs128": _cifar10(hidden=(32, 32, 32), batch_size=128),
    "ImageMLPAE_Cifar10_256x256x256_bs128": _cifar10(hidden=(256, 256, 256), batch_size=128),
    "ImageMLPAE_Cifar10_256x256x256_bs1024": _cifar10(hidden=(256, 256, 256), batch_size=1024),
    "ImageMLPAE_Cifar10_128x32x128_bs256": _cifar10(hidden=(128, 32, 128), batch_size=256),
    "ImageMLPAE_Mnist_128x32x128_bs128": _mnist(hidden=(128, 32, 128), batch_size=128),
    "ImageMLPAE_FashionMnist_128x32x128_bs128": _fashion_mnist(hidden=(128, 32, 128), batch_size=128),
}
