"""The numbers an update rule computes with besides theta: multipliers, decays, bounds, time scales.

Owns their names in files. A checkpoint carries them so that a reader needs no source code, and they are compared when
it is read, so that a constant that changes here cannot silently change what published weights do. Never holds a value
of its own: every number is read from where the rule takes it. What an argument of the architecture sets is not here.
"""

from __future__ import annotations

from collections.abc import Callable

from lopt import (
    accumulators,
    celo2,
    celo_adam,
    features,
    kernels,
    loss_features,
    mlp_lopt,
    nn_adam,
    recurrent,
    rnn_mlp,
    star,
    velo,
)
from lopt.base import LearnedOptimizer
from lopt.celo import Celo
from lopt.small_fc import SmallFcLopt
from lopt.velo import Velo

Constant = float | str | bool | None | list["Constant"]
Constants = dict[str, Constant]


def constants(lopt: LearnedOptimizer) -> Constants:
    """All constants of this optimizer by name, as JSON; empty for a rule whose every number is theta or an argument."""
    stated = _STATED.get(lopt.name)
    return {name: _plain(value) for name, value in stated().items()} if stated else {}


def _step() -> dict[str, object]:
    return {"step_mult": features.STEP_MULT, "exp_mult": features.EXP_MULT}


def _decays() -> dict[str, object]:
    return {
        "momentum_decays": accumulators.MOMENTUM_DECAYS,
        "rms_decays": accumulators.RMS_DECAYS,
        "adafactor_decays": accumulators.ADAFACTOR_DECAYS,
    }


def _rule(kind: type[SmallFcLopt | Celo | Velo]) -> dict[str, object]:
    """The per-parameter family; small_fc_lopt's decays are where its learned offsets start."""
    return {
        **_decays(),
        "exp_mult": features.EXP_MULT,
        "columns": kind.columns,
        "normalizer_eps": features.NORMALIZER_EPS,
        "diag_eps": kind.diag_eps,
        "max_gradient": kind.max_gradient,
        "parameter_scaled": kind.parameter_scaled,
    }


def _schedule() -> dict[str, object]:
    return {"fractions": recurrent.FRACTIONS, "loss_means": loss_features.NUM_MEANS}


_STATED: dict[str, Callable[[], dict[str, object]]] = {
    "small_fc_lopt": lambda: _rule(SmallFcLopt) | {"timescales": features.TIMESCALES},
    "mulo": lambda: _rule(SmallFcLopt) | {"timescales": features.TIMESCALES},
    "star": lambda: (
        _decays()
        | _step()
        | {
            "columns": kernels.SMALL_FC_COLUMNS,
            "normalizer_eps": features.NORMALIZER_EPS,
            "diag_eps": star.DIAG_EPS,
            "timescales": features.TIMESCALES,
        }
    ),
    "celo": lambda: _rule(Celo) | _schedule() | {"step_mult": features.STEP_MULT},
    "velo": lambda: _rule(Velo) | _schedule() | {"step_mult": features.STEP_MULT, "bank_mult": velo.BANK_MULT},
    "celo_adam": lambda: (
        _schedule()
        | {
            "step_mult": celo_adam.STEP_MULT,
            "adam_decays": celo_adam.DECAYS,
            "eps": celo_adam.EPS,
            "root_eps": celo_adam.ROOT_EPS,
            "max_gradient": celo_adam.MAX_GRADIENT,
        }
    ),
    "celo2": lambda: (
        _decays()
        | {
            "rms_decays": celo2.RMS_DECAYS,
            "step_mult": features.STEP_MULT,
            "columns": celo2.COLUMNS,
            "normalizer_eps": celo2.EPS,
            "rsqrt_eps": celo2.RSQRT_EPS,
            "max_gradient": celo2.MAX_GRADIENT,
            "adam_decays": celo2.ADAM_DECAYS,
            "adam_mult": celo2.ADAM_MULT,
            "newton_schulz": celo2.NEWTON_SCHULZ,
            "newton_schulz_steps": celo2.NEWTON_SCHULZ_STEPS,
        }
    ),
    "mlp_lopt": lambda: _step() | {"momentum_decays": mlp_lopt.DECAYS, "timescales": features.TIMESCALES},
    "nn_adam": lambda: {
        "lowest": nn_adam.LOWEST,
        "highest": nn_adam.HIGHEST,
        "control_mult": nn_adam.CONTROL_MULT,
        "max_gradient": nn_adam.MAX_GRADIENT,
    },
    "rnn_mlp_lopt": lambda: (
        _step()
        | {
            "decays": rnn_mlp.DECAYS,
            "loss_decay": rnn_mlp.LOSS_DECAY,
            "clip_decay": rnn_mlp.CLIP_DECAY,
            "clip_mult": rnn_mlp.CLIP_MULT,
            "timescales": features.TIMESCALES,
        }
    ),
}


def _plain(value: object) -> Constant:
    """As JSON would return it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(f"a constant is {value!r}: expected numbers, texts or lists of them")
