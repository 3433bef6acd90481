"""MLP-mixers: the original's values and sizes, how they start, and their laws."""

import dataclasses
import math

import pytest
import torch

from configs.checks import ConfigError
from tasks.families.mlp_mixer import MlpMixer
from tasks.fixed.mlp_mixer import TASKS
from tasks.keys import generator
from tests.task_laws import RandomLibrary, assert_gradients, assert_isolation, assert_laws, make_particles, rows
from tests.vision_laws import as_the_original, awake

SMALL = MlpMixer(batch_size=6, patch_size=4, width=12, layers=2, tokens_mlp_dim=10, channels_mlp_dim=20)


def test_loss_and_gradient_are_the_originals():
    static = dataclasses.replace(SMALL, dataset="cifar10", batch_size=4, image_size=12)
    expected = (2260, 2.8872443912927843, 2.2144965700547603, 1.0971074605310502)
    assert as_the_original(static) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Patches 16 * 16 * 3 * 512 + 512 = 393,728. A block with 16 tokens: normalisations 4 * 512; tokens
        # 2 * 16 * 384 + 384 + 16; channels 2 * 512 * 2048 + 2048 + 512. Last normalisation 1024; head 513 * 1000.
        ("MLPMixer_ImageNet64_tiny16", 393728 + 5 * (2048 + 12688 + 2099712) + 1024 + 513000),
        ("MLPMixer_ImageNet64_bs256_tiny16", 11479992),
        ("MLPMixer_ImageNet64_small16", 39266664),
        ("MLPMixer_Food101_64_tiny16", 11018805),
        ("MLPMixer_Food101_64_bs256_tiny16", 11018805),
        ("MLPMixer_Food101_64_small16", 38575333),
        ("MLPMixer_Cifar100_tiny16", 10972152),
        ("MLPMixer_Cifar100_bs256_tiny16", 10972152),
        ("MLPMixer_Cifar100_small16", 38500740),
    ],
)
def test_fixed_tasks_have_the_originals_sizes(name, parameters):
    static = TASKS[name]
    assert len(TASKS) == 9
    assert static.work().parameters == parameters
    assert (static.batch_size, static.patch_size) == (256 if "bs256" in name else 128, 16)
    dataset = next(there for ours, there in _DATASETS.items() if name.startswith(f"MLPMixer_{ours}_"))
    assert (static.dataset, static.image_size) == (dataset, 32 if dataset == "cifar100" else 64)


_DATASETS = {"ImageNet64": "imagenet64", "Food101_64": "food101", "Cifar100": "cifar100"}


def test_laws():
    library = RandomLibrary()
    assert_laws(SMALL, library)
    task = SMALL.build(library)
    drawn = awake(task, scale=0.3)  # the second bias across tokens has no effect, so its gradient is all rounding
    assert assert_gradients(task, drawn) < 2e-4
    assert_isolation(task, drawn)


def test_a_colored_task_of_other_sizes_keeps_the_laws():
    static = dataclasses.replace(SMALL, dataset="cifar10", image_size=6, patch_size=2, layers=1, tokens_mlp_dim=5)
    assert_laws(static, RandomLibrary(), particles=2)


def test_init_and_the_first_loss():
    static = dataclasses.replace(SMALL, dataset="cifar100", width=256, channels_mlp_dim=512)
    task = static.build(RandomLibrary())
    params = task.init(generator(1))
    for name, fan_in in (("embedding/w", 48), ("block0/channels0/w", 256), ("block1/channels1/w", 512)):
        assert params[name].std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert params[name].abs().max() <= 2 * fan_in**-0.5 / 0.8796
    assert {name for name, leaf in params.items() if not leaf.any()} == {"head/w"} | {
        name for name in params if name.endswith(("/b", "/offset"))
    }
    drawn = make_particles(task, 2)
    losses = task.losses(drawn.params, drawn.batch)
    assert losses.tolist() == pytest.approx([math.log(100)] * 2, rel=1e-6)
    assert task.normalizer(losses).tolist() == pytest.approx([10 * math.log(100) / math.log(200)] * 2)
    assert task.normalizer(torch.tensor([0.0, math.log(200), 99.0])).tolist() == pytest.approx([0, 10, 10])


def test_tokens_are_mixed():
    """A change in one patch reaches the loss also where the channels' MLP is silent and only tokens are mixed."""
    task = SMALL.build(RandomLibrary())
    drawn = awake(task, 1)
    params, batch = rows(drawn.params, 0), rows(drawn.batch, 0)
    silent = {name: torch.zeros_like(leaf) if "/channels1/" in name else leaf for name, leaf in params.items()}
    without = {name: torch.zeros_like(leaf) if "/tokens1/" in name else leaf for name, leaf in silent.items()}
    assert task.loss(silent, batch) != task.loss(without, batch)
    # Without mixing, the mean over the tokens does not depend on where a patch lies.
    moved = {**batch, "image": batch["image"].roll((4, 4), (2, 3))}
    assert task.loss(without, moved).item() == pytest.approx(task.loss(without, batch).item(), rel=1e-6)
    assert task.loss(silent, moved).item() != pytest.approx(task.loss(silent, batch).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"patch_size": 3}, "patch_size"), ({"width": 0}, "width"), ({"tokens_mlp_dim": 0}, "tokens_mlp_dim")],
)
def test_bad_fields_are_named(fields, field):
    with pytest.raises(ConfigError) as error:
        MlpMixer(**fields)
    assert error.value.field == field
