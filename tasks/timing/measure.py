"""Measured step times: a task is built and trained by Adam for 20 steps and more, or refused with a reason.

Owns: the timed inner step, its limits, and the loop that fills a table. Must never predict, nor know any one family.

A step is what a worker does for its particles: draw a batch each, take losses and gradients, update the parameters; the
update is Adam's, so that the time does not depend on which learned optimizer is trained. On the CPU it is the CPU time
of one thread, which other programs on the machine hardly change; on an accelerator the synchronised wall-clock time.
"""

from __future__ import annotations

import datetime
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.checks import ConfigError
from tasks.base import Params, Task
from tasks.data.library import Library
from tasks.errors import DataError
from tasks.families import FAMILIES
from tasks.families.draws import Pool
from tasks.keys import encode
from tasks.random import keys
from tasks.static import StaticConfig
from tasks.timing.table import Row, digest, read_table, write_table

PARTICLES = 8
STEPS = 20
"""The steps of Adam that a task must take with finite losses."""

_TIMED_SECONDS = 0.05
_MAX_STEPS = 200
_LEARNING_RATE = 1e-3
_SAVE_SECONDS = 60.0
CPU = torch.device("cpu")


class Measurement(NamedTuple):
    """Whether a task ran and its ``seconds`` per inner step and particle (NaN if not), or the ``reason`` why not.

    ``bytes`` is the most memory that a step of all ``particles`` holds, taken as that many times what one of them does
    (0 if it did not run). Reasons: timing.table.
    """

    ran: bool
    reason: str
    seconds: float
    bytes: int
    particles: int


class Limits(NamedTuple):
    """What is refused: more ``memory`` (bytes; None: half of what is free) and slower than ``step`` seconds.

    Both are for one step of all particles.
    """

    memory: int | None = None
    step: float = 0.2


