"""What a learned optimizer does to each tensor, update by update: recorded while somebody asks for it, free otherwise.

    with lopt.record(opt, every=10) as trace:
        ...                                    # train
    lopt.plot(trace, "inside.png")

Owns which optimizers are being recorded, what is measured around an update, and what rules say of themselves
(``note``, ``note_outputs``). Never changes a bit of the training that it looks at, and never waits for a device before
the record is read. Does not draw: ``lopt.figures`` does.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lopt import kernels
from lopt.base import LearnedOptimizer, Params, State, Theta
from lopt.features import EXP_MULT
from lopt.guard_rails import Progress, check_count, gradients_per_update

if TYPE_CHECKING:
    from types import TracebackType

    from lopt.optimizer import Optimizer
    from lopt.sharded import Sharded

MEASURED = ("step_mean_abs", "step_rms", "parameter_rms", "gradient_rms", "cosine")
OUTPUTS = ("direction", "magnitude")

_traces: weakref.WeakKeyDictionary[Optimizer, Trace] = weakref.WeakKeyDictionary()
_notes: contextvars.ContextVar[_Notes | None] = contextvars.ContextVar("lopt_notes", default=None)


def record(opt: Optimizer, every: int = 1, directions: bool = False) -> Trace:
    """Record the first update of ``opt`` from now on, and one in ``every`` after it, until ``Trace.stop``.

    ``directions=True`` also records d and a, the two outputs of the rule's MLP. The fused kernels never store them, so
    that each update that is recorded is first computed by the reference in torch, on the side; what is trained is not
    touched by it. Only the rules of ``lopt.per_parameter`` have them, and not for DTensors. An update that is recorded
    takes a copy of the parameters, and with ``directions`` one of the state too.

    With DTensors every process records alike. Copies of ``opt`` (pickle, deepcopy) are not recorded. Raises
    ``ValueError`` where ``opt`` is being recorded already.
    """
    check_count("every", every)
    if opt in _traces:
        raise ValueError("this optimizer is being recorded already: stop() its trace first")
    _traces[opt] = trace = Trace(opt.lopt.name, every, directions)
    return trace


class Trace:
    """What was recorded of one optimizer; also a context manager that calls ``stop``. ``lopt.plot`` draws it."""

    def __init__(self, rule: str, every: int, directions: bool) -> None:
        self.rule, self.every, self.directions = rule, every, directions
        self._made = self._made_before_resets = self._step = self._next = 0
        self._tensors: dict[str, int] = {}
        self._updates: list[_Update] = []

    def stop(self) -> None:
        """Record no more. What there is remains."""
        for opt in [opt for opt, trace in _traces.items() if trace is self]:
            del _traces[opt]

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def arrays(self) -> dict[str, np.ndarray]:
        """The record of R updates and T tensors, in fp32. Waits for the device.

        - ``rule`` (): the architecture's name;
        - ``step`` (R,): how many calls of ``Optimizer.step`` there were, with this one; counts on over ``reset_steps``;
        - ``tensor`` (T,): names as the rule knows them, the parameters' numbers where they were given none;
        - ``dimensions`` (T,): 0 to 5; 1 for vectors.

        Of every update and tensor (R, T), nan where it took no part in the update:

        - ``step_mean_abs`` and ``step_rms``: of p_new - p, as made: with rate and weight decay, in fp32 (a half
          precision parameter is rounded after it). The mean absolute is what VeLO's figures 13 and 29 show;
        - ``parameter_rms``, ``gradient_rms``: before the update; of accumulated gradients the mean;
        - ``cosine``: of the angle between p_new - p and -g; 1 is steepest descent, nan if one of both is zero;
        - ``step_factor``: VeLO's c, of either sign;
        - with ``directions``: ``direction``, the mean of |d| over the tensor, and ``magnitude``, that of exp(0.001 a).

        Of every update (R,): ``loss``, for rules that see one, as they see it; ``schedule``, the learned factor lr(t)
        of Celo (its figure 6) and Celo-Adam.
        """
        updates = [update.fetch() for update in self._updates]
        found: dict[str, np.ndarray] = {
            "rule": np.array(self.rule),
            "step": np.array([update.step for update in self._updates], dtype=np.int64),
            "tensor": np.array(list(self._tensors), dtype=np.str_),
            "dimensions": np.array(list(self._tensors.values()), dtype=np.int64),
        }
        columns = {name: i for i, name in enumerate(self._tensors)}
        for kind in dict.fromkeys(kind for update in updates for kind in update):
            per_tensor = any(update[kind].ndim for update in updates if kind in update)
            values = np.full((len(updates), len(columns)) if per_tensor else len(updates), np.nan, dtype=np.float32)
            for i, (update, recorded) in enumerate(zip(updates, self._updates, strict=True)):
                if kind in update:
                    values[(i, [columns[name] for name in recorded.names]) if per_tensor else i] = update[kind]
            found[kind] = values
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``arrays()`` as a .npz file; ``lopt.plot(numpy.load(path))`` draws it."""
        with open(path, "wb") as file:
            np.savez_compressed(file, **self.arrays())  # type: ignore[arg-type]  # numpy's stub takes a name for a flag

    def _due(self, progress: Progress) -> bool:
        """Whether the update at hand is to be recorded."""
        if progress["steps"] < self._made:
            self._made_before_resets = self._step
        self._made = progress["steps"]
        self._step = self._made_before_resets + self._made + 1
        return self._step >= self._next

    def _add(self, params: Params, values: dict[str, Tensor], calls: int) -> None:
        """Record the update at hand, which took that many calls of ``step``."""
        self._tensors |= {name: p.ndim for name, p in params.items()}
        self._updates.append(_Update(self._step, list(params), values))
        self._next = self._step + self.every * calls


