"""Celo's 17 tasks with every data set replaced by a small one, so that they run on a laptop.

Owns: these copies. Must never take a published name: scores are not comparable.

``Embedded_NAME`` is the published task NAME on scikit-learn's digits or Python's own help text, which need no download;
``Fashion_NAME``, of the tasks on images, has Fashion-MNIST at 16x16 pixels. A name says which task is copied, not its
sizes: the kind of model, its layers, norms and activations are kept, widths, batches and sequences made smaller.

The digits are so few (1,149 for training) that an MLP learns them by heart, down to losses of 1e-6, whose ratios are
noise. Random shifts and pixel noise put a floor of about 0.1 nats below them; what stands in for CIFAR-100 has more of
both. How low each loss gets is in docs/tasks.md (benchmarks/loss_floors.py measures it).
"""

from __future__ import annotations

from typing import Any

from tasks.families.image_conv import ImageConv
from tasks.families.image_mlp import ImageMlp
from tasks.families.lopt_training import LoptTraining
from tasks.families.mlp_ae import MlpAe
from tasks.families.rnn_lm import RnnLm
from tasks.families.transformer_lm import TransformerLm
from tasks.families.vit import VisionTransformer
from tasks.static import StaticConfig

_DIGITS: dict[str, Any] = {"dataset": "digits", "image_size": 8, "batch_size": 64}
_FASHION: dict[str, Any] = {"dataset": "fashion_mnist", "image_size": 16, "batch_size": 64}
_NOISY: dict[str, Any] = {"shift": 1, "noise": 0.15}
_NOISIER: dict[str, Any] = {"shift": 2, "noise": 0.3}
_TEXT: dict[str, Any] = {"corpus": "pydoc", "vocabulary": "32k"}


def _on_images(data: dict[str, Any], patch_size: int) -> dict[str, StaticConfig]:
    """The tasks of the 17 that are on images, on others; ``patch_size`` gives the originals' four patches."""
    easy, hard = data | _NOISY, data | _NOISIER
    three: dict[str, Any] = {"hidden": (64, 64, 64), **easy}
    conv: dict[str, Any] = {"hidden": (16, 32, 32), "strided": 1}
    vit: dict[str, Any] = {"patch_size": patch_size, **hard}
    small = {**easy, "image_size": 8, "batch_size": 32}
    return {
        "ImageMLP_FashionMnist_Relu128x128": ImageMlp(hidden=(64, 64), **easy),
        "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu": ImageMlp(norm="layer_norm", **three),
        "ImageMLP_Cifar10_128x128x128_Tanh_bs128": ImageMlp(activation="tanh", **three),
        "Conv_Cifar10_32x64x64": ImageConv(**conv, **easy),
        "Conv_Cifar10_32x64x64_batchnorm": ImageConv(norm="batch_norm", **conv, **easy),
        "Conv_Cifar10_32x64x64_layernorm": ImageConv(norm="layer_norm", **conv, **easy),
        "Conv_Cifar100_32x64x64": ImageConv(**conv, **hard),
        "VIT_Cifar100_wideshallow": VisionTransformer(width=96, mlp_dim=384, heads=6, layers=2, **vit),
        "VIT_Cifar100_skinnydeep": VisionTransformer(width=32, mlp_dim=128, heads=4, layers=6, **vit),
        "ImageMLPAE_Cifar10_128x32x128_bs256": MlpAe(hidden=(64, 16, 64), **{**hard, "batch_size": 128}),
        "ImageMLPAE_Mnist_128x32x128_bs128": MlpAe(hidden=(64, 16, 64), **easy),
        "LOpt_AdafacMLPLOpt_FashionMnist_50": LoptTraining(
            optimizer="small_fc", num_steps=20, inner=ImageMlp(hidden=(32,), **small)
        ),
    }


_TEXTS: dict[str, StaticConfig] = {
    "TransformerLM_LM1B_MultiRuntime_0": TransformerLm(
        vocab_size=2000, batch_size=4, sequence_length=8, width=20, heads=5, layers=1, dropout=0.1, **_TEXT
    ),
    "TransformerLM_LM1B_MultiRuntime_2": TransformerLm(
        vocab_size=2000, batch_size=8, sequence_length=8, width=32, heads=4, layers=2, **_TEXT
    ),
    "TransformerLM_LM1B_MultiRuntime_5": TransformerLm(
        vocab_size=2000, batch_size=8, sequence_length=32, width=32, heads=4, layers=1, **_TEXT
    ),
    "RNNLM_lm1b32k_Patch32_LSTM256_Embed128": RnnLm(
        vocab_size=1000, batch_size=16, sequence_length=32, cell="lstm", hidden=64, embedding=32, **_TEXT
    ),
    "RNNLM_wikipediaen32k_Patch32_LSTM256_Embed128": RnnLm(
        vocab_size=2000, batch_size=16, sequence_length=32, cell="lstm", hidden=64, embedding=32, **_TEXT
    ),
}

TASKS: dict[str, StaticConfig] = {
    **{f"Embedded_{name}": static for name, static in (_on_images(_DIGITS, 4) | _TEXTS).items()},
    **{f"Fashion_{name}": static for name, static in _on_images(_FASHION, 8).items()},
}
