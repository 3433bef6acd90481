"""Pictures of what was recorded of optimizers (``lopt.trace``): ``lopt.plot``.

Owns what is drawn and how it looks. Computes nothing but ratios and quantiles of what a record holds, and leaves
matplotlib as it found it: no pyplot, no settings. Imported when something is drawn, since ``lopt`` works without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from lopt.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
"""What ``Trace.arrays`` gives, also out of a file (``numpy.load``)."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888")
"""Told apart by the colour-blind too: Okabe and Ito 2008, a grey in place of the yellow. One line per tensor up to
this many tensors."""
GROUPS = ("vectors", "matrices", "kernels")
DASHES = ("dashed", "solid", "dotted")
"""Of vectors (and scalars), of matrices, and of tensors of three and more dimensions."""
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
}


class Panel(NamedTuple):
    """One quantity over the steps: its name in ``Trace.arrays``, its title with what it is measured in, its axis."""

    kind: str
    title: str
    scale: str


PANELS = (
    Panel("loss", "training loss", "log"),
    Panel("schedule", "predicted schedule lr(t) (factor of the step)", "linear"),
    Panel("step_factor", "predicted step size c (factor of the step)", "log"),
    Panel("step_mean_abs", "step size: mean |Δp| (units of p)", "log"),
    Panel("relative_step", "relative step size: rms Δp / rms p", "log"),
    Panel("cosine", "direction of the step: cosine to −gradient", "linear"),
    Panel("direction", "direction output: mean |d|", "log"),
    Panel("magnitude", "magnitude output: mean exp(0.001 a) (factor)", "linear"),
)


