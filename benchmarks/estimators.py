"""How noisy and how biased the estimators of the meta-gradient are, at equal inner steps: a table and a picture.

    python benchmarks/estimators.py [--out docs/estimators.md] [--json]

Owns the comparison. Must never change an estimator: all are built as a worker builds them.

The task is digits with a 64-8-10 MLP in batches of 16, the rule Celo's (phase 1, 159 meta-parameters) at the published
weights, sigma 0.01, windows of 10 steps. The objective is the mean loss of a training of T steps. Every pair is a
sample of its own: what it alone contributes is known from its seeds and coefficients (``worker.perturbations``), so
that one run of many pairs gives mean and covariance. Online estimators are sampled over T steps after T steps of
warming up, when the pairs' episodes are staggered. The truth is the mean of back-propagated gradients, which have a
standard error of their own.

Equal inner steps: an online estimate of one pair costs 2 x 10 inner steps, one of full ES 2 T. ``noise`` is the
standard deviation (root of the covariance's trace) of the mean of as many independent pairs as 6,400 inner steps pay
for, over the length of the true gradient. ``along truth`` is the mean estimate's projection on the truth, in units of
the truth's length: 1 where there is no bias.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

import lopt
import tasks
from configs.schema import DataConfig, EstimatorConfig
from lopt.interchange import read
from worker.estimators import Estimate, build
from worker.perturbations import contributions
from worker.unroll import Key, Unroll
from worker.variance import quality

mpl.use("Agg")
from matplotlib import pyplot as plt

HORIZONS, WINDOW, PAIRS, BUDGET, SIGMA = (20, 50, 100, 200), 10, 128, 6400, 0.01
FULL_CALLS, TRUTH_CALLS, TRUTH_TASKS = 2, 12, 8
ESTIMATORS: dict[str, dict[str, Any]] = {
    "PES": {"name": "pes"},
    "GPES, K = 50": {"name": "gpes", "noise_period": 50},
    "NRES": {"name": "nres"},
    "full ES": {"name": "full_es"},
    "truncated ES": {"name": "truncated_es"},
}
COLORS = {
    "PES": "#4477AA",
    "GPES, K = 50": "#66CCEE",
    "NRES": "#228833",
    "full ES": "#CCBB44",
    "truncated ES": "#EE6677",
}

READING = """\
What can be read from it: NRES is the quietest of the three that remember a whole training, at every horizon here.
Full ES is noisier than all of them at equal steps, because it has one pair where they have T / 10. Truncated ES is the
quietest of all and misses nearly all of a long training's gradient: what a step does to the losses after its window.

