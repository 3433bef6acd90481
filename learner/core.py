"""The learner as a state machine: which meta-gradients count, and what they do to theta.

Owns theta, the aggregate, the meta-optimizer and the books. Never knows Ray, the clock, the network or storage.

The books balance at every instant, per task family: received = applied + waiting + dropped (by reason).
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.schema import MetaOptimizerConfig
from lopt.base import LearnedOptimizer, Theta
from lopt.meta_gradient import MetaGradient

OTHER_FAMILY = "other"
"""Where the books put messages whose family is none of the run's."""
CAPACITY_BATCHES = 4
REMEMBERED_WORKERS = 4096


class Verdict(StrEnum):
    """What became of a submitted meta-gradient; all but ``ACCEPTED`` are reasons for dropping it."""

    ACCEPTED = "accepted"
    STALE = "stale"
    FUTURE = "future"
    DUPLICATE = "duplicate"
    NON_FINITE = "non_finite"
    MALFORMED = "malformed"
    WRONG_RUN = "wrong_run"
    FULL = "full"


REASONS = tuple(verdict.value for verdict in Verdict if verdict is not Verdict.ACCEPTED)


@dataclass
class Account:
    """One task family's books, in meta-gradients; ``inner_steps`` are those behind the accepted ones."""

    received: int = 0
    applied: int = 0
    waiting: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    inner_steps: int = 0

    def balanced(self) -> bool:
        return self.received == self.applied + self.waiting + sum(self.dropped.values())


class MetaStepError(RuntimeError):
    """A meta-step that would leave theta with numbers that are not finite."""


