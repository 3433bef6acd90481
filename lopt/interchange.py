"""Weights of the JAX originals, by their own names.

Owns the renaming between learned_optimization's / Celo's parameter trees and paceline's theta. Never reads files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import torch

from lopt.base import LearnedOptimizer, Theta, ThetaError

_CELO = {
    "mlp.b0": "ff_mod_stack/b0",
    "mlp.w1": "ff_mod_stack/w1",
    "mlp.b1": "ff_mod_stack/b1",
    "mlp.w2": "ff_mod_stack/w2",
    "mlp.b2": "ff_mod_stack/b2",
    "mix.w": "rnn_params/linear_1/w",
    "mix.b": "rnn_params/linear_1/b",
    "input.w": "rnn_params/linear_2/w",
    "input.b": "rnn_params/linear_2/b",
    "lstm.w": "rnn_params/rnn/linear/w",
    "lstm.b": "rnn_params/rnn/linear/b",
    "lstm.hidden": "lstm_init_state/hidden",
    "lstm.cell": "lstm_init_state/cell",
    "step_size.w": "rnn_params/step_size/w",
    "step_size.b": "rnn_params/step_size/b",
    "dead.mix.w": "rnn_params/linear/w",
    "dead.mix.b": "rnn_params/linear/b",
    "dead.controls.w": "rnn_params/rnn_to_controls/w",
    "dead.controls.b": "rnn_params/rnn_to_controls/b",
}
_SMALL_FC = {f"mlp.{leaf}": f"nn/{leaf}" for leaf in ("w0", "b0", "w1", "b1", "w2", "b2")} | {
    name: name for name in ("momentum_decays", "rms_decays", "adafactor_decays")
}


def theta_from_jax(lopt: LearnedOptimizer, leaves: Mapping[str, np.ndarray]) -> Theta:
    """theta of ``lopt`` from the original's leaves, named by their path (``/`` or ``|`` between parts, ``~`` ignored).

    Raises ``ThetaError`` for an architecture without a known original, and where a leaf is missing, unknown or of
    another shape.
    """
    found = {re.sub(r"[|/]+", "/", name.replace("~", "")).strip("/"): leaf for name, leaf in leaves.items()}
    if lopt.name == "celo":
        names = dict(_CELO)
        blocks = [f"ff_mod_stack/w0__{i}" for i in range(14)]
        if missing := [block for block in blocks if block not in found]:
            raise ThetaError(f"leaves {missing} of the original are missing")
        found["ff_mod_stack/w0"] = np.concatenate([found.pop(block) for block in blocks], axis=-2)
        names["mlp.w0"] = "ff_mod_stack/w0"
    elif lopt.name == "small_fc_lopt":
        names = _SMALL_FC
    else:
        raise ThetaError(f"no JAX original is known for {lopt.name!r}")
    if set(names.values()) != set(found):
        difference = sorted(set(names.values()) ^ set(found))
        raise ThetaError(f"leaves of another architecture: {difference} are missing or unknown")
    shapes = {entry.name: entry.shape for entry in lopt.spec.entries}
    theta = {}
    for name, source in names.items():
        leaf = torch.from_numpy(np.array(found[source], dtype=np.float32))
        if leaf.numel() != math.prod(shapes[name]):
            raise ThetaError(f"leaf {source!r} has shape {tuple(leaf.shape)}: expected {shapes[name]}")
        # Celo's originals have a leading axis of size one (a bank of one rule, a batch of one state)
        theta[name] = leaf.reshape(shapes[name])
    lopt.spec.check(theta)
    return theta
