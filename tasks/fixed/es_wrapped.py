"""The fixed tasks whose gradients are estimated by evolution strategies.

Source: google/learned_optimization, tasks/fixed/es_wrapped.py.
"""

from __future__ import annotations

from tasks.augmentations.es_gradient import EsGradient
from tasks.fixed.image_mlp import TASKS as MLP
from tasks.static import StaticConfig

_PAIRS = (
    (1, "ImageMLP_Cifar10_128x128x128_Relu"),
    (8, "ImageMLP_Cifar10_128x128x128_Relu"),
    (1, "ImageMLP_Mnist_128x128x128_Relu"),
    (8, "ImageMLP_Mnist_128x128x128_Relu"),
    (1, "ImageMLP_FashionMnist8_Relu32"),
    (1, "ImageMLP_Cifar10BW8_Relu32"),
)

TASKS: dict[str, StaticConfig] = {
    f"ESWrapped_{pairs}pair_{name}": EsGradient(task=MLP[name], sigma=0.01, pairs=pairs) for pairs, name in _PAIRS
}
