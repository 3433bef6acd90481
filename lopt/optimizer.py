"""A learned optimizer as a ``torch.optim.Optimizer``.

Owns the bridge between torch's parameter groups and the pure rule: it gathers parameters, gradients and state, calls
``LearnedOptimizer.update`` once, and writes the result back. Holds no arithmetic of its own but the learning-rate
multiplier and the decoupled weight decay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lopt.base import LearnedOptimizer, State, Theta

GLOBAL = "lopt"


class Optimizer(torch.optim.Optimizer):
    """Applies a learned optimizer to parameters.

    ``lr`` multiplies the learned step (1.0: as trained), so that LR schedulers and per-group rates work;
    ``weight_decay`` is decoupled: p <- p - lr * weight_decay * p. ``num_steps`` is the declared length of training,
    which learned schedules need.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lopt: LearnedOptimizer,
        theta: Theta,
        *,
        num_steps: int | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps = {num_steps!r}: expected a number >= 1")
        if num_steps is None and lopt.needs_horizon:
            raise ValueError(f"num_steps = None: {lopt.name} has a learned schedule and needs the number of steps")
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr = {lr!r}: expected a number >= 0")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay = {weight_decay!r}: expected a number >= 0")
        self.lopt, self.theta, self.num_steps = lopt, theta, num_steps
        self._global: State = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's signature knows no loss
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """One update. The training loss comes from ``closure`` (which also calls ``backward``) or from ``loss``.

        Raises ``ValueError`` if the optimizer needs a loss and gets none, or one that is not finite, and
        ``RuntimeError`` for sparse gradients. Parameters without a gradient are left as they are.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is None and self.lopt.needs_loss:
            raise ValueError(f"{self.lopt.name} needs the training loss: call step(closure) or step(loss=loss)")
        value = 0.0 if loss is None else float(loss)
        if not math.isfinite(value):
            raise ValueError(f"loss = {value}: expected a finite number; no parameter was changed")

        groups = [
            (group, p) for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()
        ]
        if not groups:
            return loss
        if any(p.grad.is_sparse for _, p in groups):
            raise RuntimeError(f"{self.lopt.name} does not take sparse gradients: use dense ones")
        device = groups[0][1].device
        theta = {name: tensor.to(device) for name, tensor in self.theta.items()}
        params = {str(i): p.detach().float() for i, (_, p) in enumerate(groups)}
        grads = {str(i): p.grad.detach().float() for i, (_, p) in enumerate(groups)}
        fresh = [str(i) for i, (_, p) in enumerate(groups) if not self.state[p]]
        state = self._gather(groups)
        if fresh:
            state = self.lopt.init_state(theta, {i: params[i] for i in fresh}, self.num_steps or 1) | state
        new_params, new_state = self.lopt.update(
            theta, state, params, grads, torch.tensor(value, device=device, dtype=torch.float32)
        )
        self._scatter(groups, new_state)
        for i, (group, p) in enumerate(groups):
            moved = params[str(i)] + group["lr"] * (new_params[str(i)] - params[str(i)])
            p.copy_(moved - group["lr"] * group["weight_decay"] * params[str(i)])
        return loss

    def _gather(self, groups: list[tuple[dict[str, Any], Tensor]]) -> State:
        per_tensor = {f"{kind}/{i}": leaf for i, (_, p) in enumerate(groups) for kind, leaf in self.state[p].items()}
        return self._global | per_tensor

    def _scatter(self, groups: list[tuple[dict[str, Any], Tensor]], state: State) -> None:
        names = {str(i): p for i, (_, p) in enumerate(groups)}
        self._global = {}
        for key, leaf in state.items():
            kind, _, name = key.rpartition("/")
            if name in names:
                self.state[names[name]][kind] = leaf
            else:
                self._global[key] = leaf

    def __getstate__(self) -> dict[str, Any]:
        """torch would leave out what it does not know, and pickle and deepcopy with it."""
        own = {"lopt": self.lopt, "theta": self.theta, "num_steps": self.num_steps, "_global": self._global}
        return super().__getstate__() | own

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict plus the optimizer-wide state under ``"lopt"``."""
        return super().state_dict() | {GLOBAL: {"num_steps": self.num_steps, "state": dict(self._global)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exact resume: accumulators keep fp32 whatever the parameters' dtype. Leaves the caller's dict untouched."""
        own = copy.deepcopy(state_dict)
        if GLOBAL not in own:
            raise ValueError(f"state_dict has no entry {GLOBAL!r}: not a learned optimizer's")
        mine = own.pop(GLOBAL)
        super().load_state_dict(own)
        self.num_steps = mine["num_steps"]
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in own["param_groups"] for i in group["params"]]
        for p, i in zip(params, indices, strict=True):
            if i in own["state"]:
                # torch casts floating state to the parameter's dtype, which would round the accumulators
                self.state[p] = {kind: leaf.to(p.device) for kind, leaf in own["state"][i].items()}
        device = params[0].device
        self._global = {name: leaf.to(device) for name, leaf in mine["state"].items()}