def step_seconds(
    static: StaticConfig,
    library: Library,
    device: torch.device = CPU,
    particles: int = PARTICLES,
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Measurement:
    """Measure one config; a refused one costs at most a few steps. Raises DataError if its data cannot be had."""
    with _one_thread(device):
        reason = _refused(static, device, particles, limits)
        if not reason:
            try:
                return _measure(static.build(library), device, particles, limits)
            except ConfigError as error:
                reason = f"impossible: {error}"
            except torch.OutOfMemoryError:
                reason = "memory: the device ran out of it"
    return Measurement(False, reason, math.nan, 0, particles)


def _refused(static: StaticConfig, device: torch.device, particles: int, limits: Limits) -> str:
    """Why the config's work alone rules it out, or nothing."""
    work = static.work()
    memory = free_bytes(device) // 2 if limits.memory is None else limits.memory
    if work.bytes * particles > memory:
        return f"memory: {_size(work.bytes * particles)} expected, the limit is {_size(memory)}"
    least = 3 * work.flops * particles / peak_flops(device)
    return f"slow: at least {least:.1g} s a step, the limit is {limits.step:g}" if least > limits.step else ""


def _measure(task: Task, device: torch.device, particles: int, limits: Limits) -> Measurement:
    # One particle alone first: what is too slow for it would take several times as long for all of them. If the steps
    # of all are so long that few are enough to time them, it also takes those that must be finite.
    trainings = []
    for count in (1, particles):
        training = _Training(task, count, device)
        trainings.append(training)
        training.step()
        if training.times[0] <= 4 * limits.step:
            training.step()  # the first one also sets up kernels and caches
        if min(training.times) > limits.step:
            reason = f"slow: {min(training.times):.2g} s a step of {count}, the limit is {limits.step:g}"
            return Measurement(False, reason, math.nan, 0, particles)
    alone, together = trainings
    while sum(together.times) < _TIMED_SECONDS and together.steps < _MAX_STEPS:
        together.step()
    while together.steps < STEPS and alone.steps < STEPS:
        alone.step()
    for training in trainings:
        finite = torch.stack(training.losses).isfinite().all(1).cpu()
        if not finite.all():
            reason = f"not finite: the loss after {int(finite.int().argmin())} steps"
            return Measurement(False, reason, math.nan, 0, particles)
    # The least of the times: whatever else happens on the machine only ever adds to a step.
    seconds = float(f"{min(together.times) / particles:.4g}")
    return Measurement(True, "", seconds, alone.peak_bytes() * particles, particles)


class _Training:
    """``particles`` trainings of one task side by side, by Adam (Kingma & Ba 2015)."""

    def __init__(self, task: Task, particles: int, device: torch.device) -> None:
        self.task, self.device, self.steps = task, device, 0
        self.losses: list[Tensor] = []
        self.times: list[float] = []
        generator = torch.Generator().manual_seed(0)
        dynamic = task.sample_dynamic(generator, particles)
        rows = [task.init(generator, {k: leaf[i] for k, leaf in dynamic.items()}) for i in range(particles)]
        self.params: Params = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        self.dynamic = {name: leaf.to(device) for name, leaf in dynamic.items()}
        self.state = task.init_state(self.params)
        self.mean = [torch.zeros_like(leaf) for leaf in self.params.values()]
        self.square = [torch.zeros_like(leaf) for leaf in self.params.values()]
        self.keys = keys(_MAX_STEPS * particles, "timing", device=device).reshape(_MAX_STEPS, particles)

    def step(self) -> None:
        """One inner step of every particle; adds to ``times`` (seconds) and ``losses`` ((P,), before the update)."""
        start = _clock(self.device)
        batch = self.task.batch("train", self.keys[self.steps % _MAX_STEPS])
        losses, grads, self.state = self.task.losses_and_grads(self.params, self.state, batch, self.dynamic)
        self.losses.append(losses)
        self.steps += 1
        with torch.no_grad():
            self._update(list(grads.values()))
        self.times.append(_clock(self.device) - start)

    def _update(self, grads: list[Tensor]) -> None:
        torch._foreach_lerp_(self.mean, grads, 0.1)
        torch._foreach_mul_(self.square, 0.999)
        torch._foreach_addcmul_(self.square, grads, grads, 0.001)
        scale = torch._foreach_sqrt(self.square)
        torch._foreach_add_(scale, 1e-8)
        rate = _LEARNING_RATE * math.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        torch._foreach_addcdiv_(list(self.params.values()), self.mean, scale, -rate)

    def peak_bytes(self) -> int:
        """The most bytes alive within one more step: parameters, Adam's moments and all that the step allocates."""
        held = sum(leaf.nbytes for leaf in [*self.params.values(), *self.mean, *self.square, *self.state.values()])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step()
            return int(torch.cuda.max_memory_allocated(self.device)) - before + held
        allocations = _Allocations(held)
        with allocations:
            self.step()
        return allocations.peak


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows how many bytes are alive: ``start`` and those of tensors made within; ``peak`` is the most there were."""

    def __init__(self, start: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = start
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


def measure_table(
    families: Sequence[str],
    count: int,
    path: Path,
    library: Library,
    device: torch.device = CPU,
    seed: int = 0,
    progress: Callable[[int, int, Row], None] | None = None,
    pool: Pool = Pool(),  # noqa: B008 - immutable
    limits: Limits = Limits(),  # noqa: B008
) -> list[Row]:
    """Draw and measure ``count`` configs of each family of ``FAMILIES``, and write the table; all its rows.

    Draws that ``path`` has already are not measured again, so that a run that was stopped goes on where it was; the
    file is written about every minute. Draw i of a family depends on ``seed``, the family and i alone. ``progress``
    gets the number of draws done, of all, and the newest row. Raises DataError if ``path`` is a table of another device
    or setting, or if data is missing.
    """
    if limits.memory is None:
        limits = limits._replace(memory=free_bytes(device) // 2)
    rows = _rows_so_far(path, device)
    done = {(row.family, row.seed, row.draw) for row in rows}
    missing = [(index, name) for index in range(count) for name in families if (name, seed, index) not in done]
    saved = time.monotonic()
    for number, (index, name) in enumerate(missing, 1):
        rows.append(_row(name, seed, index, library, device, pool, limits))
        if progress is not None:
            progress(count * len(families) - len(missing) + number, count * len(families), rows[-1])
        if time.monotonic() - saved > _SAVE_SECONDS:
            write_table(path, rows)
            saved = time.monotonic()
    write_table(path, rows)
    return rows


def _rows_so_far(path: Path, device: torch.device) -> list[Row]:
    """The rows of the table that is to be completed, which must be of this setting."""
    rows = read_table(path) if path.exists() else []
    for name, value in _setting(device).items():
        if rows and getattr(rows[0], name) != value:
            found = f"{path}: column {name} = {getattr(rows[0], name)!r}, this is {value!r}"
            raise DataError(f"{found}: a table has times of one setting only, so write a new one")
    return rows


def _setting(device: torch.device) -> dict[str, str | int]:
    """The columns that are the same in all rows of a table."""
    threads = 1 if device.type == "cpu" else torch.get_num_threads()
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": threads,
        "particles": PARTICLES,
    }


def _row(family: str, seed: int, index: int, library: Library, device: torch.device, pool: Pool, limits: Limits) -> Row:
    static = ""
    rng = np.random.default_rng(list(encode((seed, "timing", family, index))))
    try:
        drawn = FAMILIES[family].draw(rng, pool)
        static = drawn.to_json()
        measured = step_seconds(drawn, library, device, PARTICLES, limits)
    except ConfigError as error:
        measured = Measurement(False, f"impossible: {error}", math.nan, 0, PARTICLES)
    where: dict[str, Any] = _setting(device)
    return Row(
        family=family,
        seed=seed,
        draw=index,
        static=static,
        digest=digest(static) if static else "",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        **(where | measured._asdict()),
    )


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return device.type
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), device.type)


def free_bytes(device: torch.device) -> int:
    """The memory that the device has left; on the CPU what the kernel could give without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise ConfigError("memory", None, "a limit in bytes, as this system does not say what is free") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@cache
def peak_flops(device: torch.device) -> float:
    """Floating-point operations per second of large matrix products, the best of float32 and bfloat16.

    A lower bound of time follows from it, so that tasks which cannot be quick enough are refused without running them.
    """
    size = 1024 if device.type == "cpu" else 8192
    best = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        for _ in range(4):
            start = _clock(device)
            torch.mm(matrix, matrix)
            best = min(best, _clock(device) - start)
    return 2 * size**3 / best


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread for tensors on the CPU, so that its time is all there is."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _size(number: float) -> str:
    return f"{number / 2**30:.2g} GiB"
