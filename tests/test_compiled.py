"""Compiled losses and gradients: the eager ones but for rounding, for any task; cached; eager without a compiler."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from configs.schema import DataConfig, EstimatorConfig, FamilyConfig, TaskConfig
from lopt import SmallFcLopt
from tasks import Library, TaskDistribution
from tasks.augmentations.delayed_gradient import DelayedGradient
from tasks.families.image_conv import ImageConv
from tasks.families.image_mlp import ImageMlp
from tasks.families.rnn_lm import RnnLm
from tasks.families.transformer_lm import TransformerLm
from tests.task_laws import RandomLibrary, make_particles
from worker import compiled
from worker.compiled import Compiled
from worker.core import WorkerCore

MLP = ImageMlp(hidden=(8,), image_size=4, batch_size=8)
SLOW = {
    "image_conv": ImageConv(hidden=(4, 4), image_size=8, batch_size=4, norm="layer_norm", activation="dynamic"),
    "transformer_lm": TransformerLm(width=8, heads=1, layers=1, sequence_length=4, batch_size=2, dropout=0.1),
    "rnn_lm": RnnLm(hidden=8, embedding=4, sequence_length=3, batch_size=2),
    "augmented": DelayedGradient(delay=2, task=MLP),
}


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """Here it is."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One for the module: most of a first compilation's time goes into headers, which are compiled once."""
    path = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_COMPILED", str(path))
        yield path


def make(static, count=3, seed=0):
    task = static.build(RandomLibrary())
    particles = make_particles(task, count, seed)
    return task, (particles.params, task.init_state(particles.params), particles.batch, particles.dynamic)


def check(static, identity=None):
    task, inputs = make(static)
    function = Compiled(task, identity)
    out, expected = function(*inputs), task.losses_and_grads(*inputs)
    assert function.refusal is None
    assert function.compile_seconds > 0
    torch.testing.assert_close(out.losses, expected.losses)
    assert list(out.grads) == list(expected.grads)
    assert list(out.state) == list(expected.state)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(out.grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-7)
    for name, leaf in expected.state.items():
        torch.testing.assert_close(out.state[name], leaf)
    return function


