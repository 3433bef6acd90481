"""The fused window's Triton kernel equals the reference, under triton's interpreter and on a GPU if there is one, and
compiles for GPUs that are not here.

Run as a script (``TRITON_INTERPRET=1``, which triton looks at when it is imported, so in a process of its own) this
does all ``CASES`` without a GPU and prints as JSON by how much each differs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import lopt
import tasks
from configs.schema import DataConfig
from tasks.data.images import ImageDataset, Pixels
from tests.test_kernels_gpu import Launches, spilled
from worker import fused
from worker.fused import gpu
from worker.unroll import Unroll

CPU = torch.device("cpu")
TOLERANCE = 1e-5
TOLERANCE_ON_GPU = 2e-4
STACK = 256
"""Bytes of registers that a thread may keep in the cache, so that two programs share a multiprocessor."""
SMALL = {"kind": "image_mlp", "hidden": [4], "batch_size": 16, "image_size": 4}
SCALED = {"kind": "reparam", "level": "global", "low": 0.1, "high": 10.0, "task": SMALL}
CASES = {
    # rule, task, whether its pixels are bytes, horizons, steps of each window
    "re-parametrised": (lambda: lopt.SmallFcLopt(9, step_mult=0.02), SCALED, False, (2, 9), (9,)),
    "few hidden units": (lambda: lopt.SmallFcLopt(2, step_mult=0.02), SMALL, False, (2, 4), (3, 2)),
    "celo": (lambda: lopt.Celo(1), SCALED, False, (1, 2), (3,)),
    "deep and wide": (
        lambda: lopt.SmallFcLopt(16, step_mult=0.02),
        SMALL | {"hidden": [3, 70], "batch_size": 70},
        True,
        (1, 2),
        (3,),
    ),
    "moved and noisy": (lambda: lopt.SmallFcLopt(9), SMALL | {"shift": 1, "noise": 0.3}, True, (1, 2), (3,)),
    "no hidden layer": (lambda: lopt.SmallFcLopt(9, step_mult=0.02), SMALL | {"hidden": []}, False, (1, 2), (3,)),
}
NUM_TASKS = 2


def task_of(config, as_bytes):
    task = tasks.static_from_dict(config).build(tasks.Library(DataConfig()))
    if as_bytes:
        draws = torch.Generator().manual_seed(0)
        size = config["image_size"]
        images = torch.randint(256, (40, 1, size, size), generator=draws).to(torch.uint8)
        pixels = Pixels(images, torch.randint(10, (40,), generator=draws), torch.randperm(40, generator=draws), 40)
        data = ImageDataset(pixels, range(7, 40), size, config.get("shift", 0), config.get("noise", 0.0))
        task.datasets = tasks.Datasets(data, data, data)
    return task


def perturbed(rule, device):
    """Every particle's own theta, (2n, ...)."""
    draws = torch.Generator().manual_seed(1)
    theta = rule.init_theta(draws)
    scales = {name: 0.01 if "decay" in name else 0.1 for name in theta}
    many = {name: [leaf + scales[name] * torch.randn(leaf.shape, generator=draws) for _ in range(2 * NUM_TASKS)]
            for name, leaf in theta.items()}  # fmt: skip
    return {name: torch.stack(leaves).to(device) for name, leaves in many.items()}


def unrolls(case, device=CPU):
    """The reference, and the same with the kernel."""
    make, config, as_bytes, horizon, _ = CASES[case]
    rule, task = make(), task_of(config, as_bytes)
    assert gpu.refusal(task, rule) is None
    both = [Unroll(task, rule, NUM_TASKS, horizon, (case,), device, path="reference") for _ in range(2)]
    both[1].path = fused.Fused(task, rule)
    return both


