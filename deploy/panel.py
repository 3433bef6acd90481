"""What a person sees while a run goes on: one live panel on a terminal, plain lines elsewhere.

Owns the looks of a status. Never asks for one: it is given them.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.status import StatusSnapshot

LINE_SECONDS = 5.0


class StatusDisplay:
    """Shows the newest status; use as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: StatusSnapshot) -> None:
        """Replace the panel; without a terminal, print a line every ``LINE_SECONDS`` seconds."""
        if self._live is not None:
            self._live.update(panel(status))
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            self._console.print(line(status), highlight=False, soft_wrap=True)


def _figures(status: StatusSnapshot) -> dict[str, str]:
    dropped: dict[str, int] = {}
    for drop in status.books.dropped:
        dropped[drop.reason] = dropped.get(drop.reason, 0) + drop.count
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "none"
    evaluation = "waiting for the first"
    if status.evaluation is not None and status.evaluation.final_loss and status.evaluation.speedup:
        evaluation = (
            f"version {status.evaluation.version}: final loss IQM {status.evaluation.final_loss.iqm:.3f}, "
            f"speed-up IQM {status.evaluation.speedup.iqm:.3f}  (tuned Adam = 1)"
        )
    return {
        "meta-loss": "-" if status.meta_loss is None else f"{status.meta_loss:.4f}",
        "meta-gradients": f"{status.meta_gradients_per_second:.1f} /s",
        "staleness": f"{status.mean_staleness:.2f} versions",
        "accepted": f"{status.books.applied + status.books.waiting}",
        "dropped": reasons,
        "workers": f"{status.workers_alive} of {status.workers_desired} alive, {status.workers_replaced} replaced",
        "checkpoint": status.checkpoint.name if status.checkpoint else "none yet",
        "evaluation": evaluation,
    }


def panel(status: StatusSnapshot) -> Panel:
    """The status as a panel of one screen."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column()
    for name, value in _figures(status).items():
        table.add_row(name, value)
    bar = ProgressBar(total=status.meta_steps, completed=status.version, width=40)
    steps = Text(f"meta-step {status.version} of {status.meta_steps}   {status.elapsed_seconds:.0f} s")
    title = f"paceline [bold]{status.run}[/bold] · {status.state} · incarnation {status.incarnation}"
    return Panel(Group(steps, bar, Text(), table), title=title, title_align="left", padding=(1, 2), expand=False)


def line(status: StatusSnapshot) -> str:
    """The status as one line for logs."""
    figures = _figures(status)
    return (
        f"[{status.elapsed_seconds:6.1f} s] {status.state}: meta-step {status.version}/{status.meta_steps}, "
        f"meta-loss {figures['meta-loss']}, {figures['meta-gradients']}, staleness {status.mean_staleness:.2f}, "
        f"accepted {figures['accepted']}, dropped {figures['dropped']}, workers {status.workers_alive}/"
        f"{status.workers_desired}, evaluation {figures['evaluation']}"
    ).replace("[", "\\[")