And what cannot: where T is 200, GPES lies above PES, which Li et al.'s analysis does not expect; tails may be heavy
there, and 128 pairs do not settle it. The truth's own error is common to a column, so that a column may lie off 1
together; sigma is not small either, and evolution strategies estimate the gradient of losses smoothed by it. That they
are unbiased where it is small is what tests/test_estimators.py and tests/test_estimators_mlp.py show. GPES whose period
is no shorter than the training is NRES. Noise is that of single estimates: successive ones of a pair share
perturbations, in NRES most of all, so that averaging over meta-steps gains less there than with PES.""".splitlines()


class Bench:
    """The task, the rule and its theta, and everything that is measured on them."""

    def __init__(self) -> None:
        static = tasks.static_from_dict({"kind": "image_mlp", "hidden": [8], "batch_size": 16})
        self.task = static.build(tasks.Library(DataConfig()))
        self.rule, self.theta = lopt.Celo(1), read("celo")[1]

    def unroll(self, num_tasks: int, horizon: int, key: Key) -> Unroll:
        return Unroll(self.task, self.rule, num_tasks, (horizon, horizon), key, path="generic")

    def truth(self, horizon: int) -> Tensor:
        """Back-propagated gradients (calls, D), each the mean of some tasks."""
        config = EstimatorConfig("backprop", horizon_low=horizon, horizon_high=horizon)
        estimator = build(self.unroll(TRUTH_TASKS, horizon, ("truth", horizon)), config)
        state, rows = estimator.init(), []
        for _ in range(TRUTH_CALLS):
            estimate, state = estimator.estimate(self.theta, state)
            rows.append(estimate.gradient)
        return torch.stack(rows)

    def samples(self, horizon: int, options: dict[str, Any]) -> tuple[Tensor, int]:
        """What each pair estimates, (estimates, pairs, D), and the inner steps behind one estimate of one pair."""
        key = ("samples", horizon)
        config = EstimatorConfig(**options, sigma=SIGMA, window=WINDOW, num_tasks=PAIRS)
        estimator = build(self.unroll(PAIRS, horizon, key), config)
        windows = FULL_CALLS if config.name == "full_es" else horizon // WINDOW
        warming = 0 if config.name == "full_es" else windows
        state, rows = estimator.init(), []
        for number in range(warming + windows):
            estimate, state = estimator.estimate(self.theta, state)
            if number >= warming:
                rows.append(self.of_each_pair(estimate, key))
        return torch.stack(rows), estimate.inner_steps // PAIRS

    def of_each_pair(self, estimate: Estimate, key: Key) -> Tensor:
        assert estimate.terms is not None  # noqa: S101 - evolution strategies have them
        return PAIRS * contributions(key, estimate.terms, SIGMA, self.rule.spec.trainable_size, PAIRS)


def measure() -> list[dict[str, Any]]:
    """One row for each horizon and estimator."""
    bench, rows = Bench(), []
    for horizon in HORIZONS:
        true_samples = bench.truth(horizon)
        truth = true_samples.double().mean(0)
        exact = quality(true_samples)
        length = math.sqrt(max(exact.signal, 0.0)) or float("nan")
        truth_error = float((true_samples.double() @ truth).std() / len(true_samples) ** 0.5 / truth.square().sum())
        for label, options in ESTIMATORS.items():
            samples, cost = bench.samples(horizon, options)
            variance = sum(quality(estimates).variance for estimates in samples) / len(samples)
            along = samples.double().mean(0) @ truth / truth.square().sum()
            rows.append(
                {
                    "horizon": horizon,
                    "estimator": label,
                    "noise": math.sqrt(variance * cost / BUDGET) / length,
                    "along_truth": float(along.mean()),
                    "error": math.hypot(float(along.std()) / PAIRS**0.5, truth_error),
                    "true_length": length,
                }
            )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for place, label in enumerate(ESTIMATORS):
        mine = [row for row in rows if row["estimator"] == label]
        x = [row["horizon"] for row in mine]
        left.plot(x, [row["noise"] for row in mine], "o-", color=COLORS[label], label=label)
        shifted = [horizon * 1.04 ** (place - 2) for horizon in x]
        ratios, errors = [row["along_truth"] for row in mine], [2 * row["error"] for row in mine]
        right.errorbar(shifted, ratios, errors, fmt="o-", color=COLORS[label], capsize=3)
    left.set(xscale="log", yscale="log", ylabel=f"noise / true gradient, {BUDGET} inner steps", title="Noise")
    right.set(xscale="log", ylabel="mean estimate along the truth", title="Bias (bars: 2 standard errors)")
    right.axhline(1, color="black", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.set_xlabel("horizon T (inner steps)")
        axes.set_xticks(HORIZONS, [str(horizon) for horizon in HORIZONS])
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    for axes in (left, right):
        axes.minorticks_off()
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


def page(rows: list[dict[str, Any]], picture: str) -> str:
    """The table as Markdown, with what its numbers mean."""
    lines = [
        "# Estimators, measured",
        "",
        "Made by `python benchmarks/estimators.py`, whose docstring says how. Digits, a 64-8-10 MLP, Celo's rule at",
        f"the published weights, windows of {WINDOW} steps, sigma {SIGMA}, {PAIRS} pairs. *noise*: standard deviation",
        f"of an estimate from {BUDGET} inner steps over the length of the true (back-propagated) gradient. *along",
        "truth*: the mean estimate's projection on the truth, 1 where there is no bias, with one standard error.",
        "",
        f"![noise and bias by horizon]({picture})",
        "",
        "| estimator | " + " | ".join(f"T = {t}: noise | along truth" for t in HORIZONS) + " |",
        "|---|" + "---|---|" * len(HORIZONS),
    ]
    for label in ESTIMATORS:
        cells = [
            f"{row['noise']:.2f} | {row['along_truth']:.2f} ± {row['error']:.2f}"
            for row in rows
            if row["estimator"] == label
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *READING]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/estimators.md"))
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    rows = measure()
    picture = arguments.out.with_suffix(".png")
    draw(rows, picture)
    arguments.out.write_text(page(rows, picture.name))
    print(page(rows, picture.name), f"{time.perf_counter() - begun:.0f} s", sep="\n")
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
