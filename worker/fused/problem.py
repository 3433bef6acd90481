"""What the fused kernels are told of a task, and which tasks and rules they serve.

Owns that decision and the description. Never computes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase

from lopt.base import LearnedOptimizer
from lopt.celo import Celo
from lopt.celo2 import Celo2
from lopt.mulo import MuLO
from lopt.small_fc import SmallFcLopt
from lopt.velo import Velo
from tasks import Task
from tasks.augmentations.reparam import ReparamTask
from tasks.data.images import CPU, ImageDataset
from tasks.families.activations import KINDS
from tasks.families.image_mlp import ImageMlpTask
from tasks.families.mlp_ae import MlpAeTask
from tasks.static import DYNAMIC


class Loss(IntEnum):
    """What the last layer's outputs are for; the kernels' LossKind."""

    CROSS_ENTROPY, SQUARED_ERROR, RECONSTRUCTION = range(3)


@dataclass(frozen=True)
class Problem:
    """An MLP task as the kernels see it; ``tau`` is the name of its global re-parametrisation's dynamic leaf."""

    widths: tuple[int, ...]
    batch_size: int
    loss: Loss
    activation: int
    switches: tuple[bool, bool, bool]
    """center_data, constrain_output, log_loss, where particles have none of their own."""
    dataset: ImageDataset
    channels: int
    tau: str | None
    dynamic_normalizer: bool
    """Whether the meta-loss depends on the dynamic configuration."""


SWITCHES = ("center_data", "constrain_output", "log_loss")


def refusal_of_rule(lopt: LearnedOptimizer) -> str | None:
    """Why the kernels do not serve this rule; None where they do."""
    if isinstance(lopt, Celo2) and (lopt.compat or any(fnmatchcase("w0", name) for name in lopt.adam_names.split())):
        return "the rule is celo2 with a routing of its own"
    if type(lopt) in (SmallFcLopt, MuLO, Celo, Velo, Celo2):
        return None
    return f"the rule is {lopt.name}: expected small_fc_lopt, mulo, celo, velo or celo2"


def refusal_of_task(task: Task) -> str | None:
    """Why the kernels do not serve this task; None where they do."""
    if isinstance(task, ReparamTask) and task.static.level == "global":
        task = task.task
    if type(task) not in (ImageMlpTask, MlpAeTask):
        return f"the task is a {type(task).__name__}: expected an MLP classifier or auto-encoder, at most re-scaled"
    if isinstance(task, ImageMlpTask) and (task.config.norm != "none" or task.config.dropout > 0):
        return "the MLP has norms or dropout"
    dataset = task.datasets.train
    if not isinstance(dataset, ImageDataset):
        return f"its data is a {type(dataset).__name__}: expected ImageDataset"
    images, _, _ = dataset.pixels.on(CPU)
    if images.shape[-1] != dataset.size:
        return f"its images are enlarged from {images.shape[-1]} to {dataset.size} pixels with every batch"
    if isinstance(task, ImageMlpTask) and dataset.pixels.classes > task.config.classes:
        return f"its data has {dataset.pixels.classes} classes: expected at most {task.config.classes}"
    return None


def problem_of(task: Task) -> Problem:
    """The description of a task that is not refused."""
    tau = None
    if isinstance(task, ReparamTask):
        tau, task = task.name, task.task
    assert isinstance(task, ImageMlpTask | MlpAeTask)  # noqa: S101 - what refusal_of_task lets pass
    config = task.config
    if isinstance(task, ImageMlpTask):
        loss = Loss.SQUARED_ERROR if task.config.loss == "squared" else Loss.CROSS_ENTROPY
    else:
        loss = Loss.RECONSTRUCTION
    dataset = task.datasets.train
    assert isinstance(dataset, ImageDataset)  # noqa: S101 - likewise
    center, constrain, log = (getattr(config, name, False) is True for name in SWITCHES)
    return Problem(
        widths=config.widths,
        batch_size=config.batch_size,
        loss=loss,
        activation=0 if config.activation == DYNAMIC else KINDS.index(config.activation),
        switches=(center, constrain, log),
        dataset=dataset,
        channels=config.channels,
        tau=tau,
        dynamic_normalizer=getattr(config, "log_loss", False) == DYNAMIC,
    )
