"""The fixed MLP, convolutional and auto-encoder tasks: their names, the originals' sizes, and how they start."""

import math
import re

import pytest
import torch

from tasks.fixed import image_conv, image_mlp, mlp_ae
from tasks.keys import generator
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count

TASKS = image_mlp.TASKS | image_conv.TASKS | mlp_ae.TASKS
RANDOM = RandomLibrary()

# What the appendix of VeLO and its baselines call VeLOdrome (digest of learned_optimization's baselines/data).
VELODROME = [
    *(f"ImageMLP_Cifar10_{hidden}_Relu" for hidden in ("1024x1024", "128x128x128", "256x256", "4096x4096")),
    *(f"ImageMLP_Cifar10_128x128_Dropout{rate}_Relu_MSE" for rate in ("02", "05", "08")),
    *(f"ImageMLP_Cifar10_128x128x128_{norm}Norm_{act}" for norm in ("Batch", "Layer") for act in ("Relu", "Tanh")),
    *(f"ImageMLP_Cifar10_128x128x128_Tanh_bs{size}" for size in (64, 128, 256)),
    *("ImageMLP_Cifar10_8192x8192_Relu", "ImageMLP_Cifar10_128x128x128_Relu_MSE"),
    *("ImageMLP_Cifar100_128x128x128_Relu", "ImageMLP_Cifar10_8_Relu32", "ImageMLP_FashionMnist8_Relu32"),
    *("ImageMLP_FashionMnist_Relu128x128", "ImageMLP_Imagenet16_Relu256x256x256", "ImageMLP_Mnist_128x128x128_Relu"),
    *("Conv_Cifar100_32x64x64", "Conv_Cifar100_32x64x64_Tanh", "Conv_Cifar10_16_32x64x64", "Conv_Cifar10_32x64x64"),
    *("Conv_Cifar10_32x64x64_Tanh", "Conv_Cifar10_32x64x64_batchnorm", "Conv_Cifar10_32x64x64_layernorm"),
    *("Conv_imagenet16_16_64x128x128x128", "Conv_imagenet32_16_32x64x64"),
    *("ImageMLPAE_Cifar10_128x32x128_bs256", "ImageMLPAE_Cifar10_256x256x256_bs128"),
    *("ImageMLPAE_Cifar10_256x256x256_bs1024", "ImageMLPAE_Cifar10_32x32x32_bs128"),
    *("ImageMLPAE_FashionMnist_128x32x128_bs128", "ImageMLPAE_Mnist_128x32x128_bs128"),
]


def test_the_published_names_are_there():
    assert len(set(VELODROME)) == 22 + 9 + 6
    assert set(VELODROME) <= set(TASKS)
    assert (len(image_mlp.TASKS), len(image_conv.TASKS), len(mlp_ae.TASKS)) == (27, 11, 6)


