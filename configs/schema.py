"""The typed schema of a run, and the only place where its limits are stated.

Owns: which fields a configuration has, their types, their defaults and their allowed values.
Never imports Hydra, torch, Ray or any other room: every room may read it.

Each dataclass checks itself and raises ``ConfigError`` that names field, value and expectation.
``deploy.config`` composes the YAML groups, fills these classes and turns the field names into full dotted paths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

ACTIVATIONS = ("relu", "tanh", "gelu", "silu")
CLIENT_OPTIONS = ("endpoint_url", "region", "anon")
EMBEDDED_DATASETS = ("digits",)
DATASETS = ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn")
FAMILY_KINDS = ("image_mlp",)
REPARAM_LEVELS = ("none", "global", "tensor", "parameter")
ESTIMATORS = ("pes", "full_es")
OBJECTIVES = ("mean", "final")
META_OPTIMIZERS = ("adam", "adamw")
NORMALIZATIONS = ("unit", "none")
MODES = ("async", "sync")


class ConfigError(ValueError):
    """A configuration that cannot be run; ``str()`` is one paragraph for the user."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(field, value, expected)  # as given, so that it crosses process boundaries unharmed
        self.field = field
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: expected {self.expected}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a near miss, else an empty string."""
    close = get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(field, value, f"one of {', '.join(choices)}{did_you_mean(value, choices)}")


def at_least(field: str, value: float, minimum: float) -> None:
    """Raise ConfigError unless ``value`` is finite and at least ``minimum``."""
    if not minimum <= value < math.inf:
        raise ConfigError(field, value, f"a number >= {minimum}")


def positive(field: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is finite and above zero."""
    if not 0 < value < math.inf:
        raise ConfigError(field, value, "a number > 0")


