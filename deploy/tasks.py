"""The ``paceline tasks`` commands: what tasks there are, what one of them is, draws from families, and step times.

Owns: their arguments, tables and JSON. Must never define a task, or keep what it draws or builds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from configs.checks import ConfigError, did_you_mean, one_of, split_text
from configs.schema import RANGES, DataConfig

if TYPE_CHECKING:
    from tasks.families.draws import Pool
    from tasks.static import StaticConfig
    from tasks.timing.table import Row

TRIES = 512
"""Draws of one config before an impossible combination of data and family is given up (VeLO's limit, appendix C.4)."""

tasks_app = typer.Typer(no_args_is_help=True, help="Tasks: which there are, what one is, draws, and step times.")
console = Console()
errors = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Root = Annotated[str | None, typer.Option(help="where data sets lie (task.data.root)")]
Families = Annotated[str, typer.Option(help="family names with commas between; all by default")]
Seed = Annotated[int, typer.Option(help="seed of the draws")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Known faults end the command with one sentence and exit code 1."""
    from tasks.errors import DataError

    try:
        yield
    except (ConfigError, DataError) as error:
        text = "error: " + " ".join(str(error).split())
        errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@tasks_app.command("list")
def list_tasks(
    suite: Annotated[str | None, typer.Option(help="only the tasks of this suite")] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """List the fixed tasks, or those of a suite."""
    with _one_sentence():
        from deploy.task_facts import amount
        from tasks.data.library import Library
        from tasks.distribution import datasets_of
        from tasks.fixed import TASKS
        from tasks.suites import SUITES
        from tasks.suites import suite as names_of

        library = Library(DataConfig(root=root))
        missing: dict[str, str | None] = {}
        rows: list[dict[str, Any]] = []
        for name in TASKS if suite is None else names_of(suite):
            static, work = TASKS[name], TASKS[name].work()
            datasets = list(dict.fromkeys(datasets_of(static)))
            missing |= {dataset: library.missing(dataset) for dataset in datasets if dataset not in missing}
            rows.append(
                {
                    "name": name,
                    "kind": static.kind,
                    "data": datasets,
                    "missing": [dataset for dataset in datasets if missing[dataset] is not None],
                    "parameters": work.parameters,
                    "forward_flops": work.flops,
                    "suites": [title for title, members in SUITES.items() if name in members],
                }
            )
    if as_json:
        typer.echo(json.dumps({"tasks": rows, "missing": {name: why for name, why in missing.items() if why}}))
        return
    table = Table("task", "kind", "data", "parameters", "forward FLOPs", box=None, header_style="bold")
    for row in rows:
        data = ", ".join(f"{name} (missing)" if name in row["missing"] else name for name in row["data"])
        table.add_row(row["name"], row["kind"], data, f"{row['parameters']:,}", amount(row["forward_flops"]))
    console.print(table, highlight=False)
    sizes = ", ".join(f"{title} ({len(members)})" for title, members in SUITES.items())
    console.print(f"{len(rows)} tasks. Suites: {sizes}", highlight=False)


@tasks_app.command("show")
def show_task(
    words: Annotated[
        list[str], typer.Argument(metavar="NAME", help="a fixed task, a family, a YAML file, or kind=... field=...")
    ],
    seed: Annotated[int | None, typer.Option(help="seed of the draw from a family")] = None,
    run: Annotated[bool, typer.Option("--run", help="also measure the loss at initialisation")] = False,
    table: Annotated[str, typer.Option(help="table of step times to predict from")] = "cpu",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Show a task: its configuration, model, work, memory, data and predicted time."""
    with _one_sentence():
        from deploy import task_facts
        from tasks.data.library import Library

        name, static = _described(words, seed)
        facts = task_facts.gather(name, static, Library(DataConfig(root=root)), _seconds(static, table), run)
    if as_json:
        typer.echo(json.dumps(facts.to_dict()))
    else:
        task_facts.show(facts, console)


@tasks_app.command("draw")
def draw_tasks(
    families: Families = "",
    count: Annotated[int, typer.Option(min=1, help="configurations of each family")] = 1,
    seed: Seed = 0,
    images: Annotated[str, typer.Option(help="image sets to draw from; the published ones by default")] = "",
    texts: Annotated[str, typer.Option(help="corpus/vocabulary pairs; the published ones by default")] = "",
    ranges: Annotated[str, typer.Option(help="paper, or code where the published code differs")] = RANGES[0],
    as_json: AsJson = False,
) -> None:
    """Draw configurations and print them as YAML, ready to be pasted below `task.families`."""
    with _one_sentence():
        one_of("ranges", ranges, RANGES)
        pool = _pool(images, texts, ranges)
        drawn = {
            f"{family}_{index}": _draw(family, seed, index, pool).to_dict()
            for family in _families(families)
            for index in range(count)
        }
    if as_json:
        typer.echo(json.dumps(drawn))
        return
    for name, values in drawn.items():
        line = yaml.safe_dump(values, sort_keys=False, default_flow_style=True, width=10**6).strip()
        typer.echo(f"{name}:\n  task: {line}")


@tasks_app.command("time")
def time_tasks(
    out: Annotated[Path, typer.Option(help="the .parquet table; one that exists is completed")],
    families: Families = "",
    count: Annotated[int, typer.Option(min=1, help="configurations of each family")] = 200,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure step times of drawn configurations on this machine, for `task.time.table`; needs no data sets."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with _one_sentence():
        import torch

        from tasks.timing.measure import measure_table
        from tasks.timing.stand_in import RandomLibrary
        from tasks.timing.table import summary, summary_text

        if out.suffix != ".parquet":
            raise ConfigError("out", str(out), "a file name that ends in .parquet")
        place = _device(device)
        names = _families(families)
        columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True) as bar:
            line = bar.add_task("measuring", total=count * len(names))

            def advance(done: int, total: int, row: Row) -> None:
                bar.update(line, completed=done, total=total, description=row.family)

            rows = measure_table(names, count, out, RandomLibrary(), torch.device(place), seed, advance)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "rows": len(rows), "families": summary(rows)}))
    else:
        typer.echo(f"{summary_text(rows)}\n{out}: {len(rows)} configurations; use it with task.time.table={out}")


