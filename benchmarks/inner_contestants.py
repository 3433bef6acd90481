"""Who takes part in ``inner_loop.py``: our engine and its peers, as processes that answer JSON lines.

    python benchmarks/inner_contestants.py CORE           our engine, pinned to one core

Owns the workload and its contests (a rule on the fast set's MLP, or another family under Celo phase 1), our side of the
protocol, and what both sides begin with, so that a peer's losses can be compared. Decides nothing about what is
measured and how it is reported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import lopt
import worker.compiled
from configs.checks import ConfigError
from configs.schema import DataConfig
from lopt import kernels
from tasks import Datasets, Library, Task, generator, static_from_dict
from tasks.data.images import ImageDataset, Pixels
from tasks.data.text import TextDataset
from tasks.families.image_mlp import ImageMlp, ImageMlpTask
from worker.compiled import Compiled
from worker.memory import keep_freed_memory
from worker.unroll import Unroll

HERE = Path(__file__).parent
WINDOW, BATCH, ROWS, SIGMA = 50, 64, 60_000, 0.01
WIDTHS = (64, 32, 10)
HORIZON = (100, 2000)
RULES: dict[str, Callable[[], lopt.LearnedOptimizer]] = {
    "small_fc/4": lambda: lopt.SmallFcLopt(4),
    "small_fc/8": lambda: lopt.SmallFcLopt(8),
    "small_fc/32": lambda: lopt.SmallFcLopt(32),
    "celo/1": lambda: lopt.Celo(1),
    "celo/2": lambda: lopt.Celo(2),
    "celo2": lambda: lopt.Celo2(),
    "velo_s": lambda: lopt.Velo(64, 32),
}
PEERED = tuple(rule for rule in RULES if rule != "celo2")
FAMILIES: dict[str, dict[str, Any]] = {
    "image_conv": {
        "kind": "image_conv", "dataset": "digits", "image_size": 8, "batch_size": 64, "hidden": [16, 32], "strided": 1,
    },
    "rnn_lm": {
        "kind": "rnn_lm", "corpus": "pydoc", "vocab_size": 256, "sequence_length": 32, "batch_size": 16,
        "cell": "lstm", "hidden": 32, "embedding": 32,
    },
    "transformer_lm": {
        "kind": "transformer_lm", "corpus": "pydoc", "vocab_size": 256, "sequence_length": 32, "batch_size": 8,
        "width": 64, "heads": 8, "layers": 1,
    },
    "vit": {
        "kind": "vit", "dataset": "digits", "image_size": 8, "batch_size": 32, "patch_size": 2, "width": 32,
        "heads": 2, "layers": 2, "mlp_dim": 64,
    },
}  # fmt: skip
"""Of the sizes that the paper draws, such that a step of one particle takes 0.2 to 5 ms; the update is Celo phase 1."""
CHECK_STEPS = 5


class RandomImages:
    """A library whose one image set is random pixels, as many as the large published sets have."""

    def images(self, dataset: str, size: int, *rest: object, **more: object) -> Datasets:
        draws = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (ROWS, 1, size, size), dtype=torch.uint8, generator=draws)
        labels = torch.randint(WIDTHS[-1], (ROWS,), generator=draws)
        part = ImageDataset(Pixels(pixels, labels, torch.randperm(ROWS, generator=draws), ROWS), range(ROWS), size)
        return Datasets(part, part, part)


def contest(name: str) -> tuple[Task, lopt.LearnedOptimizer, str]:
    """Task, rule and the task's identity, of the name of a rule (on the MLP) or of a family (under Celo phase 1)."""
    if name in FAMILIES:
        static = static_from_dict(FAMILIES[name])
        return static.build(Library(DataConfig())), RULES["celo/1"](), static.digest()
    mlp = ImageMlp(hidden=WIDTHS[1:-1])
    return ImageMlpTask(mlp, RandomImages()), RULES[name](), mlp.digest()  # type: ignore[arg-type]


