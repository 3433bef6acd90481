"""How fast the inner engine is: inner steps per second per core, beside the same maths in JAX.

    python benchmarks/inner_loop.py [--quick] [--json] [--jax-python PATH] [--families] [--soak SECONDS]

A step is one inner step of one particle: batch, forward, backward, update. The workload is the fast set's: an MLP
64-32-10, batches of 64 from 60,000 images of 8x8, windows of 50 steps, horizons log-uniform on 100-2000 (resets are
part of the time), antithetic pairs, theta perturbed per particle. Ours goes through the public seam ``worker.Unroll``.

Every contestant is a process of its own that is pinned to one core and answers JSON lines, one at a time
(``inner_contestants.py``); repeats are interleaved round by round, and reported are medians of steps per second of CPU
time. "Two cores" is two of our processes at once, as two workers are, by the wall clock. Each round also measures the
core's rate of fused multiply-adds (``fma_peak.cpp``), of which the highest counts. Before that, peers must give the
losses of our reference path.

``fused_fraction_of_fma_peak`` counts the floating-point operations of ``flops``: what the arithmetic needs at least.
``--quick`` ends within 60 seconds: three repeats, the small_fc rules, no peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inner_contestants import (
    BATCH,
    CHECK_STEPS,
    FAMILIES,
    HERE,
    PEERED,
    RULES,
    WIDTHS,
    Contestant,
    disagreement,
    ours,
    write_start,
)

HIDDEN = ("4", "8", "32")
CHECK_TOLERANCE = 1e-4
PEERS = ("jax", "learned_optimization")
"""Paths of the peers: our hand-written version, and google/learned_optimization as it is published."""


def flops(hidden: int) -> dict[str, int]:
    """Floating-point operations of one step with small_fc_lopt, by part; additions and multiplications count alike.

    task: two products forward, their three gradients backward (none for the images). network: of a parameter's 28
    columns the 16 that vary along both axes (12 are hoisted to a row or a column, 11 time features into the bias), then
    hidden x hidden and hidden x 2. features, per parameter: accumulators 13 (three momenta, the second moment, the
    square), columns 14 (three products and a root with the second moment, three preconditioners and six products),
    squares for their normalisers 32, sums along both axes 2, the step 4.
    """
    inputs, width, outputs = WIDTHS
    params = (inputs + 1) * width + (width + 1) * outputs
    return {
        "task": 2 * BATCH * (2 * inputs * width + 3 * width * outputs),
        "network": 2 * params * (16 * hidden + hidden**2 + 2 * hidden),
        "features": params * (13 + 14 + 32 + 2 + 4),
    }


class Entry(NamedTuple):
    """What one contestant does: a rule or family, how many particles, and the path (``jax``: a peer's)."""

    name: str
    path: str
    particles: int = 16

    @property
    def label(self) -> str:
        return f"{self.name} {self.path} {self.particles}"


class Contests:
    """Who takes part, opened one after the other, and what was measured of each."""

    def __init__(self, cores: list[int], jax_python: str | None, scratch: Path) -> None:
        self.cores, self.scratch = cores, scratch
        self.ours = ours(cores[0])
        self.second = ours(cores[-1]) if len(cores) > 1 else None
        self.peers: dict[str, Contestant] = {}
        if jax_python:
            for script in ("jax_peer.py", "jax_families.py"):
                # on the other core, so that both sides compile at the same time; they are never timed at the same time
                self.peers[script] = Contestant([jax_python, str(HERE / script), "--serve"], cores[-1])
        self.opened: dict[Entry, dict[str, Any]] = {}
        self.rates: dict[Entry, list[float]] = {}
        self.scaling: dict[Entry, list[float]] = {}
        self.fma: list[float] = []

    def peer(self, name: str) -> Contestant:
        return self.peers["jax_families.py" if name in FAMILIES else "jax_peer.py"]

    def open(self, entries: list[Entry], both: list[Entry]) -> None:
        """Start all contests; those in ``both`` also on the second core. Raises RuntimeError where a peer disagrees."""
        own = [entry for entry in entries if entry.path not in PEERS]
        peers = [entry for entry in entries if entry.path in PEERS]
        expected = {}
        for entry in own:
            self.ours.send(open=entry.name, path=entry.path, particles=entry.particles)
        for entry in peers:
            file = self.scratch / f"{entry.label.replace('/', '-')}.npz"
            expected[entry] = write_start(entry.name, entry.particles, file)
            request = {"path": entry.path, "particles": entry.particles, "start": str(file)}
            self.peer(entry.name).send(open=entry.name, **request)
        found = {entry: self.ours.receive() for entry in own}
        for entry in peers:
            found[entry] = self.peer(entry.name).receive()
            off = found[entry]["disagreement"] = disagreement(found[entry].pop("losses"), expected[entry])
            if not off < CHECK_TOLERANCE:
                raise RuntimeError(f"{entry.label}: the peer's losses differ from the reference's by {off:.1e}")
        self.opened = {entry: answer for entry, answer in found.items() if "refused" not in answer}
        for entry, reply in found.items():
            if "refused" in reply:
                print(f"{entry.label}: not measured, {reply['refused']}")
        self.rates = {entry: [] for entry in self.opened}
        if self.second is not None:
            self.scaling = {entry: [] for entry in both if entry in self.opened}
            for entry in self.scaling:
                self.second.ask(open=entry.name, path=entry.path, particles=entry.particles)

    def round(self, seconds: float, peak: Path | None) -> None:
        """Every contest once, in turn."""
        for entry, rates in self.rates.items():
            contestant = self.peer(entry.name) if entry.path in PEERS else self.ours
            reply = contestant.ask(time=entry.name, path=entry.path, particles=entry.particles, seconds=seconds)
            rates.append(reply["steps_per_second"])
        for entry, ratios in self.scaling.items():
            ratios.append(self._two_cores(entry, seconds))
        if peak is not None:
            command = ["taskset", "-c", str(self.cores[0]), str(peak)] if shutil.which("taskset") else [str(peak)]
            self.fma.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))  # noqa: S603

    def _two_cores(self, entry: Entry, seconds: float) -> float:
        """Steps per second of two workers at once, of those of one, by the wall clock."""
        assert self.second is not None  # noqa: S101 - only then there is scaling
        request = {
            "time": entry.name, "path": entry.path, "particles": entry.particles, "seconds": seconds, "wall": True,
        }  # fmt: skip
        alone = self.ours.ask(**request)["steps_per_second"]
        for contestant in (self.ours, self.second):
            contestant.send(**request)
        together = sum(contestant.receive()["steps_per_second"] for contestant in (self.ours, self.second))
        return float(together / alone)

    def close(self) -> None:
        for contestant in (self.ours, self.second, *self.peers.values()):
            if contestant is not None:
                contestant.close()

    def median(self, name: str, path: str, particles: int = 16) -> float | None:
        rates = self.rates.get(Entry(name, path, particles))
        return statistics.median(rates) if rates else None


