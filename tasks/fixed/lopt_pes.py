"""The fixed tasks of learned-optimizer training by PES.

Source: _make_grad_est_lopt in google/learned_optimization, tasks/fixed/lopt.py: AdafacMLPLOpt, TruncatedPES with its
default standard deviation of 0.01, trainings of constant length.
"""

from __future__ import annotations

from tasks.families.lopt_training import LoptTraining
from tasks.fixed.image_mlp import TASKS as MLP
from tasks.static import StaticConfig

_INNER = {"Fashion": MLP["ImageMLP_FashionMnist8_Relu32"], "Cifar": MLP["ImageMLP_Cifar10BW8_Relu32"]}
_SIZES = ((16, 50, 10), (16, 200, 10), (8, 50, 5), (4, 50, 10), (4, 50, 5))

TASKS: dict[str, StaticConfig] = {
    f"LOptPES_Adafac_{data}_OuterBS{trainings}_Length{length}_Trunc{window}": LoptTraining(
        optimizer="small_fc",
        hidden_size=4,
        hidden_layers=2,
        inner=inner,
        num_steps=length,
        outer_batch=trainings,
        gradient="pes",
        window=window,
        sigma=0.01,
    )
    for data, inner in _INNER.items()
    for trainings, length, window in _SIZES
}
