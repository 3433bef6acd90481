"""The update that small_fc_lopt, muLO, VeLO and Celo share: one small MLP applied to every parameter.

Owns the step p <- p - f d exp(0.001 a) [rms(p)], (d, a) = MLP(normalised columns), over all tensors: the reference in
torch, cut into chunks so that its temporaries are bounded, and the choice between it and the fused kernels
(``lopt.kernels``), which compute the same. Never decides what the network is: a subclass does, once per step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lopt import kernels, trace
from lopt.accumulators import Decays, Statistics, align, as_vector, fixed_decays, update_accumulators
from lopt.base import LearnedOptimizer, Params, State, Stepper, Theta, move
from lopt.chunked import outputs
from lopt.features import EXP_MULT, columns


@dataclass(frozen=True)
class Network:
    """The MLP of one step. ``weights[i]`` is (P, n_i, n_i+1), or (P, T, n_i, n_i+1) with one network per tensor.

    ``biases`` alike; ``factor`` (P,) or (P, T) multiplies the step; the T tensors are in the order of ``params``.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    decays: Decays
    factor: Tensor

    def of_tensor(self, t: int) -> Network:
        """What tensor ``t`` sees: no axis T anywhere."""
        return replace(
            self,
            weights=[w[:, t] if w.ndim == 4 else w for w in self.weights],
            biases=[b[:, t] if b.ndim == 3 else b for b in self.biases],
            factor=self.factor[:, t] if self.factor.ndim == 2 else self.factor,
        )


class PerParameterRule(LearnedOptimizer):
    """A learned optimizer that applies one MLP to every parameter; see the module's docstring."""

    columns: ClassVar[tuple[str, ...]]
    """Names of the first layer's input blocks (``features.columns``), in its order."""
    diag_eps: ClassVar[float]
    max_gradient: ClassVar[float | None] = None
    """Gradients are clipped elementwise to +- this."""
    parameter_scaled: ClassVar[bool] = False
    """Whether the step is multiplied by the root mean square of the tensor's parameters."""

    @abstractmethod
    def network(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor, decays: Decays | None = None
    ) -> tuple[Network, State]:
        """The network of this step, and the leaves of the new state other than the accumulators.

        ``decays`` are ``self.decays(theta)`` where the caller has them from an earlier step.
        """

    def decays(self, theta: Theta) -> Decays:
        """The decays of the accumulators, which are the same in every step."""
        return fixed_decays(next(iter(theta.values())).device)

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        network, new_state = self.network(theta, state, params, grads, loss)
        if kernels.serves(self, params, network.weights):
            new_params, accumulators = kernels.update(self, network, state, params, grads)
            return new_params, new_state | accumulators
        new_params, accumulators = self._reference(network, state, params, grads)
        return new_params, new_state | accumulators

    def stepper(self, theta: Theta, state: State, params: Params) -> Stepper:
        """In place, of a copy of these particles, where the kernels can."""
        weights = [leaf for name, leaf in theta.items() if name.startswith("mlp.w")]
        if kernels.serves(self, params, weights) and kernels.on_cpu(params):
            return _InPlace(self, theta, state, params)
        return super().stepper(theta, state, params)

    def _reference(self, network: Network, state: State, params: Params, grads: Params) -> tuple[Params, State]:
        """What the kernels compute, tensor by tensor in torch."""
        new_params: Params = {}
        new_state: State = {}
        for t, (name, param) in enumerate(params.items()):
            p, g = as_vector(param), as_vector(grads[name])
            moved, accumulators = self._update_tensor(network.of_tensor(t), name, state, p, g)
            new_params[name] = moved.reshape(param.shape)
            new_state |= accumulators
        return new_params, new_state

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
        """As the base's, without any copy where the kernels serve: parameters and accumulators are overwritten."""
        one_theta, one_state, one_params, one_grads = (
            {name: leaf.unsqueeze(0) for name, leaf in tree.items()} for tree in (theta, state, params, grads)
        )
        network, new_state = self.network(one_theta, one_state, one_params, one_grads, loss.unsqueeze(0))
        if kernels.serves(self, one_params, network.weights):
            kernels.apply(self, network, one_state, one_params, one_grads, lr, weight_decay)
        else:
            new_params, accumulators = self._reference(network, one_state, one_params, one_grads)
            move(one_params, new_params, lr, weight_decay)
            new_state |= accumulators
        return state | {name: leaf.squeeze(0) for name, leaf in new_state.items()}

    def _update_tensor(self, network: Network, name: str, state: State, p: Tensor, g: Tensor) -> tuple[Tensor, State]:
        """One tensor (P, *s) of all particles."""
        g = self.clipped(g)
        accumulators, statistics = update_accumulators(name, state, g, network.decays)
        factor = network.factor
        if self.parameter_scaled:
            factor = factor * torch.sqrt(p.flatten(1).square().mean(-1) + 1e-9)
        out = outputs(network.weights, network.biases, self.blocks, p, g, statistics)
        trace.note_outputs(name, out)
        return p - step(out, factor), accumulators

    def clipped(self, g: Tensor) -> Tensor:
        return g if self.max_gradient is None else g.clamp(-self.max_gradient, self.max_gradient)

    def blocks(self, p: Tensor, g: Tensor, statistics: Statistics) -> list[Tensor]:
        """The input columns of one tensor (P, *s), in the first layer's order."""
        blocks = columns(p, g, statistics, diag_eps=self.diag_eps)
        return [blocks[column] for column in self.columns]


class _InPlace(Stepper):
    """Copies of the particles, which the kernels overwrite."""

    rule: PerParameterRule

    def __init__(self, rule: PerParameterRule, theta: Theta, state: State, params: Params) -> None:
        state, params = (
            {name: leaf.clone(memory_format=torch.contiguous_format) for name, leaf in tree.items()}
            for tree in (state, params)
        )
        super().__init__(rule, theta, state, params)
        self._decays = rule.decays(theta)
        self._kernel = kernels.cpu.InPlace(rule, state, params)

    def step(self, grads: Params, loss: Tensor) -> None:
        network, new_state = self.rule.network(self.theta, self.state, self.params, grads, loss, self._decays)
        self._kernel.step(network, grads)
        self.state |= new_state


def step(out: Tensor, factor: Tensor) -> Tensor:
    """factor d exp(0.001 a) of the network's first two outputs: (P, n_out, *s), (P,) -> (P, *s)."""
    return out[:, 0] * torch.exp(out[:, 1] * EXP_MULT) * align(factor, out[:, 0])
