"""The training of learned optimizers as a task, so that an optimizer can train optimizers (VeLO, appendix C.3.9).

Owns: the static config, what it costs, and its distribution. Must never train anything (lopt_unroll.py and lopt_es.py).

The parameters are a learned optimizer's theta. The loss is the mean of the inner task's normalised training losses over
the steps of ``outer_batch`` inner trainings (tasks/fixed/lopt.py and tasks/parametric/lopt.py of learned_optimization).
Each loss is of new trainings: their initial parameters, the inner task's dynamic configs (one draw for each training,
as in that code; the paper has them drawn with the task) and one batch for each step come in this task's batch, as the
leaves ``start/<name>`` and ``dynamic/<name>`` (n, outer_batch, ...) and ``data/<name>`` (n, outer_batch, steps, ...).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

from configs.checks import ConfigError, at_least, one_of, positive
from tasks.base import Task
from tasks.data.library import Library
from tasks.families import image_mlp
from tasks.families.draws import Pool, choice, log_integer, log_number
from tasks.families.image_conv import KERNEL, ImageConv
from tasks.families.image_mlp import ImageMlp
from tasks.families.lopt_es import EsLoptTrainingTask
from tasks.families.lopt_unroll import NETWORKS, LoptTrainingTask, network_flops, rule_of
from tasks.static import StaticConfig, Work

OPTIMIZERS = ("sgd", "sgdm", "adam", *NETWORKS)
GRADIENTS = ("backprop", "es", "pes")
_CARRIED = {"sgd": 1, "sgdm": 2, "adam": 3, "mlp_lopt": 7, "small_fc": 8}
"""Floats that a training carries from step to step for each inner parameter, itself included."""


@dataclass(frozen=True, kw_only=True)
class LoptTraining(StaticConfig, kind="lopt_training"):
    """``optimizer`` on ``inner`` for ``num_steps``; ``hidden_size`` to ``step_mult`` are those of the two networks.

    ``gradient``: ``backprop`` through whole trainings; or truncated ES or PES, with perturbations of standard
    deviation ``sigma``, on trainings that go on from step to step of this task by ``window`` inner steps.
    """

    optimizer: str = "small_fc"
    num_steps: int = 10
    outer_batch: int = 1
    hidden_size: int = 4
    hidden_layers: int = 2
    exp_mult: float = 0.001
    step_mult: float = 0.001
    inner: StaticConfig = dataclasses.field(default_factory=ImageMlp)
    gradient: str = "backprop"
    window: int = 10
    sigma: float = 0.01

    def __post_init__(self) -> None:
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("gradient", self.gradient, GRADIENTS)
        for name in ("num_steps", "outer_batch", "hidden_size", "hidden_layers", "window"):
            at_least(name, getattr(self, name), 1)
        for name in ("exp_mult", "step_mult", "sigma"):
            positive(name, getattr(self, name))
        _facts(self.inner)
        if self.gradient != "backprop" and self.window > self.num_steps:
            raise ConfigError("window", self.window, f"at most num_steps = {self.num_steps}")

    @property
    def steps(self) -> int:
        """How many inner steps one loss is of."""
        return self.num_steps if self.gradient == "backprop" else self.window

    def build(self, library: Library) -> Task:
        return (LoptTrainingTask if self.gradient == "backprop" else EsLoptTrainingTask)(self, library)

    def work(self) -> Work:
        inner, trainings = self.inner.work(), self.outer_batch * self.steps
        columns = 60 + 3 * self.hidden_size * self.hidden_layers if self.optimizer in NETWORKS else 10
        step = 3 * inner.activations + columns * inner.parameters
        shapes, first, pixels = _facts(self.inner)
        return Work(
            parameters=rule_of(self).spec.size,
            flops=trainings * (3 * inner.flops - first + network_flops(self, shapes)),
            activations=self.outer_batch * step + trainings * (_CARRIED[self.optimizer] * inner.parameters + pixels),
        )


class _Facts(NamedTuple):
    """Of an inner task: its parameters' shapes, flops of the layer whose input needs no gradient, pixels in a batch."""

    shapes: list[tuple[int, ...]]
    first_layer: int
    pixels: int


def _facts(inner: StaticConfig) -> _Facts:
    """Raises ConfigError for a task of another kind, or one with augmentations."""
    if isinstance(inner, ImageMlp):
        weights: list[tuple[int, ...]] = list(pairwise(inner.widths))
        vectors, hidden, places = list(inner.widths[1:]), inner.hidden, 1
    elif isinstance(inner, ImageConv):
        kernels = [(out, channels, KERNEL, KERNEL) for channels, out in pairwise(inner.stages)]
        weights = [*kernels, (inner.stages[-1], inner.classes)]
        side = math.ceil(inner.image_size / 2) if inner.strided else inner.image_size
        vectors, hidden, places = [*inner.hidden, inner.classes], inner.hidden, side**2 if inner.hidden else 1
    else:
        raise ConfigError("inner.kind", inner.kind, "image_mlp or image_conv")
    norms = [] if inner.norm == "none" else [*hidden, *hidden]
    shapes = [*weights, *((width,) for width in [*vectors, *norms])]
    return _Facts(shapes, 2 * inner.batch_size * places * prod(weights[0]), inner.batch_size * inner.pixels)


def draw(rng: np.random.Generator, pool: Pool) -> LoptTraining:
    """A config of VeLO's distribution (C.3.9), by back-propagation; its inner task is one of C.3.1."""
    optimizer = choice(rng, OPTIMIZERS)
    network: dict[str, Any] = {}
    if optimizer in NETWORKS:
        network = {
            "hidden_size": log_integer(rng, 2, 512),
            "hidden_layers": log_integer(rng, 1, 4),
            "exp_mult": log_number(rng, 1e-5, 1.0),
            "step_mult": log_number(rng, 1e-5, 1.0),
        }
    return LoptTraining(
        optimizer=optimizer,
        num_steps=log_integer(rng, 1, 100),
        outer_batch=log_integer(rng, 1, 8),
        inner=image_mlp.draw(rng, pool),
        **network,
    )
