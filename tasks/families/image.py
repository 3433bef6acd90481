"""What all tasks on images share: the data half of their static config, the forms of meta-loss, and classification.

Owns: which images a task sees and in what batches, and ``MetaLoss``, the map from losses to meta-losses.
Must never know a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from configs.checks import ConfigError, at_least
from tasks.data.catalogue import channels, num_classes, own_kind
from tasks.errors import DataError
from tasks.static import StaticConfig

if TYPE_CHECKING:
    from tasks.base import Datasets
    from tasks.data.library import Library


@dataclass(frozen=True, kw_only=True)
class ImageStatic(StaticConfig):
    """The data of a task on images: ``dataset`` resized to ``image_size`` pixels square, all colors or ``grey``.

    ``shift`` (pixels) and ``noise`` (standard deviation, pixels in [0, 1]) are drawn anew for every batch of every
    split, which gives a small data set a loss floor well above rounding noise. ``num_classes`` is for data sets whose
    classes the catalogue does not know.
    """

    dataset: str = "digits"
    image_size: int = 8
    grey: bool = False
    batch_size: int = 64
    shift: int = 0
    noise: float = 0.0
    num_classes: int | None = None

    def __post_init__(self) -> None:
        try:
            channels(self.dataset)
        except DataError as error:
            raise ConfigError("dataset", self.dataset, str(error)) from error
        at_least("image_size", self.image_size, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("shift", self.shift, 0)
        at_least("noise", self.noise, 0)
        if self.num_classes is not None:
            at_least("num_classes", self.num_classes, 2)

    @property
    def classes(self) -> int:
        """How many classes the labels are of. Raises ConfigError if neither the catalogue nor the config says."""
        if self.num_classes is not None:
            return self.num_classes
        if own_kind(self.dataset):
            raise ConfigError("num_classes", None, f"how many classes {self.dataset} has")
        return num_classes(self.dataset)

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.grey else channels(self.dataset)

    @property
    def pixels(self) -> int:
        """Numbers in one image."""
        return self.channels * self.image_size**2

    def images(self, library: Library) -> Datasets:
        """The splits of the data. Raises DataError if it cannot be had."""
        return library.images(
            self.dataset, self.image_size, self.grey, self.shift, self.noise, classes=self.num_classes
        )


class MetaLoss(NamedTuple):
    """``scale * (clip(loss, low, high) - shift)``; what is not finite counts as ``high``."""

    high: float
    low: float = 0.0
    shift: float = 0.0
    scale: float = 1.0

    def __call__(self, loss: Tensor) -> Tensor:
        finite = torch.nan_to_num(loss, nan=self.high, posinf=self.high, neginf=self.high)
        return self.scale * (finite.clamp(self.low, self.high) - self.shift)

    @property
    def worst(self) -> float:
        """The largest value, exactly as it comes out in float32."""
        return self(torch.tensor(math.inf)).item()


CLASSIFIER_NORMALIZERS = ("fixed", "parametric")


def classifier_meta_loss(normalizer: str, classes: int) -> MetaLoss:
    """The originals' normalisers of cross entropy: ``fixed`` of fixed tasks, ``parametric`` of the drawn ones.

    fixed: clipped at 1.5 log C, else as it is (tasks/fixed/image_mlp.py). parametric: clipped at log 2C, then moved and
    scaled so that guessing is near 10 log 5 / log C (tasks/parametric/image_mlp.py).
    """
    if normalizer == "fixed":
        return MetaLoss(1.5 * math.log(classes))
    return MetaLoss(math.log(2 * classes), shift=math.log(classes / 5), scale=10 / math.log(classes))


def clipped_meta_loss(classes: int) -> MetaLoss:
    """10 loss / log 2C, clipped to [0, 10]."""
    worst = math.log(2 * classes)
    return MetaLoss(worst, scale=10 / worst)


def check_widths(field: str, widths: tuple[int, ...]) -> None:
    """Raise ConfigError unless every width of a list of layers is at least 1."""
    for index, width in enumerate(widths):
        at_least(f"{field}[{index}]", width, 1)


def check_below_one(field: str, rate: float) -> None:
    """Raise ConfigError unless ``rate`` is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ConfigError(field, rate, "a number in [0, 1)")
