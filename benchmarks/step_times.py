"""What tasks cost: the measured step times as a picture, how well they are predicted, and how fast tasks are sampled.

    python benchmarks/step_times.py [--table cpu] [--scale 25] [--out docs/task_times.png] [--json] [--skip-network]

Owns the comparison of time models, the statistics of a table and their picture. Must never measure a step time: that is
``paceline tasks time``.

The picture's first part is VeLO's figure 19 (arXiv:2211.09760): the time per step of more than 1,000 drawn configs of
each family, and gaps where one was refused. The second is what the paper's thresholds (C.5, times ``--scale``) make of
the mixture. Held-out errors are of a random fifth of each family's configs, which neither model has seen: the ratio of
predicted and measured time, the larger one on top. The set network is the paper's (C.4, and time_filter/time_model.py
of google/learned_optimization): a vector for each key and value of the config, mixed with their mean and maximum,
trained by Adam on the squared error of log seconds, one network for each family, kept where it was best on a tenth of
its training configs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from tasks.families import FAMILIES
from tasks.families.draws import Pool
from tasks.static import StaticConfig, static_from_json
from tasks.timing.features import WORK, features, matrix
from tasks.timing.model import TimeModel
from tasks.timing.rejection import NothingFits, Rejection
from tasks.timing.table import Row, read_table, summary_text, table_path

THRESHOLDS = {2e-5: 0.65, 1e-4: 0.3, 4e-4: 0.1, 1e-3: 0.05}
"""Seconds per step on the paper's accelerator, and their weights, which the paper lets add up to 1.1 (C.5)."""
EARLIEST = {"vit": 1e-4, "rnn_lm": 1e-4, "lopt_training": 1e-4, "resnet": 4e-4, "transformer_lm": 1e-3}
"""The lowest threshold at which a family is drawn. The paper has 2e-5 for vit and 1e-4 for the others; on one core, at
25 times its seconds, next to nothing of vit, resnet and transformer_lm is below those."""
TRIES = 4096
"""Eight times the paper's: of the transformers one in a hundred draws is quick enough."""
COLORS = dict(zip(FAMILIES, mpl.colormaps["tab10"].colors, strict=False))
Array = npt.NDArray[np.float64]


class SetNetwork(nn.Module):
    """The paper's run time network: log seconds (n,) of configs (n, keys), NaN where a config lacks a key."""

    def __init__(self, keys: int, width: int = 128, last: int = 512) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(keys, width) / math.sqrt(8))
        self.key = nn.Parameter(torch.empty(keys, width).uniform_(-0.1, 0.1))
        self.first = nn.Linear(width, width)
        self.each, self.mean, self.maximum = (nn.Linear(width, width) for _ in range(3))
        self.after = nn.Linear(width, last)
        self.head = nn.Sequential(
            nn.Linear(last, last), nn.ReLU(), nn.Linear(last, last), nn.ReLU(), nn.Linear(last, 1)
        )

    def forward(self, values: Tensor) -> Tensor:
        there = values.isfinite()[..., None].float()
        count = there.sum(1, keepdim=True)
        hidden = self.key + (values.nan_to_num()[..., None] * self.value + self.key).relu()
        hidden = self.first(hidden).relu() * there
        mean, maximum = hidden.sum(1, keepdim=True) / count, hidden.amax(1, keepdim=True)
        hidden = (self.each(hidden).relu() + self.mean(mean).relu() + self.maximum(maximum).relu()) / 3
        hidden = (self.after(hidden) * there).sum(1) / count[:, 0]
        return self.head(hidden)[:, 0] - 10


