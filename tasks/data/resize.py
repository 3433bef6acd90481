"""Grey and resized images, in compact form.

Owns: the colors' weights and the interpolation. Must never know where images come from.

The originals resize without antialiasing (``tf.image.resize``: of a 28 x 28 image at 8 x 8 they see 64 x 4 of the 784
pixels); here shrinking averages over all pixels, so that nothing aliases. An image that is not square is squeezed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.data.sources import Images

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""

_PIXELS = 1 << 24  # converted at a time, to bound memory


def resize(images: Tensor, size: int) -> Tensor:
    """(n, channels, h, w) float to (n, channels, size, size): bilinear, antialiased where it shrinks."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def convert(images: Images, size: int, grey: bool) -> Images:
    """uint8 (n, 1 or 3, h, w) as uint8 (n, 1 if grey else 3, size, size), rounded to the nearest level.

    Grey images with color asked for get three equal channels.
    """
    if images.shape[-2:] != (size, size) or (grey and images.shape[1] == 3):
        block = max(1, _PIXELS // images[0].size)
        parts = [images[start : start + block].astype(np.float32) for start in range(0, len(images), block)]
        images = np.concatenate([_converted(torch.from_numpy(part), size, grey) for part in parts])
    return np.broadcast_to(images, (len(images), 1 if grey else 3, size, size))


def _converted(pixels: Tensor, size: int, grey: bool) -> Images:
    if grey and pixels.shape[1] == 3:
        pixels = torch.einsum("nchw,c->nhw", pixels, torch.tensor(LUMA))[:, None]
    levels: Images = resize(pixels, size).round_().clamp_(0, 255).byte().numpy()
    return levels
