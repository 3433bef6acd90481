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
from lopt.velo import Velo


def load(
    source: str | os.PathLike[str], architecture: str | None = None, **arguments: Argument
) -> Callable[..., Optimizer]:
    """The learned optimizer at ``source`` (a preset, a path, a URL or a hub id: see ``read``), ready for parameters.

    Call the result as you would call a class of ``torch.optim``: parameters first, then ``Optimizer``'s keywords.
    Raises ``CheckpointError`` where there is none or it is damaged.
    """
    lopt, theta, _ = read(source, architecture, **arguments)
    return functools.partial(Optimizer, lopt=lopt, theta=theta)


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
    "Velo",
    "build",
    "decode",
    "describe",
    "encode",
    "export_pylo",
    "from_hub",
    "load",
    "mup",
    "push_to_hub",
    "read",
    "theta_from_jax",
]
