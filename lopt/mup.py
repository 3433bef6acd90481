"""Maximal update parametrisation: what learns well in a narrow model does so, unchanged, in a wide one.

Owns the width factors of muLO (Therien et al. 2024, arXiv:2406.00153) for torch models: initialisation, output
multiplier and the factor of each parameter's step. Never touches an update rule, and patches neither classes nor
packages. They fit every rule that, like Adam and small_fc_lopt, follows the gradient with steps whose size does not
depend on the width of a tensor; small_fc_lopt meta-trained with them is muLO.

    base = make_model(width=128)                                # a narrow twin, of which only the shapes matter
    model = make_model(width=4096)
    lopt.mup.init_(model, base, generator)                      # once, before training
    lopt.mup.scale_outputs_(model, base)                        # whenever the model is built
    opt = lopt.load("mulo.safetensors")(lopt.mup.param_groups(model, base))

A dimension is a width where a parameter's sizes in the model and in the base differ, and grows by their ratio; n is
the growth of the last one, which is the fan-in of a hidden weight. The table of muLO, relative to the base:

    parameter                         widths    initial std of layers     factor of the step   forward pass
    input weights, biases, all else   fan-out   1 / sqrt(fan-in); 0       1
    hidden weights                    both      1 / sqrt(fan-in)          1 / n
    output weights                    fan-in    1 / sqrt(base's fan-in)   1                    output / n

The authors' code has the fan-in where this has n: with weights of theirs, take a base of width one. It starts output
weights at zero and biases at N(0, 1), which the table allows as well. It divides what the output layer returns, bias
included; so does PyLO, which rewrites the installed ``mup`` package for it (that divides the layer's input). Here a
forward hook on the layer does. Left to the model: attention logits must be divided by the size of a head, not its root.
Under muP gradients shrink as 1 / n. small_fc_lopt sees them relative to their size over a tensor, but not below about
0.003, the root of its normalisers' epsilon: where they get there, multiply the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.checks import did_you_mean

Base = nn.Module | Mapping[str, Sequence[int]]
"""A model of the base's width, or the shapes of its parameters by name."""
Growth = dict[int, float]
"""By which factor each width of a parameter is larger than the base's."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight is (fan-out, fan-in, ...)."""


class WidthError(ValueError):
    """A base that is not the model's, or widths without a rule; names the parameter, what was found and expected."""


class OutputMultiplier:
    """Forward hook that multiplies what a layer returns."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self.factor


def init_(model: nn.Module, base: Base, generator: torch.Generator | None = None) -> None:
    """Initialise all linear and convolution layers as in the table, and nothing else (norms, tables, own parameters).

    Raises ``WidthError`` where the base does not fit.
    """
    for _, layer, growth in _layers(model, base):
        # the fan-in of the output layer is the base's, at any width
        fan_in = layer.weight[0].numel() / (growth[1] if _is_output(growth) else 1)
        nn.init.normal_(layer.weight, std=fan_in**-0.5, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def scale_outputs_(model: nn.Module, base: Base) -> None:
    """Have all output layers multiply what they return by 1 / n; a second call replaces the first.

    The multiplier is no part of the model's state dict. Raises ``WidthError`` where the base does not fit.
    """
    for _, layer, growth in _layers(model, base):
        if _is_output(growth):
            if (multiplier := _multiplier(layer)) is None:
                multiplier = OutputMultiplier(1.0)
                layer.register_forward_hook(multiplier)
            multiplier.factor = 1 / growth[1]


def param_groups(model: nn.Module, base: Base, *, lr: float = 1.0, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """All parameters of ``model`` in groups for an optimizer, their ``lr`` being the given one times the step's factor.

    They come with their names, as from ``named_parameters()``, for rules that go by them.
    ``weight_decay`` is divided by that factor: lr x weight_decay, the share lost in a step, is the same at any width.
    Raises ``WidthError`` where the base does not fit, and for an output layer that lacks its multiplier.
    """
    for name, layer, growth in _layers(model, base):
        if _is_output(growth) and _multiplier(layer) is None:
            raise WidthError(
                f"output layer {name!r} has no multiplier: call lopt.mup.scale_outputs_(model, base) first"
            )
    groups: dict[float, dict[str, Any]] = {}
    all_growth = _growth(model, base)
    for name, p in model.named_parameters():
        growth = all_growth[p]
        factor = 1 / growth[max(growth)] if len(growth) == 2 else 1.0
        group = groups.setdefault(factor, {"params": [], "lr": lr * factor, "weight_decay": weight_decay / factor})
        group["params"].append((name, p))
    return list(groups.values())


def _growth(model: nn.Module, base: Base) -> dict[nn.Parameter, Growth]:
    """Every parameter's widths."""
    shapes = {name: p.shape for name, p in base.named_parameters()} if isinstance(base, nn.Module) else base
    params = dict(model.named_parameters())
    for name in sorted(params.keys() ^ shapes.keys()):
        where, other = ("model", shapes) if name in params else ("base", params)
        raise WidthError(f"parameter {name!r}: only the {where} has it{did_you_mean(name, other)}")
    growth = {}
    for name, p in params.items():
        found, expected = tuple(p.shape), tuple(shapes[name])
        if len(found) != len(expected) or 0 in expected:
            raise WidthError(
                f"parameter {name!r} has shape {found}: expected as many dimensions as the base's {expected}"
            )
        growth[p] = {axis: n / n0 for axis, (n, n0) in enumerate(zip(found, expected, strict=True)) if n != n0}
        if len(growth[p]) > 2:
            raise WidthError(f"parameter {name!r} has shape {found}: expected at most two widths (base {expected})")
    return growth


def _layers(model: nn.Module, base: Base) -> Iterator[tuple[str, Any, Growth]]:
    """Name, layer and widths of the weight of all linear and convolution layers."""
    growth = _growth(model, base)
    for name, layer in model.named_modules():
        # a weight that is computed from others (weight norm, say) is no parameter and is left alone
        if isinstance(layer, LAYERS) and isinstance(layer.weight, nn.Parameter):
            yield name, layer, growth[layer.weight]


def _is_output(growth: Growth) -> bool:
    return set(growth) == {1}


def _multiplier(layer: nn.Module) -> OutputMultiplier | None:
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, OutputMultiplier)), None)
