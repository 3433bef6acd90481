"""The contract of a learned optimizer, and the one place that turns its weights into a flat vector and back.

Owns ``LearnedOptimizer`` and ``ThetaSpec``. Never knows which optimizer it is, how it is trained or on what.

Layout: all arithmetic is written *particle-major*. A particle is one (theta, parameters, state) triple; every tensor
of the ``*_particles`` methods has the particle axis P in front, so that thousands of small trainings are one batch.
``update`` is the same code with P = 1.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

Theta = dict[str, Tensor]
Params = dict[str, Tensor]
State = dict[str, Tensor]
Argument = int | float | str | bool
"""What a constructor may take, so that a checkpoint's JSON header can hold it."""


class ThetaError(ValueError):
    """Meta-parameters that do not belong to this architecture; names the entry, what was found and expected."""


@dataclass(frozen=True)
class ThetaEntry:
    """One named tensor of theta; ``frozen`` parts are neither perturbed nor decayed nor sent."""

    name: str
    shape: tuple[int, ...]
    frozen: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ThetaSpec:
    """Names, shapes and frozen parts of theta, in the order in which the flat vector holds them."""

    entries: tuple[ThetaEntry, ...]

    @cached_property
    def size(self) -> int:
        """Number of meta-parameters, frozen ones included."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def trainable_size(self) -> int:
        """Length D of the flat vector."""
        return sum(entry.size for entry in self.entries if not entry.frozen)

    @cached_property
    def digest(self) -> str:
        """Identifies the architecture: equal digests mean exchangeable thetas."""
        text = json.dumps([(entry.name, entry.shape) for entry in self.entries])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flatten(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Trainable parts as one fp32 vector: leaves (..., *shape) -> (..., D)."""
        parts = [
            theta[entry.name].to(torch.float32).flatten(theta[entry.name].ndim - len(entry.shape))
            if entry.shape
            else theta[entry.name].to(torch.float32).unsqueeze(-1)
            for entry in self.entries
            if not entry.frozen
        ]
        return torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor, frozen: Mapping[str, Tensor]) -> Theta:
        """The inverse: (..., D) -> leaves (..., *shape); frozen leaves come from ``frozen`` and are broadcast."""
        if flat.shape[-1] != self.trainable_size:
            raise ThetaError(f"flat theta has length {flat.shape[-1]}: expected {self.trainable_size}")
        lead, start, theta = flat.shape[:-1], 0, {}
        for entry in self.entries:
            if entry.frozen:
                theta[entry.name] = frozen[entry.name].expand((*lead, *entry.shape))
            else:
                theta[entry.name] = flat[..., start : start + entry.size].reshape((*lead, *entry.shape))
                start += entry.size
        return theta

    def check(self, theta: Mapping[str, Tensor]) -> None:
        """Raise ``ThetaError`` unless ``theta`` has exactly these names and shapes and only finite fp32 numbers."""
        names = {entry.name for entry in self.entries}
        if names != theta.keys():
            missing, extra = sorted(names - theta.keys()), sorted(theta.keys() - names)
            raise ThetaError(f"theta of another architecture: missing {missing}, unknown {extra}")
        for entry in self.entries:
            leaf = theta[entry.name]
            if tuple(leaf.shape) != entry.shape:
                raise ThetaError(f"theta[{entry.name!r}] has shape {tuple(leaf.shape)}: expected {entry.shape}")
            if leaf.dtype != torch.float32:
                raise ThetaError(f"theta[{entry.name!r}] has dtype {leaf.dtype}: expected torch.float32")
            if not bool(torch.isfinite(leaf).all()):
                raise ThetaError(f"theta[{entry.name!r}] holds numbers that are not finite")


class LearnedOptimizer(ABC):
    """A pure update rule f(theta, state, params, grads, loss) -> (params, state).

    A subclass implements the two ``*_particles`` methods. State leaves all carry the particle axis, so that an engine
    can restart single particles by overwriting their rows.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    """Where the rule comes from: authors, year, title, arXiv number."""
    spec: ThetaSpec
    needs_loss: bool = False
    """Whether ``loss`` influences the update."""
    needs_horizon: bool = False
    """Whether ``num_steps`` influences the update."""
    elementwise: bool = False
    """Whether every parameter is updated without looking at any other, so that a tensor may be cut anywhere."""

    @property
    def arguments(self) -> dict[str, Argument]:
        """Constructor arguments, so that ``lopt.build(name, **arguments)`` makes an equal optimizer."""
        return {}

    @abstractmethod
    def init_theta(self, generator: torch.Generator) -> Theta:
        """Fresh meta-parameters."""

    def checked(self, theta: Theta) -> Theta:
        """``theta`` if it is one of this rule. Raises ``ThetaError``, naming the entry, if not."""
        self.spec.check(theta)
        return dict(theta)

    @abstractmethod
    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        """State before the first step: theta leaves (P, ...), params leaves (P, *shape), num_steps (P,) -> (P, ...)."""

    @abstractmethod
    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        """One inner step of every particle; ``loss`` is (P,), the training loss that ``grads`` belong to."""

    def stepper(self, theta: Theta, state: State, params: Params) -> Stepper:
        """These particles, ready to take one step after the other under ``theta``."""
        return Stepper(self, theta, state, params)

    def init_state(self, theta: Theta, params: Params, num_steps: int) -> State:
        """``init_particles`` for one particle: no leading axis anywhere."""
        horizon = torch.tensor([num_steps], device=next(iter(params.values())).device)
        return _drop_axis(self.init_particles(_add_axis(theta), _add_axis(params), horizon))

    def update(self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor) -> tuple[Params, State]:
        """``update_particles`` for one particle: no leading axis anywhere, ``loss`` is ()."""
        new_params, new_state = self.update_particles(
            _add_axis(theta), _add_axis(state), _add_axis(params), _add_axis(grads), loss.unsqueeze(0)
        )
        return _drop_axis(new_params), _drop_axis(new_state)

    def apply(
        self,
        theta: Theta,
        state: State,
        params: Params,
        grads: Params,
        loss: Tensor,
        lr: Sequence[float],
        weight_decay: Sequence[float],
    ) -> State:
        """One step in place, for one particle: p <- p - lr (step + weight_decay p), with one factor per tensor.

        ``params`` are fp32 and are overwritten; the leaves of ``state`` may be. Returns the new state.
        """
        new_params, new_state = self.update(theta, state, params, grads, loss)
        move(params, new_params, lr, weight_decay)
        return new_state


class Stepper:
    """Particles that take step after step under one theta: ``params`` and ``state`` are where they have come to.

    A subclass computes once what follows from theta alone, and may overwrite ``params`` and ``state`` with every step.
    """

    def __init__(self, rule: LearnedOptimizer, theta: Theta, state: State, params: Params) -> None:
        self.rule, self.theta, self.state, self.params = rule, theta, state, params

    def step(self, grads: Params, loss: Tensor) -> None:
        """As ``update_particles``."""
        self.params, self.state = self.rule.update_particles(self.theta, self.state, self.params, grads, loss)


def move(params: Params, new_params: Params, lr: Sequence[float], weight_decay: Sequence[float]) -> None:
    """p <- p - lr (p - p_new + weight_decay p), in place."""
    old = list(params.values())
    steps = torch._foreach_sub(old, [new_params[name] for name in params])
    if any(weight_decay):
        torch._foreach_add_(steps, torch._foreach_mul(old, list(weight_decay)))
    torch._foreach_mul_(steps, list(lr))
    torch._foreach_sub_(old, steps)


def _add_axis(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}


def _drop_axis(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.squeeze(0) for name, tensor in tensors.items()}