def compile_peak(folder: Path) -> Path | None:
    """``fma_peak.cpp`` as a program; None without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    program = folder / "fma_peak"
    source = HERE / "fma_peak.cpp"
    subprocess.run([compiler, "-O3", "-march=native", str(source), "-o", str(program)], check=True)  # noqa: S603
    return program


def imports(python: str, module: str) -> bool:
    """Whether that Python has the module and can import it."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0  # noqa: S603


def peers_at(python: str) -> tuple[str, ...]:
    """The peers that this Python can run."""
    if not imports(python, "jax"):
        return ()
    whole = imports(python, "learned_optimization.learned_optimizers.adafac_mlp_lopt")
    return PEERS if whole else PEERS[:1]


def starting_seconds(core: int, scratch: Path) -> dict[str, float]:
    """How long the first window of a new configuration takes, each in a new process: as the first that is ever compiled
    (the compiler's instruction sets are then tried, too), compiled anew, and compiled before."""
    found = {}
    for state, particles in (("first", 16), ("cold", 8), ("warm", 8)):
        contestant = ours(core, PACELINE_COMPILED=str(scratch / "compiled"))
        found[state] = contestant.ask(open="small_fc/4", path="generic", particles=particles)["first_seconds"]
        contestant.close()
    return found


def soak(core: int, seconds: float) -> None:
    """Memory of one worker over time."""
    contestant = ours(core)
    entries = [
        Entry(name, path) for name, path in (("small_fc/4", "fused"), ("celo/2", "fused"), ("small_fc/4", "generic"))
    ]
    opened = [
        entry for entry in entries if "refused" not in contestant.ask(open=entry.name, path=entry.path, particles=16)
    ]
    end, slice_seconds = time.perf_counter() + seconds, min(10.0, seconds / 20)
    series = []
    while time.perf_counter() < end:
        for entry in opened:
            reply = contestant.ask(time=entry.name, path=entry.path, particles=16, seconds=slice_seconds)
        series.append(reply["resident"] / 2**20)
        print(f"{seconds - (end - time.perf_counter()):8.0f} s  {series[-1]:8.1f} MiB", flush=True)
    settled = series[len(series) // 4 :]
    print(f"growth after the first quarter: {settled[-1] - settled[0]:+.1f} MiB")
    contestant.close()


def plan(quick: bool, families: bool, peers: tuple[str, ...]) -> list[Entry]:
    """Every contest of this run."""
    rules = [f"small_fc/{hidden}" for hidden in HIDDEN] if quick else list(RULES)
    entries = [Entry(rule, path) for rule in rules for path in ("fused", "generic")]
    if not quick:
        entries += [Entry("small_fc/4", path, 64) for path in ("fused", *peers[:1])]
    entries += [Entry(rule, "jax") for rule in PEERED if "jax" in peers]
    entries += [Entry("small_fc/4", path) for path in peers[1:]]
    for family in FAMILIES if families else ():
        entries += [Entry(family, path) for path in ("generic", *peers[:1])]
    return entries


def report(contests: Contests, quick: bool) -> dict[str, Any]:
    """What ``--json`` prints."""

    def by_hidden(path: str) -> dict[str, float | None]:
        return {hidden: contests.median(f"small_fc/{hidden}", path) for hidden in HIDDEN}

    peak = max(contests.fma) if contests.fma else None
    fused = by_hidden("fused")
    fractions = {
        hidden: rate * sum(flops(int(hidden)).values()) / peak / 1e9 for hidden, rate in fused.items() if rate and peak
    }
    rules = [rule for rule in RULES if not rule.startswith("small_fc")]
    others = {
        rule: {path: contests.median(rule, path) for path in ("fused", "generic", "jax")}
        for rule in ([] if quick else rules)
    }
    families = {
        name: {path: contests.median(name, path) for path in ("generic", "jax")}
        for name in FAMILIES
        if Entry(name, "generic") in contests.opened
    }
    return {
        "fused": fused,
        "generic": by_hidden("generic"),
        "fused_fraction_of_fma_peak": fractions,
        "jax": by_hidden("jax") if contests.peers else None,
        "learned_optimization": contests.median("small_fc/4", "learned_optimization"),
        "rules": others,
        "families": families,
        "particles_64": {path: contests.median("small_fc/4", path, 64) for path in ("fused", "jax")},
        "two_cores": {entry.path: statistics.median(ratios) for entry, ratios in contests.scaling.items()},
        "fma_gflops": peak,
        "flops_per_step": {hidden: sum(flops(int(hidden)).values()) for hidden in HIDDEN},
        "first_seconds": {entry.label: reply["first_seconds"] for entry, reply in contests.opened.items()},
        "bytes_per_particle": {
            entry.label: reply["bytes_per_particle"]
            for entry, reply in contests.opened.items()
            if "bytes_per_particle" in reply
        },
        "repeats": max(map(len, contests.rates.values())),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}
        | {"jax": next((reply["jax"] for reply in contests.opened.values() if "jax" in reply), None)},
    }


