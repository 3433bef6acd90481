"""Values of google/learned_optimization's own image tasks, for our models to have.

They were computed in float64 with the JAX sources (tasks/fixed and tasks/parametric), run on the parameters, images and
random numbers of ``wave_particle``, carried over to haiku's layout; for centered VAEs with a bin size of 2/255 (see
tasks/families/mlp_vae.py).
"""

import torch

from tasks.families.image_conv import ImageConv
from tasks.families.image_mlp import ImageMlp
from tasks.families.mlp_ae import MlpAe
from tasks.families.mlp_vae import MlpVae
from tasks.keys import generator
from tests.task_laws import RandomLibrary

DATA = {"dataset": "cifar10", "batch_size": 6}
PARAMETRIC = {"normalizer": "parametric"}

CASES = {
    "mlp": ImageMlp(**DATA, image_size=4, hidden=(5, 4)),
    "mlp_parametric": ImageMlp(**DATA, image_size=4, hidden=(5, 4), activation="gelu", **PARAMETRIC),
    "mlp_layer_norm": ImageMlp(**DATA, image_size=4, hidden=(5, 4), norm="layer_norm", activation="tanh"),
    "mlp_batch_norm": ImageMlp(**DATA, image_size=4, hidden=(5, 4), norm="batch_norm"),
    "mlp_squared": ImageMlp(**DATA, image_size=3, hidden=(5,), loss="squared"),
    "mlp_linear": ImageMlp(**DATA, image_size=3, hidden=(), **PARAMETRIC),
    "conv": ImageConv(**DATA, image_size=7, hidden=(5, 4, 4)),
    "conv_even": ImageConv(**DATA, image_size=6, hidden=(5, 4), activation="tanh"),
    "conv_layer_norm": ImageConv(**DATA, image_size=5, hidden=(5, 4), norm="layer_norm", activation="tanh"),
    "conv_batch_norm": ImageConv(**DATA, image_size=5, hidden=(5, 4), norm="batch_norm"),
    "conv_parametric": ImageConv(**DATA, image_size=6, hidden=(4, 4, 4), strided=2, activation="silu", **PARAMETRIC),
    "conv_linear": ImageConv(**DATA, image_size=3, hidden=(), strided=0, **PARAMETRIC),
    "ae": MlpAe(**DATA, image_size=4, hidden=(5, 4)),
    "ae_plain": MlpAe(
        **DATA, image_size=4, hidden=(5,), activation="sin", constrain_output=False, center_data=True, **PARAMETRIC
    ),
    "ae_log": MlpAe(**DATA, image_size=4, hidden=(5, 4), activation="cos", log_loss=True, **PARAMETRIC),
    "ae_log_center": MlpAe(
        **DATA, image_size=3, hidden=(4,), activation="selu", log_loss=True, center_data=True, **PARAMETRIC
    ),
    "vae": MlpVae(**DATA, image_size=3, encoder=(5, 4), decoder=(4,), latent=2, activation="tanh"),
    "vae_sum": MlpVae(
        **DATA, image_size=3, encoder=(), decoder=(4, 5), latent=3, activation="relu6", per_dimension_loss=False
    ),
    "vae_center": MlpVae(**DATA, image_size=3, encoder=(5,), decoder=(), latent=2, center_data=True),
}

ORIGINALS = {
    "mlp": [2.985212703390945, 2.5831736891359816],
    "mlp_parametric": [2.854016834338758, 1.7984297125227813],
    "mlp_layer_norm": [2.3238660363941595, 0.540297116698676],
    "mlp_batch_norm": [2.585099243057068, 3.118027511376743],
    "mlp_squared": [0.6518887104908274, 2.6150910138634456],
    "mlp_linear": [4.840345736444867, 1.6054379697166181],
    "conv": [2.758371412342465, 1.6938460896267793],
    "conv_even": [2.496462796558414, 0.38196237201193034],
    "conv_layer_norm": [2.4304698418708552, 2.343035865262606],
    "conv_batch_norm": [2.4522292399047547, 0.584939757044069],
    "conv_parametric": [5.4822639165226, 9.961100414290575],
    "conv_linear": [2.9997678589430206, 0.5877535955176936],
    "ae": [0.14139625855727606, 0.05311790484935398],
    "ae_plain": [0.6686989147866897, 2.5724981663398574],
    "ae_log": [-2.1984301161577404, 0.2260837338444746],
    "ae_log_center": [-3.47356864620081, 10.709566605341045],
    "vae": [6.969554817762022, 1.4906159058597102],
    "vae_sum": [211.83444705098367, 79.75322380996032],
    "vae_center": [21.39476006051968, 281.29449246395916],
}
"""Loss and length of the gradient of each case."""

META_LOSSES = {
    "mlp": [0.0, 0.3, 2.0, 3.453877639491, 3.453877639491],
    "mlp_squared": [0.0, 3.0, 10.0, 10.0, 10.0],
    "mlp_parametric": [-3.01029995664, -1.70741651093, 5.675589681425, 10.0, 10.0],
    "mlp_layer_norm": [0.0, 0.3, 2.0, 3.453877639491, 3.453877639491],
    "conv": [0.0, 0.3, 2.0, 3.453877639491, 3.453877639491],
    "conv_parametric": [-3.01029995664, -1.70741651093, 5.675589681425, 10.0, 10.0],
    "ae": [0.0, 0.3, 1.0, 1.0, 1.0],
    "ae_plain": [4.0, 9.398013614504, 10.34657359278, 10.5, 10.5],
    "ae_log": [10.0, 10.15, 10.5, 10.5, 10.5],
    "vae": [0.0, 0.3, 2.0, 10.0, 10.0],
    "vae_sum": [0.0, 0.011111111111, 0.074074074074, 3.703703703704, 10.0],
}
"""Meta-losses of VALUES."""

VALUES = (0.0, 0.3, 2.0, 100.0, float("inf"))
"""Losses whose meta-losses are recorded."""


def wave(shape, phase):
    """Float64 numbers on [-0.5, 0.5], in row-major order."""
    return (0.5 * torch.cos(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.7 + phase)).reshape(shape)


def wave_particle(static):
    """Parameters and a batch, in float64."""
    task = static.build(RandomLibrary())
    params = {name: wave(leaf.shape, sum(name.encode()) % 7) for name, leaf in task.init(generator(0)).items()}
    batch = {
        "image": 0.5 + wave((static.batch_size, static.channels, static.image_size, static.image_size), 0.1),
        "label": torch.arange(static.batch_size) % static.classes,
        "key": torch.tensor(7),
    }
    return params, batch


def measured(name):
    """Loss and length of the gradient of a case."""
    params, batch = wave_particle(CASES[name])
    grads, loss = torch.func.grad_and_value(CASES[name].build(RandomLibrary()).loss)(params, batch)
    return [loss.item(), sum(leaf.square().sum() for leaf in grads.values()).sqrt().item()]


def meta_losses(name):
    """The meta-losses of VALUES."""
    return CASES[name].build(RandomLibrary()).normalizer(torch.tensor(VALUES, dtype=torch.float64)).tolist()
