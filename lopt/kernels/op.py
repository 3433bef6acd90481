"""The update of the per-parameter rules as one operation that torch's compilers see as such.

Owns ``paceline::per_parameter_update``: its schema, its shapes for tracing, and the packing of a step into lists of
tensors. What it computes is ``PerParameterRule``'s: by the kernels where they serve, else by the reference. Code that
runs eagerly gains nothing from it and calls the rule. It is not differentiated.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import lopt
from lopt import kernels
from lopt.accumulators import factored_axes
from lopt.base import Params, State

if TYPE_CHECKING:
    from lopt.per_parameter import Network, PerParameterRule


def update(
    rule: PerParameterRule, network: Network, state: State, params: Params, grads: Params
) -> tuple[Params, State]:
    """One step of every particle: new parameters and accumulators, as ``kernels.update``, also while compiling."""
    names = [f"{kind}/{name}" for name, p in params.items() for kind in _kinds(p)]
    out = torch.ops.paceline.per_parameter_update(
        text(rule),
        list(params.values()),
        [grads[name] for name in params],
        [state[name] for name in names],
        list(network.weights),
        list(network.biases),
        list(network.decays),
        network.factor,
    )
    return dict(zip(params, out, strict=False)), dict(zip(names, out[len(params) :], strict=True))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def text(rule: PerParameterRule) -> str:
    """The arguments of ``lopt.build`` for a rule like this."""
    return json.dumps({"name": rule.name, **rule.arguments})


@torch.library.custom_op("paceline::per_parameter_update", mutates_args=())
def per_parameter_update(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    accumulators: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    decays: list[Tensor],
    factor: Tensor,
) -> list[Tensor]:
    """New parameters and then accumulators, contiguous. ``rule`` is JSON: the arguments of ``lopt.build``.

    Tensors as in ``per_parameter.Network``; ``accumulators`` of every parameter in turn are m, v and then either row
    and col or diag.
    """
    from lopt.per_parameter import Network

    built = _built(rule)
    network = Network(weights, biases, (decays[0], decays[1], decays[2]), factor)
    named = {str(i): p for i, p in enumerate(params)}
    names = [f"{kind}/{i}" for i, p in named.items() for kind in _kinds(p)]
    state = dict(zip(names, accumulators, strict=True))
    named_grads = dict(zip(named, grads, strict=True))
    if kernels.serves(built, named, weights):
        new_params, new_state = kernels.update(built, network, state, named, named_grads)
    else:
        new_params, new_state = built._reference(network, state, named, named_grads)
    return [leaf.contiguous() for leaf in (*new_params.values(), *(new_state[name] for name in names))]


@per_parameter_update.register_fake
def _shapes(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    accumulators: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    decays: list[Tensor],
    factor: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in (*params, *accumulators)]


def _kinds(param: Tensor) -> tuple[str, ...]:
    """The accumulators of a parameter (P, ...)."""
    factored = factored_axes(tuple(param.shape[1:])) is not None
    return ("m", "v", "row", "col") if factored else ("m", "v", "diag")


@cache
def _built(rule: str) -> PerParameterRule:
    built: PerParameterRule = lopt.build(**json.loads(rule))  # type: ignore[assignment]
    return built
