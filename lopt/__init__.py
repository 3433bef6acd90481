"""Learned optimizers: pure update rules, their checkpoints, and the ``torch.optim.Optimizer`` made of them.

    import lopt
    opt = lopt.load("runs/quick/optimizer.safetensors")(model.parameters(), num_steps=1000)
    opt.step(closure)                      # or: loss.backward(); opt.step(loss=loss)

Owns the mathematics of how things are trained, and the files it is kept in. Never imports Ray, Hydra or gRPC.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lopt import mup
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaError, ThetaSpec
from lopt.celo import Celo
from lopt.celo2 import Celo2
from lopt.celo_adam import CeloAdam
from lopt.checkpoint import CheckpointError, build, decode, encode
from lopt.describe import Description, describe
from lopt.hand_designed import Adam
from lopt.interchange import export_pylo, from_hub, read, theta_from_jax
from lopt.interchange.publish import push_to_hub
from lopt.meta_gradient import MetaGradient
from lopt.mlp_lopt import MlpLopt
from lopt.mulo import MuLO
from lopt.nn_adam import NNAdam
from lopt.optimizer import Optimizer
from lopt.rnn_mlp import RnnMlp
from lopt.small_fc import SmallFcLopt
from lopt.star import Star
from lopt.trace import Trace, record
from lopt.velo import Velo

if TYPE_CHECKING:
    from lopt.figures import plot


def load(
    source: str | os.PathLike[str], architecture: str | None = None, **arguments: Argument
) -> Callable[..., Optimizer]:
    """The learned optimizer at ``source`` (a preset, a path, a URL or a hub id: see ``read``), ready for parameters.

    Call the result as you would call a class of ``torch.optim``: parameters first, then ``Optimizer``'s keywords.
    Raises ``CheckpointError`` where there is none or it is damaged.
    """
    lopt, theta, _ = read(source, architecture, **arguments)
    return functools.partial(Optimizer, lopt=lopt, theta=theta)


def __getattr__(name: str) -> Any:
    """``plot`` is imported by whoever asks for it: matplotlib takes longer than all the rest."""
    if name == "plot":
        from lopt.figures import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Adam",
    "Celo",
    "Celo2",
    "CeloAdam",
    "CheckpointError",
    "Description",
    "LearnedOptimizer",
    "MetaGradient",
    "MlpLopt",
    "MuLO",
    "NNAdam",
    "Optimizer",
    "Params",
    "RnnMlp",
    "SmallFcLopt",
    "Star",
    "State",
    "Theta",
    "ThetaEntry",
    "ThetaError",
    "ThetaSpec",
    "Trace",
    "Velo",
    "build",
    "decode",
    "describe",
    "encode",
    "export_pylo",
    "from_hub",
    "load",
    "mup",
    "plot",
    "push_to_hub",
    "read",
    "record",
    "theta_from_jax",
]
