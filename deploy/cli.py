"""The ``paceline`` command.

Owns argument parsing, exit codes and the translation of known faults into one paragraph. Imports the rooms late, so
that ``--help`` is fast and Ray's environment is set before Ray is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from configs.checks import ConfigError
from deploy.data import data_app
from deploy.tasks import tasks_app

if TYPE_CHECKING:
    from deploy.control_client import Endpoint

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Meta-train learned optimizers: launch, watch, scale and stop runs.",
)
app.add_typer(data_app, name="data")
app.add_typer(tasks_app, name="tasks")
console = Console()
errors = Console(stderr=True)

RunName = Annotated[str, typer.Argument(help="name of the run")]
LogDir = Annotated[str, typer.Option(help="where runs keep their logs on this machine")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as experiment=quick run.seed=1")]


def _fail(error: BaseException) -> NoReturn:
    errors.print("error: " + " ".join(str(error).split()), style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command()
def train(overrides: Overrides = None) -> None:
    """Meta-train a learned optimizer; the same command continues a run that was interrupted."""
    import lopt
    import tasks
    from deploy.cluster import prepare_environment
    from deploy.config import load
    from learner.checkpoints import StoreError

    try:
        config = load(overrides or [])
        prepare_environment(config.cluster)
        from deploy import train as launcher  # imports Ray
        from deploy.run import RunFailed
        from learner.pool import PoolError
    except ConfigError as error:
        _fail(error)
    try:
        code = launcher.train(config, console)
    except (ConfigError, StoreError, RunFailed, PoolError, lopt.CheckpointError, lopt.ThetaError) as error:
        _fail(error)
    except (tasks.DataError, tasks.NothingFits) as error:
        _fail(error)
    raise typer.Exit(code)


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print the configuration that `train` would run with the same overrides."""
    from deploy.config import load, to_yaml

    try:
        console.print(to_yaml(load(overrides or [])), markup=False, highlight=False, soft_wrap=True)
    except ConfigError as error:
        _fail(error)


@app.command()
def doctor(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check this machine: versions, compiler, devices, store, data, ports; what is missing and what to do."""
    from deploy import doctor as checks
    from deploy.config import load

    try:
        settings = load(overrides or [])
    except ConfigError as error:
        _fail(error)
    found = checks.run_checks(settings.storage, settings.task.data, settings.cluster)
    if as_json:
        typer.echo(json.dumps(checks.to_dicts(found)))
    else:
        checks.print_checks(found, console)
    raise typer.Exit(checks.exit_code(found))


@contextmanager
def _endpoint(run: str, log_dir: str) -> Iterator[Endpoint]:
    """The run's control service; its faults end the command with one sentence."""
    from deploy import control_client

    try:
        yield control_client.find(run, log_dir)
    except (control_client.ControlUnavailable, control_client.ControlRefused) as error:
        _fail(error)


def _answer(as_json: bool, text: str, **values: object) -> None:
    typer.echo(json.dumps(values) if as_json else text)


@app.command()
def status(
    run: RunName,
    log_dir: LogDir = "runs",
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option(help="go on until the run ends")] = False,
) -> None:
    """Show a running run."""
    from deploy import control_client
    from deploy.panel import panel
    from deploy.status import status_to_json

    with _endpoint(run, log_dir) as endpoint:
        for snapshot in control_client.watch(endpoint) if watch else [control_client.status(endpoint)]:
            if as_json:
                typer.echo(json.dumps(status_to_json(snapshot)))
            else:
                console.print(panel(snapshot))


@app.command()
def scale(run: RunName, workers: int, log_dir: LogDir = "runs", as_json: AsJson = False) -> None:
    """Change the number of workers of a running run."""
    from deploy import control_client

    with _endpoint(run, log_dir) as endpoint:
        control_client.scale(endpoint, workers)
        _answer(as_json, f"{run}: {workers} workers asked for", run=run, workers_desired=workers)


@app.command()
def pause(run: RunName, log_dir: LogDir = "runs", as_json: AsJson = False) -> None:
    """Stop making meta-steps until `resume`."""
    from deploy import control_client

    with _endpoint(run, log_dir) as endpoint:
        control_client.pause(endpoint)
        _answer(as_json, f"{run}: paused", run=run, state="paused")


@app.command()
def resume(run: RunName, log_dir: LogDir = "runs", as_json: AsJson = False) -> None:
    """Go on after `pause`."""
    from deploy import control_client

    with _endpoint(run, log_dir) as endpoint:
        control_client.resume(endpoint)
        _answer(as_json, f"{run}: running", run=run, state="running")


@app.command()
def checkpoint(run: RunName, log_dir: LogDir = "runs", as_json: AsJson = False) -> None:
    """Save a checkpoint of a running run now."""
    from deploy import control_client

    with _endpoint(run, log_dir) as endpoint:
        name, version = control_client.checkpoint(endpoint)
        _answer(as_json, f"{run}: saved {name}", run=run, checkpoint=name, version=version)


@app.command()
def stop(run: RunName, log_dir: LogDir = "runs", as_json: AsJson = False) -> None:
    """End a running run with a checkpoint; `train` continues it."""
    from deploy import control_client

    with _endpoint(run, log_dir) as endpoint:
        version = control_client.stop(endpoint)
        _answer(as_json, f"{run}: stopped at version {version}", run=run, version=version)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
