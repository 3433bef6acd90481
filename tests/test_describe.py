"""What ``lopt.describe`` tells of an architecture, a preset or a file is computed from it."""

import dataclasses
import re

import pytest
import torch

import lopt
from lopt.checkpoint import ARCHITECTURES, CheckpointError


def text_of(description):
    return dict(line.split(None, 1) for line in str(description).splitlines())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_described_by_its_name(name):
    description = lopt.describe(name)
    rows = text_of(description)
    assert description.architecture == name
    assert rows["paper"] == ARCHITECTURES[name].paper
    assert re.search(r"[12]\d{3}", rows["paper"]), "a paper has a year"
    assert description.state_bytes_per_parameter >= 0
    assert all(description.inputs)


def test_a_preset_is_described_with_where_it_comes_from():
    description = lopt.describe("celo")
    assert (description.trainable, description.frozen) == (37089 - 1440, 1440)
    assert description.needs_loss
    assert description.needs_horizon
    assert description.inputs[:4] == ("g", "clipped_g", "p", "m")
    assert description.inputs[-2:] == ("training loss", "fraction of num_steps")
    rows = text_of(description)
    assert rows["architecture"] == "celo(phase=2)"
    assert rows["needs"] == "the training loss and num_steps"
    assert rows["license"] == "Apache-2.0"
    assert rows["run"] == "celo_phase2"
    assert rows["meta-parameters"] == "35,649 trainable and 1,440 frozen"


def test_arguments_choose_a_variant():
    assert lopt.describe("small_fc_lopt", hidden_size=32).trainable == 2409
    assert lopt.describe("celo", phase=1).needs_loss is False
    assert lopt.describe("velo", lstm_size=64, bank_size=32).trainable < lopt.describe("velo").trainable
    with pytest.raises(CheckpointError, match="hiden"):
        lopt.describe("small_fc_lopt", hiden=3)
    with pytest.raises(CheckpointError, match="did you mean 'celo'"):
        lopt.describe("cello")


def test_a_file_is_described_with_its_provenance_shortened(tmp_path):
    rule = lopt.SmallFcLopt(4)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(lopt.encode(rule, theta, {"run": "mine", "config": "a: 1\n" * 100}))
    rows = text_of(lopt.describe(path))
    assert rows["run"] == "mine"
    assert rows["config"] == "500 characters"
    assert rows["needs"] == "nothing but gradients"


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sgd", 0),
        ("adam", 2),
        ("celo_adam", 2),
        ("small_fc_lopt", 3 + 1 + 3 * (1024 + 1024) / 1024**2),
        ("mlp_lopt", 6),
    ],
)
def test_memory_is_what_the_state_of_a_matrix_takes(name, numbers):
    # fp32; a handful of numbers belong to the whole model
    assert lopt.describe(name).state_bytes_per_parameter == pytest.approx(4 * numbers, abs=1e-3)


def test_a_description_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        lopt.describe("adam").paper = "mine"
