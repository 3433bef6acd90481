"""The fixed ResNet tasks, by their published names.

Owns: those names with exactly the models and data of google/learned_optimization's tasks/fixed/resnet.py.

Version 2, relu, 64 channels in the stem; ImageNet at 16, 32 and 64 pixels. The original gives these tasks no
normaliser of their own (their meta-loss is the loss); here it is that of the drawn ResNets, so that it is bounded.
"""

from __future__ import annotations

from tasks.families.resnet import ResNet
from tasks.static import StaticConfig


def _resnet(
    image_size: int,
    batch_size: int,
    stem_kernel: int,
    widths: tuple[int, ...],
    blocks: tuple[int, ...] = (1, 1, 1, 1),
    max_pool: bool = True,
) -> ResNet:
    return ResNet(
        dataset=f"imagenet{image_size}",
        image_size=image_size,
        batch_size=batch_size,
        version=2,
        stem_channels=64,
        stem_kernel=stem_kernel,
        stem_stride=2,
        max_pool=max_pool,
        blocks=blocks,
        widths=widths,
    )


TASKS: dict[str, StaticConfig] = {
    "Resnet_MultiRuntime_0": _resnet(16, 64, 3, (8, 16, 16, 16)),
    "Resnet_MultiRuntime_1": _resnet(16, 64, 3, (8, 16, 16, 32)),
    "Resnet_MultiRuntime_2": _resnet(16, 64, 3, (64, 128, 128, 128)),
    "Resnet_MultiRuntime_3": _resnet(16, 192, 5, (64, 128, 256, 512)),
    "Resnet_MultiRuntime_4": _resnet(16, 192, 5, (128, 256, 512, 512)),
    "Resnet_MultiRuntime_5": _resnet(32, 128, 5, (128, 256, 512, 512)),
    "Resnet_MultiRuntime_6": _resnet(32, 256, 3, (128, 256, 512, 512)),
    "Resnet_MultiRuntime_7": _resnet(32, 256, 5, (256, 512, 512, 1024)),
    "Resnet_MultiRuntime_8": _resnet(64, 256, 3, (256, 512, 1024, 1024)),
    "Resnet_MultiRuntime_9": _resnet(64, 256, 3, (256, 512, 1024, 1024), blocks=(1, 2, 4, 5)),
    "Resnet_MultiRuntime_10": _resnet(64, 256, 5, (256, 512, 1024, 1024), blocks=(1, 1, 3, 4), max_pool=False),
}