# Weights, then biases, then normalisation. CIFAR has 32 * 32 * 3 = 3072 numbers, MNIST 784, ImageNet-16 768.
DEEP = 3072 * 128 + 2 * 128 * 128 + 128 * 10 + 3 * 128 + 10
CONV = 9 * (3 * 32 + 32 * 64 + 64 * 64) + 160
PARAMETERS = {
    "ImageMLP_Cifar10BW8_Relu32": 64 * 32 + 32 * 10 + 42,
    "ImageMLP_FashionMnist_Relu128x128": 784 * 128 + 128 * 128 + 128 * 10 + 266,
    "ImageMLP_FashionMnist8_Relu32": 64 * 32 + 32 * 10 + 42,
    "ImageMLP_FashionMnist16_Relu32": 256 * 32 + 32 * 10 + 42,
    "ImageMLP_FashionMnist32_Relu32": 1024 * 32 + 32 * 10 + 42,
    "ImageMLP_Cifar10_8_Relu32": 192 * 32 + 32 * 10 + 42,
    "ImageMLP_Imagenet16_Relu256x256x256": 768 * 256 + 2 * 256 * 256 + 256 * 1000 + 1768,
    "ImageMLP_Cifar10_128x128x128_Relu": DEEP,
    "ImageMLP_Cifar100_128x128x128_Relu": DEEP + 90 * 129,
    "ImageMLP_Cifar10_128x128x128_Tanh_bs64": DEEP,
    "ImageMLP_Cifar10_128x128x128_Tanh_bs128": DEEP,
    "ImageMLP_Cifar10_128x128x128_Tanh_bs256": DEEP,
    "ImageMLP_Mnist_128x128x128_Relu": 784 * 128 + 2 * 128 * 128 + 128 * 10 + 394,
    "ImageMLP_Cifar10_256x256_Relu": 3072 * 256 + 256 * 256 + 256 * 10 + 522,
    "ImageMLP_Cifar10_256x256_Relu_BS32": 3072 * 256 + 256 * 256 + 256 * 10 + 522,
    "ImageMLP_Cifar10_1024x1024_Relu": 3072 * 1024 + 1024 * 1024 + 1024 * 10 + 2058,
    "ImageMLP_Cifar10_4096x4096_Relu": 29409290,
    "ImageMLP_Cifar10_8192x8192_Relu": 92372992 + 10,
    "ImageMLP_Cifar10_16384x16384_Relu": 318963722,
    "ImageMLP_Cifar10_128x128x128_Relu_MSE": DEEP,
    "ImageMLP_Cifar10_128x128_Dropout02_Relu_MSE": DEEP - 128 * 129,
    "ImageMLP_Cifar10_128x128_Dropout05_Relu_MSE": DEEP - 128 * 129,
    "ImageMLP_Cifar10_128x128_Dropout08_Relu_MSE": DEEP - 128 * 129,
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Relu": DEEP + 6 * 128,
    "ImageMLP_Cifar10_128x128x128_LayerNorm_Tanh": DEEP + 6 * 128,
    "ImageMLP_Cifar10_128x128x128_BatchNorm_Relu": DEEP + 6 * 128,
    "ImageMLP_Cifar10_128x128x128_BatchNorm_Tanh": DEEP + 6 * 128,
    "Conv_Cifar10_8_16x32": 9 * (3 * 16 + 16 * 32) + 48 + 330,
    "Conv_Cifar10_16_32x64x64": CONV + 650,
    "Conv_Cifar10_32x64x64": CONV + 650,
    "Conv_Cifar100_32x64x64": CONV + 6500,
    "Conv_Cifar100_32x64x64_BS32": CONV + 6500,
    "Conv_Cifar100_32x64x64_Tanh": CONV + 6500,
    "Conv_Cifar10_32x64x64_Tanh": CONV + 650,
    "Conv_imagenet32_16_32x64x64": CONV + 65000,
    "Conv_imagenet16_16_64x128x128x128": 9 * (3 * 64 + 64 * 128 + 2 * 128 * 128) + 448 + 129000,
    "Conv_Cifar10_32x64x64_batchnorm": CONV + 650 + 2 * 160,
    "Conv_Cifar10_32x64x64_layernorm": CONV + 650 + 2 * 160,
    "ImageMLPAE_Cifar10_32x32x32_bs128": 2 * 3072 * 32 + 2 * 32 * 32 + 96 + 3072,
    "ImageMLPAE_Cifar10_256x256x256_bs128": 2 * 3072 * 256 + 2 * 256 * 256 + 768 + 3072,
    "ImageMLPAE_Cifar10_256x256x256_bs1024": 2 * 3072 * 256 + 2 * 256 * 256 + 768 + 3072,
    "ImageMLPAE_Cifar10_128x32x128_bs256": 2 * 3072 * 128 + 2 * 128 * 32 + 288 + 3072,
    "ImageMLPAE_Mnist_128x32x128_bs128": 2 * 784 * 128 + 2 * 128 * 32 + 288 + 784,
    "ImageMLPAE_FashionMnist_128x32x128_bs128": 2 * 784 * 128 + 2 * 128 * 32 + 288 + 784,
}


@pytest.mark.parametrize("name", TASKS)
def test_it_has_the_originals_parameters(name):
    static = TASKS[name]
    assert static.work().parameters == PARAMETERS[name]
    if static.work().parameters < 5_000_000:
        assert parameter_count(static.build(RANDOM).init(generator(0))) == PARAMETERS[name]


