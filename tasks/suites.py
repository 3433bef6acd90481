"""The benchmark suites: which fixed tasks are measured together, by the names that were published.

Owns: the lists of names. Must never define a task (``tasks.fixed`` does) or read data.

Sources: the task names of google/learned_optimization are the keys of
``baselines/data/speedup_over_multiple_baselines.json`` (125 of them) and the gin names of ``tasks/fixed/*.py``; the
quick set is ``continuous_eval/evaluation_set.py``; Celo's set and the meta-training set are the appendices A.5 and A.4
of Moudgil et al. 2025 (arXiv:2501.12670).
"""

from __future__ import annotations

from collections.abc import Iterable

from configs.checks import ConfigError, did_you_mean


def _joined(prefix: str, endings: str | Iterable[object]) -> tuple[str, ...]:
    return tuple(f"{prefix}_{ending}" for ending in (endings.split() if isinstance(endings, str) else endings))


_IMAGE_MLP = _joined(
    "ImageMLP",
    """
    Cifar100_128x128x128_Relu Cifar10_1024x1024_Relu Cifar10_128x128_Dropout02_Relu_MSE
    Cifar10_128x128_Dropout05_Relu_MSE Cifar10_128x128_Dropout08_Relu_MSE Cifar10_128x128x128_BatchNorm_Relu
    Cifar10_128x128x128_BatchNorm_Tanh Cifar10_128x128x128_LayerNorm_Relu Cifar10_128x128x128_LayerNorm_Tanh
    Cifar10_128x128x128_Relu Cifar10_128x128x128_Relu_MSE Cifar10_128x128x128_Tanh_bs64
    Cifar10_128x128x128_Tanh_bs128 Cifar10_128x128x128_Tanh_bs256 Cifar10_256x256_Relu Cifar10_4096x4096_Relu
    Cifar10_8192x8192_Relu Cifar10_8_Relu32 FashionMnist8_Relu32 FashionMnist_Relu128x128 Imagenet16_Relu256x256x256
    Mnist_128x128x128_Relu
    """,
)
_CONV = _joined(
    "Conv",
    """
    Cifar100_32x64x64 Cifar100_32x64x64_Tanh Cifar10_16_32x64x64 Cifar10_32x64x64 Cifar10_32x64x64_Tanh
    Cifar10_32x64x64_batchnorm Cifar10_32x64x64_layernorm imagenet16_16_64x128x128x128 imagenet32_16_32x64x64
    """,
)
_AUTO_ENCODER = _joined(
    "ImageMLPAE",
    """
    Cifar10_128x32x128_bs256 Cifar10_256x256x256_bs1024 Cifar10_256x256x256_bs128 Cifar10_32x32x32_bs128
    FashionMnist_128x32x128_bs128 Mnist_128x32x128_bs128
    """,
)
_RESNET = _joined("Resnet_MultiRuntime", range(11))
_RNN_LM = _joined(
    "RNNLM",
    """
    lm1b32k_Patch32_IRNN256_Embed128 lm1b32k_Patch32_LSTM256_Embed128 lm1b32k_Patch32_VanillaRNN256_Embed128
    lm1bbytes_Patch128_LSTM128_Embed64 lm1bbytes_Patch32_GRU128_Embed64 lm1bbytes_Patch32_GRU256_Embed128
    lm1bbytes_Patch32_IRNN128_Embed64 lm1bbytes_Patch32_LSTM128_Embed64 lm1bbytes_Patch32_LSTM256_Embed128
    lm1bbytes_Patch32_VanillaRNN128_Embed64 wikipediaen32k_Patch32_GRU256_Embed128
    wikipediaen32k_Patch32_LSTM256_Embed128 wikipediaenbytes_Patch32_GRU256_Embed128
    wikipediaenbytes_Patch32_LSTM256_Embed128
    """,
)
_TRANSFORMER_LM = (
    *_joined("TransformerLM_LM1B_MultiRuntime", range(12)),
    *_joined("TransformerLM_LM1B", "5layer_32width 5layer_128width 5layer_256width 5layer_512width"),
)
_VIT = tuple(
    f"VIT_{data}_{shape}"
    for data in ("Cifar100", "Food101_64", "ImageNet64")
    for shape in ("skinnydeep", "wideshallow")
)
_MIXER = tuple(
    f"MLPMixer_{data}_{size}"
    for data in ("Cifar100", "Food101_64", "ImageNet64")
    for size in ("bs256_tiny16", "small16", "tiny16")
)
_ES_WRAPPED = _joined(
    "ESWrapped",
    """
    1pair_ImageMLP_Cifar10BW8_Relu32 1pair_ImageMLP_Cifar10_128x128x128_Relu 1pair_ImageMLP_FashionMnist8_Relu32
    1pair_ImageMLP_Mnist_128x128x128_Relu 8pair_ImageMLP_Cifar10_128x128x128_Relu 8pair_ImageMLP_Mnist_128x128x128_Relu
    """,
)
_LOPT = _joined(
    "LOpt",
    """
    AdafacMLPLOpt_Cifar10_8_10 AdafacMLPLOpt_FashionMnist_20 AdafacMLPLOpt_FashionMnist_50
    ES4_AdafacMLPLOpt_FashionMnist_20 ES4_LOpt_MLPLOpt_Cifar10_16_10 ES4_LOpt_MLPLOpt_FahionMnist_50
    LearnableAdam_Cifar10_8_200 LearnableAdam_Cifar10_8_50 MLPLOpt_Cifar10_16_10 MLPLOpt_Cifar10_8_50
    MLPLOpt_FahionMnist_10 MLPLOpt_FahionMnist_100 MLPLOpt_FahionMnist_50
    """,
)  # "Fahion" is how the published names spell it
_LOPT_PES = tuple(
    f"LOptPES_Adafac_{data}_OuterBS{tasks}_Length{length}_Trunc{window}"
    for data in ("Cifar", "Fashion")
    for tasks, length, window in ((16, 200, 10), (16, 50, 10), (8, 50, 5), (4, 50, 10), (4, 50, 5))
)