def run_case(case, device):
    """The largest error of each leaf after each window, relative to the leaf's largest number; and of the losses."""
    reference, ours = unrolls(case, device)
    theta, errors = perturbed(reference.lopt, device), {}
    expected, found, inside = reference.start(), ours.start(), False
    for window, steps in enumerate(CASES[case][-1]):
        right = reference.run(theta, expected, steps, window)
        with patch.object(fused.cpu, "run", gpu.run):
            losses = ours.run(theta, found, steps, window).losses
        errors[f"{window} losses"] = float((losses - right.losses).abs().max() / right.losses.abs().max())
        inside |= bool(right.done[:-1].any())
        assert found.tensors().keys() == expected.tensors().keys()
        for name, x in expected.tensors().items():
            x, y = x.double(), found.tensors()[name].double()
            errors[f"{window} {name}"] = float((y - x).abs().max() / x.abs().max().clamp_min(1e-30))
    assert inside, "no episode begins inside of a window"
    return errors


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_fused_gpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_the_window_equals_the_reference_under_the_interpreter(interpreted, case):
    assert interpreted[case]
    for name, error in interpreted[case].items():
        assert error <= TOLERANCE, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_the_window_equals_the_reference_on_a_gpu(case):
    for name, error in run_case(case, torch.device("cuda", 0)).items():
        assert error <= TOLERANCE_ON_GPU, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_window_on_a_gpu_repeats_bit_by_bit():
    device = torch.device("cuda", 0)
    results = []
    for _ in range(2):
        _, ours = unrolls("re-parametrised", device)
        particles = ours.start()
        with patch.object(fused.cpu, "run", gpu.run):
            results.append((ours.run(perturbed(ours.lopt, device), particles, 20, 0).losses, particles.tensors()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(x, results[1][1][name]) for name, x in results[0][1].items())


@pytest.mark.parametrize(("case", "capability"), [("celo", 90), ("moved and noisy", 80)])
def test_the_window_compiles_ahead_of_time_for_two_programs_per_multiprocessor(monkeypatch, case, capability):
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches = Launches(monkeypatch)
    _, ours = unrolls(case)
    with patch.object(fused.cpu, "run", gpu.run):
        ours.run(perturbed(ours.lopt, CPU), ours.start(), 2, 0)
    ((kernel, constants, types, options),) = launches.distinct().values()
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    # the device's cosine does so for arguments far beyond those of noise
    assert constants["noise"] > 0 or "f64" not in compiled.asm["ptx"], "computes in double precision"
    assert "atom." not in compiled.asm["ptx"], "adds in no fixed order"
    assert options["num_warps"] * 32 * options["maxnreg"] <= (64 << 10) // 2
    assert compiled.metadata.shared <= (96 << 10) // 2
    assert spilled(compiled.asm["cubin"]) <= STACK


def test_sizes_are_not_compiled_in(monkeypatch):
    pytest.importorskip("triton")
    launches = Launches(monkeypatch)
    for hidden, batch_size in (([], 5), ([3], 16), ([40, 20], 64)):
        task = task_of(SMALL | {"hidden": hidden, "batch_size": batch_size}, False)
        unroll = Unroll(task, lopt.Celo(1), NUM_TASKS, (5, 5), ("sizes",), path="reference")
        unroll.path = fused.Fused(task, unroll.lopt)
        with patch.object(fused.cpu, "run", gpu.run):
            unroll.run(perturbed(unroll.lopt, CPU), unroll.start(), 2, 0)
    assert len(launches.seen) == 3
    assert len(launches.distinct()) == 1
    kernel, arguments, _ = launches.seen[0]
    for parameter, value in zip(kernel.params, arguments, strict=False):
        assert isinstance(value, torch.Tensor) or parameter.do_not_specialize, parameter.name


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (lopt.Celo(2), {}),
        (lopt.SmallFcLopt(33), {}),
        (lopt.Celo(1), {"activation": "tanh"}),
        (lopt.Celo(1), {"activation": "dynamic"}),
        (lopt.Celo(1), {"loss": "squared"}),
        (lopt.Celo(1), {"norm": "layer_norm"}),
    ],
)
def test_what_the_kernel_does_not_compute_is_refused(rule, changes):
    pytest.importorskip("triton")
    assert gpu.refusal(task_of(SMALL, False), lopt.Celo(1)) is None
    assert gpu.refusal(task_of(SMALL | changes, False), rule)


def main():
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        """As the original, which patches triton.language anew for every call of a function: most of all time."""
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    torch.set_num_threads(1)
    print(json.dumps({case: run_case(case, CPU) for case in CASES}))


if __name__ == "__main__":
    main()
