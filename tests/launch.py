"""Starts ``paceline train`` as a user does: a process of its own, watched and steered through its control service."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from deploy import control_client

TINY = [
    "experiment=quick",
    "task.families={tiny: {task: {kind: image_mlp, dataset: digits, hidden: [4], batch_size: 8}}}",
    "estimator.num_tasks=2",
    "estimator.window=5",
    "estimator.horizon_low=5",
    "estimator.horizon_high=20",
    "storage.every=5",
    "evaluation=none",
]
TINY_EVALUATION = [
    "evaluation=embedded",
    "evaluation.tasks={other: {num_steps: 10, task: {kind: image_mlp, dataset: digits, hidden: [5], batch_size: 8}}}",
    "evaluation.seeds=2",
    "evaluation.every=50",
]


class Launch:
    """One ``paceline train`` and what it printed."""

    def __init__(self, directory: Path, run: str, overrides, environment=None) -> None:
        self.directory, self.run = directory, run
        self.output = directory / f"{run}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "deploy.cli", "train", *TINY, f"run.name={run}"]
        command += [f"run.log_dir={directory}/runs", f"storage.root={directory}/runs", *overrides]
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}) | {"PYTHONPATH": str(Path(__file__).parent.parent)},
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def endpoint(self):
        return control_client.find(self.run, self.directory / "runs")

    def status(self):
        return control_client.status(self.endpoint())

    def wait_for(self, condition, seconds=90.0, what="condition"):
        """The first status for which ``condition`` holds."""
        deadline = time.monotonic() + seconds
        status = None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.text}"
            try:
                status = self.status()
            except (control_client.ControlUnavailable, control_client.ControlRefused):
                status = None
            if status is not None and condition(status):
                return status
            time.sleep(0.05)
        raise AssertionError(f"waited {seconds} s for {what}; last status {status}; output:\n{self.text}")

    def wait(self, seconds=180.0) -> int:
        """The exit code."""
        return self.process.wait(timeout=seconds)

    def descendants(self) -> dict[int, str]:
        """All processes below the launcher: pid -> command line or Ray's title."""
        return descendants(self.process.pid)

    def find(self, title: str) -> list[int]:
        return sorted(pid for pid, command in self.descendants().items() if title in command)

    def end(self) -> None:
        """Kill whatever is left, by pid."""
        for pid in [self.process.pid, *self.descendants()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=30)


@contextmanager
def launched(directory, run, *overrides, environment=None):
    launch = Launch(directory, run, overrides, environment)
    try:
        yield launch
    finally:
        launch.end()


def descendants(root: int) -> dict[int, str]:
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat[0] != "Z":
                parents[int(entry.name)], commands[int(entry.name)] = int(stat[1]), command
    found, frontier = {}, [root]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found |= {pid: commands[pid] for pid in frontier}
    return found


def balanced(status) -> bool:
    books = status.books
    return books.received == books.applied + books.waiting + sum(drop.count for drop in books.dropped)


def cli(*arguments, seconds=60):
    """Exit code and output of ``paceline`` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "200"},
    )
    return done.returncode, done.stdout + done.stderr


def cli_json(*arguments):
    code, output = cli(*arguments, "--json")
    assert code == 0, output
    return json.loads(output)
