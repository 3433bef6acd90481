"""A task's batched losses and gradients as one compiled function: the forward and backward half of the generic path.

Owns: tracing, compiling, the cache of compiled functions and the fall-back to eager torch. Must never know an update
rule, and never changes what is computed: compiled and eager differ by rounding.

``Task.losses_and_grads`` is traced with concrete shapes (augmentations, vmap and the backward pass are then nothing but
a list of operations) and compiled ahead of time by AOTInductor to one shared library, which is loaded without Python's
part of the compiler. One that was compiled before, by whatever process, is so there within milliseconds.

Where the particles' intermediate results do not fit into a core's cache together, what is compiled is a piece of the
particles, and the pieces are computed one after the other.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from tasks.base import IDENTITY, Batch, Dynamic, LossesAndGrads, Params, Task, TaskState

if TYPE_CHECKING:
    from torch.fx import GraphModule

CACHE = Path("~/.cache/paceline/compiled")
"""Beside the data sets' cache (``configs.schema.DataConfig``); ``PACELINE_COMPILED`` in the environment replaces it."""

MOST_OPERATIONS = 1000
"""Of a graph that a run waits for: more take over ten seconds to compile. An LSTM over 32 tokens has 1184 (35 s)."""
BESIDE = 3
"""So many times as large may a graph be that is compiled beside the work."""

CACHE_BYTES = 1 << 20
"""Of a core's own cache. The largest result of a piece of the particles fits into it, if that of one particle does."""

GELU_SCALE, GELU_CUBIC = (2 / math.pi) ** 0.5, 0.044715

Run = Callable[[list[Tensor]], list[Tensor]]
Signature = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]

log = logging.getLogger(__name__)


class TooLargeError(RuntimeError):
    """A graph that is not worth compiling; says how large it is."""


