"""What is being trained: data, task families, their augmentations, and what they cost.

Owns: the meaning of a task. Must never import Ray, Hydra or gRPC; only ``families.lopt_*`` know optimizers.
"""

from tasks.augmentations import check_augmentations
from tasks.base import Batch, Dataset, Datasets, Dynamic, Params, Task, TaskState
from tasks.data.library import Library
from tasks.distribution import Draw, TaskDistribution, datasets_of, resolve_task
from tasks.errors import DataError
from tasks.families import FAMILIES
from tasks.keys import generator
from tasks.static import StaticConfig, static_from_dict, static_from_json
from tasks.timing.rejection import NothingFits

__all__ = [
    "FAMILIES",
    "Batch",
    "DataError",
    "Dataset",
    "Datasets",
    "Draw",
    "Dynamic",
    "Library",
    "NothingFits",
    "Params",
    "StaticConfig",
    "Task",
    "TaskDistribution",
    "TaskState",
    "check_augmentations",
    "datasets_of",
    "generator",
    "resolve_task",
    "static_from_dict",
    "static_from_json",
]
