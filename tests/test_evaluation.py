"""Training for measurement: the same start and the same data for every optimizer, one batch for a whole sweep."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import lopt
from configs.schema import DataConfig
from evaluator.results import TaskResult, Yardstick
from evaluator.scores import score
from evaluator.training import FINAL_BATCHES, LEARNING_RATES, Curves, train, train_one, tune_adam
from tasks import Library, generator, static_from_dict
from tasks.random import fold, keys

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by threads, and everything when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def family():
    """The task and its name, as ``train`` takes them."""
    task = {"kind": "image_mlp", "dataset": "digits", "hidden": [12], "batch_size": 16, "shift": 1, "noise": 0.1}
    return "digits_12", static_from_dict(task).build(Library(DataConfig()))


def adam(family, rates, seeds, steps=STEPS):
    return train(lopt.Adam(), {"learning_rate": torch.tensor(rates)}, *family, steps, seeds)


@pytest.fixture(scope="module")
def celo():
    optimizer = lopt.build("celo", phase=1)
    return optimizer, optimizer.init_theta(generator("test", 0))


def test_the_same_seeds_give_the_same_result_to_the_last_bit(family, celo):
    first, second = (train_one(*celo, *family, STEPS, 3, version=1, checkpoint="c") for _ in range(2))
    assert first == second
    assert first != train_one(*celo, *family, STEPS, 4, version=1, checkpoint="c")


def test_global_randomness_has_no_influence_and_is_left_alone(family):
    torch.manual_seed(0)
    first = adam(family, [1e-2], [0])
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first.losses, adam(family, [1e-2], [0]).losses)
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_optimizer_under_test_and_adam_start_at_the_same_loss(family, celo):
    result = train_one(*celo, *family, STEPS, 2, version=0, checkpoint="c")
    sweep = adam(family, [1e-4, 1e-2], [2, 2])
    assert result.curve[0] == pytest.approx(float(sweep.losses[0, 0]), rel=1e-5)
    assert torch.equal(sweep.losses[0, 0], sweep.losses[1, 0])
    assert not torch.equal(sweep.losses[0], sweep.losses[1])


def test_an_optimizer_that_does_nothing_sees_the_same_batches_as_adam_with_rate_zero(family):
    """The loss of a model that never moves is the stream of batches."""
    still = adam(family, [0.0, 0.0], [0, 1])
    alone = adam(family, [0.0], [1])
    assert torch.allclose(still.losses[1], alone.losses[0], rtol=1e-5)
    assert torch.allclose(still.test_loss[1], alone.test_loss[0], rtol=1e-5)
    assert not torch.allclose(still.losses[0], still.losses[1], rtol=1e-2)
    assert still.losses[0].unique().numel() == STEPS


def test_a_sweep_in_one_batch_equals_its_single_runs(family):
    rates, seeds = [1e-3, 1e-1, 1e-3], [0, 0, 5]
    batch = adam(family, rates, seeds)
    for row, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        alone = adam(family, [rate], [seed])
        torch.testing.assert_close(batch.losses[row], alone.losses[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(batch.test_loss[row], alone.test_loss[0], rtol=1e-3, atol=1e-4)


def batch(task, split, key):
    return {name: leaf[0] for name, leaf in task.batch(split, key).items()}


def test_adam_is_torchs_adam_on_the_declared_streams(family):
    """An oracle built from torch.optim and the documented keys, sharing no code with train()."""
    _, task = family
    params = task.init(generator("evaluation", "digits_12", 7, "init"))
    leaves = [leaf.requires_grad_() for leaf in params.values()]
    optimizer = torch.optim.Adam(leaves, lr=5e-2)
    key, curve = keys(1, "evaluation", "digits_12", 7, "train"), []
    for step in range(STEPS):
        loss = task.loss(params, batch(task, "train", fold(key, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    key = keys(1, "evaluation", "digits_12", 7, "final test")
    with torch.no_grad():
        final = [task.loss(params, batch(task, "test", fold(key, i))).item() for i in range(FINAL_BATCHES)]
    ours = adam(family, [5e-2], [7])
    np.testing.assert_allclose(ours.losses[0], curve, rtol=1e-4)
    assert float(ours.test_loss) == pytest.approx(np.mean(final), rel=1e-4)


def test_a_diverged_particle_is_marked_capped_and_leaves_the_others_alone(family):
    pair = adam(family, [1e-2, 1e38], [0, 0])
    alone = adam(family, [1e-2], [0])
    assert pair.diverged.tolist() == [False, True]
    assert torch.isfinite(pair.losses).all()
    assert float(pair.test_loss[1]) == float(pair.train_loss[1]) == pytest.approx(1.5 * math.log(10))
    torch.testing.assert_close(pair.losses[0], alone.losses[0], rtol=1e-3, atol=1e-4)


def test_a_diverged_run_can_be_stored_and_scores_zero(family):
    yardstick = tune_adam(*family, STEPS, [0])
    theta = {"learning_rate": torch.tensor(1e38)}
    run = train_one(lopt.Adam(), theta, *family, STEPS, 0, version=1, checkpoint="c")
    assert TaskResult.from_json(run.to_json()) == run
    assert run.diverged
    assert score([run], {"digits_12": yardstick}).final_loss.iqm == 0.0


def test_the_sweep_is_half_powers_of_ten_from_1e_minus_5_to_1():
    assert len(LEARNING_RATES) == 11
    np.testing.assert_allclose(np.diff(np.log10(LEARNING_RATES)), 0.5, atol=1e-3)
    assert (LEARNING_RATES[0], LEARNING_RATES[-1]) == (1e-5, 1.0)


def test_the_yardstick_is_the_learning_rate_with_the_lowest_mean_test_loss(family):
    yardstick = tune_adam(*family, STEPS, [0, 1])
    curves = {rate: adam(family, [rate, rate], [0, 1]) for rate in (1e-3, yardstick.learning_rate, 1.0)}
    losses = {rate: float(curve.test_loss.mean()) for rate, curve in curves.items()}
    assert min(losses, key=losses.get) == yardstick.learning_rate
    assert dict(yardstick.sweep)[1e-3] == pytest.approx(losses[1e-3], rel=1e-3)
    assert min(loss for _, loss in yardstick.sweep) == pytest.approx(np.mean(yardstick.test_losses), rel=1e-4)
    assert np.shape(yardstick.curves) == (2, STEPS)
    assert Yardstick.from_json(yardstick.to_json()) == yardstick


def test_a_learning_rate_that_diverges_for_one_seed_is_never_the_best(family, monkeypatch):
    test = torch.tensor([0.1, 0.3, 2.0, 1.0])
    curves = Curves(torch.ones(4, 2), test, test, torch.tensor([False, True, False, False]))
    monkeypatch.setattr("evaluator.training.train", lambda *args: curves)
    yardstick = tune_adam(*family, 2, [0, 1], learning_rates=[0.5, 0.1])
    assert yardstick.learning_rate == 0.1
    assert yardstick.sweep == [[0.5, None], [0.1, 1.5]]
    assert yardstick.test_losses == [2.0, 1.0]


def test_where_every_learning_rate_diverges_there_is_no_yardstick(family):
    yardstick = tune_adam(*family, STEPS, [0], learning_rates=[1e38, 1e-5])
    assert yardstick.learning_rate == 1e-5
    assert yardstick.sweep[0] == [1e38, None]
    with pytest.raises(ValueError, match="diverged with every learning rate"):
        tune_adam(*family, STEPS, [0], learning_rates=[1e38])


def test_tuned_adam_as_a_checkpoint_scores_one(family):
    yardstick = tune_adam(*family, STEPS, [0, 1])
    theta = {"learning_rate": torch.tensor(yardstick.learning_rate)}
    runs = [train_one(lopt.Adam(), theta, *family, STEPS, seed, version=0, checkpoint="adam") for seed in (0, 1)]
    scores = score(runs, {"digits_12": yardstick})
    assert scores.final_loss.iqm == pytest.approx(1.0, abs=0.1)
    assert scores.final_loss.optimality_gap == pytest.approx(0.0, abs=0.1)


def test_theta_without_a_particle_axis_is_refused(family):
    with pytest.raises(ValueError, match="'learning_rate'"):
        train(lopt.Adam(), {"learning_rate": torch.tensor(1e-3)}, *family, 1, [0])


def test_the_core_imports_without_ray_hydra_or_grpc():
    code = (
        "import sys, evaluator.training, evaluator.queue, evaluator.report;"
        "print(sorted({'ray', 'hydra', 'grpc'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
