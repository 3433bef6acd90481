"""What is being trained: data, task families and their augmentations.

Owns: the meaning of a task. Must never import Ray, Hydra, gRPC or a learned optimizer.
"""

from tasks.base import (
    Batch,
    Dataset,
    Datasets,
    Dynamic,
    Params,
    StaticConfig,
    Task,
    TaskFamily,
    losses,
    losses_and_grads,
)
from tasks.errors import DataError
from tasks.keys import generator
from tasks.registry import build_family

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Datasets",
    "Dynamic",
    "Params",
    "StaticConfig",
    "Task",
    "TaskFamily",
    "build_family",
    "generator",
    "losses",
    "losses_and_grads",
]