def _described(words: Sequence[str], seed: int | None) -> tuple[str, StaticConfig]:
    """The task that the words name or write out, and what to call it."""
    from tasks.families import FAMILIES
    from tasks.fixed import TASKS
    from tasks.static import static_from_dict

    if all("=" in word for word in words):
        return "inline", static_from_dict(_mapping(list(words), "task"))
    if len(words) > 1:
        raise ConfigError("task", " ".join(words), "one name, or kind=... and field=value words")
    (name,) = words
    if name in FAMILIES:
        return f"{name}, seed {seed or 0}", _draw(name, seed or 0, 0, _pool("", "", RANGES[0]))
    if seed is not None:
        raise ConfigError("seed", seed, f"the name of a family with it, not {name!r}{did_you_mean(name, FAMILIES)}")
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        return path.name, static_from_dict(_mapping(path, str(path)))
    if name not in TASKS:
        close = did_you_mean(name, [*TASKS, *FAMILIES])
        raise ConfigError("task", name, f"the name of a fixed task or a family, a .yaml file or kind=...{close}")
    return name, TASKS[name]


def _mapping(source: Path | list[str], field: str) -> dict[str, Any]:
    """The plain mapping in a YAML file, or in ``field=value`` words (``task.kind=...`` is a field of a field)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.from_dotlist(source) if isinstance(source, list) else OmegaConf.create(source.read_text())
        values = OmegaConf.to_container(tree, resolve=False)
    except OSError as error:
        raise ConfigError(field, None, f"a file that can be read ({error.strerror})") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(field, str(error).splitlines()[0], "YAML of plain values") from None
    if not isinstance(values, dict):
        raise ConfigError(field, values, "a mapping with kind and its fields")
    return {str(name): value for name, value in values.items()}


def _families(names: str) -> list[str]:
    """The families between the commas, or all of them."""
    from tasks.families import FAMILIES

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        one_of("families", name, tuple(FAMILIES))
    return chosen or list(FAMILIES)


def _pool(images: str, texts: str, ranges: str) -> Pool:
    """What is drawn from: the published pool, or the sets between the commas."""
    from tasks.data.catalogue import CATALOGUE
    from tasks.families.draws import Pool

    published = Pool()
    sets = tuple(name.strip() for name in images.split(",") if name.strip())
    pairs = [split_text("texts", text.strip()) for text in texts.split(",") if text.strip()]
    for field, names, kind in (("images", sets, "image"), ("texts", [pair[0] for pair in pairs], "text")):
        known = tuple(entry.name for entry in CATALOGUE.values() if entry.kind == kind)
        for name in names:
            if ":" not in name:  # with a colon it is the user's own
                one_of(field, name, known)
    return Pool(sets or published.images, tuple(pairs) or published.texts, ranges)


def _draw(family: str, seed: int, index: int, pool: Pool) -> StaticConfig:
    """Draw ``index`` of a family, which depends on these arguments alone; what is impossible is drawn again."""
    import numpy as np

    from tasks.families import FAMILIES
    from tasks.keys import encode

    rng = np.random.default_rng(list(encode((seed, "draw", family, index))))
    for _ in range(TRIES):
        try:
            return FAMILIES[family].draw(rng, pool)
        except ConfigError as error:
            problem = error
    raise ConfigError("families", family, f"one that fits the data: {TRIES} draws were impossible, the last: {problem}")


def _seconds(static: StaticConfig, table: str) -> float | None:
    """The predicted time of a step per particle; None without the table that should ship, or if it would not run."""
    from tasks.timing.model import load_model
    from tasks.timing.table import shipped_tables

    if table == "cpu" and table not in shipped_tables():
        return None
    seconds, runs = load_model(table).predict([static])
    return float(seconds[0]) if runs[0] else None


def _device(name: str) -> str:
    """A device that torch can use. Raises ConfigError if it cannot."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ConfigError("device", name, f"one that torch can use ({str(error).splitlines()[0]})") from None
    return name
