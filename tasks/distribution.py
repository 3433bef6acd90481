"""The task distribution of a run: from its configuration to drawn static configs.

Owns: which families can be drawn, the order of the draws (threshold, family, configuration, augmentations: VeLO C.5)
and what is said about data that is not there. Must never estimate a time itself (timing.py's rejection does) nor know
what any family draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from configs.checks import ConfigError, did_you_mean, split_text
from configs.schema import FamilyConfig, TaskConfig
from tasks.augmentations import apply_augmentation
from tasks.base import Task
from tasks.data.library import Library
from tasks.errors import DataError
from tasks.families import FAMILIES
from tasks.families.draws import Pool
from tasks.fixed import fixed_task
from tasks.static import StaticConfig, static_from_dict
from tasks.timing.rejection import Rejection

Sampler = Callable[[np.random.Generator], StaticConfig]


class Draw(NamedTuple):
    """A drawn task: the family's name, as logs, metrics and the wire call it, and the static config."""

    family: str
    static: StaticConfig


def resolve_task(task: str | Mapping[str, Any] | None, name: str, field: str) -> StaticConfig:
    """The static config that a configuration names or writes out; None means the fixed task called ``name``.

    Raises ConfigError with the dotted path ``field``.
    """
    if isinstance(task, Mapping):
        return static_from_dict(task, field)
    try:
        return fixed_task(name if task is None else task)
    except ConfigError as error:
        raise ConfigError(field, error.value, error.expected) from error


