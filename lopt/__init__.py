"""Learned optimizers: pure update rules, their checkpoints, and the ``torch.optim.Optimizer`` made of them.

    import lopt
    opt = lopt.load("runs/quick/optimizer.safetensors")(model.parameters(), num_steps=1000)
    opt.step(closure)                      # or: loss.backward(); opt.step(loss=loss)

Owns the mathematics of how things are trained. Imports torch and safetensors only: no Ray, no Hydra, no gRPC.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from lopt.adam import Adam
from lopt.base import LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaError, ThetaSpec
from lopt.celo import Celo
from lopt.checkpoint import CheckpointError, build, decode, encode, read
from lopt.interchange import theta_from_jax
from lopt.meta_gradient import MetaGradient
from lopt.optimizer import Optimizer
from lopt.small_fc import SmallFcLopt


def load(path_or_name: str) -> Callable[..., Optimizer]:
    """The learned optimizer at ``path_or_name`` (a preset, a path or an fsspec URL), ready to be given parameters.

    Call the result as you would call a class of ``torch.optim``: parameters first, then ``Optimizer``'s keywords.
    Raises ``CheckpointError`` where there is none or it is damaged.
    """
    lopt, theta, _ = read(path_or_name)
    return functools.partial(Optimizer, lopt=lopt, theta=theta)


__all__ = [
    "Adam",
    "Celo",
    "CheckpointError",
    "LearnedOptimizer",
    "MetaGradient",
    "Optimizer",
    "Params",
    "SmallFcLopt",
    "State",
    "Theta",
    "ThetaEntry",
    "ThetaError",
    "ThetaSpec",
    "build",
    "decode",
    "encode",
    "load",
    "read",
    "theta_from_jax",
]
