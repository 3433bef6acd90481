"""The Triton kernels equal the reference, under triton's interpreter and on a GPU if there is one; and what the
interpreter cannot tell: that they compile for GPUs that are not here, to code that neither spills nor adds in an order
of its own."""

import json
import os
import re
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
from lopt import kernels
from lopt.accumulators import factored_axes
from lopt.kernels import gpu
from tests import gpu_cases

TOLERANCE = 2e-5
TOLERANCE_ON_GPU = 1e-4
"""Roots, exponentials and quotients are a few units in the last place off there, in the reference as well."""
CAPABILITIES = (80, 90)
CPU = torch.device("cpu")
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple)


@pytest.fixture(scope="module")
def interpreted():
    """What ``gpu_cases`` prints: every case's differences, by case and by name."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", gpu_cases.CASES)
def test_kernels_equal_the_reference_under_the_interpreter(interpreted, case):
    assert interpreted[case]
    for name, error in interpreted[case].items():
        assert error <= TOLERANCE, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", gpu_cases.CASES)
def test_kernels_equal_the_reference_on_a_gpu(case):
    for name, error in gpu_cases.run_case(case, torch.device("cuda", 0)).items():
        assert error <= TOLERANCE_ON_GPU, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_on_a_gpu_repeats_bit_by_bit_and_the_host_never_waits():
    rule = lopt.SmallFcLopt(32)
    step = gpu_cases.step_of(rule, ((1000, 1000), (50000,)), torch.device("cuda", 0))
    first, _ = gpu.update(rule, *step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second, _ = gpu.update(rule, *step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], second[name]) for name in first)


class Launches:
    """Takes the place of launching: keeps the arguments of every kernel that would be launched."""

    def __init__(self, patch):
        from triton.runtime.jit import JITFunction

        self.seen = []
        patch.setattr(
            JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs: self.seen.append((kernel, args, kwargs))
        )

    def distinct(self):
        """Kernel, constants, types of the other arguments and options, once each."""
        from triton.runtime.jit import mangle_type

        found = {}
        for kernel, args, kwargs in self.seen:
            bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            options = {name: bound.pop(name) for name in kwargs if name not in kernel.arg_names}
            constants = {param.name: bound[param.name] for param in kernel.params if param.is_constexpr}
            types = {n: "constexpr" if n in constants else mangle_type(bound[n]) for n in kernel.arg_names}
            key = (kernel.__name__, *constants.values(), *types.values())
            found[key] = (kernel, constants, types, options)
        return found


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton")
    return Launches(monkeypatch)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_ahead_of_time(launches, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for rule in (lopt.MuLO(32), lopt.Velo(8, 4)):
        step = gpu_cases.step_of(rule, gpu_cases.FEW, CPU)
        gpu.update(rule, *step)
    gpu.moments(step[1], step[2])
    kinds = launches.distinct()
    assert {name for name, *_ in kinds} == {
        "axis_sums", "accumulate", "row_means", "column_sums", "normalizers", "apply",
        "chunk_moments", "tensor_moments",
    }  # fmt: skip
    for kernel, constants, types, options in kinds.values():
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
        compiled = triton.compile(
            ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
        )
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert "f64" not in compiled.asm["ptx"], f"{kernel.__name__} computes in double precision"
        assert "atom." not in compiled.asm["ptx"], f"{kernel.__name__} adds in no fixed order"
        assert compiled.metadata.shared <= 48 << 10
        assert spilled(compiled.asm["cubin"]) == 0, f"{kernel.__name__} does not fit into registers"


def spilled(binary):
    """Bytes of stack that a kernel needs."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1])


def test_a_step_in_place_uploads_no_table_that_has_not_changed(launches):
    rule = lopt.Celo(2)
    network, state, params, grads = gpu_cases.step_of(rule, gpu_cases.FEW, CPU)
    for rate, new_tables in ((1.0, 1), (1.0, 0), (0.5, 1)):
        before = gpu._pointers.cache_info().misses
        gpu.apply(rule, network, state, params, grads, [rate] * 3, [0.0] * 3)
        assert gpu._pointers.cache_info().misses - before == new_tables


