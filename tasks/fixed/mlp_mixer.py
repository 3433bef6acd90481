"""The fixed MLP-mixer tasks, by their published names.

Owns: those names with exactly the models and data of google/learned_optimization's tasks/fixed/mlp_mixer.py: Mixer-B/16
with 8 layers instead of 12 (small16), or narrower with 5 (tiny16); batches of 128, or of 256 where the name says so.
"""

from __future__ import annotations

from typing import Any

from tasks.families.mlp_mixer import MlpMixer
from tasks.static import StaticConfig

_DATA = {"ImageNet64": ("imagenet64", 64), "Food101_64": ("food101", 64), "Cifar100": ("cifar100", 32)}
_SMALL: dict[str, Any] = {"width": 768, "layers": 8, "tokens_mlp_dim": 384, "channels_mlp_dim": 3072}
_TINY: dict[str, Any] = {"width": 512, "layers": 5, "tokens_mlp_dim": 384, "channels_mlp_dim": 2048}
_MODELS = {"small16": (128, _SMALL), "tiny16": (128, _TINY), "bs256_tiny16": (256, _TINY)}

TASKS: dict[str, StaticConfig] = {
    f"MLPMixer_{data}_{model}": MlpMixer(
        dataset=dataset, image_size=image_size, batch_size=batch_size, patch_size=16, **sizes
    )
    for data, (dataset, image_size) in _DATA.items()
    for model, (batch_size, sizes) in _MODELS.items()
}