_CELO17 = (
    "ImageMLP_FashionMnist_Relu128x128",
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu",
    "ImageMLP_Cifar10_128x128x128_Tanh_bs128",
    "Conv_Cifar10_32x64x64",
    "Conv_Cifar10_32x64x64_batchnorm",
    "Conv_Cifar10_32x64x64_layernorm",
    "Conv_Cifar100_32x64x64",
    "VIT_Cifar100_wideshallow",
    "VIT_Cifar100_skinnydeep",
    "TransformerLM_LM1B_MultiRuntime_0",
    "TransformerLM_LM1B_MultiRuntime_2",
    "TransformerLM_LM1B_MultiRuntime_5",
    "ImageMLPAE_Cifar10_128x32x128_bs256",
    "ImageMLPAE_Mnist_128x32x128_bs128",
    "RNNLM_lm1b32k_Patch32_LSTM256_Embed128",
    "RNNLM_wikipediaen32k_Patch32_LSTM256_Embed128",
    "LOpt_AdafacMLPLOpt_FashionMnist_50",
)

_FAST4 = (
    "ImageMLP_Cifar10BW8_Relu32_bs64",
    "ImageMLP_FashionMnist8_Relu32_bs64",
    "ImageMLP_Mnist8_Relu32_bs64",
    "ImageMLP_SvhnBW8_Relu32_bs64",
)

