"""What one optimizer step costs: nanoseconds and temporary bytes per parameter.

    python benchmarks/apply.py [--quick] [--json] [--threads N] [--shapes NAME ...]

Every optimizer steps the same shapes in turn, round by round, in one process, on fixed gradients; the figure is the
median over rounds of the process's CPU time (with one thread) or of the wall time. AdamW is ``torch.optim``'s fused
one. PyLO's optimizers are measured where ``pylo`` can be imported. Peak bytes are the growth of the resident set
during a step beyond parameters, gradients and state (Linux only).

The floor is what the arithmetic of the rule's MLP takes at this core's fused-multiply-add rate, measured in the same
run by ``fma_peak.cpp`` (small_fc_lopt 3,200 and VeLO, Celo 192 floating-point operations per parameter, all that does
not vary per parameter hoisted), or what its 72 bytes of memory traffic per parameter take at the rate of a copy,
whichever is more.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lopt
from lopt.kernels import cpu

Shapes = list[tuple[int, ...]]
VIT_BLOCK: Shapes = [
    (768,), (768,), (2304, 768), (2304,), (768, 768), (768,),
    (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,),
]  # fmt: skip
SHAPES: dict[str, Shapes] = {
    "mlp_64_32_10": [(32, 64), (32,), (10, 32), (10,)],
    "matrices_3x1024x1024": [(1024, 1024)] * 3,
    "vit_b16": [
        (768, 3, 16, 16), (768,), (1, 1, 768), (1, 197, 768), *VIT_BLOCK * 12, (768,), (768,), (1000, 768), (1000,),
    ],
}  # fmt: skip
REPORTED = "vit_b16"
FLOP = {"small_fc_lopt": 3200, "velo": 192, "celo": 192}
BYTES = 72
DIGEST_FLOOR = {"small_fc_lopt": 14.3, "velo": 1.28, "celo": 1.28}
"""ns per parameter of the MLP alone on the Zen 5 core of the reference digest (245 GFLOP/s)."""
REEXEC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives large blocks back at once, so that the resident set shows what is really held."""


def our(name: str, rule: lopt.LearnedOptimizer) -> Callable[[list[torch.nn.Parameter]], Callable[[], object]]:
    def make(params: list[torch.nn.Parameter]) -> Callable[[], object]:
        theta = rule.init_theta(torch.Generator().manual_seed(0))
        opt = lopt.Optimizer(params, rule, theta, num_steps=10_000)
        return lambda: opt.step(loss=1.0)

    return make


def adamw_fused(params: list[torch.nn.Parameter]) -> Callable[[], object]:
    return torch.optim.AdamW(params, lr=1e-3, fused=True).step


def pylo(name: str, rule: lopt.LearnedOptimizer) -> Callable[[list[torch.nn.Parameter]], Callable[[], object]]:
    """PyLO's implementation in torch, with the weights that ours has."""

    def make(params: list[torch.nn.Parameter]) -> Callable[[], object]:
        optim = importlib.import_module("pylo.optim")
        with tempfile.TemporaryDirectory() as folder:
            lopt.export_pylo(folder, rule, rule.init_theta(torch.Generator().manual_seed(0)))
            if name == "pylo_small_fc_lopt":
                return optim.AdafacLO_naive(params, hf_key=folder).step
            rnn, mlp = f"{folder}/VeLO_RNN", f"{folder}/VeLO_MLP"
            opt = optim.VeLO_naive(params, num_steps=10_000, hf_key_rnn=rnn, hf_key_mlp=mlp)
        return lambda: opt.step(torch.tensor(1.0))

    return make


def candidates(quick: bool) -> dict[str, Callable[[list[torch.nn.Parameter]], Callable[[], object]]]:
    found = {
        "small_fc_lopt": our("small_fc_lopt", lopt.SmallFcLopt(32)),
        "velo": our("velo", lopt.Velo()),
        "celo": our("celo", lopt.Celo(2)),
        "adamw_fused": adamw_fused,
    }
    if not quick and importlib.util.find_spec("pylo") is not None:
        found["pylo_small_fc_lopt"] = pylo("pylo_small_fc_lopt", lopt.SmallFcLopt(32))
        found["pylo_velo"] = pylo("pylo_velo", lopt.Velo(compat=True))
    return found


