"""What a run starts from: the learned optimizer that its configuration names, and the first theta.

Owns how ``configs.schema.LoptConfig`` becomes an architecture and meta-parameters. Never starts anything, never reads
a run's own checkpoints.
"""

from __future__ import annotations

import torch

import lopt
from configs.checks import ConfigError
from configs.schema import Config

STAGES = {"phase"}
"""Arguments that say which part of theta is trained. All others say what theta means."""


def build_lopt(config: Config) -> lopt.LearnedOptimizer:
    """The learned optimizer that ``config`` names. Raises ``lopt.CheckpointError`` if there is none such."""
    return lopt.build(config.lopt.name, **config.lopt.arguments)


def initial_theta(rule: lopt.LearnedOptimizer, config: Config) -> lopt.Theta:
    """Fresh meta-parameters from the run's seed, or those of ``lopt.init_from`` (another phase's, say).

    Raises ``ConfigError`` unless they were made for this architecture with these arguments.
    """
    source = config.lopt.init_from
    if source is None:
        return rule.init_theta(torch.Generator().manual_seed(config.run.seed))
    # weights in the originals' formats do not tell all their arguments: those that the user wrote are taken for them
    said = {name: value for name, value in config.lopt.arguments.items() if name not in STAGES}
    try:
        found, theta, _ = lopt.read(source, rule.name, **said)
    except lopt.CheckpointError as error:
        raise ConfigError("lopt.init_from", source, f"weights of {rule.name} ({error})") from error
    for name, value in rule.arguments.items():
        if name not in STAGES and found.arguments[name] != value:
            expected = f"weights of {rule.name} with {name} = {value!r}; these have {found.arguments[name]!r}"
            raise ConfigError("lopt.init_from", source, f"{expected} (lopt.arguments.{name} can be set to that)")
    return theta
