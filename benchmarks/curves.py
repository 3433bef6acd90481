"""What Celo's published weights are worth beside a tuned Adam: learning curves on three tasks, as a picture.

    python benchmarks/curves.py [--data ROOT] [--steps N] [--seeds K] [--out docs/celo_curves.png] [--json]

Owns the comparison and its picture. Must never tune, scale or schedule Celo: ``lopt.load("celo_authors")`` with the
number of steps, as anybody would use it.

Adam has 14 learning rates: those of learned_optimization's baselines (``AdamLR_*`` in baselines/hparam_sets.py), the
half powers of ten from 1e-7 to 1, without 1e-7, at which hardly anything moves within thousands of steps. The best one
has the lowest final training loss, mean over seeds, among those that never diverged; a rate that ends a quarter above
the best one's loss on the first seed is not trained from the others. So Adam costs 14 trainings where Celo costs one.
As in the papers, Adam's rate is constant and all else is torch's default: what Celo gains by lowering its step towards
the end, a schedule would give Adam too. No optimizer has weight decay or clipping.

Runs with the same task and seed start from the same parameters and see the same batches, whatever the optimizer.
Final losses are means over 10 fresh batches of the training and of the held-out data, curves are smoothed by an
exponential average of 0.9 (both as Celo, appendix A.3). The speed-up is Celo's eq. 12: steps of all training over
Celo's steps to where the best Adam ends, 0 where it does not get there. A run whose loss is not finite ends there.

The tasks: ``digits`` (embedded; as the project's own evaluation has it, and of the kind that Celo was meta-trained on),
Celo's ImageMLP_FashionMnist_Relu128x128 where ``--data`` names the folder that holds fashion_mnist/, and a decoder-only
transformer on the characters of Python's own help (``pydoc_data.topics``, half a megabyte of ASCII; it differs a little
from one Python to the next). With the defaults all of it takes about 9 minutes of one core.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import lopt
from configs.schema import DataConfig
from evaluator.scores import smooth, speedup_score
from tasks import Batch, DataError, Dataset, Library, Task, generator
from tasks.families.image_mlp import ImageMlp
from tasks.random import fold, integers, keys

RATES = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TEXTBOOK = 1e-3
HOPELESS = 1.25
FINAL_BATCHES = 10
POINTS = 250
"""Of a line: more than the picture can show."""
IMAGES = {
    "digits": ImageMlp(dataset="digits", image_size=8, hidden=(32,), batch_size=64, shift=1, noise=0.15),
    "fashion_mnist": ImageMlp(dataset="fashion_mnist", image_size=28, hidden=(128, 128), batch_size=128),
}
TITLES = {
    "digits": "digits 8x8, MLP 32",
    "fashion_mnist": "Fashion-MNIST, MLP 128-128",
    "text": "Python's help, transformer",
}
VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 128, 64, 64, 4, 2
Array = npt.NDArray[np.float64]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Problem:
    """One task: a model whose ``forward`` is the loss of a batch, and its data."""

    model: Callable[[torch.Generator], nn.Module]
    train: Dataset
    held_out: Dataset
    batch_size: int


@dataclass(frozen=True)
class Run:
    """One training: losses before each step (T,), and final losses. NaN where they are not finite."""

    losses: Array
    train: float
    held_out: float
    seconds_per_step: float
    """CPU seconds, the model's forward and backward pass included."""


@dataclass(frozen=True)
class Curves:
    """The runs of one optimizer on one task: training losses (seeds, T), all else (seeds,)."""

    losses: Array
    train: Array
    held_out: Array
    seconds_per_step: Array

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Curves:
        return cls(**{field.name: np.array([getattr(run, field.name) for run in runs]) for field in fields(Run)})


class TaskModule(nn.Module):
    """The project's image task as a module."""

    def __init__(self, task: Task, init: torch.Generator) -> None:
        super().__init__()
        self.task = task
        self.weights = nn.ParameterDict(task.init(init))

    def forward(self, batch: Batch) -> Tensor:
        return self.task.loss(dict(self.weights.items()), batch)


class Text(Dataset):
    """Windows of ``CONTEXT`` + 1 characters of a text, (n, batch size, CONTEXT + 1) int64, drawn with replacement."""

    def __init__(self, characters: Tensor) -> None:
        self.windows = characters.unfold(0, CONTEXT + 1, 1)
        self.num_examples = len(self.windows)

    def sample(self, keys: Tensor, batch_size: int) -> Batch:
        return {"text": self.windows[integers(keys, self.num_examples, (batch_size,))]}


