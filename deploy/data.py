"""``paceline data``: which data sets there are, fetching them, and checking them.

Owns: what these three commands print and their exit codes. Must never know a file format or how a download goes on
(tasks.data does). Imports tasks late, so that ``--help`` is fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from configs.checks import ConfigError
from configs.schema import DataConfig

if TYPE_CHECKING:
    from tasks.data.catalogue import Entry, RemoteFile
    from tasks.data.fetch import Report
    from tasks.data.library import Library

data_app = typer.Typer(no_args_is_help=True, help="Data sets: what there is, fetch it, check it.")
console = Console()
errors = Console(stderr=True)

Name = Annotated[str, typer.Argument(help="name of a data set, as `paceline data list` shows it")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as task.data.root=/data")]


@contextmanager
def _library(overrides: list[str] | None) -> Iterator[Library]:
    """The data sets where the configuration says they are; known faults end the command with one sentence."""
    from deploy.config import load
    from tasks.data.library import Library
    from tasks.errors import DataError

    try:
        yield Library(load(overrides or []).task.data)
    except (ConfigError, DataError) as error:
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    errors.print("error: " + " ".join(str(error).split()), style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from None


@data_app.command("list")
def list_sets(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """All data sets: which are embedded, which are in place, and where the others come from."""
    from tasks.data.catalogue import CATALOGUE

    with _library(overrides) as library:
        rows = [_row(entry, library) for entry in CATALOGUE.values()]
    if as_json:
        typer.echo(json.dumps({"root": library.config.root, "sets": rows}))
        return
    table = Table("name", "kind", "classes", "state", "download", "licence", "from", title=_where(library.config))
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for row in rows:
        cells = (row["name"], row["kind"], row["classes"] or "", row["state"], _size(row["bytes"]), row["licence"])
        style = "yellow" if row["state"] == "missing" else "green"
        table.add_row(*map(str, cells), urlsplit(row["from"]).netloc.removeprefix("www."), style=style)
    console.print(table)
    for row in rows:
        if row["begun"]:
            console.print(_sentence(row["name"], row["why"]), markup=False, highlight=False, soft_wrap=True)


@data_app.command()
def fetch(
    name: Name,
    overrides: Overrides = None,
    source: Annotated[
        str | None, typer.Option(help="a folder or URL with the same files, to fetch from instead")
    ] = None,
    only: Annotated[str, typer.Option(help="a pattern: only files of the set whose names match")] = "*",
    as_json: AsJson = False,
) -> None:
    """Download a data set to task.data.root. What was cut off goes on where it ended."""
    from tasks.data.catalogue import entry
    from tasks.data.inventory import fetch as fetch_files

    with _library(overrides) as library:
        wanted = entry(name)
        if wanted.embedded:
            _answer(as_json, f"{name} is embedded and needs nothing", name=name, files=[])
            return
        with _Bars(quiet=as_json) as bars:
            fetched = list(fetch_files(wanted, library.root, source, only, bars.of))
    files = [
        {"file": file.name, "bytes": file.size, "sha256": file.sha256, "transferred": file.transferred}
        for file in fetched
    ]
    moved = sum(file.transferred for file in fetched)
    text = f"{name}: {len(files)} files, {sum(file.size for file in fetched):,} bytes in place, {moved:,} transferred"
    _answer(as_json, text, name=name, files=files)


@data_app.command()
def verify(name: Name, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check every file of a data set: size, checksum, and that it can be read. Exit code 1 if something is wrong."""
    from tasks.data.catalogue import entry
    from tasks.data.inventory import verify as verify_files

    findings = []
    with _library(overrides) as library:
        for finding in verify_files(entry(name), library.root):
            findings.append({"subject": finding.subject, "ok": finding.ok, "message": finding.message})
            if not as_json:
                mark = "[green]ok[/]  " if finding.ok else "[bold red]fail[/]"
                console.print(f"{mark} ", end="")
                console.print(
                    _sentence(finding.subject, finding.message), markup=False, highlight=False, soft_wrap=True
                )
    if as_json:
        typer.echo(json.dumps({"name": name, "findings": findings}))
    raise typer.Exit(int(not all(finding["ok"] for finding in findings)))


class _Bars:
    """One progress bar for each file that is being transferred, on standard error."""

    def __init__(self, quiet: bool) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=errors, disable=quiet)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def of(self, file: RemoteFile) -> Report:
        """What is told of the transfer of ``file``; its bar appears with the first bytes."""
        bars: list[Any] = []

        def report(done: int, total: int | None) -> None:
            if not bars:
                bars.append(self._progress.add_task(file.path.rpartition("/")[2]))
            self._progress.update(bars[0], completed=done, total=total)

        return report


def _row(entry: Entry, library: Library) -> dict[str, Any]:
    """What the list says of a set; ``bytes`` and ``sha256`` are of what is downloaded, where that is published.

    ``begun``: it is missing, but there is something in its folder.
    """
    why = library.missing(entry.name)
    begun = why is not None and library.config.root is not None and library.root.is_folder(entry.name)
    known = all(file.size is not None for file in entry.files)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "title": entry.title,
        "classes": entry.classes or None,
        "state": "embedded" if entry.embedded else "here" if why is None else "missing",
        "why": why,
        "begun": begun,
        "by_hand": entry.by_hand or None,
        "bytes": entry.size if known and entry.files else None,
        "licence": entry.licence,
        "from": entry.homepage,
        "files": [
            {"path": file.path, "url": file.url, "bytes": file.size, "sha256": file.sha256} for file in entry.files
        ],
    }


def _where(config: DataConfig) -> str:
    return (
        f"task.data.root = {config.root}" if config.root else "task.data.root is not set: only embedded sets are there"
    )


def _size(count: int | None) -> str:
    if count is None:
        return ""
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def _sentence(subject: str, message: str) -> str:
    return message if message.startswith(subject) else f"{subject}: {message}"


def _answer(as_json: bool, text: str, **values: object) -> None:
    typer.echo(json.dumps(values) if as_json else text)
