"""Task families: one module each with its static config, its task and its distribution.

Owns: the table of families that can be drawn. Must never know augmentations or data files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tasks.families import (
    image_conv,
    image_mlp,
    lopt_training,
    mlp_ae,
    mlp_mixer,
    mlp_vae,
    resnet,
    rnn_lm,
    transformer_lm,
    vit,
)
from tasks.families.draws import Pool
from tasks.static import StaticConfig

__all__ = ["FAMILIES", "Family", "mlp_mixer"]


class Family(NamedTuple):
    """A parametric family: how a static config is drawn, and which part of the pool (images, texts) it needs."""

    draw: Callable[[np.random.Generator, Pool], StaticConfig]
    data: str


FAMILIES = {
    "image_mlp": Family(image_mlp.draw, "images"),
    "image_conv": Family(image_conv.draw, "images"),
    "mlp_ae": Family(mlp_ae.draw, "images"),
    "mlp_vae": Family(mlp_vae.draw, "images"),
    "vit": Family(vit.draw, "images"),
    "resnet": Family(resnet.draw, "images"),
    "rnn_lm": Family(rnn_lm.draw, "texts"),
    "transformer_lm": Family(transformer_lm.draw, "texts"),
    "lopt_training": Family(lopt_training.draw, "images"),
}
"""VeLO's nine (arXiv 2211.09760, appendix C.3). The mixer is only in fixed suites."""
