"""Owns the report's figures: numbers in, inline SVG out.

Colours are CSS variables, so that one drawing serves light and dark pages, and text stays text in the page's font.
A role (trained, tuned Adam, untrained) looks the same in every figure; families and other series are told apart by
colour and dashes. No pyplot: figures are objects without global state. Must never draw a name that a user chose:
legends are HTML, where names are escaped.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from evaluator.scores import Array, Scores, smooth

Series = tuple[Sequence[float], Sequence[float]]
"""x values and y values, equally long."""

ROLES = {"trained": "trained", "adam": "tuned Adam", "untrained": "untrained"}
DASHES = ("", "6 2", "2 2", "7 2 2 2")
NUM_SERIES = 6  # colours in the style sheet; further series repeat them
MAX_POINTS = 400  # per line: more than a screen can show, and it keeps the page small

# Colours that occur nowhere else stand for CSS variables while matplotlib draws.
_INK, _MUTED, _GRID = "#010101", "#010102", "#010103"
_ROLE_COLOURS = {"trained": "#020201", "adam": "#020202", "untrained": "#020203"}
_ROLE_DASHES = {"trained": "", "adam": "6 2", "untrained": "2 2"}
_SERIES_COLOURS = [f"#03030{index}" for index in range(NUM_SERIES)]
_VARIABLES = (
    {_INK: "ink", _MUTED: "muted", _GRID: "grid"}
    | {colour: role for role, colour in _ROLE_COLOURS.items()}
    | {colour: f"series-{index}" for index, colour in enumerate(_SERIES_COLOURS)}
)
_STYLE: Any = {  # Any: older matplotlib wants a plain dict, newer one of literal keys
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.solid_capstyle": "round",
}
WIDE, HALF = (9.6, 3.1), (4.7, 2.7)  # inches; the page scales them


def legend(index: int) -> dict[str, str]:
    """Colour variable and dashes of series ``index``, for its entry in an HTML legend."""
    return {"colour": f"--series-{index % NUM_SERIES}", "dashes": DASHES[index % len(DASHES)]}


def role_legend(role: str) -> dict[str, str]:
    """Colour variable and dashes of ``role``, for its entry in an HTML legend."""
    return {"colour": f"--{role}", "dashes": _ROLE_DASHES[role]}


def meta_loss(families: Mapping[str, Series]) -> Markup:
    """Meta-loss over meta-steps, one line per family: raw (faint) and smoothed."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(WIDE, "meta-step", "meta-loss")
        for index, (x, y) in enumerate(map(_finite, families.values())):
            if x.size:
                colour = _SERIES_COLOURS[index % NUM_SERIES]
                axes.plot(_thin(x), _thin(y), color=colour, linewidth=0.8, alpha=0.3)
                _line(axes, x, smooth(y), colour, DASHES[index % len(DASHES)], marker="o" if x.size == 1 else "")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "meta-loss", "Meta-loss over meta-steps, one line per task family")


def scores(by_version: Mapping[int, Scores], criterion: str, label: str) -> Markup:
    """The IQM of one criterion over versions; tuned Adam (1) and the untrained start (version 0) are levels."""
    versions = sorted(by_version)
    values = [getattr(by_version[version], criterion).iqm for version in versions]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(HALF, "meta-step", label)
        _level(axes, 1.0, "adam")
        if versions[0] == 0:
            _level(axes, values[0], "untrained")
        _line(axes, np.array(versions), np.array(values), _ROLE_COLOURS["trained"], "", marker="o")
        axes.set_ylim(bottom=0, top=1.12 * max(1.0, *values))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, f"scores-{criterion}", f"{label} over meta-steps; tuned Adam is the line at 1")


def learning_curves(name: str, roles: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """One task's training loss over inner steps: median over seeds and band between the quartiles, smoothed, log y.

    ``roles`` maps a role to its curves, all of one length; ``name`` tells figures of one page apart.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(HALF, "inner step", "training loss")
        for role in reversed(ROLES):
            if curves := roles.get(role):
                smoothed = np.maximum(smooth(curves), 1e-12)
                low, middle, high = (_thin(row) for row in np.percentile(smoothed, (25, 50, 75), axis=0))
                x = _thin(np.arange(1, smoothed.shape[1] + 1))
                axes.fill_between(x, low, high, color=_ROLE_COLOURS[role], alpha=0.18, linewidth=0)
                _line(axes, x, middle, _ROLE_COLOURS[role], _ROLE_DASHES[role])
        _log_axis(axes)
        return _svg(figure, name, "Training loss over inner steps: trained, untrained and tuned Adam")


def lines(
    name: str,
    series: Mapping[str, Series],
    xlabel: str,
    ylabel: str,
    *,
    size: tuple[float, float] = HALF,
    stairs: bool = False,
) -> Markup:
    """Several series over one axis; ``stairs`` for counts that jump."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(size, xlabel, ylabel)
        for index, (x, y) in enumerate(map(_finite, series.values())):
            colour, dashes = _SERIES_COLOURS[index % NUM_SERIES], DASHES[index % len(DASHES)]
            _line(axes, x, y, colour, dashes, marker="o" if x.size == 1 else "", stairs=stairs)
        axes.set_ylim(bottom=0)
        if stairs:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, name, f"{ylabel} over {xlabel}")


def staleness(counts: Mapping[int, int]) -> Markup:
    """Histogram of the staleness of meta-gradients, in versions."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(HALF, "staleness (versions)", "meta-gradients")
        axes.bar(list(counts), list(counts.values()), width=0.85, color=_SERIES_COLOURS[0])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        return _svg(figure, "staleness", "Histogram of staleness")


def _figure(size: tuple[float, float], xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _label(axes, xlabel, ylabel)
    return figure, axes


def _label(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_title(ylabel, loc="left", fontsize=9)
    axes.tick_params(length=2.5)


def _line(axes: Axes, x: Array, y: Array, colour: str, dashes: str, *, marker: str = "", stairs: bool = False) -> None:
    thin_x, thin_y = (x, y) if stairs else (_thin(x), _thin(y))
    pattern = (0, tuple(float(length) for length in dashes.split())) if dashes else "solid"
    axes.plot(
        thin_x, thin_y, color=colour, linewidth=1.7, linestyle=pattern, marker=marker, markersize=4,
        drawstyle="steps-post" if stairs else "default",
    )  # fmt: skip


def _level(axes: Axes, value: float, role: str) -> None:
    pattern = (0, tuple(float(length) for length in _ROLE_DASHES[role].split()))
    axes.axhline(value, color=_ROLE_COLOURS[role], linewidth=1.4, linestyle=pattern)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _finite(series: Series) -> tuple[Array, Array]:
    x, y = (np.asarray(values, dtype=np.float64) for values in series)
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _thin(values: Array) -> Array:
    if values.size <= MAX_POINTS:
        return values
    picked: Array = values[np.linspace(0, values.size - 1, MAX_POINTS).round().astype(int)]
    return picked


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """``figure`` as an <svg> element: CSS colours, ids of its own, no size, no metadata."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{label}"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)  # noqa: S704 - drawn here from numbers; names never get in
