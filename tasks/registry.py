"""From a configuration to a task family.

Owns: which family each kind is, and the augmentations around it. Must never validate what configs.schema has.
"""

from __future__ import annotations

from configs.schema import DataConfig, FamilyConfig
from tasks.base import TaskFamily
from tasks.datasets import load_datasets, num_classes
from tasks.image_mlp import ImageMlpConfig, ImageMlpFamily
from tasks.reparam import ReparamFamily


def build_family(name: str, config: FamilyConfig, data: DataConfig) -> TaskFamily:
    """The family of ``config`` with its data read; ``name`` is what logs, metrics and the wire call it.

    Raises DataError if the data cannot be had.
    """
    static = ImageMlpConfig(
        dataset=config.dataset,
        num_classes=num_classes(config.dataset),
        image_size=config.image_size,
        hidden=tuple(config.hidden),
        activation=config.activation,
        batch_size=config.batch_size,
        shift=config.shift,
        noise=config.noise,
    )
    datasets = load_datasets(config.dataset, config.image_size, data, config.shift, config.noise)
    family = ImageMlpFamily(name, static, datasets)
    return family if config.reparam.level == "none" else ReparamFamily(family, config.reparam)
