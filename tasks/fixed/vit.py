"""The fixed vision-transformer tasks, by their published names.

Owns: those names with exactly the models and data of google/learned_optimization's tasks/fixed/vit.py: patches of 16,
batches of 128, no dropout; wideshallow is ViT-S/16 with 6 layers instead of 12, skinnydeep a narrower one with 10.
"""

from __future__ import annotations

from typing import Any

from tasks.families.vit import VisionTransformer
from tasks.static import StaticConfig

_DATA = {"ImageNet64": ("imagenet64", 64), "Food101_64": ("food101", 64), "Cifar100": ("cifar100", 32)}
_MODELS: dict[str, dict[str, Any]] = {
    "wideshallow": {"width": 384, "mlp_dim": 1536, "heads": 6, "layers": 6},
    "skinnydeep": {"width": 128, "mlp_dim": 512, "heads": 4, "layers": 10},
}

TASKS: dict[str, StaticConfig] = {
    f"VIT_{data}_{model}": VisionTransformer(
        dataset=dataset, image_size=image_size, batch_size=128, patch_size=16, **sizes
    )
    for data, (dataset, image_size) in _DATA.items()
    for model, sizes in _MODELS.items()
}
