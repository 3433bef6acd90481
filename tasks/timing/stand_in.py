"""Random data in the shape of every data set of the catalogue, so that tasks can be timed without any of them.

Owns: those stand-ins. Must never be trained on in earnest, or read a file.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from configs.schema import DataConfig
from tasks.base import Datasets
from tasks.data.catalogue import entry
from tasks.data.images import ImageDataset, Pixels
from tasks.data.library import Library
from tasks.data.loading import stored_side
from tasks.data.text import TextDataset, Tokens

_EXAMPLES = 4096
_TOKENS = 1 << 20


class RandomLibrary(Library):
    """A library that has every image set and every corpus; the time of a step depends on their shapes alone."""

    def __init__(self) -> None:
        super().__init__(DataConfig())

    def images(
        self,
        dataset: str,
        size: int,
        grey: bool = False,
        shift: int = 0,
        noise: float = 0.0,
        classes: int | None = None,
    ) -> Datasets:
        """Random pixels and labels, with the channels and classes of ``dataset``, and its side in memory."""
        known = entry(dataset)
        pixels = _pixels(1 if grey else known.channels, stored_side(dataset, size), classes or known.classes)
        split = ImageDataset(pixels, range(_EXAMPLES), size, shift, noise)
        return Datasets(split, split, split)

    def text(self, corpus: str, vocabulary: str, vocab_size: int, sequence_length: int) -> Datasets:
        """Random tokens below ``vocab_size``."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (_TOKENS,), generator=generator, dtype=torch.int32)
        split = TextDataset(Tokens(tokens), vocab_size, sequence_length)
        return Datasets(split, split, split)

    def missing(self, name: str) -> str | None:
        """None: nothing is missing."""
        return None


@lru_cache(16)
def _pixels(channels: int, side: int, classes: int) -> Pixels:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (_EXAMPLES, channels, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (_EXAMPLES,), generator=generator)
    return Pixels(images, labels, torch.arange(_EXAMPLES), _EXAMPLES)
