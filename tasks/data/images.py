"""Batches of images: examples in one compact tensor per device, drawn, resized and augmented there.

Owns: how pixels lie in memory, and sampling. Must never read files, normalise pixels, or know a model.

Pixels lie as uint8 (255 is 1.0), exact for a set at its native size; what was shrunk or made grey is rounded to the
nearest of the 256 levels, as in an image file. A set that would take gigabytes if it were enlarged lies at its native
side, and each batch is enlarged. ``digits``, whose pixels are sixteenths, and what is made of them lie as float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.base import Batch, Dataset
from tasks.data.resize import resize
from tasks.random import fold, integers, normal

CPU = torch.device("cpu")


class Pixels:
    """An image set at one size.

    ``images`` (n, channels, side, side) uint8, or float32 in [0, 1]; ``labels`` (n,) int64; ``order`` (n,) int64: the
    examples in the order that the splits cut, of which the first ``training`` are for training, the others for testing.
    All are copied once to every device that a batch is asked for on.
    """

    def __init__(self, images: Tensor, labels: Tensor, order: Tensor, training: int) -> None:
        self.training = training
        self.classes = int(labels.max()) + 1
        self._copies = {CPU: (images, labels, order)}

    def __len__(self) -> int:
        return len(self._copies[CPU][1])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and order on ``device``."""
        if device not in self._copies:
            images, labels, order = self._copies[CPU]
            self._copies[device] = (images.to(device), labels.to(device), order.to(device))
        return self._copies[device]

    @property
    def bytes(self) -> int:
        """What all copies take."""
        return sum(tensor.nbytes for copy in self._copies.values() for tensor in copy)


class ImageDataset(Dataset):
    """Batches of ``image`` (n, B, channels, size, size) float32 and ``label`` (n, B) int64, drawn with replacement.

    The examples are ``rows`` of the order of ``pixels``. Every image is moved by up to ``shift`` pixels along each axis
    (uniform, zeros move in) and gets Gaussian noise of standard deviation ``noise``; noisy pixels may leave [0, 1].
    """

    def __init__(self, pixels: Pixels, rows: range, size: int, shift: int = 0, noise: float = 0.0) -> None:
        self.num_examples = len(rows)
        self.pixels = pixels
        self.rows = rows
        self.size = size
        self.shift = shift
        self.noise = noise

    def sample(self, keys: Tensor, batch_size: int) -> Batch:
        images, labels, order = self.pixels.on(keys.device)
        index = order[integers(keys, self.num_examples, (batch_size,)).add_(self.rows.start)]
        image = images.index_select(0, index.view(-1))
        if image.shape[-1] != self.size:
            image = resize(_floats(image), self.size)
        if self.shift:
            image = _moved(image, integers(fold(keys, "shift"), 2 * self.shift + 1, (batch_size, 2)), self.shift)
        image = _floats(image).view(*index.shape, *image.shape[1:])
        if self.noise:
            image += self.noise * normal(fold(keys, "noise"), image.shape[1:])
        return {"image": image, "label": labels[index]}


def _floats(images: Tensor) -> Tensor:
    """``images`` as float32 in [0, 1]; what is so already is returned as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _moved(images: Tensor, moves: Tensor, shift: int) -> Tensor:
    """``images`` (m, channels, size, size), each moved by its row of ``moves`` (..., 2) in [0, 2 shift], less shift."""
    size = images.shape[-1]
    padded = F.pad(images, (shift, shift, shift, shift))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (m, channels, 2 shift + 1, 2 shift + 1, size, size)
    down, right = moves.reshape(-1, 2).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, down, right]