class LearnerCore:
    """Filters, normalises, aggregates and applies meta-gradients (VeLO D.4, E.1).

    ``ordered`` is for synchronous runs: contributions are summed in the order of their workers' names instead of the
    order of arrival, so that theta does not depend on who was faster.
    """

    def __init__(
        self,
        lopt: LearnedOptimizer,
        theta: Theta,
        config: MetaOptimizerConfig,
        *,
        run: str,
        incarnation: int,
        families: list[str],
        ordered: bool = False,
    ) -> None:
        self.lopt, self.config, self.run, self.incarnation, self.ordered = lopt, config, run, incarnation, ordered
        self.version = 0
        self.books = {family: Account() for family in [*families, OTHER_FAMILY]}
        self.update_norm = 0.0
        self.last_malformation = ""
        self._frozen = theta
        self._flat = lopt.spec.flatten(theta).clone().requires_grad_()
        self._optimizer = _meta_optimizer(self._flat, config)
        self._sums: dict[str, Tensor] = {}
        self._waiting = 0
        self._sequences: OrderedDict[str, int] = OrderedDict()

    @property
    def theta(self) -> Theta:
        """The current meta-parameters."""
        return self.lopt.spec.unflatten(self._flat.detach().clone(), self._frozen)

    @property
    def flat(self) -> npt.NDArray[np.float32]:
        """The trainable part of theta (D,); a copy."""
        copy: npt.NDArray[np.float32] = self._flat.detach().numpy().copy()
        return copy

    def submit(self, gradient: MetaGradient) -> Verdict:
        """Judge one meta-gradient and, if it is accepted, add it to the aggregate of the next meta-step."""
        verdict = self._judge(gradient)
        known = isinstance(gradient.family, str) and gradient.family in self.books
        account = self.books[gradient.family if known else OTHER_FAMILY]
        account.received += 1
        if verdict is not Verdict.ACCEPTED:
            account.dropped[verdict] += 1
            return verdict
        account.waiting += 1
        self._waiting += 1
        account.inner_steps += gradient.inner_steps
        self._sequences[gradient.worker] = gradient.sequence
        self._sequences.move_to_end(gradient.worker)
        if len(self._sequences) > REMEMBERED_WORKERS:
            self._sequences.popitem(last=False)
        self._add(gradient)
        return verdict

    def _judge(self, gradient: MetaGradient) -> Verdict:
        malformation = gradient.malformation(self.lopt.spec.trainable_size)
        if malformation is None and gradient.family not in self.books:
            malformation = f"family = {gradient.family!r}: expected one of {', '.join(self.books)}"
        if malformation is not None:
            self.last_malformation = malformation
            return Verdict.MALFORMED
        if gradient.run != self.run or gradient.incarnation != self.incarnation:
            return Verdict.WRONG_RUN
        if gradient.sequence <= self._sequences.get(gradient.worker, -1):
            return Verdict.DUPLICATE
        if gradient.version > self.version:
            return Verdict.FUTURE
        if self.version - gradient.version > self.config.max_staleness:
            return Verdict.STALE
        if not (math.isfinite(gradient.mean_loss) and bool(np.isfinite(gradient.dense).all())):
            return Verdict.NON_FINITE
        if self._waiting >= CAPACITY_BATCHES * self.config.meta_batch:
            return Verdict.FULL
        return Verdict.ACCEPTED

    def _add(self, gradient: MetaGradient) -> None:
        # float64, so that the sum of many is as good as its terms
        vector = torch.from_numpy(gradient.dense.astype(np.float64))
        if self.config.normalize == "unit":
            norm = vector.norm()
            vector = vector / norm if norm > 0 else vector
        lane = gradient.worker if self.ordered else ""
        self._sums[lane] = self._sums[lane] + vector if lane in self._sums else vector

    def ready(self) -> bool:
        """Whether enough meta-gradients wait for a meta-step."""
        return self._waiting >= self.config.meta_batch

    def step(self) -> int:
        """One meta-step with everything that waits; returns the new version.

        Raises ``MetaStepError``, with theta and the books as they were, if theta would stop being finite.
        """
        if not self._waiting:
            raise ValueError("no meta-gradient waits: nothing to step with")
        total = torch.stack([self._sums[lane] for lane in sorted(self._sums)]).sum(0)
        gradient = (total / self._waiting).to(torch.float32)
        if self.config.clip_value is not None:
            gradient = gradient.clamp(-self.config.clip_value, self.config.clip_value)
        if self.config.clip_norm is not None:
            gradient = gradient * min(1.0, self.config.clip_norm / max(float(gradient.norm()), 1e-30))
        before = self._flat.detach().clone()
        self._flat.grad = gradient
        self._optimizer.step()
        if not bool(torch.isfinite(self._flat.detach()).all()):
            with torch.no_grad():
                self._flat.copy_(before)
            raise MetaStepError(f"meta-step {self.version + 1} would make theta not finite: lower learning_rate?")
        self.update_norm = float((self._flat.detach() - before).norm())
        for account in self.books.values():
            account.applied += account.waiting
            account.waiting = 0
        self._sums, self._waiting = {}, 0
        self.version += 1
        return self.version

    def balanced(self) -> bool:
        """Whether received = applied + waiting + dropped for every family, and waiting is what the aggregate holds."""
        accounts = self.books.values()
        return all(account.balanced() for account in accounts) and self._waiting == sum(a.waiting for a in accounts)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but theta that a resumed learner needs: tensors and JSON. Waiting contributions are included."""
        tensors = {f"sum:{lane}": total for lane, total in self._sums.items()}
        for name, value in self._optimizer.state.get(self._flat, {}).items():
            tensors[f"optimizer:{name}"] = torch.as_tensor(value)
        books = {family: vars(account) for family, account in self.books.items()}
        return tensors, {"version": self.version, "books": json.loads(json.dumps(books))}

    def restore(self, theta: Theta, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Continue from ``state()`` and its theta; families that the run no longer has keep their books."""
        self.lopt.spec.check(theta)
        self._frozen = theta
        with torch.no_grad():
            self._flat.copy_(self.lopt.spec.flatten(theta))
        self._optimizer = _meta_optimizer(self._flat, self.config)
        kept = {key.partition(":")[2]: value for key, value in tensors.items() if key.startswith("optimizer:")}
        if kept:
            self._optimizer.state[self._flat] = kept
        self._sums = {key.partition(":")[2]: value for key, value in tensors.items() if key.startswith("sum:")}
        self.version = record["version"]
        self.books |= {family: Account(**account) for family, account in record["books"].items()}
        self._waiting = sum(account.waiting for account in self.books.values())


def _meta_optimizer(flat: Tensor, config: MetaOptimizerConfig) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    if config.name == "adam":
        return torch.optim.Adam([flat], lr=config.learning_rate, betas=betas, eps=config.eps)
    return torch.optim.AdamW(
        [flat], lr=config.learning_rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay
    )
