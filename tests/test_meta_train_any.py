"""Every learned optimizer there is can be meta-trained from a configuration: workers' estimates, then a meta-step."""

from dataclasses import replace
from functools import cache
from importlib import resources

import numpy as np
import pytest
import torch
import yaml

import lopt
import tasks
from configs.checks import ConfigError
from configs.schema import Config
from deploy.config import from_yaml, group_options, load, to_dict
from learner.core import LearnerCore, Verdict
from learner.start import build_lopt, initial_theta
from lopt.checkpoint import ARCHITECTURES
from worker.core import WorkerCore

OPTIONS = group_options()["lopt"]
SMALL = {
    "celo_phase2": {"init_from": "celo"},
    "velo": {"arguments": {"lstm_size": 8, "bank_size": 4}},
    "velo_small": {"arguments": {"lstm_size": 6, "bank_size": 3, "compat": True}},
    "mulo": {"arguments": {"hidden_size": 8}},
    "mlp_lopt": {"arguments": {"hidden_size": 8}},
    "nn_adam": {"arguments": {"lstm_size": 4}},
}
"""What makes an option small, or complete; the others are tried as they are."""
TINY = [
    "task.families={tiny: {task: {kind: image_mlp, hidden: [4], batch_size: 4}}}",
    "task.augment=[{kind: reparam, level: global, low: 0.1, high: 10}]",
    "estimator.num_tasks=2",
    "estimator.window=4",
    "estimator.horizon_low=3",
    "estimator.horizon_high=9",
    "meta_optimizer.meta_batch=3",
    "evaluation=none",
]


@cache
def tiny() -> Config:
    return load(TINY)


def config_of(option: str, **changes: object) -> Config:
    chosen = (resources.files("configs") / "lopt" / f"{option}.yaml").read_text()
    tree = to_dict(tiny()) | {"lopt": yaml.safe_load(chosen) | SMALL.get(option, {}) | changes}
    return from_yaml(yaml.safe_dump(tree))


def worker(config: Config, rule: lopt.LearnedOptimizer) -> WorkerCore:
    distribution = tasks.TaskDistribution(config.task, tasks.Library(config.task.data))
    return WorkerCore(rule, distribution, config.estimator, 0, ("worker", 0), path="reference")


def meta_gradient(turn, version, sequence):
    return lopt.MetaGradient(
        run="r",
        incarnation=1,
        version=version,
        worker="w",
        sequence=sequence,
        family=turn.family,
        static_digest=turn.static_digest,
        dense=turn.estimate.gradient.numpy(),
        mean_loss=turn.estimate.mean_loss,
        norm=float(turn.estimate.gradient.norm()),
        inner_steps=turn.estimate.inner_steps,
        seconds=0.1,
    )


def spied(rule):
    """The thetas of every inner step from now on."""
    seen, original = [], rule.update_particles

    def spy(thetas, *rest):
        seen.append(thetas)
        return original(thetas, *rest)

    rule.update_particles = spy
    return seen


def test_every_architecture_is_an_option_of_a_configuration():
    assert {config_of(option).lopt.name for option in OPTIONS} == set(ARCHITECTURES)


def test_hyperparameters_are_meta_learned_in_log_space():
    rules = [build_lopt(config_of(option)) for option in OPTIONS]
    assert {rule.name for rule in rules if "log_space" in rule.arguments} >= {"sgd", "adam", "nadamw", "muon"}
    assert all(rule.arguments.get("log_space", True) for rule in rules)


@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_meta_trained_with_pes_over_restarts_of_episodes(option):
    config = config_of(option)
    rule = build_lopt(config)
    theta = initial_theta(rule, config)
    own, seen = worker(config, rule), spied(rule)
    learner = LearnerCore(rule, theta, config.meta_optimizer, run="r", incarnation=1, families=["tiny"])
    for sequence in range(3):
        turn = own.estimate(theta, sequence)
        assert turn.estimate.gradient.shape == (rule.spec.trainable_size,)
        assert turn.estimate.gradient.abs().max() > 0
        assert learner.submit(meta_gradient(turn, 0, sequence)) is Verdict.ACCEPTED, learner.last_malformation
    assert own._slots[0].state["episode"].min() >= 1, "no episode was over"
    for entry in rule.spec.entries:
        leaves = torch.stack([thetas[entry.name].expand(4, *entry.shape) for thetas in seen])
        assert bool((leaves == theta[entry.name]).all()) == entry.frozen, entry.name

    learner.step()
    moved = learner.theta
    rule.spec.check(moved)
    for entry in rule.spec.entries:
        assert torch.equal(moved[entry.name], theta[entry.name]) == entry.frozen, entry.name
    again, found, _ = lopt.decode(lopt.encode(rule, moved, {}))
    assert again.arguments == rule.arguments

    other = worker(config, rule)
    other.restore(own.snapshot())
    assert torch.equal(own.estimate(found, 3).estimate.gradient, other.estimate(found, 3).estimate.gradient)


@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_meta_trained_with_full_es(option):
    config = config_of(option)
    config = replace(config, estimator=replace(config.estimator, name="full_es", horizon_high=5))
    rule = build_lopt(config)
    estimate = worker(config, rule).estimate(initial_theta(rule, config), 0).estimate
    assert np.isfinite(estimate.mean_loss)
    assert estimate.gradient.isfinite().all()
    assert estimate.gradient.abs().max() > 0


def stored(tmp_path, rule):
    path = tmp_path / f"{rule.name}.safetensors"
    path.write_bytes(lopt.encode(rule, rule.init_theta(torch.Generator().manual_seed(0)), {}))
    return path


def starting_from(option, source, **changes):
    config = config_of(option, init_from=str(source), **changes)
    return initial_theta(build_lopt(config), config)


def test_a_run_starts_from_the_first_phase_of_celo_or_from_published_weights(tmp_path):
    first = lopt.Celo(1)
    assert torch.equal(
        starting_from("celo_phase2", stored(tmp_path, first))["mlp.w0"],
        first.init_theta(torch.Generator().manual_seed(0))["mlp.w0"],
    )
    assert torch.equal(starting_from("celo_phase1", "celo")["mlp.w0"], lopt.read("celo")[1]["mlp.w0"])
    with pytest.raises(ConfigError, match=r"^lopt\.init_from = 'celo': expected weights of celo_adam \("):
        starting_from("celo_adam", "celo")


def test_a_theta_that_means_something_else_under_these_arguments_is_refused(tmp_path):
    plain = stored(tmp_path, lopt.build("adam"))
    with pytest.raises(ConfigError, match=r"^lopt.init_from = .*log_space = False: expected True"):
        starting_from("adam", plain)
    assert starting_from("adam", plain, arguments={})["learning_rate"] == pytest.approx(1e-3)
    large = stored(tmp_path, lopt.build("small_fc_lopt", hidden_size=4, step_mult=0.01))
    with pytest.raises(ConfigError, match=r"with step_mult = 0.001; these have 0.01 \(lopt.arguments.step_mult"):
        starting_from("small_fc_lopt", large)
    assert starting_from("small_fc_lopt", large, arguments={"step_mult": 0.01})
