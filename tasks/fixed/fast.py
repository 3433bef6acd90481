"""Celo's meta-training set: four data sets at 8x8 pixels without color, one hidden layer of 32 relu units, batch 64.

Sources: Moudgil et al. 2025 (arXiv:2501.12670), appendix A.4; celo/tasks.py, which copies
learned_optimization/research/general_lopt/tasks/fast_mlp_diff_data.py. There, the tasks are functions without
published names; these follow the grammar of the published ones. The original's SVHN has 1 % of its training examples
(tasks/datasets/image.py:85 says min(1, ...) for max), this one all.
"""

from __future__ import annotations

from tasks.families.image_mlp import ImageMlp
from tasks.static import StaticConfig

TASKS: dict[str, StaticConfig] = {
    f"ImageMLP_{name}_Relu32_bs64": ImageMlp(
        dataset=dataset, image_size=8, grey=grey, hidden=(32,), activation="relu", batch_size=64
    )
    for name, dataset, grey in (
        ("Cifar10BW8", "cifar10", True),
        ("FashionMnist8", "fashion_mnist", False),
        ("Mnist8", "mnist", False),
        ("SvhnBW8", "svhn", True),
    )
}