def perturbed(rule: lopt.LearnedOptimizer, n: int) -> lopt.base.Theta:
    """theta of n antithetic pairs, leaves (2n, ...)."""
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    eps = SIGMA * torch.randn(n, rule.spec.trainable_size, generator=torch.Generator().manual_seed(1))
    flat = rule.spec.flatten(theta)
    return rule.spec.unflatten(torch.cat([flat + eps, flat - eps]), theta)


@contextmanager
def marked(rule: lopt.LearnedOptimizer) -> Iterator[None]:
    """In it, a profile can tell the rule's updates and the compiled function from the rest."""

    def mark(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def with_label(*inputs: Any) -> Any:
            with torch.profiler.record_function(label):
                return function(*inputs)

        return with_label

    def stepper(*given: Any) -> lopt.base.Stepper:
        found = start(*given)
        found.step = mark(found.step, "paceline::update")  # type: ignore[method-assign]
        return found

    start = rule.stepper
    with (
        patch.object(rule, "stepper", stepper),
        patch.object(Compiled, "__call__", mark(Compiled.__call__, "compiled")),
    ):
        yield


class Engine:
    """Our engine on one contest: particles that every call moves on by windows."""

    def __init__(self, name: str, particles: int, path: str) -> None:
        start = time.perf_counter()
        task, rule, identity = contest(name)
        self.theta = perturbed(rule, particles // 2)
        compiled = Compiled(task, identity)
        self.unroll = Unroll(task, rule, particles // 2, HORIZON, ("inner_loop",), path=path, compiled=compiled)
        self.particles, self.windows = self.unroll.start(), 0
        self.build_seconds = time.perf_counter() - start
        start = time.perf_counter()
        self.window()
        self.first_seconds = time.perf_counter() - start

    def window(self) -> None:
        self.unroll.run(self.theta, self.particles, WINDOW, self.windows)
        self.windows += 1

    def steps_per_second(self, seconds: float, clock: Callable[[], float]) -> float:
        start, before = clock(), self.windows
        while self.windows == before or clock() - start < seconds:
            self.window()
        return (self.windows - before) * WINDOW * 2 * self.unroll.num_tasks / (clock() - start)

    def bytes_per_particle(self) -> int:
        """Parameters, optimizer state and theta."""
        leaves = [leaf for name, leaf in self.particles.tensors().items() if ":" in name]
        return sum(leaf.nbytes for leaf in [*leaves, *self.theta.values()]) // (2 * self.unroll.num_tasks)

    def shares(self) -> dict[str, float]:
        """Where the CPU time of a window goes, by torch's profiler; ``python`` is what no operator accounts for."""
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with marked(self.unroll.lopt), torch.profiler.profile(activities=cpu) as profile:
            start = time.perf_counter()
            self.window()
            total = time.perf_counter() - start
        found = dict.fromkeys((*PARTS, "other operators"), 0.0)
        for event in profile.key_averages():
            part = next((part for part, words in PARTS.items() if any(w in event.key for w in words)), None)
            found[part or "other operators"] += event.self_cpu_time_total / 1e6
        found["python"] = max(0.0, total - sum(found.values()))
        return {part: round(seconds / total, 3) for part, seconds in found.items()}


PARTS = {
    "rule": ("paceline::",),
    "compiled code": ("compiled",),
    "convolutions": ("conv",),
    "matrix products": ("mm", "matmul", "linear"),
}


def serve(core: int) -> None:
    """Answer requests on standard input, as the peers do."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()
    worker.compiled.MOST_OPERATIONS *= worker.compiled.BESIDE  # as where the compiler works beside the run
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    opened: dict[tuple[str, int, str], Engine] = {}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request, opened)), file=answers, flush=True)


def answer(request: dict[str, Any], opened: dict[tuple[str, int, str], Engine]) -> dict[str, Any]:
    """``{"open": name, "particles": P, "path": path}``, then the same with ``time`` or ``shares`` in place of ``open``.

    A path that does not serve the contest answers with ``refused``.
    """
    name = request.get("open") or request.get("time") or request["shares"]
    identity = (name, request["particles"], request["path"])
    if "open" in request:
        try:
            engine = opened[identity] = Engine(*identity)
        except ConfigError as error:
            return {"refused": str(error)}
        return {"first_seconds": engine.first_seconds, "bytes_per_particle": engine.bytes_per_particle()}
    if "shares" in request:
        return opened[identity].shares()
    clock = time.perf_counter if request.get("wall") else time.process_time
    return {"steps_per_second": opened[identity].steps_per_second(request["seconds"], clock), "resident": resident()}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Contestant:
    """A process that is pinned to a core and answers JSON lines."""

    def __init__(self, command: Sequence[str], core: int, **environment: str) -> None:
        own = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", **environment}
        self.process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | own,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip

    def send(self, **request: object) -> None:
        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended with exit code {self.process.wait()}")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **request: object) -> dict[str, Any]:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        self.process.stdin.close()
        self.process.wait()


def ours(core: int, **environment: str) -> Contestant:
    return Contestant([sys.executable, __file__, str(core)], core, **environment)


def write_start(name: str, particles: int, path: Path) -> Tensor:
    """Write what a contest begins with to the npz file that a peer reads, and return the first losses (5, 2n) that the
    reference in torch gives."""
    n = particles // 2
    task, rule, _ = contest(name)
    theta, horizon = perturbed(rule, n), torch.tensor([HORIZON[1]] * particles)
    fresh = [task.init(generator("start", i)) for i in range(n)] * 2
    params = {leaf: torch.stack([p[leaf] for p in fresh]) for leaf in fresh[0]}
    data = data_of(task)
    seeds = np.random.default_rng(0).integers(0, 2**32, (WINDOW, n), dtype=np.uint32)
    arrays = {
        f"{part}/{leaf}": np.ascontiguousarray(x.numpy())
        for part, leaves in (("theta", theta), ("params", params), ("data", data))
        for leaf, x in leaves.items()
    }
    np.savez(path, **arrays, horizon=horizon.numpy(), seeds=seeds)  # type: ignore[arg-type]
    state, losses = rule.init_particles(theta, params, horizon), []
    with kernels.reference(), torch.no_grad():
        for step in range(CHECK_STEPS):
            rows = [batch_of(task, data, int(seed)) for seed in seeds[step]] * 2
            batch = {leaf: torch.stack([row[leaf] for row in rows]) for leaf in rows[0]}
            loss, grads, _ = task.losses_and_grads(params, {}, batch)
            params, state = rule.update_particles(theta, state, params, grads, loss)
            losses.append(loss)
    return torch.stack(losses)


def data_of(task: Task) -> dict[str, Tensor]:
    """The whole training split: image and label, or tokens."""
    train = task.datasets.train
    if isinstance(train, TextDataset):
        return {"tokens": train.tokens.on(torch.device("cpu"))}
    assert isinstance(train, ImageDataset)  # noqa: S101 - FAMILIES has only these
    images, labels, order = train.pixels.on(torch.device("cpu"))
    rows = order[train.rows.start : train.rows.stop]
    return {"image": images[rows], "label": labels[rows]}


def batch_of(task: Task, data: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The batch of one particle that the peers make of a seed (``drawn`` in jax_peer.py)."""
    counters = np.arange(task.batch_size, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(seed)
    x = (counters ^ (counters >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    bits = torch.from_numpy((x ^ (x >> np.uint32(16))).astype(np.int64))
    if "image" in data:
        image, label = data["image"][bits % len(data["label"])], data["label"][bits % len(data["label"])]
        batch = {"image": image / 255 if image.dtype == torch.uint8 else image, "label": label}
    else:
        length = FAMILIES["rnn_lm"]["sequence_length"]
        ids = data["tokens"][(bits % (len(data["tokens"]) - length))[:, None] + torch.arange(length + 1)].long()
        ids = torch.where(ids < 256, ids, 2)
        batch = {"obs": ids[:, :-1], "target": ids[:, 1:]}
    return {**batch, "key": torch.tensor(seed)}


def disagreement(found: list[list[float]], expected: Tensor) -> float:
    """The largest relative difference of the losses over the first steps."""
    return float(((torch.tensor(found[:CHECK_STEPS]) - expected).abs() / expected.abs()).max())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