def show(contests: Contests, found: dict[str, Any]) -> None:
    """The same for people."""
    peak = found["fma_gflops"]
    print(f"\nmedians of {found['repeats']} repeats, thousand inner steps per second per core; x is ours over jax")
    print(f"{'':28}{'fused':>9}{'generic':>9}{'jax':>9}{'fused x':>9}{'generic x':>11}{'of the FMA peak':>17}")
    for name in (*RULES, *FAMILIES):
        for particles in (16, 64):
            rates = {path: contests.median(name, path, particles) for path in ("fused", "generic", "jax")}
            if not any(rates.values()):
                continue
            hidden = name.partition("small_fc/")[2]
            fraction = found["fused_fraction_of_fma_peak"].get(hidden) if particles == 16 else None
            print(
                f"{name + f', {particles} particles':28}"
                + "".join(f"{rate / 1e3:9.2f}" if rate else f"{'':9}" for rate in rates.values())
                + "".join(
                    f"{ours / rates['jax']:{width}.2f}" if ours and rates["jax"] else " " * width
                    for ours, width in ((rates["fused"], 9), (rates["generic"], 11))
                )
                + (f"{fraction:17.0%}" if fraction else "")
            )
    megaflops = ", ".join(f"{flop / 1e6:.2f} (hidden {hidden})" for hidden, flop in found["flops_per_step"].items())
    print(f"FMA peak {f'{peak:.0f} GFLOP/s' if peak else 'unknown (no g++)'}; MFLOP per step: {megaflops}")
    if found["learned_optimization"]:
        print(f"google/learned_optimization, small_fc/4: {found['learned_optimization'] / 1e3:.2f}")
    for path, ratio in found["two_cores"].items():
        print(f"two cores, {path}: {ratio:.2f} x one")
    worst = [reply["disagreement"] for reply in contests.opened.values() if "disagreement" in reply]
    if worst:
        print(f"the peers' losses over {CHECK_STEPS} steps differ from the reference's by at most {max(worst):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="within 60 seconds, without peers")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object on the last line")
    parser.add_argument("--jax-python", metavar="PATH", help="a Python with jax, for the peers (default: this one)")
    parser.add_argument("--families", action="store_true", help="also four other families, and what bounds each")
    parser.add_argument("--repeats", type=int, help="rounds (default: 7; 3 with --quick)")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="only watch a worker's memory for so long")
    chosen = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if chosen.soak:
        soak(cores[0], chosen.soak)
        return
    python = chosen.jax_python or sys.executable
    peers = () if chosen.quick else peers_at(python)
    print(f"torch {torch.__version__}, {platform.machine()}, cores {cores}")
    for peer in PEERS if not chosen.quick else ():
        print(f"{peer}: {'measured' if peer in peers else 'not importable'} ({python})")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        contests = Contests(cores, python if peers else None, scratch)
        both = [Entry("small_fc/4", "fused"), Entry("small_fc/4", "generic")]
        contests.open(plan(chosen.quick, chosen.families, peers), both)
        peak = compile_peak(scratch)
        for _ in range(chosen.repeats or (3 if chosen.quick else 7)):
            contests.round(0.3, peak)
        found = report(contests, chosen.quick)
        if chosen.families:
            found["bounds"] = {
                name: contests.ours.ask(shares=name, path="generic", particles=16) for name in found["families"]
            }
        contests.close()
        if not chosen.quick:
            found["start_seconds"] = starting_seconds(cores[0], scratch)
    show(contests, found)
    for name in ("start_seconds", "bounds"):
        if name in found:
            print(f"{name}: {found[name]}")
    if chosen.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