def parameters(shapes: Shapes) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p).normal_(0, 0.01, generator=generator)
    return params


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since it was last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def peak_bytes(step: Callable[[], object]) -> int:
    """How much the resident set grows during one step."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return max(0, resident("VmHWM") - before)


def measure(
    shapes: Shapes, makers: dict[str, Callable[..., Callable[[], object]]], seconds: float
) -> dict[str, dict[str, float]]:
    """ns and peak temporary bytes per parameter of each optimizer. Rounds go on for about ``seconds``."""
    params = parameters(shapes)
    count = sum(p.numel() for p in params)
    steps, samples = {}, {name: [] for name in makers}
    for name, make in makers.items():
        own = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for p, q in zip(own, params, strict=True):
            p.grad = q.grad
        steps[name] = make(own)
        steps[name]()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    linux = Path("/proc/self/clear_refs").exists()
    peaks = {name: peak_bytes(step) / count if linux else math.nan for name, step in steps.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[next(iter(samples))]) < 2:
        for name, step in steps.items():
            start, rounds = clock(), 0
            while rounds == 0 or clock() - start < 0.01:
                step()
                rounds += 1
            samples[name].append((clock() - start) / rounds / count * 1e9)
    return {name: {"ns": statistics.median(samples[name]), "peak_bytes": peaks[name]} for name in makers}


def fma_rate() -> float | None:
    """This core's GFLOP/s of fused multiply-adds; None without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        source = Path(__file__).with_name("fma_peak.cpp")
        subprocess.run([compiler, "-O3", "-march=native", str(source), "-o", str(program)], check=True)  # noqa: S603
        return float(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)  # noqa: S603


def copy_rate() -> float:
    """Bytes read and written per nanosecond by a large copy on one core."""
    source = torch.ones(1 << 25)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 8 * source.numel() / min(times) / 1e9


def show(name: str, found: dict[str, dict[str, float]], fma: float | None, copy: float) -> None:
    print(f"\n{name}: {sum(math.prod(s) for s in SHAPES[name]):,} parameters in {len(SHAPES[name])} tensors")
    print(f"{'':20}{'ns/param':>10}{'peak B':>8}{'x AdamW':>9}{'x floor here':>14}{'x floor of the digest':>23}")
    for optimizer, values in found.items():
        own, floor, digest = optimizer.removeprefix("pylo_"), "", ""
        if own in FLOP:
            least = max(BYTES / copy, FLOP[own] / fma if fma else 0.0)
            floor, digest = f"{values['ns'] / least:.2f}", f"{values['ns'] / DIGEST_FLOOR[own]:.2f}"
        ratio = values["ns"] / found["adamw_fused"]["ns"]
        print(f"{optimizer:20}{values['ns']:10.2f}{values['peak_bytes']:8.1f}{ratio:9.1f}{floor:>14}{digest:>23}")


def main() -> None:
    if any(os.environ.get(name) != value for name, value in REEXEC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | REEXEC)  # noqa: S606
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="within 60 seconds; without PyLO")
    parser.add_argument(
        "--json", action="store_true", help=f"print the figures for {REPORTED} as JSON on the last line"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    fma, copy = fma_rate(), copy_rate()
    rate = f"{fma:.0f} GFLOP/s of FMA" if fma else "FMA rate unknown (no g++)"
    print(
        f"torch {torch.__version__}, {platform.machine()}, {chosen.threads} thread(s), "
        f"kernels: {cpu.build() or 'not built'}"
    )
    print(f"this core: {rate}, copies at {copy:.1f} GB/s")
    results = {}
    for name in chosen.shapes:
        seconds = 0.5 if name != REPORTED else 3.0 if chosen.quick else 20.0
        results[name] = measure(SHAPES[name], candidates(chosen.quick), seconds)
        show(name, results[name], fma, copy)
    if chosen.json:
        reported = results.get(REPORTED, {})
        print(
            json.dumps(
                {
                    "shapes": REPORTED,
                    "threads": chosen.threads,
                    "ns_per_parameter": {name: values["ns"] for name, values in reported.items()},
                    "peak_bytes_per_parameter": {name: values["peak_bytes"] for name, values in reported.items()},
                }
            )
        )


if __name__ == "__main__":
    main()
