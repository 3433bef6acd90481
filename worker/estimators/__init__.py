"""Estimators of the meta-gradient: siblings over one unroll.

Owns which estimator a configuration means. Perturbations are ``worker.perturbations``', inner steps the unroll's.
"""

from __future__ import annotations

from configs.schema import EstimatorConfig
from worker.estimators.backprop import Backprop, TruncatedBackprop
from worker.estimators.base import Estimate, EstimatorState, GradientEstimator, LossDifference, es_gradient
from worker.estimators.full import FullES
from worker.estimators.online import GPES, NRES, PES, TruncatedES
from worker.perturbations import sigmas
from worker.unroll import Unroll

__all__ = [
    "GPES",
    "NRES",
    "PES",
    "Backprop",
    "Estimate",
    "EstimatorState",
    "FullES",
    "GradientEstimator",
    "LossDifference",
    "TruncatedBackprop",
    "TruncatedES",
    "build",
    "es_gradient",
]
_ONLINE: dict[str, type[GPES]] = {"pes": PES, "nres": NRES, "truncated_es": TruncatedES}


def build(unroll: Unroll, config: EstimatorConfig) -> GradientEstimator:
    """The estimator that ``config`` describes. Raises ConfigError where it does not fit the rule or the task."""
    window, split, objective = config.window, config.split, config.objective
    if config.name == "backprop":
        return Backprop(unroll, objective=objective, split=split)
    if config.name == "truncated_backprop":
        return TruncatedBackprop(unroll, window=window)
    sigma = sigmas(unroll.lopt.spec, config.sigma, {part.match: part.sigma for part in config.sigmas})
    difference = LossDifference(config.clip_loss_diff, config.sign_delta_loss)
    if config.name == "full_es":
        return FullES(unroll, sigma, objective=objective, difference=difference, split=split)
    if config.noise_period is not None:
        windows = config.noise_period // window
        return GPES(unroll, sigma, window=window, noise_windows=windows, difference=difference, split=split)
    return _ONLINE[config.name](unroll, sigma, window=window, difference=difference, split=split)
