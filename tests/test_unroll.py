"""The inner loop: what the two sides share, how episodes begin and end, what a snapshot holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
import tasks
from configs.schema import DataConfig, EstimatorConfig, FamilyConfig, ReparamConfig
from tests.quadratic import Family, Gd, Static
from worker.core import WorkerCore
from worker.unroll import Unroll, log_uniform


def digits(name="tiny", **changes):
    settings = {"hidden": [4], "batch_size": 8, "shift": 1, "noise": 0.1, "reparam": ReparamConfig("global", 0.1, 10.0)}
    return tasks.build_family(name, FamilyConfig(**(settings | changes)), DataConfig())


def unrolled(rule, family, theta, num_tasks, steps, horizon=(3, 9)):
    static = family.sample_static(np.random.default_rng(0))
    unroll = Unroll(family, static, rule, num_tasks, horizon, ("test",))
    particles = unroll.start()
    window = unroll.run(theta, particles, steps, 0)
    return particles, window


def both_sides(rule, num_tasks, eps):
    flat = rule.spec.flatten(rule.init_theta(torch.Generator().manual_seed(0)))
    spread = eps * torch.randn(num_tasks, len(flat), generator=torch.Generator().manual_seed(1))
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    return rule.spec.unflatten(torch.cat([flat + spread, flat - spread]), theta)


@pytest.mark.parametrize("rule", [lopt.SmallFcLopt(4), lopt.Celo(1), lopt.Celo(2)], ids=["small_fc", "celo1", "celo2"])
def test_both_sides_are_the_same_training_when_nothing_is_perturbed(rule):
    particles, window = unrolled(rule, digits(), both_sides(rule, 3, 0.0), 3, 20)
    positive, negative = window.losses.chunk(2, dim=1)
    torch.testing.assert_close(positive, negative, rtol=1e-6, atol=1e-6)
    for leaf in (particles.params | particles.dynamic).values():
        torch.testing.assert_close(leaf[:3], leaf[3:], rtol=1e-5, atol=1e-6)
    assert window.losses[:, 0].std() > 0
    assert not torch.equal(window.losses[:, 0], window.losses[:, 1]), "tasks must differ from each other"


@pytest.mark.parametrize("rule", [lopt.SmallFcLopt(4), lopt.Celo(1), lopt.Celo(2)], ids=["small_fc", "celo1", "celo2"])
def test_particles_in_a_batch_equal_one_training_after_the_other(rule):
    family, num_tasks, steps = digits(), 2, 12
    thetas = both_sides(rule, num_tasks, 0.05)
    particles, window = unrolled(rule, family, thetas, num_tasks, steps, horizon=(100, 100))
    static = family.sample_static(np.random.default_rng(0))
    batches = tasks.generator("test", "batches", 0)
    data = [family.datasets.train.sample(batches, (num_tasks, 8)) for _ in range(steps)]
    for i in range(2 * num_tasks):
        draws = tasks.generator("test", "episode", i % num_tasks, 0)
        log_uniform((100, 100), draws)
        torch.randint(1, 101, (), generator=draws)
        dynamic = {name: leaf[0] for name, leaf in family.sample_dynamic(draws, 1).items()}
        task = family.build(static, dynamic)
        params = task.init(draws)
        theta = {name: leaf[i] for name, leaf in thetas.items()}
        state = rule.init_state(theta, params, 100)
        ended = int(particles.ends[i % num_tasks])
        for t in range(min(steps, ended)):
            batch = {name: leaf[i % num_tasks] for name, leaf in data[t].items()}
            grads, loss = torch.func.grad_and_value(lambda p, b=batch, f=task: f.loss(p, b))(params)
            torch.testing.assert_close(task.normalizer(loss), window.losses[t, i], rtol=2e-4, atol=2e-5)
            params, state = rule.update(theta, state, params, grads, loss)


def test_episodes_end_at_their_horizon_and_the_first_one_earlier():
    rule = Gd()
    unroll = Unroll(Family(), Static(), rule, 64, (10, 10), ("stagger",))
    theta = rule.spec.unflatten(rule.spec.flatten(rule.init_theta(None)).expand(128, -1), rule.init_theta(None))
    _, done = unroll.run(theta, unroll.start(), 40, 0)
    first = [int(column.nonzero()[0]) + 1 for column in done.T]
    assert set(first) == set(range(1, 11)), "first ends are spread over the whole horizon"
    for column, start in zip(done.T, first, strict=True):
        ends = column.nonzero().flatten() + 1
        assert ends.tolist() == list(range(start, 41, 10))


@given(st.integers(1, 50), st.integers(0, 3000), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_horizons_stay_within_their_bounds(low, extra, seed):
    drawn = log_uniform((low, low + extra), torch.Generator().manual_seed(seed))
    assert low <= drawn <= low + extra


def test_horizons_are_log_uniform():
    draws = torch.Generator().manual_seed(0)
    drawn = np.array([log_uniform((10, 1000), draws) for _ in range(4000)])
    assert abs(np.mean(drawn < 100) - 0.5) < 0.03


def test_a_diverging_particle_reports_the_worst_loss_and_leaves_the_others_alone():
    rule = Gd()
    flat = torch.tensor([[0.08, 0.03]]).repeat(4, 1)
    sane = rule.spec.unflatten(flat, rule.init_theta(None))
    mad = rule.spec.unflatten(torch.cat([flat[:1] * 1e6, flat[1:]]), rule.init_theta(None))
    unroll = Unroll(Family(), Static(), rule, 2, (50, 50), ("mad",))
    expected = unroll.run(sane, unroll.start(), 40, 0).losses
    losses = unroll.run(mad, unroll.start(), 40, 0).losses
    assert losses.isfinite().all()
    assert (losses[-1, 0]) == unroll.task.worst_loss
    assert torch.equal(losses[:, 1:], expected[:, 1:])


CONFIGS = {
    "pes": EstimatorConfig(sigma=0.5, num_tasks=2, window=4, horizon_low=3, horizon_high=11),
    "full_es": EstimatorConfig(
        name="full_es", sigma=0.5, num_tasks=2, horizon_low=3, horizon_high=7, objective="final"
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_restored_worker_goes_on_bit_for_bit(config):
    rule = lopt.Celo(2)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    families = [digits("one"), digits("two", hidden=[3, 3])]
    first = WorkerCore(rule, families, config, 0, ("w", 0))
    for _ in range(5):
        first.estimate(theta)
    second = WorkerCore(rule, families, config, 0, ("w", 0))
    second.restore(first.snapshot())
    for _ in range(3):
        one, two = first.estimate(theta), second.estimate(theta)
        assert one.family == two.family
        assert torch.equal(one.estimate.gradient, two.estimate.gradient)
        assert one.estimate.gradient.isfinite().all()
        assert one.estimate.gradient.abs().max() > 0


def test_workers_rotate_through_families_from_their_slot_on_and_differ():
    rule, config = Gd(), CONFIGS["pes"]
    families = [Family(), Family(), Family()]
    for family, name in zip(families, "abc", strict=True):
        family.name = name
    cores = [WorkerCore(rule, families, config, slot, ("w", slot)) for slot in range(2)]
    turns = [[core.estimate(rule.init_theta(None)) for _ in range(4)] for core in cores]
    assert ["".join(turn.family for turn in own) for own in turns] == ["abca", "bcab"]
    gradients = [turn.estimate.gradient for own in turns for turn in own]
    assert len({tuple(gradient.tolist()) for gradient in gradients}) == len(gradients)


def test_frozen_parts_are_not_perturbed():
    rule = lopt.Celo(1)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    seen = []
    original = rule.update_particles

    def spy(thetas, *rest):
        seen.append(thetas)
        return original(thetas, *rest)

    rule.update_particles = spy
    WorkerCore(rule, [digits()], CONFIGS["pes"], 0, ("w",)).estimate(theta)
    for entry in rule.spec.entries:
        spread = seen[0][entry.name].std(0, correction=0).max()
        assert (spread == 0) == entry.frozen, entry.name
