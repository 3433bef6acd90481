"""benchmarks/curves.py: its table and picture are of what was really trained, and a diverged Adam is never the best."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lopt
from tasks import Dataset, random

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "curves.py"
spec = importlib.util.spec_from_file_location("benchmarks_curves", SCRIPT)
curves = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = curves
spec.loader.exec_module(curves)


@pytest.fixture(scope="module")
def digits():
    return curves.image_problem("digits", None)


def made(*train):
    """The curves of one optimizer with these final training losses."""
    return curves.Curves.of([curves.Run(np.linspace(3.0, loss, 4), loss, loss, 0.001) for loss in train])


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    curves.main()


def test_the_script_writes_a_picture_and_every_final_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "FINAL_BATCHES", 1)
    picture = tmp_path / "new" / "curves.png"
    run_script(monkeypatch, "--steps", 2, "--seeds", 1, "--out", picture, "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"digits", "text"}  # no data root, no Fashion-MNIST
    for task in found.values():
        assert len(task["adam"]) == 14
        assert f"{task['best_rate']:g}" in task["adam"]
        assert all(0 < loss < 10 for loss in task["celo"]["train"] + task["celo"]["held_out"])
    with Image.open(picture) as image:
        assert image.width > image.height > 300


def test_a_root_without_fashion_mnist_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "train", None)
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, "--data", tmp_path, "--out", tmp_path / "curves.png")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message
    assert "train-images-idx3-ubyte" in message


def test_all_optimizers_start_at_the_same_parameters_and_see_the_same_first_batch(digits):
    celo, adam = curves.compare("digits", digits, steps=3, seeds=2)
    assert tuple(adam) == curves.RATES
    assert celo.losses.shape == (2, 3)
    assert celo.losses[0, 0] != celo.losses[1, 0]
    for found in adam.values():
        np.testing.assert_array_equal(found.losses[:, 0], celo.losses[: len(found.losses), 0])
        assert (found.losses[0, 1:] != celo.losses[0, 1:]).all()


def test_celo_is_told_the_steps_and_its_true_losses(digits, monkeypatch):
    optimizers, told = [], []

    class Watched(lopt.Optimizer):
        def step(self, closure):
            told.append(closure())
            return super().step(closure)

    def load(name):
        rule, theta, _ = lopt.read(name)

        def make(params, **settings):
            optimizers.append(Watched(params, rule, theta, **settings))
            return optimizers[-1]

        return make

    monkeypatch.setattr(lopt, "load", load)
    celo, _ = curves.compare("digits", digits, steps=4, seeds=1)
    (optimizer,) = optimizers
    assert optimizer.progress["num_steps"] == optimizer.progress["steps"] == 4
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert told == celo.losses[0].tolist()


class OneBadBatch(Dataset):
    """Images of infinity in the second batch only."""

    def __init__(self, inner):
        self.inner, self.num_examples, self.drawn = inner, inner.num_examples, 0

    def sample(self, keys, batch_size):
        self.drawn += 1
        batch = self.inner.sample(keys, batch_size)
        return batch | {"image": batch["image"] * math.inf} if self.drawn == 2 else batch


def test_a_run_ends_at_its_first_loss_that_is_not_finite_and_has_no_final_loss(digits):
    problem = dataclasses.replace(digits, train=OneBadBatch(digits.train))
    run = curves.train("digits", problem, lambda params: torch.optim.SGD(params, lr=0.1), 4, seed=0)
    assert np.isnan(run.losses).tolist() == [False, True, True, True]
    assert math.isnan(run.train)
    assert math.isnan(run.held_out)


def test_the_best_adam_has_the_lowest_mean_and_neither_diverged_nor_skipped_a_seed():
    adam = {1e-3: made(0.2, math.nan), 1e-2: made(0.9, 0.7), 1e-1: made(0.5, 0.6), 1.0: made(0.1)}
    assert curves.best_rate(adam) == 1e-1


def test_speed_up_is_all_steps_over_those_that_celo_needed():
    adam = made(1.0, 1.0)
    goal = curves.smooth(adam.losses)[0, -1]
    at_once = np.array([[goal, 0, 0, 0], [9, 9, 9, 9.0]])
    celo = curves.Curves(at_once, np.ones(2), np.ones(2), np.ones(2))
    np.testing.assert_array_equal(curves.speedup(celo, adam), [4.0, 0.0])


def test_the_transformer_predicts_each_character_from_those_before_it():
    model = curves.Transformer(torch.Generator().manual_seed(0))
    text = curves.batch(curves.text_problem().train, random.keys(1, "test"), 1)["text"]
    x = model.characters(text[:, :-1])
    x.retain_grad()
    model.blocks(x)[0, 10].sum().backward()
    assert x.grad[0, : 10 + 1].abs().sum(-1).gt(0).all()
    assert x.grad[0, 11:].eq(0).all()