def network_predictions(train: Sequence[Row], test: Sequence[Row], with_work: bool, seed: int = 0) -> Array:
    """Seconds of ``test`` by the set network trained on ``train``; ``with_work``: also from the work by formula."""
    torch.manual_seed(seed)
    described = [features(static_from_json(row.static)) for row in (*train, *test)]
    names = sorted({name for found in described for name in found if with_work or name not in WORK})
    inputs = matrix(described, names)
    inputs = np.sign(inputs) * np.log1p(np.abs(inputs))
    low, high = np.nanmin(inputs[: len(train)], 0), np.nanmax(inputs[: len(train)], 0)
    scaled = torch.from_numpy(2 * (inputs - low) / (high - low + 1e-9) - 1).float()
    targets = torch.tensor([row.seconds for row in train]).float().log()
    held = len(train) // 10
    network = SetNetwork(len(names))
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    best, chosen = math.inf, scaled.new_zeros(len(test))
    for epoch in range(150):
        adam.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * epoch / 150))
        for rows in (held + torch.randperm(len(train) - held)).split(64):
            loss = (network(scaled[rows]) - targets[rows]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            error = (network(scaled[:held]) - targets[:held]).square().mean().item()
            if error < best:
                best, chosen = error, network(scaled[len(train) :])
    return chosen.exp().double().numpy()


def ratios(predicted: Array, rows: Sequence[Row]) -> tuple[float, float]:
    """The median and the 90th percentile of max(p/t, t/p); NaN where there are too few."""
    if len(rows) < 5:
        return math.nan, math.nan
    ratio = predicted / np.array([row.seconds for row in rows])
    middle, high = np.quantile(np.maximum(ratio, 1 / ratio), (0.5, 0.9))
    return float(middle), float(high)


def held_out(rows: Sequence[Row], skip_network: bool) -> dict[str, dict[str, Any]]:
    """By family: the errors of each model on the fifth of its configs that none has seen, and of the judgement."""
    results: dict[str, dict[str, Any]] = {}
    tests, trains = {}, {}
    for family in FAMILIES:
        own = [row for row in rows if row.family == family and row.static]
        order = np.random.default_rng(0).permutation(len(own))
        tests[family], trains[family] = ([own[i] for i in part] for part in np.split(order, [len(own) // 5]))
    model = TimeModel([row for train in trains.values() for row in train], "the training part")
    for family, test in tests.items():
        ran, ran_train = [row for row in test if row.ran], [row for row in trains[family] if row.ran]
        seconds, runs = model.predict([static_from_json(row.static) for row in test])
        truth = np.array([row.ran for row in test])
        usual = np.exp(np.median(np.log([row.seconds for row in ran_train])))
        results[family] = {
            "configs": len(ran),
            "trees": ratios(seconds[truth], ran),
            "constant": ratios(np.full(len(ran), usual), ran),
            "misjudged": float((runs != truth).mean()),
            "misjudged_by_majority": float(min(truth.mean(), 1 - truth.mean())),
        }
        if not skip_network:
            enough = len(ran_train) >= 40
            for key, with_work in (("network", False), ("network_with_work", True)):
                predicted = network_predictions(ran_train, ran, with_work) if enough else np.full(len(ran), math.nan)
                results[family][key] = ratios(predicted, ran)
    return results


def held_out_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The errors as a table for people."""
    columns = {"trees": "trees", "network_with_work": "network+work", "network": "set network", "constant": "median"}
    shown = {key: title for key, title in columns.items() if all(key in result for result in results.values())}
    lines = [
        f"{'held-out error':16}{'configs':>8}" + "".join(f"{t:>16}" for t in shown.values()) + "    runs misjudged"
    ]
    for family, result in results.items():
        cells = "".join(f"{result[key][0]:9.3f} {result[key][1]:6.2f}" for key in shown)
        judged = f"{result['misjudged']:10.1%} (of {result['misjudged_by_majority']:.1%})"
        lines.append(f"{family:16}{result['configs']:8}{cells}{judged}")
    return "\n".join([*lines, "(median ratio and 90th percentile of predicted and measured time)"])


def mixture(rejection: Rejection, scale: float, seconds: float = 10.0) -> dict[str, Any]:
    """Draws from the paper's mixture for so many ``seconds``: (threshold, family, config) and how fast they came."""
    rng = np.random.default_rng(0)
    thresholds, weights = np.array(list(THRESHOLDS)), np.array(list(THRESHOLDS.values()))
    samplers = {name: partial(_drawn, name) for name in FAMILIES}
    for name in FAMILIES:  # the models are fitted before the clock starts
        rejection.model.predict([_drawn_possible(name, rng)])
    drawn: list[tuple[float, str, StaticConfig]] = []
    nothing: Counter[tuple[float, str]] = Counter()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        threshold = float(rng.choice(thresholds, p=weights / weights.sum()))
        names = [name for name in FAMILIES if threshold >= EARLIEST.get(name, 0)]
        family = names[int(rng.integers(len(names)))]
        try:
            static = rejection.sample(rng, samplers[family], family, threshold * scale, TRIES)
        except NothingFits:
            nothing[threshold, family] += 1
            continue
        drawn.append((threshold, family, static))
    return {"drawn": drawn, "nothing": dict(nothing), "per_second": len(drawn) / (time.perf_counter() - start)}


def acceptance(model: TimeModel, scale: float, draws: int = 400) -> dict[str, dict[float, float]]:
    """By family and threshold: the share of draws that the time model lets pass."""
    shares: dict[str, dict[float, float]] = {}
    for family in FAMILIES:
        rng = np.random.default_rng(1)
        seconds, runs = model.predict([_drawn_possible(family, rng) for _ in range(draws)])
        shares[family] = {limit: float((runs & (seconds < limit * scale)).mean()) for limit in THRESHOLDS}
    return shares


def _drawn(family: str, rng: np.random.Generator) -> StaticConfig:
    return FAMILIES[family].draw(rng, Pool())


def _drawn_possible(family: str, rng: np.random.Generator) -> StaticConfig:
    while True:
        try:
            return _drawn(family, rng)
        except ValueError:
            continue


def draw_times(axes: Axes, rows: Sequence[Row], scale: float) -> None:
    """Figure 19: every config's time per step, in the order of its arithmetic; refused ones as gaps with a tick."""
    top = 0.0
    for place, family in enumerate(FAMILIES):
        own = [row for row in rows if row.family == family and row.static]
        own.sort(key=lambda row: static_from_json(row.static).work().flops)
        x = place + 0.05 + 0.9 * np.arange(len(own)) / len(own)
        ran = np.array([row.ran for row in own])
        seconds = np.array([row.seconds for row in own])
        axes.plot(x[ran], seconds[ran], ".", color=COLORS[family], markersize=2.5)
        top = max(top, seconds[ran].max())
        share = f"{ran.sum():,} of {sum(row.family == family for row in rows):,} ran"
        axes.text(
            place + 0.5, 1.02, f"{family}\n{share}", transform=axes.get_xaxis_transform(), ha="center", fontsize=8
        )
        axes.plot(x[~ran], np.full((~ran).sum(), 1.6 * top), "|", color="#999999", markersize=5, markeredgewidth=0.3)
    for threshold in THRESHOLDS:
        axes.axhline(threshold * scale, color="#555555", linewidth=0.7, linestyle="--")
        axes.text(len(FAMILIES), threshold * scale, f" {threshold:g} s x {scale:g}", va="center", fontsize=7.5)
    axes.set(yscale="log", xlim=(0, len(FAMILIES)), xticks=[], ylabel="seconds per inner step and particle")
    axes.set_xlabel("drawn configurations of each family, by their floating-point operations (grey: refused)")


def draw_errors(axes: Axes, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Median and 90th percentile of the ratio on held-out configs, trees and set network side by side."""
    models = [("trees", "#1f77b4", "boosted trees")]
    if all("network" in result for result in results.values()):
        models += [("network_with_work", "#ff7f0e", "set network, with work"), ("network", "#d62728", "set network")]
    for shift, (key, color, label) in enumerate(models):
        y = np.arange(len(results)) + 0.22 * (shift - (len(models) - 1) / 2)
        middle, high = np.array([result[key] for result in results.values()]).T
        axes.hlines(y, middle, high, color=color, linewidth=1.2)
        axes.plot(middle, y, "o", color=color, markersize=4, label=label)
        axes.plot(high, y, "|", color=color, markersize=6)
    axes.set(yticks=range(len(results)), xlabel="factor of error: median to 90th percentile")
    axes.set_yticklabels(list(results), fontsize=8)
    axes.set(xlim=(1, None), title="held-out configurations")
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)


def draw_mixture(times: Axes, sizes: Axes, drawn: Sequence[tuple[float, str, StaticConfig]], model: TimeModel) -> None:
    """The mixture's predicted times and its parameter counts, by family."""
    seconds = model.predict([static for _, _, static in drawn]).seconds
    parameters = np.array([static.work().parameters for _, _, static in drawn])
    names = np.array([family for _, family, _ in drawn])
    for axes, values, title in ((times, seconds, "predicted seconds per step"), (sizes, parameters, "parameters")):
        bins = np.geomspace(values.min(), values.max(), 40)
        groups = [values[names == family] for family in FAMILIES]
        axes.hist(groups, bins=bins, stacked=True, color=[COLORS[family] for family in FAMILIES], label=list(FAMILIES))
        axes.set(xscale="log", xlabel=title, ylabel="draws", title=f"{len(drawn):,} draws of the mixture")
    times.legend(fontsize=7, loc="upper right")


def draw_acceptance(axes: Axes, shares: Mapping[str, Mapping[float, float]], scale: float) -> None:
    """The share of each family's draws that each threshold lets pass."""
    for family, share in shares.items():
        limits = [limit for limit in share if share[limit] > 0 and limit >= EARLIEST.get(family, 0)]
        axes.plot(limits, [share[limit] for limit in limits], "o-", color=COLORS[family], markersize=3, linewidth=1)
    axes.set(xscale="log", yscale="log", xticks=list(THRESHOLDS), ylabel="share of draws accepted")
    axes.set_xticklabels([f"{1e6 * limit:g}" for limit in THRESHOLDS])
    axes.minorticks_off()
    axes.set(xlabel=f"threshold (µs; times {scale:g} here)", title="rejection sampling")


def picture(path: Path, rows: Sequence[Row], model: TimeModel, found: Mapping[str, Any], scale: float) -> None:
    """Draw everything into ``path``."""
    figure = Figure(figsize=(13, 10), dpi=110, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(1.15, 1))
    draw_times(figure.add_subplot(grid[0, :]), rows, scale)
    draw_errors(figure.add_subplot(grid[1, 0]), found["held_out"])
    draw_acceptance(figure.add_subplot(grid[1, 1]), found["acceptance"], scale)
    draw_mixture(figure.add_subplot(grid[1, 2]), figure.add_subplot(grid[1, 3]), found["mixture"]["drawn"], model)
    first = rows[0]
    where = f"{first.device}, {first.threads} thread, torch {first.torch}, {first.particles} particles"
    figure.suptitle(f"Time per inner step of sampled tasks ({where})", fontsize=12)
    figure.savefig(path)


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", default="cpu")
    parser.add_argument("--scale", type=float, default=25.0, help="this machine's time by the paper's")
    parser.add_argument("--out", type=Path, default=Path("docs/task_times.png"))
    parser.add_argument("--skip-network", action="store_true", help="do not train the paper's set network")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_table(table_path(arguments.table))
    rejection = Rejection(arguments.table)
    found = {
        "held_out": held_out(rows, arguments.skip_network),
        "acceptance": acceptance(rejection.model, arguments.scale),
        "mixture": mixture(rejection, arguments.scale),
    }
    picture(arguments.out, rows, rejection.model, found, arguments.scale)
    drawn = found["mixture"]["drawn"]
    shares = {name: sum(family == name for _, family, _ in drawn) / len(drawn) for name in FAMILIES}
    nothing = {f"{family} below {limit:g}": count for (limit, family), count in found["mixture"]["nothing"].items()}
    if arguments.json:
        speed = found["mixture"]["per_second"]
        print(json.dumps({**found, "mixture": {"per_second": speed, "shares": shares, "nothing": nothing}}))
        return
    print(summary_text(rows), held_out_text(found["held_out"]), sep="\n\n", end="\n\n")
    print(f"{'accepted':16}" + "".join(f"{limit * arguments.scale:>12.2g} s" for limit in THRESHOLDS))
    for family, accepted in found["acceptance"].items():
        print(f"{family:16}" + "".join(f"{share:13.1%} " for share in accepted.values()))
    print(f"\n{len(drawn)} draws of the mixture, {found['mixture']['per_second']:.0f} accepted draws per second")
    print("shares: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(f"nothing fitted: {nothing or 'never'}")


if __name__ == "__main__":
    main()
