"""The typed schema of a run, and the only place where its limits are stated.

Owns: which fields a configuration has, their types, their defaults and their allowed values.
Never imports Hydra, torch, Ray or any other room: every room may read it.

Each dataclass checks itself and raises ``ConfigError`` that names field, value and expectation.
``deploy.config`` composes the YAML groups, fills these classes and turns the field names into full dotted paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from configs.checks import (
    ConfigError,
    ascending,
    at_least,
    below_one,
    client_options,
    did_you_mean,
    label,
    location,
    one_of,
    positive,
    split_text,
)

MISSING = ("error", "skip")
RANGES = ("paper", "code")
ESTIMATORS = ("pes", "nres", "gpes", "truncated_es", "full_es", "backprop", "truncated_backprop")
WHOLE_TRAININGS = ("full_es", "backprop")
OBJECTIVES = ("mean", "final", "min")
SPLITS = ("train", "outer_valid")
META_OPTIMIZERS = ("adam", "adamw")
NORMALIZATIONS = ("unit", "none")
MODES = ("async", "sync")
PATHS = ("auto", "fused", "generic", "reference")


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
        location("log_dir", self.log_dir)
        one_of("mode", self.mode, MODES)
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "a whole number from 0 to 2**63 - 1")
        at_least("meta_steps", self.meta_steps, 1)
        if self.max_seconds is not None:
            positive("max_seconds", self.max_seconds)


@dataclass(frozen=True)
class DataConfig:
    """Where data sets lie: any fsspec URL (``root``; None allows only the embedded ones) and a cache (folder or URL).

    ``options`` are those of the root's fsspec client, as in ``storage``. A data set that is not there is an error, or,
    with ``missing: skip``, falls out of the distribution with a warning.
    """

    root: str | None = None
    cache: str = "~/.cache/paceline/data"
    options: dict[str, Any] = field(default_factory=dict)
    missing: str = "error"

    def __post_init__(self) -> None:
        if self.root is not None:
            location("root", self.root)
        location("cache", self.cache)
        client_options(self.options)
        one_of("missing", self.missing, MISSING)


@dataclass(frozen=True)
class FamilyConfig:
    """One task family of a run: a distribution of tasks (``sample``), or one fixed task (``task``).

    ``sample`` names a parametric family, ``task`` is a published name or a static config written by hand
    (``{kind: image_mlp, hidden: [32], ...}``); with neither, the family's own name is that of a fixed task. Which there
    are is ``tasks``' to say; ``deploy.config`` asks it. ``weight`` is its share of the draws, relative to the others;
    below a threshold of ``min_seconds`` per step it is not drawn. ``augment`` comes before the whole run's.
    """

    task: Any = None
    sample: str | None = None
    weight: float = 1.0
    min_seconds: float = 0.0
    augment: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.task is not None and not isinstance(self.task, str | dict):
            raise ConfigError("task", self.task, "the name of a fixed task, or a mapping with kind and its fields")
        if self.task is not None and self.sample is not None:
            raise ConfigError("sample", self.sample, "null where task is given: a family is one or the other")
        positive("weight", self.weight)
        at_least("min_seconds", self.min_seconds, 0)


@dataclass(frozen=True)
class TimeConfig:
    """Which tasks are quick enough (VeLO C.4 and C.5).

    Each draw takes one of ``max_seconds`` (per inner step and particle) with probability proportional to ``weights``,
    multiplied by ``scale`` (this machine's time by that of the paper's accelerator), and draws configurations until
    the time model of ``table`` (one that ships, or any file that ``paceline tasks time`` wrote) lets one pass, at most
    ``tries`` times. Without ``max_seconds`` everything passes.
    """

    max_seconds: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    scale: float = 1.0
    table: str = "cpu"
    tries: int = 512

    def __post_init__(self) -> None:
        for name in ("max_seconds", "weights"):
            for value in getattr(self, name):
                positive(name, value)
        if len(self.weights) != len(self.max_seconds):
            raise ConfigError("weights", self.weights, f"{len(self.max_seconds)} numbers, one for each of max_seconds")
        positive("scale", self.scale)
        at_least("tries", self.tries, 1)


@dataclass(frozen=True)
class SizePoint:
    """A point of the size curriculum: at meta-step ``version``, ``time.max_seconds`` are multiplied by ``factor``."""

    version: int = 0
    factor: float = 1.0

    def __post_init__(self) -> None:
        at_least("version", self.version, 0)
        positive("factor", self.factor)


@dataclass(frozen=True)
class TaskConfig:
    """The task distribution.

    Without ``slots`` every worker visits the families in rotation, one task each. With it, a worker keeps that many
    tasks, each drawn from the families by weight. After each meta-gradient its task is drawn anew with probability
    ``resample`` (VeLO: 8 slots, 1/200 to 1/1000). ``images`` and ``texts`` ("corpus/vocabulary") are what parametric
    families draw data from, the published ones where empty; ``ranges`` says whose ranges they draw from.
    ``size_schedule`` is linear between its points.
    """

    data: DataConfig = field(default_factory=DataConfig)
    families: dict[str, FamilyConfig] = field(default_factory=dict)
    augment: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ranges: str = "paper"
    time: TimeConfig = field(default_factory=TimeConfig)
    slots: int | None = None
    resample: float = 0.0
    size_schedule: list[SizePoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.families:
            raise ConfigError("families", {}, "at least one task family")
        for name in self.families:
            label("families", name)
        one_of("ranges", self.ranges, RANGES)
        if self.slots is not None:
            at_least("slots", self.slots, 1)
        if not 0 <= self.resample <= 1:
            raise ConfigError("resample", self.resample, "a probability from 0 to 1")
        for text in self.texts:
            split_text("texts", text)
        ascending("size_schedule", [point.version for point in self.size_schedule])
        if self.size_schedule and not self.time.max_seconds:
            raise ConfigError("size_schedule", self.size_schedule, "time.max_seconds, which it would scale")


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
            location("init_from", self.init_from)
        elif self.name == "celo" and self.arguments.get("phase") == 2:
            expected = "a phase 1 checkpoint, because phase 2 learns a schedule for an update rule that exists"
            raise ConfigError("init_from", None, expected)


@dataclass(frozen=True)
class HorizonPoint:
    """A point of the horizon curriculum: the bounds of the horizons that are drawn at meta-step ``version``."""

    version: int = 0
    low: int = 100
    high: int = 2000

    def __post_init__(self) -> None:
        at_least("version", self.version, 0)
        at_least("low", self.low, 1)
        at_least("high", self.high, self.low)


@dataclass(frozen=True)
class SigmaConfig:
    """The perturbation size of the parts of theta whose names match a glob pattern."""

    match: str = "*"
    sigma: float = 0.01

    def __post_init__(self) -> None:
        positive("sigma", self.sigma)


@dataclass(frozen=True)
class EstimatorConfig:
    """How a meta-gradient is estimated: antithetic pairs per task family, perturbation size, window and horizons.

    ``name``: ``pes``, ``nres``, ``gpes`` (new noise every ``noise_period`` inner steps), ``truncated_es`` and
    ``truncated_backprop`` give an estimate per ``window``; ``full_es`` and ``backprop`` one per whole training, whose
    ``objective`` is the mean or the least of its losses, or the loss of the final parameters. ``split``: the data that
    meta-losses are measured on; ``outer_valid`` means at the end of each window or training.
    ``sigmas`` are perturbation sizes other than ``sigma`` (the first that matches counts). Loss differences of a pair
    are bounded by ``clip_loss_diff``, or replaced by their sign times ``sign_delta_loss``.

    Horizons are log-uniform on [horizon_low, horizon_high] (constant where these are equal). A ``horizon_schedule``
    replaces the two: linear between its points, constant before the first and after the last (VeLO D.3).
    """

    name: str = "pes"
    num_tasks: int = 8
    sigma: float = 0.01
    window: int = 50
    horizon_low: int = 100
    horizon_high: int = 2000
    horizon_schedule: list[HorizonPoint] = field(default_factory=list)
    objective: str = "mean"
    split: str = "train"
    noise_period: int | None = None
    sigmas: list[SigmaConfig] = field(default_factory=list)
    clip_loss_diff: float | None = None
    sign_delta_loss: float | None = None

    def __post_init__(self) -> None:
        one_of("name", self.name, ESTIMATORS)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("split", self.split, SPLITS)
        at_least("num_tasks", self.num_tasks, 1)
        positive("sigma", self.sigma)
        at_least("window", self.window, 1)
        at_least("horizon_low", self.horizon_low, 1)
        at_least("horizon_high", self.horizon_high, self.horizon_low)
        ascending("horizon_schedule", [point.version for point in self.horizon_schedule])
        self._check_objective()
        self._check_perturbations()

    def _check_objective(self) -> None:
        """What is measured must exist: a window sees neither a training's end nor its least loss."""
        whole = self.name in WHOLE_TRAININGS
        if self.objective != "mean" and not whole:
            raise ConfigError("objective", self.objective, f"mean, because {self.name} sums the losses of all windows")
        if self.split != "train" and self.objective != "final" and whole:
            expected = f"train, because {self.name} measures the losses on the way (objective: final has it)"
            raise ConfigError("split", self.split, expected)
        if self.split != "train" and self.name == "truncated_backprop":
            raise ConfigError("split", self.split, "train, because truncated_backprop uses the losses on the way")

    def _check_perturbations(self) -> None:
        if self.name == "gpes" and (self.noise_period is None or self.noise_period % self.window):
            expected = f"a multiple of window = {self.window}, because noise changes between windows"
            raise ConfigError("noise_period", self.noise_period, expected)
        if self.noise_period is not None:
            at_least("noise_period", self.noise_period, 1)
            if self.name != "gpes":
                raise ConfigError("noise_period", self.noise_period, f"null: only gpes has one, not {self.name}")
        for name in ("clip_loss_diff", "sign_delta_loss"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.clip_loss_diff is not None and self.sign_delta_loss is not None:
            raise ConfigError("clip_loss_diff", self.clip_loss_diff, "null: sign_delta_loss bounds differences already")
        if "backprop" in self.name:
            for name, unset in (("sigmas", []), ("clip_loss_diff", None), ("sign_delta_loss", None)):
                if getattr(self, name) != unset:
                    raise ConfigError(name, getattr(self, name), f"{unset}: {self.name} perturbs nothing")


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
        below_one("beta1", self.beta1)
        below_one("beta2", self.beta2)
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
class WorkerConfig:
    """How a worker computes. ``path``: ``auto`` is the fastest that serves the task and the rule (``worker.paths``).

    ``turns``: how many tasks of its rotation a worker visits at one theta before it submits their meta-gradients.
    """

    path: str = "auto"
    turns: int = 1

    def __post_init__(self) -> None:
        one_of("path", self.path, PATHS)
        at_least("turns", self.turns, 1)


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
        location("root", self.root)
        client_options(self.options)


@dataclass(frozen=True)
class EvaluationTaskConfig:
    """A fixed task that a checkpoint is scored on, trained for ``num_steps``.

    ``task`` is as in ``FamilyConfig``; null means the fixed task of the entry's own name.
    """

    task: Any = None
    num_steps: int = 300

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 10)
        if self.task is not None and not isinstance(self.task, str | dict):
            raise ConfigError("task", self.task, "the name of a fixed task, or a mapping with kind and its fields")


@dataclass(frozen=True)
class EvaluationConfig:
    """What checkpoints are scored on: ``tasks`` x ``seeds``, every ``every`` versions and at the last one."""

    suite: str = "none"
    tasks: dict[str, EvaluationTaskConfig] = field(default_factory=dict)
    seeds: int = 3
    every: int = 100
    final_seconds: float = 120.0

    def __post_init__(self) -> None:
        label("suite", self.suite)
        for name in self.tasks:
            label("tasks", name)
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
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    meta_optimizer: MetaOptimizerConfig = field(default_factory=MetaOptimizerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        submitted = self.cluster.num_workers * self.worker.turns
        if self.run.mode == "sync" and self.meta_optimizer.meta_batch != submitted:
            raise ConfigError(
                "meta_optimizer.meta_batch",
                self.meta_optimizer.meta_batch,
                f"{submitted} in synchronous mode: cluster.num_workers = {self.cluster.num_workers} times "
                f"worker.turns = {self.worker.turns}",
            )
        if self.evaluation.tasks and self.evaluation.every % self.storage.every:
            raise ConfigError(
                "evaluation.every",
                self.evaluation.every,
                f"a multiple of storage.every = {self.storage.every} (only checkpoints can be evaluated)",
            )
