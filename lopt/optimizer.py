"""A learned optimizer as a ``torch.optim.Optimizer``.

Owns the bridge between torch's parameter groups and the pure rule: which parameters take part in a step, their state
under torch's names, and what is refused. Holds no arithmetic of its own: the step is ``LearnedOptimizer.apply``, fp32
copies are ``fp32``'s, and the length of training is ``guard_rails``'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lopt import distributed, fp32, guard_rails, optimizer_state, trace
from lopt.base import LearnedOptimizer, Theta
from lopt.distributed import ProcessGroup
from lopt.guard_rails import GRAD_SUM, MAX_STEPS, Progress
from lopt.optimizer_state import PROGRESS


class Optimizer(torch.optim.Optimizer):
    """Applies a learned optimizer to parameters, as any optimizer of ``torch.optim`` does.

    ``params`` are tensors, (name, tensor) pairs or groups. ``lr`` multiplies the learned step (1.0: as trained), so
    that LR schedulers and rates of groups work (those that also cycle a momentum need ``cycle_momentum=False``);
    ``weight_decay`` is decoupled: p <- p - lr * (step + weight_decay * p).

    ``num_steps`` declares how often ``step`` will be called; rules that need no horizon go on for ever whatever it is.
    The others refuse to go on: see ``increase_steps`` and ``reset_steps``. More than ``max_steps`` are made into fewer
    updates by averaging gradients and losses over several calls: see ``guard_rails``. ``lr`` and ``weight_decay`` are
    then those of the last of these calls. Raises ``ThetaError`` for a ``theta`` of another rule.

    What the rule sees: parameters and gradients in fp32 (others through copies; fp64 parameters get their fp32 step
    added in fp64), under their names if they have some. One clock and one record of losses serve all parameters: a
    parameter whose first gradient comes late, or whose group is added in mid-training, starts with empty accumulators,
    but at the training's time. A parameter without a gradient is left as it is, and so is its state.

    Gradients are not searched for NaN, as nowhere in torch.optim: one makes its tensor NaN (all tensors, in a rule in
    which they hear of each other, as VeLO), infinity is clipped where the rule clips. ``GradScaler`` and
    ``clip_grad_norm_(..., error_if_nonfinite=True)`` do search.

    Under ``torch.distributed`` every process calls ``step``, and rules that need the loss see its mean over
    ``process_group``, so that replicas never diverge: all processes (None), some, or this one alone (False). A loss
    that is not finite on one of them is refused on all. ``step`` returns this process's. Parameters may be DTensors
    (FSDP2): see ``lopt.sharded`` for what that costs. On every process the same parameters have to have a gradient, as
    DDP and FSDP2 see to.

    ``torch.compile`` leaves a step as it is: compiled code around it breaks there, once, and the fused kernels run.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lopt: LearnedOptimizer,
        theta: Theta,
        *,
        num_steps: int | None = None,
        max_steps: int = MAX_STEPS,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        process_group: ProcessGroup = None,
    ) -> None:
        if num_steps is None and lopt.needs_horizon:
            raise ValueError(f"num_steps = None: {lopt.name} has a learned schedule and needs the number of steps")
        progress = guard_rails.begin(num_steps, max_steps)
        if not lopt.needs_horizon:
            progress["num_steps"] = None
        self.lopt, self.theta, self.process_group = lopt, lopt.checked(theta), process_group
        self._plan: optimizer_state.Plan | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.param_groups[0][PROGRESS] = progress

    @property
    def progress(self) -> Progress:
        """Steps declared and made, and the rule's state that belongs to no parameter."""
        found: Progress = self.param_groups[0][PROGRESS]
        return found

    @_disable_dynamo  # as torch's own methods; torch.compiler.disable would import the compiler with lopt
    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's signature knows no loss
        self, closure: Callable[[], Tensor | float | None] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """One update. The training loss comes from ``closure`` (which also calls ``backward``) or from ``loss``.

        Rules that do not need the loss never look at it. For the others it is one number, that of the gradients before
        any loss scaling; it is compared with infinity on the host, which on a GPU waits for it once per step.

        Nothing is changed where this raises: ``ValueError`` if the rule needs a loss and gets none, or not one finite
        number (to go on after such a batch, do not call ``step`` for it); ``RuntimeError`` after the last declared
        step, for sparse gradients, and for parameters on several devices.
        """
        progress = self.progress
        guard_rails.check_not_over(progress, self.lopt.name)
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"closure is a {type(closure).__name__}: expected a function, or step(loss=loss)")
            if loss is not None:
                raise ValueError("step got a closure and a loss: expected one of them")
            with torch.enable_grad():
                loss = closure()
        if loss is None and self.lopt.needs_loss and self._asked_for_state_only():
            return None
        chosen = self._choose(attrgetter("grad"))
        device = self._device(chosen.params)
        value = self._training_loss(loss, device)
        if self.lopt.needs_loss:
            if chosen.params:
                value = distributed.average(value, self.process_group)
            if not math.isfinite(value.item()):
                raise ValueError(f"loss = {value.item()}: expected a finite number; no parameter was changed")
        if not chosen.params:
            return loss
        if progress["waiting"] or guard_rails.gradients_per_update(progress) > 1:
            states = [self.state[p] for p in chosen.params]
            if guard_rails.accumulate(progress, states, chosen.grads, value):
                chosen = self._choose(lambda p: self.state.get(p, {}).get(GRAD_SUM))
                grads, value = guard_rails.take(progress, [self.state[p] for p in chosen.params])
                self._apply(chosen._replace(grads=grads), value)
        else:
            self._apply(chosen, value)
        progress["steps"] += 1
        return loss

    def increase_steps(self, num_steps: int) -> None:
        """Declare that many more steps: the rule goes on as if they had been declared from the start.

        VeLO's "increase steps" (section 4.4.3), of its ways to train on the best in most tasks.
        """
        guard_rails.check_count("num_steps", num_steps)
        if self.progress["num_steps"] is not None:
            self.progress["num_steps"] += num_steps
            guard_rails.set_clock(self.progress)

    def reset_steps(self, num_steps: int) -> None:
        """Declare a new training of that many steps: the rule's clock starts again at 0, and it keeps all other state.

        VeLO's "reset steps" (section 4.4.3). A new ``Optimizer`` is its "full reset", which loses the accumulators too.
        """
        guard_rails.check_count("num_steps", num_steps)
        progress = self.progress
        if self.lopt.needs_horizon:
            progress["num_steps"] = num_steps
        progress["steps"] = 0
        guard_rails.set_clock(progress)

    def _training_loss(self, loss: Tensor | float | None, device: torch.device) -> Tensor:
        """The loss that the rule sees: fp32, (), on ``device``."""
        if not self.lopt.needs_loss:
            return torch.zeros((), device=device)
        if loss is None:
            raise ValueError(
                f"loss = None: {self.lopt.name} needs the training loss: call step(loss=loss), or step(closure) with a "
                "closure that returns it"
            )
        if not isinstance(loss, Tensor):
            return torch.tensor(float(loss), device=device, dtype=torch.float32)
        if loss.numel() != 1 or loss.is_complex():
            found = f"{loss.dtype} of shape {tuple(loss.shape)}"
            raise ValueError(f"loss is {found}: expected one real number, such as loss.mean()")
        return loss.detach().reshape(()).to(device, torch.float32)

    def _device(self, params: Sequence[Tensor]) -> torch.device:
        """The device of all parameters."""
        devices = {p.device for p in params}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"parameters on {found}: expected one device; make an optimizer for each")
        return devices.pop() if devices else torch.device("cpu")

    def _choose(self, gradient: Callable[[Tensor], Tensor | None]) -> _Chosen:
        """The parameters that have a gradient and are not empty."""
        chosen = _Chosen([], [], [], [])
        for group in self.param_groups:
            lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
            for p in group["params"]:
                grad = gradient(p)
                if grad is None or not p.numel():
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{self.lopt.name} does not take sparse gradients ({grad.layout}): use dense ones"
                    )
                chosen.params.append(p)
                chosen.grads.append(grad)
                chosen.lr.append(lr)
                chosen.weight_decay.append(weight_decay)
        return chosen

    def _apply(self, chosen: _Chosen, loss: Tensor) -> None:
        """One update of these parameters and of their state."""
        moved, grads = fp32.tensors(chosen.params), fp32.tensors(chosen.grads)
        with fp32.arithmetic(loss.device):
            plan = self._planned(chosen.params, moved)
            names = plan.names
            state = trace.observed(self, distributed.spread(self.lopt, moved)).apply(
                plan.theta,
                plan.gather(),
                dict(zip(names, moved, strict=True)),
                dict(zip(names, grads, strict=True)),
                loss,
                chosen.lr,
                chosen.weight_decay,
            )
        plan.scatter(state)
        fp32.write_back(chosen.params, moved)

    def _planned(self, params: Sequence[Tensor], as_fp32: Sequence[Tensor]) -> optimizer_state.Plan:
        """The plan for these parameters: that of the last step, while nothing has changed."""
        if self._plan is None or not self._plan.serves(params, self.state):
            self._plan = optimizer_state.plan(
                distributed.spread(self.lopt, params),
                self.theta,
                self.param_groups,
                self.state,
                self.progress,
                params,
                as_fp32,
            )
        return self._plan

    def _asked_for_state_only(self) -> bool:
        """Whether this step is that of torch.distributed.checkpoint, which wants state to load into; then make it.

        It calls ``step`` without a loss, at rate zero and with gradients of zero, on an optimizer that has no state.
        """
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        params = self._choose(attrgetter("grad")).params
        with fp32.arithmetic(self._device(params)):
            self._planned(params, fp32.tensors(params))
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, also in mid-training. The caller's dictionary is left alone.

        Raises ``ValueError`` for complex parameters, and for an ``lr`` or ``weight_decay`` that is not >= 0.
        """
        group = dict(param_group)
        for field in ("lr", "weight_decay"):
            value = float(group.get(field, self.defaults[field]))
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} = {value!r}: expected a number >= 0")
        super().add_param_group(group)
        for i, p in enumerate(group["params"]):
            if p.is_complex():
                self.param_groups.pop()
                raise ValueError(f"parameter {i} of the group is {p.dtype}: expected real ones (torch.view_as_real)")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exact resume: accumulators keep fp32 whatever the parameters' dtype. Shares no memory with ``state_dict``.

        Raises ``ValueError`` for the state of another optimizer or other shapes; nothing is changed then.
        """
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            optimizer_state.check(self.lopt, self.theta, self.param_groups, given)
            loaded.update(given)

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._keep_precision(loaded), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep_precision(self, loaded: dict[str, Any]) -> None:
        """torch casts state to the parameter's dtype, which would round the accumulators and make clocks floats."""
        self.progress.setdefault("state", {})  # torch.distributed.checkpoint loses dictionaries that are empty
        for p, i in optimizer_state.numbered(self.param_groups, loaded):
            if i in loaded["state"]:
                self.state[p] = {
                    kind: leaf.to(p.device, torch.float32 if leaf.is_floating_point() else leaf.dtype, copy=True)
                    for kind, leaf in loaded["state"][i].items()
                }

    def __getstate__(self) -> dict[str, Any]:
        """torch would leave out what it does not know, and pickle and deepcopy with it."""
        own = {"lopt": self.lopt, "theta": self.theta, "process_group": self.process_group}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        super().__setstate__(state)

    def __repr__(self) -> str:
        rows = [f"{type(self).__name__} ({self.lopt.name}, {self.progress['steps']} steps made"]
        for i, group in enumerate(self.param_groups):
            rows += [f"Parameter Group {i}"]
            rows += [f"    {key}: {group[key]}" for key in sorted(group) if key not in ("params", PROGRESS)]
        return "\n".join([*rows, ")"])


class _Chosen(NamedTuple):
    """The parameters of one step."""

    params: list[Tensor]
    grads: list[Tensor]
    lr: list[float]
    weight_decay: list[float]