def plot(traces: Trace | Arrays | Sequence[Trace | Arrays], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw a record, or several side by side on equal axes, as VeLO's figure 29 does; write it to ``path`` if given.

    The ending of ``path`` says how (.png, .pdf, .svg). Up to eight tensors have a line each; more are drawn as
    quantiles over the vectors, the matrices and the tensors of three or more dimensions. Raises ``ValueError`` where
    nothing was recorded.
    """
    several = [traces] if isinstance(traces, Trace | Mapping) else list(traces)
    records = [_derived(trace.arrays() if isinstance(trace, Trace) else trace) for trace in several]
    if not records or not all(len(record["step"]) for record in records):
        raise ValueError("nothing was recorded: call opt.step() after lopt.record(opt), then plot")
    panels = [panel for panel in PANELS if any(panel.kind in record for record in records)]
    panels.sort(key=lambda panel: not all(panel.kind in record for record in records))
    columns = len(records) if len(records) > 1 else 2
    cells = [(panel, record) for panel in panels for record in records]
    rows = -(-len(cells) // columns)
    lines = _lines(records)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(7.2, 3.4 * columns), 1.55 * rows + 0.7), dpi=110, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey="row" if len(records) > 1 else False, squeeze=False)
        handles: dict[str, Artist] = {}
        for axes, (panel, record) in zip(grid.flat, cells, strict=False):
            if panel.kind in record:
                handles |= _draw(axes, panel, record, lines)
                _set_scale(axes, panel, [other[panel.kind] for other in records if panel.kind in other])
        _finish(grid)
        figure.supxlabel("inner step", fontsize=8)
        for axes, record in zip(grid[0], records, strict=False):
            axes.set_title(f"{record['rule']}: {axes.get_title(loc='left')}", loc="left")
        _legend(figure, handles, None if lines else "median, quartiles and range over")
        if path is not None:
            figure.savefig(path)
    return figure


def _derived(record: Arrays) -> dict[str, Array]:
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = record["step_rms"] / record["parameter_rms"] if len(record["step"]) else record["step"]
    return {**record, "relative_step": relative}


def _lines(records: Sequence[Arrays]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each tensor; empty if there are too many to tell apart."""
    dimensions: dict[str, int] = {}
    for record in records:
        dimensions |= dict(zip(record["tensor"].tolist(), record["dimensions"].tolist(), strict=True))
    if len(dimensions) > len(COLOURS):
        return {}
    named = zip(COLOURS, dimensions.items(), strict=False)
    return {name: (colour, DASHES[_group(ndim)]) for colour, (name, ndim) in named}


def _group(ndim: int) -> int:
    """The index of the tensor's group in ``GROUPS``."""
    return min(max(ndim, 1), 3) - 1


def _draw(axes: Axes, panel: Panel, record: Arrays, lines: Mapping[str, tuple[str, str]]) -> dict[str, Artist]:
    """One quantity of one record; returns what stands for each entry of the legend."""
    axes.set_title(panel.title, loc="left")
    x, y = record["step"], record[panel.kind].astype(np.float64)
    y = np.where(np.isfinite(y) & ((y != 0) | (panel.scale == "linear")), y, np.nan)
    marker = "o" if len(x) == 1 else ""
    if y.ndim == 1:
        axes.plot(x, y, color="#444444", marker=marker)
        return {}
    if lines:
        drawn = {}
        for name, column in zip(record["tensor"].tolist(), y.T, strict=True):
            colour, dashes = lines[name]
            drawn[name] = axes.plot(x, column, color=colour, linestyle=dashes, marker=marker, markersize=3)[0]
        return dict(drawn)
    return _draw_groups(axes, x, y, np.array([_group(ndim) for ndim in record["dimensions"]]))


def _set_scale(axes: Axes, panel: Panel, of_row: Sequence[Array]) -> None:
    """The axis of y, right for all records that are drawn side by side."""
    y = np.concatenate([values.ravel() for values in of_row])
    sizes = np.abs(y[np.isfinite(y) & (y != 0)])
    if panel.scale == "linear" or not sizes.size:
        return
    if (y < 0).any():
        decades = 10 ** (np.ceil(np.log10(sizes.max())) - np.arange(3))
        axes.set_yscale("symlog", linthresh=decades[-1])
        axes.yaxis.set_major_locator(FixedLocator([*-decades, 0, *decades]))
        axes.axhline(0, color="#888888", linewidth=0.8)
        return
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    if sizes.max() < 50 * sizes.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_groups(axes: Axes, x: Array, y: Array, groups: Array) -> dict[str, Artist]:
    """Median, quartiles and range over the tensors of each group."""
    handles: dict[str, Artist] = {}
    for i, (name, colour, dashes) in enumerate(zip(GROUPS, COLOURS, DASHES, strict=False)):
        members = y[:, groups == i]
        seen = np.isfinite(members).any(1)
        if not seen.any():
            continue
        quantiles = np.full((5, len(x)), np.nan)
        quantiles[:, seen] = np.nanpercentile(members[seen], (0, 25, 50, 75, 100), axis=1)
        axes.fill_between(x, quantiles[0], quantiles[4], color=colour, alpha=0.12, linewidth=0)
        axes.fill_between(x, quantiles[1], quantiles[3], color=colour, alpha=0.3, linewidth=0)
        marker = "o" if len(x) == 1 else ""
        (line,) = axes.plot(x, quantiles[2], color=colour, linestyle=dashes, marker=marker)
        handles[f"{name} ({members.shape[1]})"] = line
    return handles


def _finish(grid: Array) -> None:
    """Take away the axes that nothing was drawn in; the lowest of each column and the first of each row have labels."""
    for axes in grid.flat:
        axes.set_visible(bool(axes.get_title(loc="left")))
    for column in grid.T:
        [axes for axes in column if axes.get_visible()][-1].tick_params(labelbottom=True)
    for row in grid:
        next(axes for axes in row if axes.get_visible()).tick_params(labelleft=True)


def _legend(figure: Figure, handles: Mapping[str, Artist], title: str | None) -> None:
    # matplotlib leaves out what starts with an underscore, as names in compiled models do
    labels = [f" {name}" if name.startswith("_") else name for name in handles]
    columns = min(len(labels), 4) if max(map(len, labels)) < 28 else 2
    legend = figure.legend(handles.values(), labels, loc="outside upper center", ncols=columns, title=title)
    for text in legend.get_texts():
        text.set_parse_math(False)
