"""The fixed tasks of learned-optimizer training, by back-propagation through whole trainings or by ES over them.

Source: google/learned_optimization, tasks/fixed/lopt.py. "Fahion" is how the published names spell it.
"""

from __future__ import annotations

from tasks.augmentations.es_gradient import EsGradient
from tasks.families.lopt_training import LoptTraining
from tasks.fixed.image_conv import TASKS as CONV
from tasks.fixed.image_mlp import TASKS as MLP
from tasks.static import StaticConfig

_FASHION = MLP["ImageMLP_FashionMnist8_Relu32"]
_CIFAR8, _CIFAR16 = CONV["Conv_Cifar10_8_16x32"], CONV["Conv_Cifar10_16_32x64x64"]


def _mlp_lopt(inner: StaticConfig, num_steps: int) -> StaticConfig:
    return LoptTraining(optimizer="mlp_lopt", hidden_size=32, hidden_layers=2, inner=inner, num_steps=num_steps)


def _adafac(inner: StaticConfig, num_steps: int) -> StaticConfig:
    return LoptTraining(optimizer="small_fc", hidden_size=4, hidden_layers=2, inner=inner, num_steps=num_steps)


def _adam(inner: StaticConfig, num_steps: int) -> StaticConfig:
    return LoptTraining(optimizer="adam", inner=inner, num_steps=num_steps)


_BACKPROP: dict[str, StaticConfig] = {
    "LOpt_MLPLOpt_FahionMnist_100": _mlp_lopt(_FASHION, 100),
    "LOpt_MLPLOpt_FahionMnist_50": _mlp_lopt(_FASHION, 50),
    "LOpt_MLPLOpt_FahionMnist_10": _mlp_lopt(_FASHION, 10),
    "LOpt_MLPLOpt_Cifar10_16_10": _mlp_lopt(_CIFAR16, 10),
    "LOpt_MLPLOpt_Cifar10_8_50": _mlp_lopt(_CIFAR8, 50),
    "LOpt_AdafacMLPLOpt_Cifar10_8_10": _adafac(_CIFAR8, 10),
    "LOpt_AdafacMLPLOpt_FashionMnist_50": _adafac(_FASHION, 50),
    "LOpt_AdafacMLPLOpt_FashionMnist_20": _adafac(_FASHION, 20),
    "LOpt_LearnableAdam_Cifar10_8_50": _adam(_CIFAR8, 50),
    "LOpt_LearnableAdam_Cifar10_8_200": _adam(_CIFAR8, 200),
}

_ES = {
    "LOpt_ES4_AdafacMLPLOpt_FashionMnist_20": "LOpt_AdafacMLPLOpt_FashionMnist_20",
    "LOpt_ES4_LOpt_MLPLOpt_FahionMnist_50": "LOpt_MLPLOpt_FahionMnist_50",
    "LOpt_ES4_LOpt_MLPLOpt_Cifar10_16_10": "LOpt_MLPLOpt_Cifar10_16_10",
}

TASKS: dict[str, StaticConfig] = _BACKPROP | {
    name: EsGradient(task=_BACKPROP[task], sigma=0.01, pairs=4) for name, task in _ES.items()
}