class Compiled:
    """``task.losses_and_grads``, with its arguments and results, compiled at the first call.

    ``identity`` is a digest of all that the task was built from besides data (``StaticConfig.digest()``); without one
    it is found by tracing, which takes a second or two where a cached function would take milliseconds. ``wait`` says
    whether the first calls wait for the compiler, so that all numbers of a run have the same rounding, or are computed
    in eager torch meanwhile.

    ``compile_seconds``: how long compilations (or loading, where there was nothing to compile) have taken so far.
    ``refusal``: why everything is computed in eager torch; None if it is not.
    """

    def __init__(self, task: Task, identity: str | None = None, wait: bool = True) -> None:
        self.task, self.identity, self.wait = task, identity, wait
        self.compile_seconds = 0.0
        self.refusal: str | None = None
        self._signature: Signature = ()
        self._future: Future[Run] = Future()
        self._run: Run | None = None

    def __call__(self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic = IDENTITY) -> LossesAndGrads:
        if self.refusal is None:
            inputs = [x.contiguous() for part in (params, state, batch, dynamic) for x in part.values()]
            run = self._ready(params, state, batch, dynamic, inputs)
            if run is not None:
                losses, *rest = run(inputs)
                grads = dict(zip(params, rest, strict=False))
                return LossesAndGrads(losses, grads, dict(zip(state, rest[len(params) :], strict=True)))
        return self.task.losses_and_grads(params, state, batch, dynamic)

    def _ready(
        self, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic, inputs: list[Tensor]
    ) -> Run | None:
        """The function for inputs like these; None where it is not there, yet or ever."""
        # the library trusts its inputs' shapes
        signature = tuple([(x.shape, x.dtype, x.device) for x in inputs])
        if signature != self._signature:
            self._start(flattened(self.task, params, state, batch, dynamic), inputs, signature)
        if self._run is None and (self.wait or self._future.done()):
            self._finish()
        return self._run

    def _start(self, function: Callable[..., list[Tensor]], inputs: list[Tensor], signature: Signature) -> None:
        self._signature, self._run, self._begun = signature, None, time.perf_counter()
        self._future = Future()
        try:
            self._compile(function, inputs)
        except failures() as error:
            self._future.set_exception(error)

    def _compile(self, function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> None:
        graph = None if self.identity else traced(function, inputs)
        library = folder() / f"{_key(self.identity or _text(graph), self._signature)}.so"
        pieces = library.with_suffix(".piece")
        if library.exists():
            self._future.set_result(_in_pieces(_loaded(library, inputs[0].device), int(pieces.read_text())))
            return
        counted = library.with_suffix(".operations")
        if counted.exists():
            self._refuse_large(int(counted.read_text()))
        # traced here, because what tracing switches on is seen by all threads
        graph = graph or traced(function, inputs)
        size = len(graph.graph.nodes)
        written = counted.with_suffix(f".{os.getpid()}")
        written.write_text(str(size))
        os.replace(written, counted)
        self._refuse_large(size)
        piece = _piece(graph, inputs[0])
        if piece < len(inputs[0]):
            inputs = [x[:piece] for x in inputs]
            graph = traced(function, inputs)
        pieces.write_text(str(piece))
        with _one_thread() as pool:
            self._future = pool.submit(_built, graph, inputs, library, piece)

    def _refuse_large(self, operations: int) -> None:
        most = MOST_OPERATIONS if self.wait else BESIDE * MOST_OPERATIONS
        if operations > most:
            raise TooLargeError(f"{operations} operations, and at most {most} are compiled")

    def _finish(self) -> None:
        try:
            self._run = self._future.result()
        except failures() as error:
            self.refusal = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            _say_once(f"losses and gradients in eager torch, not compiled: {self.refusal}")
        seconds = time.perf_counter() - self._begun
        self.compile_seconds += seconds
        log.info("losses and gradients of %s: ready in %.1f s", type(self.task).__name__, seconds)


def flattened(
    task: Task, params: Params, state: TaskState, batch: Batch, dynamic: Dynamic
) -> Callable[..., list[Tensor]]:
    """``task.losses_and_grads`` of the leaves in order, giving the losses, the gradients and then the state's."""
    names = [list(part) for part in (params, state, batch, dynamic)]

    def function(*leaves: Tensor) -> list[Tensor]:
        each = iter(leaves)
        parts = [{name: next(each) for name in part} for part in names]
        out = task.losses_and_grads(*parts)
        return [out.losses, *(out.grads[name] for name in params), *(out.state[name] for name in state)]

    return function


def traced(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
    """The operations that ``function`` is made of for inputs like these."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with _compiling():
        return make_fx(function, decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """What the compiler would compute more slowly as it stands: gelu by tanh, which costs three exponentials.

    x/2 (1 + tanh u) = x sigmoid(2u), where u is a polynomial of x.
    """
    aten = torch.ops.aten

    def gate(x: Tensor) -> Tensor:
        return torch.sigmoid(2 * GELU_SCALE * (x + GELU_CUBIC * x * x * x))

    # NotImplemented is what make_fx takes for: leave it as it is
    def gelu(x: Tensor, *, approximate: str = "none") -> Any:
        return x * gate(x) if approximate == "tanh" else NotImplemented

    def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Any:
        if approximate != "tanh":
            return NotImplemented
        open_ = gate(x)
        slope = 2 * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
        return grad * (open_ + x * open_ * (1 - open_) * slope)

    return {aten.gelu.default: gelu, aten.gelu_backward.default: gelu_backward}


@contextmanager
def _compiling() -> Iterator[None]:
    """Within it ``torch.compiler.is_compiling()`` holds, as when torch.export traces: nothing may read a value."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def failures() -> tuple[type[Exception], ...]:
    """What says that a graph cannot be traced or compiled here, and nothing else."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler, OperatorIssue, SubgraphLoweringException
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    compiler = (
        TooLargeError,
        TorchDynamoException,
        CppCompileError,
        InvalidCxxCompiler,
        OperatorIssue,
        SubgraphLoweringException,
    )
    return (*compiler, DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def _piece(graph: GraphModule, first: Tensor) -> int:
    """How many particles to compute at once: as many as ``CACHE_BYTES`` says, and a divisor of all that there are."""
    particles = len(first)
    if first.device.type != "cpu":
        return particles
    results = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    largest = max(result.nbytes for result in results if isinstance(result, Tensor))
    fitting = max(1, particles * CACHE_BYTES // largest)
    return max(size for size in range(1, particles + 1) if particles % size == 0 and size <= fitting)


def _in_pieces(run: Run, piece: int) -> Run:
    """``run``, which is about ``piece`` particles, for any multiple of them."""

    def every(inputs: list[Tensor]) -> list[Tensor]:
        if len(inputs[0]) == piece:
            return run(inputs)
        parts = zip(*(torch.split(x, piece) for x in inputs), strict=True)
        return [torch.cat(outs) for outs in zip(*(run(list(part)) for part in parts), strict=True)]

    return every


def _built(graph: GraphModule, inputs: list[Tensor], library: Path, piece: int) -> Run:
    """The library compiled, unless another process does or did that."""
    import torch._inductor
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    # the wrapper only calls kernels and gains nothing from being optimised
    options = {"aot_inductor.compile_wrapper_opt_level": "O0", "compile_threads": 1}
    with FileLock(library.with_suffix(".lock")), temporary_cache_dir(str(library.parent / "inductor")):
        if not library.exists():
            made = torch._inductor.aot_compile(graph, tuple(inputs), options=options)
            os.replace(str(made), library)
    return _in_pieces(_loaded(library, inputs[0].device), piece)


def _loaded(library: Path, device: torch.device) -> Run:
    runners = torch._C._aoti
    run: Run
    if device.type == "cuda":
        run = runners.AOTIModelContainerRunnerCuda(str(library), 1, str(device), "").run
    else:
        run = runners.AOTIModelContainerRunnerCpu(str(library), 1).run
    return run


def folder() -> Path:
    """Where compiled functions lie, readable by this user alone, because they are loaded as code."""
    path = Path(os.environ.get("PACELINE_COMPILED", CACHE)).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _key(identity: str, signature: Signature) -> str:
    parts = (identity, str(signature), _machine(), _sources(), str(torch.get_num_threads()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _text(graph: GraphModule | None) -> str:
    """The graph's operations and constants."""
    assert graph is not None  # noqa: S101 - traced where there is no identity
    constants = [f"{name} {tensor.tolist()}" for name, tensor in graph.named_buffers()]
    return "\n".join([graph.code, *constants])


@cache
def _machine() -> str:
    """torch and the processor, whose instructions the compiler uses."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    flags = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join((torch.__version__, platform.platform(), *flags))


@cache
def _sources() -> str:
    """A digest of the code that tasks consist of."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(Path(__file__).parent.parent.glob("tasks/**/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _say_once(message: str) -> None:
    log.warning(message)


@contextmanager
def _one_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread of its own that ends after what it is given, which is not waited for here."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)
