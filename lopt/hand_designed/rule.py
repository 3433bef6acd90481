"""What all hand-designed rules share: their hyper-parameters as theta, and the loop over tensors.

Owns ``HandDesigned`` and how theta spells a hyper-parameter. Never holds the arithmetic of a rule.

A rule is written for one tensor p (P, *s) of P particles; a hyper-parameter reaches it as ``h["beta1"]``, a Python
number or a tensor (P, 1, ..., 1) that broadcasts against p. Nothing is written in place.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from configs.checks import did_you_mean
from lopt.accumulators import align, as_vector
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaError, ThetaSpec

Value = float | Tensor
"""A number of every particle: the same for all of them, or (P,) or (P, 1, ..., 1)."""
Values = dict[str, Value]


@dataclass(frozen=True)
class Hyperparameter:
    """One scalar entry of theta with its textbook value.

    ``space`` is what a rule built with ``log_space=True`` keeps in theta instead of the value x: ln x ("log"),
    ln(1 - x) ("decay"), or x itself ("linear": where 0 is a usual value).
    """

    name: str
    default: float
    space: Literal["log", "decay", "linear"] = "log"

    def encode(self, value: float) -> float:
        """The entry of a log-space theta that means ``value``."""
        return {"log": math.log, "decay": lambda x: math.log(1 - x), "linear": float}[self.space](value)

    def decode(self, entry: Tensor) -> Tensor:
        """The inverse. Decays stay in [0, 1) whatever the entry is."""
        if self.space == "log":
            return entry.exp()
        return -torch.expm1(entry.clamp_max(0)) if self.space == "decay" else entry


def learning_rate(default: float) -> Hyperparameter:
    return Hyperparameter("learning_rate", default)


def decay(name: str, default: float) -> Hyperparameter:
    return Hyperparameter(name, default, "decay")


class HandDesigned(LearnedOptimizer):
    """A published update rule whose theta is its hyper-parameters, one scalar each.

    theta may be partial: an entry that it lacks has its textbook value, so that a sweep names only what it varies
    (``{"learning_rate": rates}``). ``init_theta`` gives all textbook values. By default entries are the values
    themselves; with ``log_space=True`` they are what ``Hyperparameter`` says, so that equal perturbations are equal
    relative changes and none leaves a hyper-parameter's range: use it to meta-learn them.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]]
    slots: ClassVar[tuple[str, ...]] = ()
    """Kinds of the accumulators of a tensor that have its shape and start at zero."""

    def __init__(self, log_space: bool = False) -> None:
        self.log_space = log_space
        self.spec = ThetaSpec(tuple(ThetaEntry(h.name, ()) for h in self.hyperparameters))

    @property
    def arguments(self) -> dict[str, Argument]:
        return {"log_space": self.log_space}

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {
            h.name: torch.tensor(h.encode(h.default) if self.log_space else h.default) for h in self.hyperparameters
        }

    def checked(self, theta: Mapping[str, Tensor | float]) -> Theta:
        """As the base's, but entries may be missing (they have their textbook values) and be plain numbers."""
        self._check_names(theta)
        found = {}
        for name, value in theta.items():
            found[name] = torch.as_tensor(value, dtype=torch.float32)
            if found[name].shape or not found[name].isfinite():
                raise ThetaError(f"theta[{name!r}] = {value}: expected one finite number")
        return found

    def _check_names(self, theta: Mapping[str, object]) -> None:
        names = [h.name for h in self.hyperparameters]
        for name in sorted(theta.keys() - set(names)):
            raise ThetaError(
                f"theta[{name!r}]: {self.name} has the hyper-parameters {', '.join(names)}{did_you_mean(name, names)}"
            )

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        """Raises ``ThetaError`` for an entry of theta that is no hyper-parameter of this rule."""
        self._check_names(theta)
        values = self._values(theta)
        state = {"iteration": torch.zeros_like(num_steps)}
        if self.needs_horizon:
            state["num_steps"] = num_steps.clone()
        for name, p in params.items():
            slots = self.init_slots(_aligned(values, p), p)
            state |= {f"{kind}/{name}": slot for kind, slot in slots.items()}
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        slots: dict[str, State] = {name: {} for name in params}
        new_state: State = {}
        for key, leaf in state.items():
            kind, slash, name = key.partition("/")
            if slash:
                slots[name][kind] = leaf
            else:
                new_state[key] = leaf
        new_state["iteration"] = state["iteration"] + 1
        values = self._values(theta)
        values |= self.prepare(values, new_state)

        broadcast: dict[int, Values] = {}
        new_params: Params = {}
        for name, p in params.items():
            if p.ndim not in broadcast:
                broadcast[p.ndim] = _aligned(values, p)
            new_params[name], new = self.step(broadcast[p.ndim], p, grads[name], slots[name])
            new_state |= {f"{kind}/{name}": slot for kind, slot in new.items()}
        return new_params, new_state

    def init_slots(self, h: Mapping[str, Value], p: Tensor) -> State:
        """Accumulators of one tensor (P, *s) before the first step, by kind."""
        return {kind: torch.zeros_like(p) for kind in self.slots}

    def prepare(self, h: Mapping[str, Value], state: State) -> Values:
        """What all tensors of a step share, per particle (P,); ``state["iteration"]`` counts from 1. Joins ``h``."""
        return {}

    @abstractmethod
    def step(self, h: Mapping[str, Value], p: Tensor, g: Tensor, s: State) -> tuple[Tensor, State]:
        """One tensor's new value and accumulators, from its gradient g (P, *s) and accumulators ``s``."""

    def _values(self, theta: Theta) -> Values:
        values: Values = {}
        for h in self.hyperparameters:
            if h.name not in theta:
                values[h.name] = h.default
            else:
                values[h.name] = h.decode(theta[h.name]) if self.log_space else theta[h.name]
        return values


def _aligned(values: Mapping[str, Value], p: Tensor) -> Values:
    return {name: align(value, p) if isinstance(value, Tensor) else value for name, value in values.items()}


def ema(old: Tensor, new: Tensor, beta: Value) -> Tensor:
    """beta old + (1 - beta) new. Not by ``lerp``, which makes NaN of an ``old`` that has overflowed."""
    return beta * old + (1 - beta) * new


def correction(beta: Value, iteration: Tensor) -> Tensor:
    """1 - beta^t (P,), Adam's bias correction; exact for beta near 1, where 1 - beta ** t is not."""
    log_beta = torch.log(beta) if isinstance(beta, Tensor) else math.log(beta)
    return -torch.expm1(iteration * log_beta)


def added(beta: Value) -> Value:
    """Weight of what is new in an average with decay ``beta``: 1 - beta, but 1 where beta = 1 means a sum."""
    return 1 - beta + (beta == 1)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of every particle's tensor, (P, 1, ..., 1)."""
    return align(torch.linalg.vector_norm(as_vector(x).flatten(1), dim=1), x)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A trust ratio: numerator / denominator, and 1 where either is 0."""
    zero = (numerator == 0) | (denominator == 0)
    return torch.where(zero, torch.ones_like(numerator), numerator / torch.where(zero, 1, denominator))