@pytest.mark.slow
def test_compiled_is_eager(cache):
    check(MLP, MLP.digest())
    made = {path for path in cache.iterdir() if path.suffix == ".so"}
    assert len(made) == 1

    other_values = make(MLP, seed=1)
    function = Compiled(other_values[0], MLP.digest())
    torch.testing.assert_close(
        function(*other_values[1]).losses, other_values[0].losses_and_grads(*other_values[1]).losses
    )
    assert {path for path in cache.iterdir() if path.suffix == ".so"} == made

    # a second process finds it without the compiler's part in Python
    code = (
        "import sys; from tests.test_compiled import *; task, inputs = make(MLP); f = Compiled(task, MLP.digest());"
        "f(*inputs); assert f.refusal is None; assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    environment = {**os.environ, "CXX": "/nonexistent", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent.parent)


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_compiled_is_eager_in_every_family(family):
    check(SLOW[family])


@pytest.mark.slow
def test_an_estimate_says_how_long_its_compiler_took():
    config = TaskConfig(families={"tiny": FamilyConfig(task={"kind": "image_mlp", "hidden": [8], "batch_size": 8})})
    rule = SmallFcLopt(4)
    tasks = TaskDistribution(config, Library(DataConfig()))
    core = WorkerCore(rule, tasks, EstimatorConfig(num_tasks=2, window=2), 0, ("w",), path="generic")
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    first, second = (core.estimate(theta, 0).compile_seconds for _ in range(2))
    assert first > 0
    assert second == 0


@pytest.mark.slow
def test_a_large_graph_is_compiled_only_where_nobody_waits_for_it(monkeypatch):
    task, inputs = make(MLP, count=5)
    expected = task.losses_and_grads(*inputs).losses
    graph = compiled.traced(
        compiled.flattened(task, *inputs), [x.contiguous() for part in inputs for x in part.values()]
    )
    monkeypatch.setattr(compiled, "MOST_OPERATIONS", len(graph.graph.nodes) - 1)
    for _ in range(2):  # the second finds the count in the cache
        waiting = Compiled(task, "large")
        torch.testing.assert_close(waiting(*inputs).losses, expected)
        assert waiting.refusal is not None
        assert f"{len(graph.graph.nodes)} operations" in waiting.refusal
    beside = Compiled(task, "large", wait=False)
    deadline = time.monotonic() + 120
    while not beside.compile_seconds and time.monotonic() < deadline:
        torch.testing.assert_close(beside(*inputs).losses, expected)
    assert beside.refusal is None


@pytest.mark.slow
def test_what_does_not_fit_into_the_cache_is_computed_in_pieces(monkeypatch, cache):
    task, inputs = make(MLP, count=6)
    whole = task.losses_and_grads(*inputs)
    graph = compiled.traced(
        compiled.flattened(task, *inputs), [x.contiguous() for part in inputs for x in part.values()]
    )
    largest = max(node.meta["val"].nbytes for node in graph.graph.nodes if node.op == "call_function")
    expected = {largest: 6, largest - 1: 3, largest // 2 - 1: 2, largest // 6 + 1: 1, 1: 1}
    for size, piece in expected.items():
        monkeypatch.setattr(compiled, "CACHE_BYTES", size)
        assert compiled._piece(graph, next(iter(inputs[0].values()))) == piece
    monkeypatch.setattr(compiled, "CACHE_BYTES", largest // 2)
    before = set(cache.glob("*.piece"))
    for _ in range(2):  # the second finds it
        out = Compiled(task, "in pieces")(*inputs)
        torch.testing.assert_close(out.losses, whole.losses)
        for name, grad in whole.grads.items():
            torch.testing.assert_close(out.grads[name], grad, rtol=1e-4, atol=1e-6)
    assert [path.read_text() for path in set(cache.glob("*.piece")) - before] == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_is_traced_to_what_costs_less_and_means_the_same(approximate):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)

    def both(x):
        y, pull = torch.func.vjp(lambda x: torch.nn.functional.gelu(x, approximate=approximate), x)
        return [y, pull(torch.ones_like(x))[0]]

    graph = compiled.traced(both, [x])
    operations = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert ("aten.sigmoid.default" in operations) == (approximate == "tanh")
    for found, expected in zip(graph(x), both(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_other_shapes_are_compiled_anew():
    task, inputs = make(MLP)
    function = Compiled(task, MLP.digest())
    function(*inputs)
    more = make(MLP, count=5)[1]
    torch.testing.assert_close(function(*more).losses, task.losses_and_grads(*more).losses)


WITHOUT_COMPILER = """
import logging
from tests.test_compiled import *

logging.basicConfig()
for _ in range(2):
    task, inputs = make(MLP)
    function = Compiled(task, MLP.digest())
    for _ in range(2):
        assert torch.equal(function(*inputs).losses, task.losses_and_grads(*inputs).losses)
    assert "InvalidCxxCompiler" in function.refusal, function.refusal
"""


def test_without_a_compiler_it_is_eager_and_says_so_once(tmp_path):
    environment = {**os.environ, "CXX": "/nonexistent", "PACELINE_COMPILED": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_COMPILER],
        env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("in eager torch, not compiled") == 1
    assert not list(tmp_path.glob("*.so"))


def test_until_it_is_compiled_eager_serves_who_does_not_wait(monkeypatch):
    task, inputs = make(MLP)
    function = Compiled(task, "not cached", wait=False)
    pending = compiled.Future()
    monkeypatch.setattr(function, "_compile", lambda *_: setattr(function, "_future", pending))
    expected = task.losses_and_grads(*inputs)
    assert torch.equal(function(*inputs).losses, expected.losses)
    assert function.compile_seconds == 0
    pending.set_result(lambda leaves: [torch.full((3,), 7.0), *leaves[: len(inputs[0])]])
    assert function(*inputs).losses.tolist() == [7.0] * 3
    assert function.compile_seconds > 0


def test_a_task_whose_graph_depends_on_values_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_COMPILED", str(tmp_path))

    task, inputs = make(MLP)
    eager = task.losses_and_grads

    def reading(params, state, batch, dynamic):
        scale = 2.0 if float(batch["image"].sum()) > 0 else 1.0
        out = eager(params, state, batch, dynamic)
        return out._replace(losses=scale * out.losses)

    monkeypatch.setattr(task, "losses_and_grads", reading)
    function = Compiled(task)
    assert torch.equal(function(*inputs).losses, reading(*inputs).losses)
    assert "data-dependent" in function.refusal


def test_a_large_graph_is_traced_once_and_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_COMPILED", str(tmp_path))
    monkeypatch.setattr(compiled, "MOST_OPERATIONS", 10)
    task, inputs = make(MLP)
    for _ in range(2):
        function = Compiled(task, MLP.digest())
        assert torch.equal(function(*inputs).losses, task.losses_and_grads(*inputs).losses)
        assert "at most 10" in function.refusal
        monkeypatch.setattr(compiled, "traced", None)


def test_another_configuration_or_another_shape_has_another_key():
    shapes = ((torch.Size((3, 2)), torch.float32, torch.device("cpu")),)
    more = ((torch.Size((4, 2)), torch.float32, torch.device("cpu")),)
    keys = {compiled._key("a", shapes), compiled._key("b", shapes), compiled._key("a", more)}
    assert len(keys) == 3
    assert compiled._key("a", shapes) in keys