def _below_one(field: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(field, value, "a number in [0, 1)")


def _name(field: str, value: str) -> None:
    """Names of families, evaluation tasks and suites: they become metric labels and parts of file names."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", value):
        raise ConfigError(field, value, "names of 1 to 64 letters, digits, dashes or underscores, a letter first")


def _location(field: str, value: str) -> None:
    """A path or URL. One with credentials is refused (and not repeated): configurations are stored and shown."""
    if re.search(r"://[^/]*@", value):
        raise ConfigError(field, "<not shown>", "a URL without credentials (they come from the environment)")
    if not value.strip():
        raise ConfigError(field, value, "a path or URL")


@dataclass(frozen=True)
class RunConfig:
    """Which run this is and when it ends (at ``meta_steps`` or after ``max_seconds``, whichever comes first)."""

    name: str = "run"
    seed: int = 0
    mode: str = "async"
    meta_steps: int = 1000
    max_seconds: float | None = None
    log_dir: str = "runs"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            expected = "1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
            raise ConfigError("name", self.name, expected)
        _location("log_dir", self.log_dir)
        one_of("mode", self.mode, MODES)
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "a whole number from 0 to 2**63 - 1")
        at_least("meta_steps", self.meta_steps, 1)
        if self.max_seconds is not None:
            positive("max_seconds", self.max_seconds)


@dataclass(frozen=True)
class DataConfig:
    """Where data sets lie: any fsspec URL (``root``; None allows only the embedded ones) and a local cache."""

    root: str | None = None
    cache: str = "~/.cache/paceline/data"

    def __post_init__(self) -> None:
        if self.root is not None:
            _location("root", self.root)
        _location("cache", self.cache)


@dataclass(frozen=True)
class ReparamConfig:
    """Re-parametrisation augmentation: weights are trained as w / tau, log tau uniform on [low, high] (VeLO C.5)."""

    level: str = "none"
    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        one_of("level", self.level, REPARAM_LEVELS)
        positive("low", self.low)
        at_least("high", self.high, self.low)


@dataclass(frozen=True)
class FamilyConfig:
    """One task family: an MLP classifier of images.

    ``shift`` (pixels) and ``noise`` (standard deviation, pixels in [0, 1]) are part of the task: they are drawn anew
    for every batch of every split, which gives a small data set a loss floor well above rounding noise.
    """

    kind: str = "image_mlp"
    dataset: str = "digits"
    image_size: int = 8
    hidden: list[int] = field(default_factory=lambda: [32])
    activation: str = "relu"
    batch_size: int = 64
    shift: int = 0
    noise: float = 0.0
    reparam: ReparamConfig = field(default_factory=ReparamConfig)

    def __post_init__(self) -> None:
        one_of("kind", self.kind, FAMILY_KINDS)
        one_of("dataset", self.dataset, DATASETS)
        one_of("activation", self.activation, ACTIVATIONS)
        at_least("image_size", self.image_size, 2)
        at_least("batch_size", self.batch_size, 1)
        at_least("noise", self.noise, 0)
        for width in self.hidden:
            at_least("hidden", width, 1)
        if not 0 <= self.shift < self.image_size:
            raise ConfigError("shift", self.shift, f"0 <= shift < image_size = {self.image_size}")


@dataclass(frozen=True)
class TaskConfig:
    """The task distribution: named families, visited in rotation."""

    data: DataConfig = field(default_factory=DataConfig)
    families: dict[str, FamilyConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.families:
            raise ConfigError("families", {}, "at least one task family")
        for name in self.families:
            _name("families", name)


@dataclass(frozen=True)
class LoptConfig:
    """The learned optimizer: an architecture of ``lopt``, its constructor's arguments, and a checkpoint to start from.

    Which architectures there are and what each takes is ``lopt``'s to say; ``deploy.config`` asks it.
    """

    name: str = "celo"
    arguments: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.init_from is not None:
            _location("init_from", self.init_from)
        elif self.name == "celo" and self.arguments.get("phase") == 2:
            expected = "a phase 1 checkpoint, because phase 2 learns a schedule for an update rule that exists"
            raise ConfigError("init_from", None, expected)


@dataclass(frozen=True)
class EstimatorConfig:
    """How a meta-gradient is estimated: antithetic pairs per task family, perturbation size, window and horizons."""

    name: str = "pes"
    num_tasks: int = 8
    sigma: float = 0.01
    window: int = 50
    horizon_low: int = 100
    horizon_high: int = 2000
    objective: str = "mean"

    def __post_init__(self) -> None:
        one_of("name", self.name, ESTIMATORS)
        one_of("objective", self.objective, OBJECTIVES)
        at_least("num_tasks", self.num_tasks, 1)
        positive("sigma", self.sigma)
        at_least("window", self.window, 1)
        at_least("horizon_low", self.horizon_low, 1)
        at_least("horizon_high", self.horizon_high, self.horizon_low)
        if self.name == "pes" and self.objective != "mean":
            raise ConfigError("objective", self.objective, "mean, because PES sums the losses of all windows")


@dataclass(frozen=True)
class MetaOptimizerConfig:
    """How meta-gradients become a meta-step.

    ``meta_batch`` meta-gradients are averaged per meta-step, each first brought to unit length
    (``normalize: unit``, VeLO D.4) or taken as it is (``none``, Celo). Those computed more than ``max_staleness``
    versions ago are dropped.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None
    normalize: str = "unit"
    meta_batch: int = 4
    max_staleness: int = 4

    def __post_init__(self) -> None:
        one_of("name", self.name, META_OPTIMIZERS)
        one_of("normalize", self.normalize, NORMALIZATIONS)
        positive("learning_rate", self.learning_rate)
        _below_one("beta1", self.beta1)
        _below_one("beta2", self.beta2)
        positive("eps", self.eps)
        at_least("weight_decay", self.weight_decay, 0)
        if self.name == "adam" and self.weight_decay > 0:
            raise ConfigError("weight_decay", self.weight_decay, "0 for adam (adamw decays)")
        for name in ("clip_value", "clip_norm"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        at_least("meta_batch", self.meta_batch, 1)
        at_least("max_staleness", self.max_staleness, 0)


@dataclass(frozen=True)
class ClusterConfig:
    """The Ray cluster (``address``: local starts one here; otherwise host:port or auto) and who runs on it.

    Ports: 0 lets the system choose; the chosen ones are in the status and in the run's ``control.json``.
    """

    address: str = "local"
    num_workers: int = 2
    num_evaluators: int = 1
    worker_cpus: float = 1.0
    worker_gpus: float = 0.0
    startup_seconds: float = 30.0
    control_host: str = "127.0.0.1"
    control_port: int = 0
    learner_metrics_port: int = 0
    evaluator_metrics_port: int = 0

    def __post_init__(self) -> None:
        if self.address not in ("local", "auto") and not re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[\w.-]+):\d+", self.address):
            expected = f"local, auto or host:port{did_you_mean(self.address, ('local', 'auto'))}"
            raise ConfigError("address", self.address, expected)
        at_least("num_workers", self.num_workers, 1)
        at_least("num_evaluators", self.num_evaluators, 0)
        at_least("worker_cpus", self.worker_cpus, 0)
        at_least("worker_gpus", self.worker_gpus, 0)
        positive("startup_seconds", self.startup_seconds)
        for name in ("control_port", "learner_metrics_port", "evaluator_metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(name, getattr(self, name), "a port number from 0 to 65535")


@dataclass(frozen=True)
class StorageConfig:
    """Where checkpoints and results lie (``root``: any fsspec URL) and which checkpoints are kept.

    A checkpoint is taken every ``every`` meta-steps; the newest ``keep_last`` stay, and of the older ones those whose
    version is a multiple of ``keep_every``. ``options`` are the fsspec client's (S3: endpoint_url, region, anon);
    secrets come from the environment, never from here.
    """

    root: str = "runs"
    every: int = 50
    keep_last: int = 5
    keep_every: int = 200
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("every", self.every, 1)
        at_least("keep_last", self.keep_last, 1)
        at_least("keep_every", self.keep_every, 1)
        _location("root", self.root)
        for name, value in self.options.items():
            if name not in CLIENT_OPTIONS:  # the value may be a secret
                known = f"one of {', '.join(CLIENT_OPTIONS)}{did_you_mean(name, CLIENT_OPTIONS)}"
                raise ConfigError(f"options.{name}", "<not shown>", f"{known}; secrets come from the environment")
            if type(value) is not (bool if name == "anon" else str):
                raise ConfigError(f"options.{name}", "<not shown>", "true or false" if name == "anon" else "text")
        _location("options.endpoint_url", self.options.get("endpoint_url", "default"))


@dataclass(frozen=True)
class EvaluationTaskConfig:
    """A fixed task that a checkpoint is scored on: a family without augmentation, trained for ``num_steps``."""

    family: FamilyConfig = field(default_factory=FamilyConfig)
    num_steps: int = 300

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 10)
        if self.family.reparam.level != "none":
            raise ConfigError("family.reparam.level", self.family.reparam.level, "none: scores are taken as published")


@dataclass(frozen=True)
class EvaluationConfig:
    """What checkpoints are scored on: ``tasks`` x ``seeds``, every ``every`` versions and at the last one."""

    suite: str = "none"
    tasks: dict[str, EvaluationTaskConfig] = field(default_factory=dict)
    seeds: int = 3
    every: int = 100
    final_seconds: float = 120.0

    def __post_init__(self) -> None:
        _name("suite", self.suite)
        for name in self.tasks:
            _name("tasks", name)
        at_least("seeds", self.seeds, 1)
        at_least("every", self.every, 1)
        positive("final_seconds", self.final_seconds)


@dataclass(frozen=True)
class Config:
    """A whole run. Stored, resolved, with every checkpoint."""

    task: TaskConfig
    lopt: LoptConfig
    run: RunConfig = field(default_factory=RunConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    meta_optimizer: MetaOptimizerConfig = field(default_factory=MetaOptimizerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.run.mode == "sync" and self.meta_optimizer.meta_batch != self.cluster.num_workers:
            raise ConfigError(
                "meta_optimizer.meta_batch",
                self.meta_optimizer.meta_batch,
                f"cluster.num_workers = {self.cluster.num_workers} in synchronous mode (one meta-gradient each)",
            )
        families = {f"task.families.{name}": family for name, family in self.task.families.items()}
        families |= {f"evaluation.tasks.{name}.family": task.family for name, task in self.evaluation.tasks.items()}
        for path, family in families.items():
            if family.dataset not in EMBEDDED_DATASETS and self.task.data.root is None:
                raise ConfigError(
                    "task.data.root",
                    None,
                    f"where {family.dataset} lies, which {path} needs (a folder or an fsspec URL)",
                )
        if self.evaluation.tasks and self.evaluation.every % self.storage.every:
            raise ConfigError(
                "evaluation.every",
                self.evaluation.every,
                f"a multiple of storage.every = {self.storage.every} (only checkpoints can be evaluated)",
            )
