"""What an optimizer is, in ten lines that a practitioner can act on.

Owns the summary of an architecture or of published weights. States nothing that it can compute: the memory is measured
on the state of a matrix. Never changes what it describes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lopt.base import Argument, LearnedOptimizer
from lopt.checkpoint import ARCHITECTURES, build
from lopt.constants import constants
from lopt.interchange.reading import presets, read

SIDE = 1024


@dataclass(frozen=True)
class Description:
    """One optimizer; ``print`` it. ``trainable`` and ``frozen`` count meta-parameters; ``provenance`` is None for an
    architecture without weights; ``state_bytes_per_parameter`` is that of a 1024 x 1024 matrix, fp32."""

    architecture: str
    arguments: Mapping[str, Argument]
    paper: str
    trainable: int
    frozen: int
    inputs: tuple[str, ...]
    needs_loss: bool
    needs_horizon: bool
    state_bytes_per_parameter: float
    provenance: Mapping[str, Any] | None

    @classmethod
    def of(cls, lopt: LearnedOptimizer, provenance: Mapping[str, Any] | None = None) -> Description:
        """Describe an optimizer at hand."""
        return cls(
            architecture=lopt.name,
            arguments=lopt.arguments,
            paper=lopt.paper,
            trainable=lopt.spec.trainable_size,
            frozen=lopt.spec.size - lopt.spec.trainable_size,
            inputs=_inputs(lopt),
            needs_loss=lopt.needs_loss,
            needs_horizon=lopt.needs_horizon,
            state_bytes_per_parameter=_state_bytes_per_parameter(lopt),
            provenance=provenance,
        )

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        needs = [
            text
            for text, needed in (("the training loss", self.needs_loss), ("num_steps", self.needs_horizon))
            if needed
        ]
        frozen = f" and {self.frozen:,} frozen" if self.frozen else ""
        rows = {
            "architecture": f"{self.architecture}({arguments})",
            "paper": self.paper,
            "meta-parameters": f"{self.trainable:,} trainable{frozen}",
            "inputs": ", ".join(self.inputs),
            "needs": " and ".join(needs) or "nothing but gradients",
            "memory": f"{self.state_bytes_per_parameter:.2f} bytes of state per parameter (fp32 matrix)",
        }
        for name, value in (self.provenance or {}).items():
            text = str(value)
            rows[name] = text if len(text) <= 200 and "\n" not in text else f"{len(text)} characters"
        width = max(map(len, rows)) + 2
        return "\n".join(f"{name:{width}}{text}" for name, text in rows.items())


def describe(source: str | os.PathLike[str], **arguments: Argument) -> Description:
    """Describe a preset, weights at any place that ``read`` knows, or an architecture by its name.

    ``arguments`` are an architecture's (``hidden_size=32``). Raises ``CheckpointError`` for what does not exist.
    """
    name = os.fspath(source)
    if name in ARCHITECTURES and (arguments or name not in presets()):
        return Description.of(build(name, **arguments))
    lopt, _, provenance = read(source)
    return Description.of(lopt, provenance)


def _inputs(lopt: LearnedOptimizer) -> tuple[str, ...]:
    stated = constants(lopt)
    columns = stated.get("columns")
    global_inputs = {
        "iteration": "timescales" in stated,
        "training loss": lopt.needs_loss,
        "fraction of num_steps": lopt.needs_horizon,
    }
    per_parameter = tuple(map(str, columns)) if isinstance(columns, list) else ("gradients",)
    return per_parameter + tuple(name for name, seen in global_inputs.items() if seen)


def _state_bytes_per_parameter(lopt: LearnedOptimizer) -> float:
    theta = lopt.init_theta(torch.Generator().manual_seed(0))
    state = lopt.init_state(theta, {"matrix": torch.zeros(SIDE, SIDE)}, num_steps=1)
    return sum(leaf.numel() * leaf.element_size() for leaf in state.values()) / SIDE**2