class Block(nn.Module):
    """Causal self-attention and a GELU layer of four times the width, both residual and normalised before."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(self.mlp_norm(x)))
        return torch.add(x, self.down(hidden))


class Transformer(nn.Module):
    """A decoder-only language model, started as GPT-2 is: weights from N(0, 0.02^2), biases 0."""

    def __init__(self, init: torch.Generator) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, 0.02, generator=init)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, batch: Batch) -> Tensor:
        text = batch["text"]
        x = self.characters(text[:, :-1]) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def image_problem(name: str, root: str | None) -> Problem:
    """Raises ``DataError`` where the data cannot be had."""
    task = IMAGES[name].build(Library(DataConfig(root=root)))
    data = task.datasets
    return Problem(lambda init: TaskModule(task, init), data.train, data.test, task.batch_size)


def text_problem() -> Problem:
    """The last tenth of the text is held out."""
    written = "\n\n".join(topics[name] for name in sorted(topics))
    characters = torch.tensor([*written.encode("ascii", "replace")])
    cut = len(characters) * 9 // 10
    return Problem(Transformer, Text(characters[:cut]), Text(characters[cut:]), batch_size=16)


def train(name: str, problem: Problem, make: Make, steps: int, seed: int) -> Run:
    """Train the problem with the optimizer that ``make`` makes of its parameters."""
    model = problem.model(generator("curves", name, seed, "init"))
    optimizer = make(list(model.parameters()))
    key = keys(1, "curves", name, seed, "batches")
    losses = np.full(steps, np.nan)
    start = time.process_time()
    for step in range(steps):
        loss = model(batch(problem.train, fold(key, step), problem.batch_size))
        if not math.isfinite(loss.item()):
            return Run(losses, math.nan, math.nan, (time.process_time() - start) / (step + 1))
        losses[step] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss.item)
    seconds = (time.process_time() - start) / steps
    train_loss = final_loss(model, problem.train, keys(1, "curves", name, seed, "train"), problem.batch_size)
    held_out = final_loss(model, problem.held_out, keys(1, "curves", name, seed, "held out"), problem.batch_size)
    return Run(losses, train_loss, held_out, seconds)


def batch(data: Dataset, key: Tensor, batch_size: int) -> Batch:
    """The batch of the one key (1,)."""
    return {name: leaf[0] for name, leaf in data.sample(key, batch_size).items()}


@torch.no_grad()
def final_loss(model: nn.Module, data: Dataset, key: Tensor, batch_size: int) -> float:
    """Mean over fresh batches; NaN unless it is finite."""
    value = float(np.mean([model(batch(data, fold(key, i), batch_size)).item() for i in range(FINAL_BATCHES)]))
    return value if math.isfinite(value) else math.nan


def compare(name: str, problem: Problem, steps: int, seeds: int) -> tuple[Curves, dict[float, Curves]]:
    """Celo, and Adam with every rate."""

    def celo(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return lopt.load("celo_authors")(params, num_steps=steps)

    def adam(rate: float) -> Make:
        return lambda params: torch.optim.Adam(params, lr=rate, fused=True)

    sweep = {rate: [train(name, problem, adam(rate), steps, seed=0)] for rate in RATES}
    lowest = np.nanmin([runs[0].train for runs in sweep.values()])
    for rate, runs in sweep.items():
        if runs[0].train <= HOPELESS * lowest or rate == TEXTBOOK:
            runs += [train(name, problem, adam(rate), steps, seed) for seed in range(1, seeds)]
    ours = [train(name, problem, celo, steps, seed) for seed in range(seeds)]
    return Curves.of(ours), {rate: Curves.of(runs) for rate, runs in sweep.items()}


def best_rate(adam: Mapping[float, Curves]) -> float:
    """The lowest final training loss, mean over seeds, among the rates trained from all seeds that never diverged."""
    seeds = max(len(curves.train) for curves in adam.values())
    means = {rate: curves.train.mean() for rate, curves in adam.items() if len(curves.train) == seeds}
    return min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)


def speedup(celo: Curves, adam: Curves) -> Array:
    """Of every seed of Celo, over the mean of all seeds of Adam."""
    goal = float(smooth(adam.losses)[:, -1].mean())
    return np.array([speedup_score(curve, goal) for curve in celo.losses])


def show(name: str, celo: Curves, adam: Mapping[float, Curves]) -> None:
    """The table of one task: mean, lowest and highest over seeds."""

    def row(label: str, curves: Curves, more: str = "") -> None:
        columns = [f"{v.mean():.4f} [{v.min():.4f}, {v.max():.4f}]" for v in (curves.train, curves.held_out)]
        milliseconds = curves.seconds_per_step.mean() * 1e3
        print(f"  {label:22}{len(curves.train):>6}{columns[0]:>26}{columns[1]:>26}{milliseconds:13.2f}  {more}")

    best = best_rate(adam)
    print(f"\n{name:24}{'seeds':>6}{'final training loss':>26}{'held-out loss':>26}{'CPU ms/step':>13}")
    ratio, faster = adam[best].train.mean() / celo.train.mean(), speedup(celo, adam[best]).mean()
    row("Celo", celo, f"Adam's loss / Celo's {ratio:.2f}, speed-up {faster:.2f}")
    row(f"Adam {best:g} (best)", adam[best])
    if best != TEXTBOOK:
        row(f"Adam {TEXTBOOK:g} (default)", adam[TEXTBOOK])
    rest = [f"{rate:g}: {curves.train.mean():.3f}" for rate, curves in adam.items()]
    print(f"  Adam's final training loss by rate: {', '.join(rest)}")


def draw(results: Mapping[str, tuple[Curves, dict[float, Curves]]], path: Path) -> None:
    """One panel per task: means over seeds of the smoothed curves, and for Celo and the best Adam all seeds' range."""
    style: Any = {
        "font.size": 9, "legend.fontsize": 9, "legend.frameon": False, "axes.linewidth": 0.7, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.93",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.8 * len(results), 3.9), layout="constrained", dpi=130)
        for axes, (name, (celo, adam)) in zip(
            figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
        ):
            panel(axes, celo, adam)
            axes.set_title(TITLES[name], loc="left", fontsize=10)
        figure.axes[0].set_ylabel("training loss (nats)")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(64).save(path, "png", optimize=True)  # a third of the size


def panel(axes: Axes, celo: Curves, adam: Mapping[float, Curves]) -> None:
    best = best_rate(adam)
    steps = range(0, celo.losses.shape[1], max(1, celo.losses.shape[1] // POINTS))
    shown = [
        (f"Celo as published, untuned: {celo.held_out.mean():.3f}", celo, "#0072B2", "solid"),
        (
            f"Adam {best:g}, the best of {len(adam)}: {adam[best].held_out.mean():.3f}",
            adam[best],
            "#D55E00",
            (0, (4, 1)),
        ),
    ]
    curves = [smooth(found.losses)[:, steps] for _, found, _, _ in shown]
    for layer, (label, _, colour, dashes), seeds in zip((5, 4), shown, curves, strict=True):
        axes.fill_between(steps, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, linewidth=0, zorder=layer - 2)
        axes.plot(steps, seeds.mean(0), color=colour, linewidth=1.6, linestyle=dashes, label=label, zorder=layer)
    others = [smooth(found.losses).mean(0)[steps] for rate, found in adam.items() if rate != best]
    lines = axes.plot(steps, np.stack(others, 1), color="0.72", linewidth=0.7, zorder=1)
    lines[0].set_label(f"Adam's other {len(others)} rates")
    axes.set_yscale("log")
    axes.set_ylim(0.9 * min(seeds.min() for seeds in curves), 1.25 * max(seeds[:, 0].max() for seeds in curves))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, celo.losses.shape[1])
    axes.set_xlabel("step")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), title="final loss on held-out data", alignment="left")


