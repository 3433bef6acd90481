"""How much of the engine's speed arrives in theta: the service, as its user starts it, against its bare engine.

    python benchmarks/end_to_end.py [--seconds 60] [--json] [overrides of paceline train]

The service is ``paceline train`` with learner, workers, evaluator, checkpoints and metrics on, in a directory of its
own. The bare engine is ``WorkerCore`` alone, one process for each worker, each on a core of its own, before and after
the service on the same machine. Prints both in inner steps per second (for the service those behind accepted
meta-gradients, from its journal) and the CPU seconds of each kind of process. Owns its measurements and nothing else;
ends what it started.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from deploy.config import load
from learner.start import build_lopt, initial_theta
from tasks import Library, TaskDistribution
from worker.core import WorkerCore
from worker.memory import keep_freed_memory

OVERRIDES = ["experiment=celo_phase1", "task=digits"]
WARM_SECONDS = 5.0
"""Of work before anything is counted."""
STARTUP_SECONDS = 180.0
KINDS = {
    "ray::Worker": "workers",
    "ray::Learner": "learner",
    "ray::Evaluator": "evaluator",
    "ray::Chief": "evaluators' chief",
    "deploy.cli": "launcher",
    "gcs_server": "Ray: gcs",
    "raylet/raylet": "Ray: raylet",
}
OTHERS = "Ray: agents, log monitor, idle workers"


def measure(overrides: list[str], seconds: float) -> dict[str, Any]:
    """Both speeds, the fraction, and where the service's CPU seconds went (per second of wall time)."""
    config = load(overrides)
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as directory:
        overrides = [*overrides, f"run.log_dir={directory}", f"storage.root={directory}", "run.name=bench"]
        before = bare(overrides, config.cluster.num_workers, seconds / 4)
        service, cpu = served(overrides, Path(directory), config, seconds)
        after = bare(overrides, config.cluster.num_workers, seconds / 4)
    engine, engine_cpu = ((before[i] + after[i]) / 2 for i in (0, 1))
    service_cpu = service["inner_steps"] / sum(cpu.values())
    return {
        "overrides": overrides[:-3],
        "bare_steps_per_second": engine,
        "bare_before_and_after": [before[0], after[0]],
        "bare_steps_per_cpu_second": engine_cpu,
        "service_steps_per_second": service["inner_steps"],
        "service_steps_per_cpu_second": service_cpu,
        "service_meta_steps_per_second": service["version"],
        "fraction": service["inner_steps"] / engine,
        "fraction_per_cpu_second": service_cpu / engine_cpu,
        "cores": cpu,
    }


def bare(overrides: list[str], workers: int, seconds: float) -> tuple[float, float]:
    """Inner steps per second, and per CPU second, of ``workers`` cores of the engine at once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        speeds = pool.starmap(engine_speed, [(overrides, slot, seconds) for slot in range(workers)], chunksize=1)
    return sum(wall for wall, _ in speeds), statistics.mean(cpu for _, cpu in speeds)


def engine_speed(overrides: list[str], slot: int, seconds: float) -> tuple[float, float]:
    """Inner steps per second, and per CPU second, of one worker's core, at the theta that the run starts from."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[slot % len(cores)]})
    torch.set_num_threads(1)
    keep_freed_memory()
    config = load(overrides)
    rule = build_lopt(config)
    theta = initial_theta(rule, config)
    tasks = TaskDistribution(config.task, Library(config.task.data))
    core = WorkerCore(rule, tasks, config.estimator, slot * config.worker.turns, ("bench", slot))
    work(core, theta, WARM_SECONDS)
    return work(core, theta, seconds)


def work(core: WorkerCore, theta: dict[str, torch.Tensor], seconds: float) -> tuple[float, float]:
    start, busy = time.perf_counter(), time.process_time()
    steps = 0.0
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += core.estimate(theta, 0).estimate.inner_steps
    return steps / elapsed, steps / (time.process_time() - busy)


def served(
    overrides: list[str], directory: Path, config: Config, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Inner steps and meta-steps per second of the service, and the cores that each kind of its processes took."""
    journal = directory / "bench" / "metrics.jsonl"
    with (directory / "output.txt").open("wb") as output:
        launcher = subprocess.Popen(  # noqa: S603 - the project's own command
            [sys.executable, "-m", "deploy.cli", "train", *overrides],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            start_new_session=True,
        )
        try:
            wait_for(journal, launcher, directory / "output.txt")
            time.sleep(WARM_SECONDS)
            first, used = last_line(journal), cpu_seconds(launcher.pid)
            time.sleep(seconds)
            last, used_now = last_line(journal), cpu_seconds(launcher.pid)
        finally:
            launcher.send_signal(signal.SIGINT)
            launcher.wait(120)
    wall = last["time"] - first["time"]
    speeds = {name: (last[name] - first[name]) / wall for name in ("inner_steps", "version")}
    used_now.subtract(used)
    return speeds, {kind: used_now[kind] / seconds for kind in (*KINDS.values(), OTHERS)}


def wait_for(journal: Path, launcher: subprocess.Popen[bytes], output: Path) -> None:
    """Return after the first meta-step. Raises RuntimeError with the launcher's output if there is none."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while not (journal.exists() and journal.stat().st_size):
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no meta-step within {STARTUP_SECONDS:.0f} s:\n{output.read_text(errors='replace')}")
        time.sleep(0.2)


def last_line(journal: Path) -> dict[str, Any]:
    with journal.open("rb") as file:
        file.seek(max(0, journal.stat().st_size - 100_000))
        whole = file.read().rpartition(b"\n")[0]
    found: dict[str, Any] = json.loads(whole.splitlines()[-1])
    return found


def cpu_seconds(root: int) -> Counter[str]:
    """User and system seconds so far of ``root`` and all below it, by kind of process (Linux)."""
    parents, commands, seconds = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(stat[1])
        seconds[int(entry.name)] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    total: Counter[str] = Counter()
    frontier = [root]
    while frontier:
        for pid in frontier:
            kind = next((kind for part, kind in KINDS.items() if part in commands.get(pid, "")), OTHERS)
            total[kind] += seconds.get(pid, 0.0)  # type: ignore[assignment]  # seconds are counted, too
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
    return total


def show(found: dict[str, Any]) -> None:
    before, after = found["bare_before_and_after"]
    print(
        f"bare engine    {found['bare_steps_per_second']:12,.0f} inner steps/s "
        f"(before {before:,.0f}, after {after:,.0f})"
    )
    print(
        f"service        {found['service_steps_per_second']:12,.0f} inner steps/s applied, "
        f"{found['service_meta_steps_per_second']:.1f} meta-steps/s"
    )
    print(f"fraction       {found['fraction']:12.1%}")
    print(
        f"per CPU second of all processes, so that neither waiting nor other users of the machine count: "
        f"{found['service_steps_per_cpu_second']:,.0f} of {found['bare_steps_per_cpu_second']:,.0f}, "
        f"{found['fraction_per_cpu_second']:.1%}"
    )
    print("\ncores in use while the service ran:")
    for kind, cores in sorted(found["cores"].items(), key=lambda item: -item[1]):
        print(f"  {kind:40}{cores:7.3f}")
    print(f"  {'all':40}{sum(found['cores'].values()):7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", default=OVERRIDES, help="of paceline train")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the service is watched")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    chosen = parser.parse_args()
    if not chosen.seconds > 0:
        parser.error(f"--seconds {chosen.seconds}: expected a number > 0")
    found = measure(chosen.overrides, chosen.seconds)
    show(found)
    if chosen.json:
        print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
