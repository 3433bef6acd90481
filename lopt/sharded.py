"""Learned optimizers over parameters that are spread over processes as DTensors (FSDP2, tensor parallelism).

Owns how a rule that looks at whole tensors is computed where every process holds parts of them, with the same result
as on one process. ``sharded(rule)`` has the ``init_state`` and ``apply`` of a ``LearnedOptimizer``; parameters,
gradients and leaves of the state may be DTensors, of any mix of ``Shard`` and ``Replicate`` and with parts of unequal
size or none. There are three ways:

- ``Elementwise``: rules that look at one parameter at a time run on every part by itself, without communication.
- ``PerParameter`` (small_fc_lopt, muLO, VeLO, Celo): the parts' sums are added up, in two all-reduces per step and mesh
  dimension whatever the number of tensors. The accumulators are cut like their parameters.
- ``Gathered``: every other rule runs on the whole tensors on every process. It costs an all-gather of parameters and
  gradients per step, and the memory and state of an optimizer that is not sharded.

All are collectives: every process calls them with the same tensors in the same order. State that belongs to no
parameter is the same on all processes, and plain tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lopt import fp32
from lopt.accumulators import AxisMeans, Factored, Statistics, as_vector, factored_axes, update_accumulators
from lopt.base import LearnedOptimizer, Params, State, Theta, move
from lopt.chunked import chunk_axis, chunks, outputs
from lopt.features import moments, normalizer, square_sums
from lopt.layout import Key, Layout, Sums, add_up, local
from lopt.per_parameter import Network, PerParameterRule, step
from lopt.velo import Velo

ACCUMULATORS = ("m", "v", "row", "col", "diag")


class Sharded(ABC):
    """A rule for tensors of which this process may hold parts only."""

    @abstractmethod
    def init_state(self, theta: Theta, params: Params, num_steps: int) -> State:
        """As ``LearnedOptimizer.init_state``."""

    @abstractmethod
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
        """As ``LearnedOptimizer.apply``; ``loss`` is the same on all processes."""


def sharded(rule: LearnedOptimizer) -> Sharded:
    """The way to apply this rule."""
    if isinstance(rule, PerParameterRule):
        return PerParameter(rule)
    return Elementwise(rule) if rule.elementwise else Gathered(rule)


class Elementwise(Sharded):
    """Every part by itself. Leaves of the state that belong to a tensor end in its shape."""

    def __init__(self, rule: LearnedOptimizer) -> None:
        self.rule = rule

    def init_state(self, theta: Theta, params: Params, num_steps: int) -> State:
        layouts = {name: Layout.of(p) for name, p in params.items()}
        parts = {name: layouts[name].part(p) for name, p in params.items()}
        return self._wrapped(self.rule.init_state(theta, _fp32(parts), num_steps), layouts)

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
        layouts = {name: Layout.of(p) for name, p in params.items()}
        parts, grad_parts = ({name: layouts[name].part(x) for name, x in xs.items()} for xs in (params, grads))
        cut = {key: layout.part(state[key]) for key, layout in self._leaves(state, layouts)}
        moved = _fp32(parts)
        new_state = self.rule.apply(theta, state | cut, moved, _fp32(grad_parts), loss, lr, weight_decay)
        _write_back(parts, moved)
        return self._wrapped(new_state, layouts)

    def _wrapped(self, state: State, layouts: dict[str, Layout]) -> State:
        return state | {key: layout.wrap(state[key]) for key, layout in self._leaves(state, layouts)}

    def _leaves(self, state: State, layouts: dict[str, Layout]) -> Iterator[tuple[str, Layout]]:
        """The leaves, whole or in parts, that belong to a tensor: their kind is there for every tensor."""
        kinds = dict.fromkeys(key.partition("/")[0] for key in state)
        for kind in [kind for kind in kinds if all(f"{kind}/{name}" in state for name in layouts)]:
            for name, layout in layouts.items():
                rank, leaf = len(layout.shape), state[f"{kind}/{name}"]
                lead = leaf.ndim - rank
                yield f"{kind}/{name}", layout.leaf((*leaf.shape[:lead], *layout.shape), [*[None] * lead, *range(rank)])


class Gathered(Sharded):
    """Every process computes all of it and keeps its part."""

    def __init__(self, rule: LearnedOptimizer) -> None:
        self.rule = rule

    def init_state(self, theta: Theta, params: Params, num_steps: int) -> State:
        return self.rule.init_state(theta, _fp32(_whole(params)), num_steps)

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
        whole = _whole(params)
        moved = _fp32(whole)
        new_state = self.rule.apply(theta, state, moved, _fp32(_whole(grads)), loss, lr, weight_decay)
        _write_back(whole, moved)
        for name, p in params.items():
            layout = Layout.of(p)
            layout.part(p).copy_(layout.part(whole[name]))
        return new_state


def _whole(tensors: Params) -> Params:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors.items()}


class PerParameter(Sharded):
    """The rules of ``per_parameter``, their means over a tensor from sums that are added up."""

    def __init__(self, rule: PerParameterRule) -> None:
        self.rule = rule

    def init_state(self, theta: Theta, params: Params, num_steps: int) -> State:
        layouts = {name: Layout.of(p) for name, p in params.items()}
        device = next(iter(params.values())).device
        # the accumulators start at zero: only their shapes are looked at, and those of whole tensors
        state = self.rule.init_particles(
            _with_particle(theta), _shapes(layouts), torch.tensor([num_steps], device=device)
        )
        found = {}
        for key, leaf in state.items():
            if not leaf.is_meta:
                found[key] = leaf.squeeze(0)
                continue
            name = _tensor(key)
            axes = _kept_axes(key, layouts[name].shape)
            part = layouts[name].part(params[name])
            sizes = [
                size if axis is None else part.shape[axis] for size, axis in zip(leaf.shape[1:], axes, strict=True)
            ]
            zeros = torch.zeros(sizes, dtype=leaf.dtype, device=device)
            found[key] = layouts[name].leaf(leaf.shape[1:], axes).wrap(zeros)
        return found

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
        layouts = {name: Layout.of(p) for name, p in params.items()}
        state = state | {
            key: layouts[_tensor(key)].leaf(leaf.shape, _kept_axes(key, layouts[_tensor(key)].shape)).place(leaf)
            for key, leaf in state.items()
            if key.partition("/")[0] in ACCUMULATORS
        }
        own, own_grads = ({name: layouts[name].part(x) for name, x in xs.items()} for xs in (params, grads))
        moved, own_grads = _fp32(own), _fp32(own_grads)
        parts = [_Part(self.rule, name, layouts[name], moved[name], own_grads[name], state) for name in params]
        totals = add_up({key: share for part in parts for key, share in part.axis_sums().items()})
        network, new_state = self._network(theta, state, layouts, loss, totals)
        for t, part in enumerate(parts):
            part.accumulate(network.of_tensor(t), totals)
        totals = add_up({key: share for part in parts for key, share in part.column_sums().items()})
        for part, rate, decay in zip(parts, lr, weight_decay, strict=True):
            part.move(totals, rate, decay)
        _write_back(own, moved)
        return state | {key: leaf.squeeze(0) for key, leaf in new_state.items()}

    def _network(
        self, theta: Theta, state: State, layouts: dict[str, Layout], loss: Tensor, totals: dict[Key, Tensor]
    ) -> tuple[Network, State]:
        """This step's network, from the tensors' shapes and, for VeLO, statistics: it sees no parameter itself."""
        shapes = _shapes(layouts)
        replicated = _with_particle({key: leaf for key, leaf in state.items() if not isinstance(leaf, DTensor)})
        seen = (_with_particle(theta), replicated, shapes, shapes, loss.unsqueeze(0))
        if not isinstance(self.rule, Velo):
            return self.rule.network(*seen)
        sums = torch.stack([totals["moments", name] / prod(layout.shape) for name, layout in layouts.items()])
        p_square, means, squares = torch.split(sums, [1, 4, 4], dim=-1)
        statistics = torch.cat([p_square, means, (squares - means.square()).clamp_min(0)], dim=-1)
        return self.rule.network(*seen, statistics=statistics.float().unsqueeze(0))


class _Part:
    """What this process does of a step for its part of one tensor, which may be empty.

    All its tensors have the particle axis in front, of size one, as the rules' own code expects.
    """

    def __init__(self, rule: PerParameterRule, name: str, layout: Layout, p: Tensor, g: Tensor, state: State) -> None:
        self.rule, self.name, self.layout = rule, name, layout
        self.shape = layout.shape or (1,)
        self.axes = factored_axes(self.shape)
        self.p, self._g = (as_vector(x.unsqueeze(0)) for x in (p, g))
        keys = [f"{kind}/{name}" for kind in ACCUMULATORS]
        self.state = {key: local(state[key]).unsqueeze(0) for key in keys if key in state}

    @property
    def g(self) -> Tensor:
        return self.rule.clipped(self._g)

    def axis_sums(self) -> Sums:
        """What the factored moments need, and VeLO's LSTM, before the tensor's network is known."""
        sums: Sums = {}
        if isinstance(self.rule, Velo):
            sums["moments", self.name] = self._moments(), self.layout.cuts(*range(len(self.shape)))
        if self.axes is None:
            return sums
        d1, d0 = self.axes
        square = self.g.square() + 1e-30
        old_row = self.state[f"row/{self.name}"].unsqueeze(d0 + 2)
        return sums | {
            ("row", self.name): (square.sum(d0 + 1), self.layout.cuts(d0)),
            ("col", self.name): (square.sum(d1 + 1), self.layout.cuts(d1)),
            ("both", self.name): (square.sum((d0 + 1, d1 + 1), keepdim=True), self.layout.cuts(d0, d1)),
            ("old_row", self.name): (old_row.sum(d1 + 2, keepdim=True), self.layout.cuts(d1)),
        }

    def _moments(self) -> Tensor:
        """Sums of p^2, of m (3) and v, of their squares: (9,)."""
        n = self.p.numel()
        if n == 0:
            return torch.zeros(9, dtype=torch.float64, device=self.p.device)
        rows = [moments(self.state[f"{kind}/{self.name}"].flatten(0, 1)) for kind in "mv"]
        mean, variance = (torch.cat(x).double() for x in zip(*rows, strict=True))
        p_square = self.p.flatten(1).square().mean(-1).double()
        return n * torch.cat([p_square, mean, variance + mean.square()])

    def accumulate(self, network: Network, totals: dict[Key, Tensor]) -> None:
        """The accumulators after this step's gradient, in place."""
        whole = None
        if self.axes is not None:
            n1, n0 = (self.shape[axis] for axis in self.axes)
            row, col, both, old_row = (totals[kind, self.name] for kind in ("row", "col", "both", "old_row"))
            whole = AxisMeans(self.axes, row / n0, col / n1, both / (n0 * n1), old_row / n1)
        new, statistics = update_accumulators(self.name, self.state, self.g, network.decays, whole)
        for key, leaf in new.items():
            self.state[key].copy_(leaf)
        # from here on they are those in the state: new ones of all tensors at a time would be as large as it
        diag = self.state.get(f"diag/{self.name}")
        factored = statistics.factored if diag is None else Factored(diag, diag, None, None)
        self.statistics = Statistics(self.state[f"m/{self.name}"], self.state[f"v/{self.name}"], factored)
        self.network = network

    def column_sums(self) -> Sums:
        """Sum of squares of every column and how many numbers it is over: (2, columns).

        A column of rows or columns that several processes have counts as often in both.
        """
        axis, factored = chunk_axis(self.p), self.statistics.factored
        repeated = [
            kind for kind, x in (("row", factored.row), ("col", factored.col)) if x.shape[axis + 1] < self.p.shape[axis]
        ]
        total = torch.zeros(2, 0)
        for i, chunk in enumerate(chunks(self.p, self.g, self.statistics)):
            found = []
            for column, block in zip(self.rule.columns, self.rule.blocks(*chunk), strict=True):
                sums, count = square_sums(block)
                # every chunk has all of a row that is not cut: it counts once, as a tensor's chunks differ in number
                counts = i == 0 or column.partition("_")[0] not in repeated
                found.append(torch.stack([sums.flatten().double(), torch.full_like(sums, count).flatten()]) * counts)
            self.widths = [x.shape[1] for x in found]
            total = torch.cat(found, dim=1) + (total if i else 0)
        return {("columns", self.name): (total, self.layout.cuts(*range(len(self.shape))))}

    def move(self, totals: dict[Key, Tensor], lr: float, weight_decay: float) -> None:
        """p <- p - lr (step + weight_decay p), in place."""
        sums, counts = totals["columns", self.name]
        mean_squares = torch.split((sums / counts).float().view(1, -1, 1), self.widths, dim=1)
        factor = self.network.factor
        if self.rule.parameter_scaled:
            factor = factor * torch.sqrt(mean_squares[self.rule.columns.index("p")].flatten() + 1e-9)
        scales = [normalizer(x) for x in mean_squares]
        network, blocks = self.network, self.rule.blocks
        out = outputs(network.weights, network.biases, blocks, self.p, self.g, self.statistics, scales=scales)
        move({self.name: self.p}, {self.name: self.p - step(out, factor)}, [lr], [weight_decay])


def _kept_axes(key: str, shape: tuple[int, ...]) -> list[int | None]:
    """Which axis of the whole tensor each dimension of an accumulator is: first the decays, which are none of them."""
    axes = factored_axes(shape)
    if not shape:
        return [None, None]  # a vector of one element
    missing = dict(zip(("col", "row"), axes, strict=True)).get(key.partition("/")[0]) if axes else None
    return [None, *(axis for axis in range(len(shape)) if axis != missing)]


def _tensor(key: str) -> str:
    """The tensor that a leaf ``kind/name`` of the state belongs to."""
    return key.partition("/")[2]


def _fp32(tensors: Params) -> Params:
    """What a rule computes with: see ``fp32``."""
    return dict(zip(tensors, fp32.tensors(list(tensors.values())), strict=True))


def _write_back(params: Params, moved: Params) -> None:
    """The inverse."""
    fp32.write_back(list(params.values()), list(moved.values()))


def _shapes(layouts: dict[str, Layout]) -> Params:
    """The whole tensors of one particle, without their numbers."""
    return {name: torch.empty(1, *layout.shape, device="meta") for name, layout in layouts.items()}


def _with_particle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