def test_launches_do_not_grow_with_the_number_of_tensors(launches):
    rule = lopt.Celo(2)
    gpu.update(rule, *gpu_cases.step_of(rule, gpu_cases.MANY, CPU))
    assert len(launches.seen) == 6


def test_what_is_not_contiguous_is_not_updated_in_place(launches):
    rule = lopt.Celo(2)
    network, state, params, grads = gpu_cases.step_of(rule, ((5, 12),), CPU)
    params = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in params.items()}
    with pytest.raises(ValueError, match="layer/0 or its state is not contiguous"):
        gpu.apply(rule, network, state, params, grads, [1.0], [0.0])


@given(shapes)
def test_every_element_is_shown_its_row_its_column_and_its_mean(shape):
    words = dict(zip(gpu.LAYOUT, gpu._layout((shape,), CPU, 0).words[0].tolist(), strict=True))
    d1, d0 = factored_axes(shape)

    def without(at, which):
        stride = words[f"{which}_stride"]
        return at // (words[f"{which}_extent"] * stride) * stride + at % stride

    def spread(*axes):
        """For every element, the place that it has in a tensor that lacks these axes."""
        kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
        return np.broadcast_to(np.arange(prod(kept)).reshape(kept), shape).ravel()

    at = np.arange(prod(shape))
    np.testing.assert_array_equal(without(at, "row"), spread(d0))
    np.testing.assert_array_equal(without(at, "col"), spread(d1))
    np.testing.assert_array_equal(without(without(at, "row"), "mean"), spread(d0, d1))


@settings(max_examples=30)
@given(st.lists(st.sampled_from([(), (9,), (3, 1), (70, 3), (3, 70), (300, 300), (2, 1030), (9000, 3), (5, 2, 4)])))
def test_the_pieces_of_every_phase_cover_everything_once(many):
    layout = gpu._layout(tuple(many), CPU, 0)
    words = [dict(zip(gpu.LAYOUT, row, strict=True)) for row in layout.words.tolist()]
    sizes = [prod(shape) for shape in many]
    covered = [np.zeros(size, int) for size in sizes]
    for t, start in layout.chunks.tolist():
        covered[t][start : start + gpu.CHUNK] += 1
    assert all((count == 1).all() for count in covered)
    assert [word["last_chunk"] - word["first_chunk"] for word in words] == [-(-size // gpu.CHUNK) for size in sizes]

    space = np.zeros(layout.partials_size, int)
    for t, kind, first, part in layout.pieces.tolist():
        word = {name: words[t][f"{('row', 'col')[kind]}_{name}"] for name in gpu.AXIS}
        width, _, length = gpu.ALONG if word["contiguous"] else gpu.ACROSS
        assert part * length < word["extent"] <= word["parts"] * length
        start = word["offset"] + part * word["outputs"]
        space[start + first : start + min(first + width, word["outputs"])] += 1
    assert (space == 1).all()


def test_workspaces_are_small():
    vit_block = ((768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,))
    layout = gpu._layout(vit_block, CPU, 0)
    words = sum(x.numel() for x in (layout.words, layout.pieces, layout.entries, layout.means, layout.chunks))
    floats = layout.partials_size + layout.means_size + gpu.PLACES * (len(layout.chunks) + len(vit_block))
    assert (8 * words + 4 * floats) / sum(map(prod, vit_block)) < 0.3


def test_other_devices_and_networks_are_left_to_the_reference():
    params = {"p": torch.zeros(1, 3, device="meta")}
    weights = [torch.zeros(1, 30, 4)]
    assert not kernels.serves(lopt.Celo(1), params, weights)
    assert not gpu.serves({"p": torch.zeros(1, 3)}, hidden=4)


def test_lopt_is_imported_and_applied_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, lopt
rule = lopt.SmallFcLopt(4)
params = {"p": torch.ones(1, 3)}
theta = {name: x.unsqueeze(0) for name, x in rule.init_theta(torch.Generator().manual_seed(0)).items()}
rule.update_particles(theta, rule.init_particles(theta, params, torch.tensor([5])), params, params, torch.ones(1))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parent.parent)
