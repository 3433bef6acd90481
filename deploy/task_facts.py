"""What can be said of a task before it is trained: its model, work, memory, data, predicted time and first loss.

Owns: how these facts are gathered and shown. Must never train, or draw (``deploy.tasks`` does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from rich.console import Console, Group
from rich.syntax import Syntax
from rich.table import Table

from tasks.augmentations.augmented import AugmentedStatic
from tasks.augmentations.es_gradient import EsGradient
from tasks.base import Task
from tasks.data.catalogue import CATALOGUE, own_kind
from tasks.data.library import Library
from tasks.distribution import datasets_of
from tasks.families.lopt_training import LoptTraining
from tasks.keys import generator
from tasks.random import keys
from tasks.static import StaticConfig
from tasks.timing.stand_in import RandomLibrary

INITS = 3
"""How many initial parameters the first loss is an average over."""


@dataclass(frozen=True)
class DataFact:
    """A data set of a task; ``missing`` says why it cannot be had, None if it can."""

    name: str
    title: str
    missing: str | None


@dataclass(frozen=True)
class FirstLoss:
    """Mean and standard deviation over ``INITS`` initial parameters; ``meta_loss`` is the mean after normalisation."""

    data: str
    mean: float
    deviation: float
    meta_loss: float
    worst_meta_loss: float


@dataclass(frozen=True)
class Facts:
    """A task, in numbers. FLOPs are of one particle and one batch, bytes of one particle in float32."""

    name: str
    config: dict[str, Any]
    digest: str
    tensors: dict[str, tuple[int, ...]]
    parameters: int
    forward_flops: int
    step_flops: int
    bytes: int
    data: list[DataFact]
    seconds: float | None
    first_loss: FirstLoss | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def gather(name: str, static: StaticConfig, library: Library, seconds: float | None, run: bool) -> Facts:
    """The facts of a task; shapes come from one initialisation, the first loss only with ``run``.

    Published data are not read for that. Raises DataError if images of the user's own cannot be.
    """
    work = static.work()
    own = any(own_kind(dataset) for dataset in datasets_of(static))
    task = static.build(library if own else RandomLibrary())
    params = task.init(generator("show"), _first(task.sample_dynamic(generator("show", "dynamic"), 1)))
    return Facts(
        name=name,
        config=static.to_dict(),
        digest=static.digest(),
        tensors={tensor: tuple(value.shape) for tensor, value in params.items()},
        parameters=sum(value.numel() for value in params.values()),
        forward_flops=work.flops,
        step_flops=forward_passes(static) * work.flops,
        bytes=work.bytes,
        data=[_data(dataset, library) for dataset in dict.fromkeys(datasets_of(static))],
        seconds=seconds,
        first_loss=first_loss(static, library) if run else None,
    )


def forward_passes(static: StaticConfig) -> int:
    """What a loss and its gradient take, in forward passes.

    By back-propagation three: of a layer's three products two are for gradients (the first layer needs but one). By
    evolution strategies one and two for each pair, and in learned-optimizer training by ES or PES two.
    """
    while isinstance(static, AugmentedStatic):
        if isinstance(static, EsGradient):
            return 1 + 2 * static.pairs
        static = static.task
    return 2 if isinstance(static, LoptTraining) and static.gradient != "backprop" else 3


def first_loss(static: StaticConfig, library: Library) -> FirstLoss:
    """The loss at initialisation on the training split, or on random numbers where data is missing."""
    there = all(library.missing(dataset) is None for dataset in datasets_of(static))
    task = static.build(library if there else RandomLibrary())
    losses = initial_losses(task)
    return FirstLoss(
        data="train" if there else "random",
        mean=losses.mean().item(),
        deviation=losses.std().item(),
        meta_loss=task.normalizer(losses).mean().item(),
        worst_meta_loss=task.worst_loss,
    )


def initial_losses(task: Task) -> torch.Tensor:
    """The losses (INITS,) of that many initial parameters on a batch each, one after the other to save memory."""
    stream = generator("first loss")
    dynamic = task.sample_dynamic(stream, INITS)
    losses = []
    for row, key in enumerate(keys(INITS, "first loss")):
        own = {name: leaf[row : row + 1] for name, leaf in dynamic.items()}
        params = {name: value[None] for name, value in task.init(stream, _first(own)).items()}
        losses.append(task.losses(params, task.batch("train", key[None]), own))
    return torch.cat(losses)


def _first(dynamic: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: leaf[0] for name, leaf in dynamic.items()}


def _data(dataset: str, library: Library) -> DataFact:
    title = CATALOGUE[dataset].title if dataset in CATALOGUE else "your own"
    return DataFact(dataset, title, library.missing(dataset))


def show(facts: Facts, console: Console) -> None:
    """Config, numbers and tensors for people."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for label, text in _lines(facts):
        grid.add_row(label, text)
    tensors = Table("tensor", "shape", "numbers", box=None, header_style="bold")
    for tensor, shape in facts.tensors.items():
        tensors.add_row(tensor, " x ".join(map(str, shape)) or "scalar", f"{math.prod(shape):,}")
    config = Syntax(yaml.safe_dump(facts.config, sort_keys=False).rstrip(), "yaml", background_color="default")
    console.print(Group(config, "", grid, "", tensors), highlight=False)


def _lines(facts: Facts) -> Iterable[tuple[str, str]]:
    yield "task", facts.name
    yield "digest", facts.digest
    yield "parameters", f"{facts.parameters:,} in {len(facts.tensors)} tensors"
    passes = facts.step_flops // max(facts.forward_flops, 1)
    forward, step = amount(facts.forward_flops), amount(facts.step_flops)
    yield "FLOPs per step", f"{step} ({passes} x {forward} of the forward pass; products and convolutions)"
    yield "memory per particle", f"{size(facts.bytes)} (parameters, gradients, Adam's moments, activations; float32)"
    yield "predicted time", "not measured" if facts.seconds is None else f"{facts.seconds:.2g} s per step and particle"
    for data in facts.data:
        yield "data", f"{data.name}: {data.title}; " + ("there" if data.missing is None else f"missing: {data.missing}")
    if facts.first_loss is not None:
        first = facts.first_loss
        yield (
            "first loss",
            f"{first.mean:.4f} +- {first.deviation:.4f} on {first.data} data ({INITS} inits); "
            f"meta-loss {first.meta_loss:.4f}, at worst {first.worst_meta_loss:.4f}",
        )


def amount(number: float) -> str:
    """1234567 as 1.23 M."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    raise AssertionError("unreachable")


def size(number: float) -> str:
    """Bytes as KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.3g} {unit}"
        number /= 1024
    raise AssertionError("unreachable")