def as_json(results: Mapping[str, tuple[Curves, dict[float, Curves]]]) -> str:
    """One line; a loss that is not finite is null."""

    def row(curves: Curves) -> dict[str, object]:
        finals = {"train": curves.train, "held_out": curves.held_out}
        listed = {split: [v if math.isfinite(v) else None for v in values.tolist()] for split, values in finals.items()}
        return {**listed, "seconds_per_step": curves.seconds_per_step.mean()}

    tasks = {
        name: {
            "celo": row(celo),
            "adam": {f"{rate:g}": row(curves) for rate, curves in adam.items()},
            "best_rate": best_rate(adam),
            "speedup": speedup(celo, adam[best_rate(adam)]).tolist(),
        }
        for name, (celo, adam) in results.items()
    }
    return json.dumps(tasks, allow_nan=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", metavar="ROOT", help="folder or URL that holds fashion_mnist/; without: not that task"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/celo_curves.png"))
    parser.add_argument("--json", action="store_true", help="print all final losses as JSON on the last line")
    chosen = parser.parse_args()
    for field in ("steps", "seeds"):
        if getattr(chosen, field) < 1:
            parser.error(f"--{field} {getattr(chosen, field)}: expected a whole number >= 1")
    torch.set_num_threads(1)
    problems = {"digits": image_problem("digits", None)}
    if chosen.data is not None:
        try:
            problems["fashion_mnist"] = image_problem("fashion_mnist", chosen.data)
        except DataError as error:
            parser.error(str(error))
    problems["text"] = text_problem()
    results = {}
    for name, problem in problems.items():
        start, busy = time.perf_counter(), time.process_time()
        results[name] = compare(name, problem, chosen.steps, chosen.seeds)
        show(name, *results[name])
        print(f"  {time.perf_counter() - start:.0f} s, {time.process_time() - busy:.0f} s of CPU time", flush=True)
    draw(results, chosen.out)
    print(f"\nwrote {chosen.out}")
    if chosen.json:
        print(as_json(results))


if __name__ == "__main__":
    main()
