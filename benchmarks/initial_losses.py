"""The table of all fixed tasks: parameters, work, and the loss before training beside what it should be.

    python benchmarks/initial_losses.py

writes docs/tasks_table.md; tests/test_tasks_table.py computes the rows again and compares. The data are random numbers
(tasks.timing.stand_in), so that nothing needs to be downloaded, and a large task is measured on a smaller batch and on
fewer initialisations.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from tasks.distribution import datasets_of
from tasks.families.image import ImageStatic
from tasks.families.image_mlp import ImageMlp
from tasks.families.mlp_ae import MlpAe
from tasks.families.text import TextStatic
from tasks.fixed import TASKS
from tasks.keys import generator
from tasks.random import keys
from tasks.static import StaticConfig
from tasks.timing.stand_in import RandomLibrary

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/tasks_table.md"
PUBLISHED = json.loads((ROOT / "tests/oracles/initial_losses.json").read_text())["losses"]

INITS = 3
SMALL = 3_000_000
"""Parameters up to which a task is measured on INITS initialisations; above, on one."""
WORK = 5e8
"""FLOPs of the forward pass that a measurement may take; batches are made smaller until it is so."""

HEADER = (
    "| task | kind | data | batch | parameters | forward MFLOPs | expected | published | loss | moved | meta-loss "
    "| worst |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
INTRODUCTION = """# All fixed tasks

Made by `python benchmarks/initial_losses.py`; [tests/test_tasks_table.py](../tests/test_tasks_table.py) computes it
again. What the columns mean is in [tasks.md](tasks.md#the-table-of-all-fixed-tasks).
"""


class Measured(NamedTuple):
    """Means over initialisations, the worst meta-loss, and how many parameters there are."""

    loss: float
    moved: float
    meta_loss: float
    worst: float
    parameters: int


class Row(NamedTuple):
    """One task; ``expected`` says what the loss should be near, ``published`` what the originals' was on real data.

    ``moved`` is the loss after noise was added to all parameters: networks whose last layer starts at zero, such as
    vision transformers, have a first loss that says nothing of their other layers.
    """

    name: str
    kind: str
    data: str
    batch_size: int
    parameters: int
    flops: int
    expected: str
    published: float | None
    measured: Measured

    def markdown(self) -> str:
        """The row as the page has it."""
        published = "" if self.published is None else f"{self.published:.4f}"
        return (
            f"| {self.name} | {self.kind} | {self.data} | {self.batch_size} | {self.parameters:,} "
            f"| {self.flops / 1e6:,.3f} | {self.expected} | {published} "
            f"| {' | '.join(f'{number:.4f}' for number in self.measured[:4])} |"
        )


def row(name: str) -> Row:
    """What there is to say of a fixed task; its parameters are counted, its FLOPs follow from formulas."""
    static = TASKS[name]
    found = measured(static)
    return Row(
        name=name,
        kind=static.kind,
        data=", ".join(dict.fromkeys(datasets_of(static))),
        batch_size=innermost(static).batch_size,
        parameters=found.parameters,
        flops=static.work().flops,
        expected=expectation(static),
        published=PUBLISHED.get(name),
        measured=found,
    )


def measured(static: StaticConfig) -> Measured:
    """Losses before training, on random data; a large task on a smaller batch and from one initialisation."""
    task = affordable(static).build(RandomLibrary())
    n = INITS if static.work().parameters <= SMALL else 1
    stream = generator("initial losses")
    dynamic = task.sample_dynamic(stream, n)
    first, moved = [], []
    for index, key in enumerate(keys(n, "initial losses")):
        own = {name: leaf[index : index + 1] for name, leaf in dynamic.items()}
        batch = task.batch("train", key[None])
        one = task.init(stream, {name: leaf[0] for name, leaf in own.items()})
        params = {name: leaf[None] for name, leaf in one.items()}
        first.append(task.losses(params, batch, own))
        for leaf in one.values():  # which are the leaves of params, too: one copy of 300 million numbers is enough
            leaf += _noise(leaf, stream)
        moved.append(task.losses(params, batch, own))
    losses = torch.cat(first)
    return Measured(
        loss=losses.mean().item(),
        moved=torch.cat(moved).mean().item(),
        meta_loss=task.normalizer(losses).mean().item(),
        worst=task.worst_loss,
        parameters=sum(leaf.numel() for leaf in one.values()),
    )


def _noise(leaf: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """Normal numbers that change what a layer gives by about a tenth, and make a last layer of zeros like any other."""
    noise = torch.randn(leaf.shape, generator=stream)
    if leaf.ndim < 2:
        return 0.1 * noise
    return 0.1 * noise / max(leaf.shape) ** 0.5 if leaf.any() else noise / len(leaf) ** 0.5


def innermost(static: StaticConfig) -> ImageStatic | TextStatic:
    """The config that names the data: the config itself, or the one inside it."""
    while not isinstance(static, ImageStatic | TextStatic):
        static = next(inner for inner in _fields(static) if isinstance(inner, StaticConfig))
    return static


def affordable(static: StaticConfig) -> StaticConfig:
    """The same on a batch of at most about ``WORK`` FLOPs in the forward pass, but of at least 2 texts or 16 images."""
    data = innermost(static)
    least = 2 if isinstance(data, TextStatic) else 16
    return _with_batch(static, max(int(data.batch_size * WORK / static.work().flops), least))


def expectation(static: StaticConfig) -> str:
    """What the loss is near before training, as a formula; nothing where there is none."""
    data = innermost(static)
    if isinstance(data, MlpAe):
        return "" if data.noise else "1/12"
    if isinstance(data, TextStatic):
        return f"log {data.vocab_size}"
    squared = isinstance(data, ImageMlp) and data.loss == "squared"
    return f"1/{data.classes}" if squared else f"log {data.classes}"


def value(expected: str) -> float:
    """The number that an ``expectation`` is."""
    if expected.startswith("log "):
        return math.log(int(expected[4:]))
    return 1 / int(expected[2:])


def _with_batch(static: StaticConfig, batch_size: int) -> StaticConfig:
    if isinstance(static, ImageStatic | TextStatic):
        return dataclasses.replace(static, batch_size=min(batch_size, static.batch_size))
    inner = {
        field.name: _with_batch(getattr(static, field.name), batch_size)
        for field in dataclasses.fields(static)
        if isinstance(getattr(static, field.name), StaticConfig)
    }
    return dataclasses.replace(static, **inner)


def _fields(static: StaticConfig) -> list[object]:
    return [getattr(static, field.name) for field in dataclasses.fields(static)]


def main() -> None:
    torch.set_num_threads(1)
    lines = [INTRODUCTION, HEADER]
    for name in TASKS:
        lines.append(row(name).markdown())
        print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