class TaskDistribution:
    """What ``config`` describes, with the data that ``library`` has.

    ``families`` are the names of those that can be drawn, in the configuration's order; ``warnings`` says what fell
    out and why. Raises ConfigError for names and fields that do not exist, and DataError if data is missing that may
    not be (``data.missing: error``), or if nothing is left.
    """

    def __init__(self, config: TaskConfig, library: Library) -> None:
        self.config, self.library = config, library
        self.warnings: list[str] = []
        self._rejection = Rejection(config.time.table) if config.time.max_seconds else None
        pool = self._pool()
        samplers = {name: self._sampler(name, family, pool) for name, family in config.families.items()}
        self._samplers = {name: sampler for name, sampler in samplers.items() if sampler is not None}
        if not self._samplers:
            raise DataError("; ".join(["no task family is left", *self.warnings]))
        self.families = tuple(self._samplers)

    def draw(self, rng: np.random.Generator, family: str | None = None, size: float = 1.0) -> Draw:
        """A task of ``family``, or of one drawn by weight; ``size`` is the curriculum's factor of ``max_seconds``.

        Raises tasks.timing.rejection.NothingFits if no configuration passes the time model.
        """
        threshold = self._threshold(rng, 0.0 if family is None else self.config.families[family].min_seconds)
        name = self._family(rng, threshold) if family is None else family
        draw = self._samplers[name]
        if self._rejection is None or threshold is None:
            static = _constructible(rng, draw, self.config.time.tries)
        else:
            seconds = threshold * self.config.time.scale * size
            static = self._rejection.sample(rng, draw, name, seconds, self.config.time.tries)
        for entry in [*self.config.families[name].augment, *self.config.augment]:
            static = apply_augmentation(rng, static, entry)
        return Draw(name, static)

    def build(self, static: StaticConfig) -> Task:
        """The task with its data."""
        return static.build(self.library)

    def probabilities(self) -> dict[str, float]:
        """The share of each family among the draws by weight, over all thresholds."""
        shares = dict.fromkeys(self.families, 0.0)
        thresholds = self.config.time.max_seconds or [np.inf]
        weights = np.array(self.config.time.weights or [1.0])
        for threshold, weight in zip(thresholds, weights / weights.sum(), strict=True):
            names, probabilities = self._eligible(threshold)
            for name, probability in zip(names, probabilities, strict=True):
                shares[name] += float(weight * probability)
        return shares

    def _threshold(self, rng: np.random.Generator, least: float) -> float | None:
        """One of ``max_seconds`` that is at least ``least``; None where there are none to choose from."""
        time = self.config.time
        options = [pair for pair in zip(time.max_seconds, time.weights, strict=True) if pair[0] >= least]
        if not time.max_seconds:
            return None
        if not options:
            raise ConfigError("task.time.max_seconds", time.max_seconds, f"at least one of {least} or more")
        weights = np.array([weight for _, weight in options])
        return options[int(rng.choice(len(options), p=weights / weights.sum()))][0]

    def _eligible(self, threshold: float | None) -> tuple[list[str], np.ndarray[Any, np.dtype[np.float64]]]:
        """The families that may be drawn at ``threshold`` and their probabilities."""
        families = self.config.families
        names = [name for name in self.families if threshold is None or families[name].min_seconds <= threshold]
        if not names:
            raise DataError(f"no task family is left whose min_seconds is at most {threshold}; " + self._fell_out())
        weights = np.array([families[name].weight for name in names])
        return names, weights / weights.sum()

    def _family(self, rng: np.random.Generator, threshold: float | None) -> str:
        names, probabilities = self._eligible(threshold)
        return names[int(rng.choice(len(names), p=probabilities))]

    def _pool(self) -> Pool:
        """What parametric families draw data from, without what is missing; empty where no family draws."""
        published = Pool()
        texts = [split_text("task.texts", text) for text in self.config.texts]
        needed = {FAMILIES[family.sample].data for family in self.config.families.values() if family.sample in FAMILIES}
        images = [name for name in self.config.images or published.images if "images" in needed and self._has(name)]
        corpora = [pair for pair in texts or published.texts if "texts" in needed and self._has(pair[0])]
        return Pool(tuple(images), tuple(corpora), self.config.ranges)

    def _has(self, dataset: str) -> bool:
        """Whether a data set is there; if not, the warning, or DataError where nothing may be missing."""
        problem = self.library.missing(dataset)
        if problem is None:
            return True
        text = f"data set {dataset} is left out: {problem}"
        if self.config.data.missing == "error":
            raise DataError(f"{problem} (data.missing=skip would leave {dataset} out)")
        if text not in self.warnings:
            self.warnings.append(text)
        return False

    def _fell_out(self) -> str:
        return "; ".join(self.warnings) or "none fell out"

    def _sampler(self, name: str, family: FamilyConfig, pool: Pool) -> Sampler | None:
        """How the family is drawn; None if its data is missing."""
        path = f"task.families.{name}"
        if family.sample is not None:
            if family.sample not in FAMILIES:
                known = f"one of {', '.join(FAMILIES)}{did_you_mean(family.sample, FAMILIES)}"
                raise ConfigError(f"{path}.sample", family.sample, known)
            chosen = FAMILIES[family.sample]
            if not getattr(pool, chosen.data):
                self.warnings.append(f"task family {name} is left out: none of its data sets is there")
                return None
            return partial(_draw, chosen.draw, pool)
        static = resolve_task(family.task, name, f"{path}.task")
        if not all(self._has(dataset) for dataset in datasets_of(static)):
            self.warnings.append(f"task family {name} is left out")
            return None
        return partial(_fixed, static)


def datasets_of(static: StaticConfig) -> list[str]:
    """The data sets that a static config, or one inside it, names."""
    found = [str(getattr(static, name)) for name in ("dataset", "corpus") if hasattr(static, name)]
    for field in dataclasses.fields(static):
        value = getattr(static, field.name)
        if isinstance(value, StaticConfig):
            found += datasets_of(value)
    return found


def _draw(
    draw: Callable[[np.random.Generator, Pool], StaticConfig], pool: Pool, rng: np.random.Generator
) -> StaticConfig:
    return draw(rng, pool)


def _fixed(static: StaticConfig, rng: np.random.Generator) -> StaticConfig:
    return static


def _constructible(rng: np.random.Generator, draw: Sampler, tries: int) -> StaticConfig:
    """The first draw that is possible; a combination such as a patch larger than its image is drawn again."""
    for attempt in range(tries):
        try:
            return draw(rng)
        except ConfigError:
            if attempt + 1 == tries:
                raise
    raise AssertionError("unreachable: tries is at least 1")