def observed(opt: Optimizer, rule: LearnedOptimizer | Sharded) -> LearnedOptimizer | Sharded | Observed:
    """What ``apply`` is to be called of for an update of ``opt``: the rule itself, unless this update is recorded."""
    trace = _traces.get(opt)
    if trace is None or not trace._due(opt.progress):
        return rule
    return Observed(rule, trace, gradients_per_update(opt.progress), opt.lopt.needs_loss)


@dataclass(frozen=True)
class Observed:
    """A rule whose ``apply`` also records what it does; nothing, if it raises."""

    rule: LearnedOptimizer | Sharded
    trace: Trace
    calls: int
    """Of ``Optimizer.step``, for this update."""
    needs_loss: bool

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
        """As ``LearnedOptimizer.apply``."""
        values = {"loss": loss.clone()} if self.needs_loss else {}
        if self.trace.directions and isinstance(self.rule, LearnedOptimizer):
            with _listening(directions=True) as notes, kernels.reference():
                self.rule.update(theta, state, params, grads, loss)
            if notes.outputs:
                rows = [notes.outputs[name] for name in params]
                values |= dict(zip(OUTPUTS, torch.stack(rows, dim=-1), strict=True))
        before = [p.clone() for p in params.values()]
        with _listening() as notes:
            new_state = self.rule.apply(theta, state, params, grads, loss, lr, weight_decay)
        rows = [_measure(old, p, grads[name]) for old, (name, p) in zip(before, params.items(), strict=True)]
        values |= dict(zip(MEASURED, torch.stack(rows, dim=-1), strict=True)) | notes.values
        self.trace._add(params, values, self.calls)
        return new_state


def note(kind: str, value: Tensor) -> None:
    """A rule says what it decided in this step: of all tensors (P,), or of each (P, T) in their order."""
    notes = _listener()
    if notes is not None:
        notes.values[kind] = value.detach().squeeze(0)


def note_outputs(name: str, out: Tensor) -> None:
    """A rule shows its MLP's outputs for one tensor: d and a, and perhaps more, (P, n_out, *s)."""
    notes = _listener()
    if notes is not None and notes.directions:
        d, a = out.detach()[0, :2]
        notes.outputs[name] = torch.stack([d.abs().mean(), torch.exp(a * EXP_MULT).mean()])


def _listener() -> _Notes | None:
    return None if torch.compiler.is_compiling() else _notes.get()


class _Notes:
    """What a rule said during one update of one particle."""

    def __init__(self, directions: bool) -> None:
        self.directions = directions
        self.values: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}


@contextlib.contextmanager
def _listening(directions: bool = False) -> Iterator[_Notes]:
    token = _notes.set(notes := _Notes(directions))
    try:
        yield notes
    finally:
        _notes.reset(token)


@dataclass(frozen=True)
class _Update:
    """One recorded update; ``values`` are () or, in the order of ``names``, (T,)."""

    step: int
    names: list[str]
    values: dict[str, Tensor]

    def fetch(self) -> dict[str, np.ndarray]:
        return {kind: value.cpu().numpy() for kind, value in self.values.items()}


def _measure(old: Tensor, new: Tensor, grad: Tensor) -> Tensor:
    """``MEASURED`` of one tensor."""
    step, size = new - old, new.numel()
    norms = [torch.linalg.vector_norm(x) for x in (step, old, grad)]
    sums = [torch.linalg.vector_norm(step, ord=1), (step * grad).sum(), *norms]
    total, product, step_norm, norm, grad_norm = (_whole(x) for x in sums)
    root = size**0.5
    cosine = -product / step_norm / grad_norm
    return torch.stack([total / size, step_norm / root, norm / root, grad_norm / root, cosine])


def _whole(x: Tensor) -> Tensor:
    """The sum of a DTensor's parts; a collective."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