SIDES = {"mnist": 28, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "imagenet16": 16, "imagenet32": 32}
DATASETS = {"Mnist": "mnist", "FashionMnist": "fashion_mnist", "Cifar10": "cifar10", "Cifar100": "cifar100"}


@pytest.mark.parametrize("name", TASKS)
def test_it_is_what_its_name_says(name):
    static = TASKS[name]
    family, words = name.split("_")[0], name.split("_")[1:]
    dataset = re.fullmatch(r"([Ii]magenet(?:16|32)|Cifar100?|FashionMnist|Mnist)(BW)?(\d*)", words[0])
    expected = {"dataset": DATASETS.get(dataset[1], dataset[1].lower()), "grey": dataset[2] is not None}
    size = dataset[3] or (words[1] if words[1] in ("8", "16") and not dataset[1].startswith("imagenet") else None)
    expected["image_size"] = int(size) if size else SIDES[expected["dataset"]]
    widths = re.search(r"_(?:Relu)?(\d+(?:x\d+)+)", name) or re.search(r"_Relu(\d+)", name)
    expected["hidden"] = tuple(int(width) for width in widths[1].split("x"))
    expected["activation"] = "tanh" if "Tanh" in name else "relu"
    batch_size = re.search(r"_(?:bs|BS)(\d+)", name)
    expected["batch_size"] = int(batch_size[1]) if batch_size else 128
    assert {field: getattr(static, field) for field in expected} == expected
    assert static.kind == {"ImageMLP": "image_mlp", "Conv": "image_conv", "ImageMLPAE": "mlp_ae"}[family]
    assert (static.initializer, static.normalizer, static.shift, static.noise) == ("haiku", "fixed", 0, 0)
    norm = "batch_norm" if "batchnorm" in name.lower() else "layer_norm" if "layernorm" in name.lower() else "none"
    if family == "ImageMLPAE":
        assert (static.log_loss, static.center_data, static.constrain_output) == (False, False, True)
    else:
        assert static.norm == norm
    if family == "ImageMLP":
        rate = re.search(r"Dropout0(\d)", name)
        assert static.dropout == (int(rate[1]) / 10 if rate else 0)
        assert static.loss == ("squared" if name.endswith("MSE") else "cross_entropy")
    if family == "Conv":
        assert static.strided == 1


@pytest.mark.parametrize("name", TASKS)
def test_it_starts_where_it_should(name):
    static = TASKS[name]
    if static.work().flops > 2e10 or static.work().parameters > 2e7:
        pytest.skip("would take seconds")
    task = static.build(RANDOM)
    drawn = make_particles(task, 1)
    loss = task.losses(drawn.params, drawn.batch).item()
    meta_loss = task.normalizer(torch.tensor(loss)).item()
    if static.kind == "mlp_ae":  # uniform pixels around sigmoid(0): their variance
        assert loss == pytest.approx(1 / 12, rel=0.2)
        assert (task.worst_loss, meta_loss) == (1, pytest.approx(loss))
    elif "MSE" in name:  # of labels 0.09 and of outputs, which dropout makes larger
        assert 0.09 < loss < 0.35 / (1 - static.dropout)
        assert (task.worst_loss, meta_loss) == (10, pytest.approx(10 * min(loss, 1)))
    else:
        slack = 0.2 if static.kind == "image_mlp" and static.norm != "none" else 0.1
        assert loss == pytest.approx(math.log(static.classes), rel=slack)
        assert task.worst_loss == pytest.approx(1.5 * math.log(static.classes))
        assert meta_loss == pytest.approx(loss)


@pytest.mark.parametrize(
    "name",
    [
        "ImageMLP_FashionMnist8_Relu32",
        "ImageMLP_Cifar10BW8_Relu32",
        "ImageMLP_Cifar10_128x128_Dropout05_Relu_MSE",
        "ImageMLP_Cifar10_128x128x128_BatchNorm_Tanh",
        "Conv_Cifar10_8_16x32",
        "ImageMLPAE_Mnist_128x32x128_bs128",
    ],
)
def test_it_keeps_the_laws_of_tasks(name):
    assert assert_laws(TASKS[name], RANDOM, particles=2) < 5e-5
