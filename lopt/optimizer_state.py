"""Where a rule's state lives between the steps of an ``Optimizer``, and what it must look like.

Owns the way between the rule's flat state (``kind/tensor name``, and leaves that belong to no tensor) and torch's: one
dictionary per parameter, and one in the first parameter group. Never computes a step, and holds no state itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lopt.base import LearnedOptimizer, Params, State, Theta
from lopt.guard_rails import GRAD_SUM, Progress, horizon

if TYPE_CHECKING:
    from lopt.sharded import Sharded

PROGRESS = "lopt"
"""Where the first parameter group keeps what belongs to no parameter, so that it is saved wherever groups are."""
NO_TENSOR = "?"
Groups = list[dict[str, Any]]
States = Mapping[Tensor, State]


class Place(NamedTuple):
    """Where one leaf of the rule's state lives."""

    key: str
    owner: State
    kind: str


@dataclass(frozen=True)
class Plan:
    """What stays the same from step to step while the same parameters have gradients."""

    device: torch.device
    theta: Theta
    names: list[str]
    owners: list[State]
    places: list[Place]

    def serves(self, params: Sequence[Tensor], states: States) -> bool:
        """Whether this is the plan for these parameters, on the device where they were, with their state where it was.

        Every parameter has a state of its own.
        """
        return (
            len(params) == len(self.owners)
            and all(map(is_, map(states.get, params), self.owners))
            and params[0].device == self.device
        )

    def gather(self) -> State:
        """The rule's state."""
        return {key: owner[kind] for key, owner, kind in self.places}

    def scatter(self, state: State) -> None:
        """The inverse."""
        for key, owner, kind in self.places:
            owner[kind] = state[key]


def plan(
    lopt: LearnedOptimizer | Sharded,
    theta: Theta,
    groups: Groups,
    states: States,
    progress: Progress,
    params: Sequence[Tensor],
    as_fp32: Sequence[Tensor],
) -> Plan:
    """Find the state of these parameters, initialise what there is none of yet, and move all of it to their device.

    ``states`` makes an empty dictionary for a parameter that it does not know. No gradients wait in them.
    """
    device = params[0].device
    theta = {name: leaf.to(device) for name, leaf in theta.items()}
    steps, shared = horizon(progress), progress["state"]
    if not shared:
        shared.update(init_shared(lopt, theta, device, steps))
    all_names = names_of(groups)
    names, owners = [all_names[p] for p in params], [states[p] for p in params]
    fresh = [i for i, owner in enumerate(owners) if not owner]
    if fresh:
        initial = init_tensors(lopt, theta, {names[i]: as_fp32[i] for i in fresh}, shared, steps)
        for i in fresh:
            owners[i].update(initial[names[i]])
    places = [Place(key, shared, key) for key in shared]
    for name, owner in zip(names, owners, strict=True):
        places += [Place(f"{kind}/{name}", owner, kind) for kind in owner]
    for _, owner, kind in places:
        owner[kind] = owner[kind].to(device)
    return Plan(device, theta, names, owners, places)


def names_of(groups: Groups) -> dict[Tensor, str]:
    """What the rule calls each parameter: its name if it was given one, else its number; unique in any case."""
    names: dict[Tensor, str] = {}
    used: set[str] = set()
    for group in groups:
        for i, p in enumerate(group["params"]):
            name = group["param_names"][i] if "param_names" in group else str(len(names))
            names[p] = f"{name}@{len(names)}" if name in used else name
            used.add(names[p])
    return names


def init_shared(lopt: LearnedOptimizer | Sharded, theta: Theta, device: torch.device, steps: int) -> State:
    """The rule's leaves that belong to no tensor, before the first step."""
    state = lopt.init_state(theta, {NO_TENSOR: torch.zeros(1, device=device)}, steps)
    return {key: leaf for key, leaf in state.items() if not key.endswith(f"/{NO_TENSOR}")}


def init_tensors(
    lopt: LearnedOptimizer | Sharded, theta: Theta, params: Params, shared: State, steps: int
) -> dict[str, State]:
    """The leaves of these tensors by name and kind, before their first step."""
    found: dict[str, State] = {name: {} for name in params}
    for key, leaf in lopt.init_state(theta, params, steps).items():
        if key not in shared:
            kind, _, name = key.partition("/")
            found[name][kind] = leaf
    return found


def numbered(groups: Groups, state_dict: dict[str, Any]) -> list[tuple[Tensor, int]]:
    """Every parameter and its number in a state dict."""
    params = [p for group in groups for p in group["params"]]
    numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
    return list(zip(params, numbers, strict=False))  # torch itself refuses other numbers of parameters


def check(lopt: LearnedOptimizer, theta: Theta, groups: Groups, state_dict: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the rule could have made this state for these parameters."""
    if not state_dict["param_groups"] or PROGRESS not in state_dict["param_groups"][0]:
        raise ValueError(f"state_dict: param_groups[0] has no entry {PROGRESS!r}: not a learned optimizer's")
    meta = torch.device("meta")
    theta = {name: leaf.to(meta) for name, leaf in theta.items()}
    shared = init_shared(lopt, theta, meta, 1)
    names = names_of(groups)
    given = {names[p]: state_dict["state"].get(i, {}) for p, i in numbered(groups, state_dict)}
    shapes = {name: torch.empty(p.shape, device=meta) for p, name in names.items() if given.get(name)}
    expected = init_tensors(lopt, theta, shapes, shared, 1) if shapes else {}
    for name, tensor in shapes.items():
        waiting = {GRAD_SUM: tensor} if GRAD_SUM in given[name] else {}
        before_first_update = given[name].keys() == waiting.keys()
        wanted = waiting if before_first_update else expected[name] | waiting
        _check_leaves(f"state of parameter {name!r}", given[name], wanted)
    progress = state_dict["param_groups"][0][PROGRESS]
    if progress.get("state"):
        _check_leaves(f"param_groups[0][{PROGRESS!r}]", progress["state"], shared)


def _check_leaves(where: str, found: State, expected: State) -> None:
    if found.keys() != expected.keys():
        raise ValueError(f"state_dict: {where} has {sorted(found)}: expected {sorted(expected)}")
    for kind, leaf in found.items():
        if leaf.shape != expected[kind].shape:
            shapes = f"shape {tuple(leaf.shape)}: expected {tuple(expected[kind].shape)}"
            raise ValueError(f"state_dict: {where}, {kind!r} has {shapes}")