_QUICK67 = (
    *_joined(
        "ImageMLP",
        """
        FashionMnist8_Relu32 FashionMnist_Relu128x128 Mnist_128x128x128_Relu Cifar10_128x128x128_Tanh_bs64
        Cifar10_128x128x128_Tanh_bs128 Cifar10_128x128x128_Relu Cifar10_128x128x128_Relu_MSE
        Cifar10_128x128_Dropout08_Relu_MSE Cifar10_128x128_Dropout05_Relu_MSE Imagenet16_Relu256x256x256
        Cifar10_128x128_Dropout02_Relu_MSE Cifar10_128x128x128_BatchNorm_Relu Cifar10_128x128x128_BatchNorm_Tanh
        Cifar10_128x128x128_LayerNorm_Tanh Cifar10_128x128x128_Tanh_bs256 Cifar10_128x128x128_LayerNorm_Relu
        """,
    ),
    *_AUTO_ENCODER,
    *_joined(
        "ESWrapped",
        """
        1pair_ImageMLP_Mnist_128x128x128_Relu 1pair_ImageMLP_Cifar10_128x128x128_Relu
        8pair_ImageMLP_Mnist_128x128x128_Relu 8pair_ImageMLP_Cifar10_128x128x128_Relu
        """,
    ),
    *_joined(
        "Conv",
        """
        Cifar10_16_32x64x64 imagenet16_16_64x128x128x128 Cifar10_32x64x64_Tanh Cifar10_32x64x64 imagenet32_16_32x64x64
        Cifar10_32x64x64_batchnorm Cifar10_32x64x64_layernorm
        """,
    ),
    *_joined("Resnet_MultiRuntime", range(9)),
    *_joined("TransformerLM_LM1B_MultiRuntime", range(9)),
    *_joined(
        "RNNLM",
        """
        lm1bbytes_Patch32_IRNN128_Embed64 lm1bbytes_Patch32_VanillaRNN128_Embed64 lm1bbytes_Patch32_GRU128_Embed64
        lm1bbytes_Patch32_LSTM128_Embed64 wikipediaenbytes_Patch32_GRU256_Embed128 lm1bbytes_Patch32_GRU256_Embed128
        lm1bbytes_Patch32_LSTM256_Embed128 wikipediaenbytes_Patch32_LSTM256_Embed128 lm1bbytes_Patch128_LSTM128_Embed64
        """,
    ),
    *_joined("LOpt", "LearnableAdam_Cifar10_8_50 MLPLOpt_FahionMnist_10 AdafacMLPLOpt_FashionMnist_20"),
    *_joined("VIT", "Cifar100_skinnydeep Cifar100_wideshallow ImageNet64_skinnydeep Food101_64_skinnydeep"),
)

_VELODROME = (*_IMAGE_MLP, *_CONV, *_AUTO_ENCODER, *_RESNET, *_RNN_LM, *_TRANSFORMER_LM, *_VIT)

SUITES: dict[str, tuple[str, ...]] = {
    "velodrome": _VELODROME,
    "velodrome_extended": (*_VELODROME, *_MIXER, *_ES_WRAPPED, *_LOPT, *_LOPT_PES),
    "celo17": _CELO17,
    "fast4": _FAST4,
    "quick67": _QUICK67,
    "embedded17": _joined("Embedded", _CELO17),
    "fashion17": tuple(
        f"{'Embedded' if name.startswith(('TransformerLM', 'RNNLM')) else 'Fashion'}_{name}" for name in _CELO17
    ),
}
"""Names of fixed tasks, by suite.

- ``velodrome``: the seven families of VeLOdrome-83 (VeLO, appendix F.2). The published files hold 84 tasks of these
  families and do not say which of them is not among the 83.
- ``velodrome_extended``: all of the 125 tasks with published baselines but the three of JAXNeRF.
- ``celo17``: what Celo is scored on.
- ``fast4``: Celo's meta-training set. Its tasks have no published names; these follow the grammar of the others.
- ``quick67``: ``small_time_fixed``, what VeLO was watched with during its meta-training.
- ``embedded17``: celo17 for a laptop without downloads; ``fashion17``: the same where Fashion-MNIST is there.
"""


def suite(name: str) -> tuple[str, ...]:
    """The task names of a suite. Raises ConfigError for an unknown one."""
    if name not in SUITES:
        raise ConfigError("suite", name, f"one of {', '.join(SUITES)}{did_you_mean(name, SUITES)}")
    return SUITES[name]
