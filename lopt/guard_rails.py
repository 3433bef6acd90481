"""VeLO's guard rails: what happens where training is longer than a rule that was told its length can bear.

Owns the progress of a training (calls of ``step`` declared and made), how many gradients make up one update, and the
clock of the rule: its state's ``iteration`` and ``num_steps``. Only rules with ``needs_horizon`` have guard rails: for
all others ``num_steps`` is None, and they go on for ever. Never applies an update, and never waits for a device.

Too many steps (Metz et al. 2022, appendix; prefab.py of learned_optimization): VeLO gets worse beyond 150,000 to
200,000. Where more than ``max_steps`` calls are declared, the gradients and losses of k = ceil(num_steps / max_steps)
calls are averaged into one update, and the rule is told num_steps // k. The last num_steps % k calls change nothing.

More steps than declared (section 4.4.3, on 620 tasks): simply going on is the worst choice in 52 % of them, so the
call after the last is refused. "Increase steps" is the best in 49 %, "reset steps" in 25 %; ``Optimizer`` has both.
"Full reset", the second worst, is a new ``Optimizer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from lopt.base import State

MAX_STEPS = 150_000
GRAD_SUM = "grad_sum"
"""The sum of the gradients that wait for the next update (fp32), among the state of their parameter."""


class Progress(TypedDict):
    """Where training stands: a plain dictionary, since it is part of ``Optimizer.param_groups[0]``."""

    num_steps: int | None
    """Calls of ``step`` declared; None for a rule without a horizon."""
    max_steps: int
    """Updates that the rule bears."""
    steps: int
    """Calls made with at least one gradient."""
    waiting: int
    """Calls made since the last update."""
    loss_sum: Tensor
    """Sum of their losses, ()."""
    state: State
    """The rule's leaves that belong to no tensor; empty before the first update."""


def begin(num_steps: int | None, max_steps: int) -> Progress:
    """Before the first step. Raises ``ValueError`` for numbers that are not whole and positive."""
    for field, value in (("num_steps", num_steps), ("max_steps", max_steps)):
        if value is not None:
            check_count(field, value)
    return Progress(num_steps=num_steps, max_steps=max_steps, steps=0, waiting=0, loss_sum=torch.zeros(()), state={})


def check_count(field: str, value: int) -> None:
    """Raise ``ValueError`` unless this is a whole number >= 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} = {value!r}: expected a whole number >= 1")


def check_not_over(progress: Progress, rule: str) -> None:
    """Raise ``RuntimeError`` if all declared steps are made."""
    declared = progress["num_steps"]
    if declared is not None and progress["steps"] >= declared:
        raise RuntimeError(
            f"step {progress['steps'] + 1} of num_steps = {declared}: {rule} has a learned schedule, which ends there. "
            "To train on, call increase_steps(n) for n more steps, or reset_steps(n) to start the schedule again "
            "(VeLO, section 4.4.3)"
        )


def gradients_per_update(progress: Progress) -> int:
    """k: how many calls make up one update."""
    return -(-(progress["num_steps"] or 1) // progress["max_steps"])


def horizon(progress: Progress) -> int:
    """How many updates the rule is told there will be."""
    return (progress["num_steps"] or 1) // gradients_per_update(progress)


def set_clock(progress: Progress) -> None:
    """Tell the rule how far it is and how far it goes, in updates of k calls each. Its loss averages stay as they are.

    The half-lives of VeLO's and Celo's loss averages depend on the horizon too: they remain those of the first one,
    since the averages were made with them.
    """
    state, done = progress["state"], max(0, progress["steps"] - progress["waiting"])
    for leaf, value in (("iteration", done // gradients_per_update(progress)), ("num_steps", horizon(progress))):
        if leaf in state:
            state[leaf] = torch.full_like(state[leaf], value)


def accumulate(progress: Progress, states: Sequence[State], grads: Sequence[Tensor], loss: Tensor) -> bool:
    """Add each gradient to the sum in its parameter's state, and the loss to theirs. Whether an update is due now."""
    sums, more = [], []
    for state, grad in zip(states, grads, strict=True):
        if GRAD_SUM in state:
            sums.append(state[GRAD_SUM])
            more.append(grad)
        else:
            state[GRAD_SUM] = grad.to(torch.float32, copy=True)
    if sums:
        torch._foreach_add_(sums, more)
    progress["loss_sum"] = progress["loss_sum"].to(loss.device) + loss
    progress["waiting"] += 1
    return progress["waiting"] >= gradients_per_update(progress)


def take(progress: Progress, states: Sequence[State]) -> tuple[list[Tensor], Tensor]:
    """Mean gradients of these parameters, and the mean loss, over the calls since the last update; nothing waits then.

    A call in which a parameter had no gradient counts as one with a gradient of zero.
    """
    count = progress["waiting"]
    grads = [state.pop(GRAD_SUM) for state in states]
    torch._foreach_div_(grads, count)
    loss = progress["loss_sum"] / count
    progress["waiting"], progress["loss_sum"] = 0, torch.zeros_like(loss)
    return grads, loss
