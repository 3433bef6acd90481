"""The fixed tasks by name: those of VeLO's and Celo's benchmarks, and our copies of Celo's on embedded data.

Owns: the one table of them. Must never change what a module of the folder says.
"""

from __future__ import annotations

from configs.checks import ConfigError, did_you_mean
from tasks.fixed import (
    embedded,
    es_wrapped,
    fast,
    image_conv,
    image_mlp,
    lopt,
    lopt_pes,
    mlp_ae,
    mlp_mixer,
    resnet,
    rnn_lm,
    transformer_lm,
    vit,
)
from tasks.static import StaticConfig

MODULES = (
    image_mlp,
    image_conv,
    mlp_ae,
    resnet,
    vit,
    mlp_mixer,
    rnn_lm,
    transformer_lm,
    lopt,
    lopt_pes,
    es_wrapped,
    fast,
    embedded,
)

TASKS: dict[str, StaticConfig] = {name: static for module in MODULES for name, static in module.TASKS.items()}
"""Every fixed task by its name, which is also a metric label and part of file names."""


def fixed_task(name: str) -> StaticConfig:
    """The static config of the fixed task ``name``. Raises ConfigError for an unknown one."""
    if name not in TASKS:
        raise ConfigError("task", name, f"the name of a fixed task{did_you_mean(name, TASKS)}")
    return TASKS[name]
