"""The inner loop: what the two sides share, how episodes begin and end, what a snapshot holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
import tasks
from configs.schema import DataConfig, EstimatorConfig, FamilyConfig, HorizonPoint, SizePoint, TaskConfig, TimeConfig
from tasks.random import fold, keys
from tests.quadratic import Gd, Parabola, Parabolas
from worker.core import WorkerCore
from worker.curriculum import horizon_at, size_at
from worker.unroll import Unroll, log_uniform

LIBRARY = tasks.Library(DataConfig())
REPARAM = {"kind": "reparam", "level": "global", "low": 0.1, "high": 10.0}


def mlp(**changes):
    return {"kind": "image_mlp", "hidden": [4], "batch_size": 8, "shift": 1, "noise": 0.1} | changes


def digits():
    return tasks.static_from_dict(REPARAM | {"task": mlp()}).build(LIBRARY)


def distribution(families, **settings):
    config = TaskConfig(families={name: FamilyConfig(task=task) for name, task in families.items()}, **settings)
    return tasks.TaskDistribution(config, LIBRARY)


def unrolled(rule, task, theta, num_tasks, steps, horizon=(3, 9)):
    unroll = Unroll(task, rule, num_tasks, horizon, ("test",))
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
    task, num_tasks, steps = digits(), 2, 12
    thetas = both_sides(rule, num_tasks, 0.05)
    particles, window = unrolled(rule, task, thetas, num_tasks, steps, horizon=(100, 100))
    batches = keys(num_tasks, "test", "batches", 0)
    data = [task.batch("train", fold(batches, step)) for step in range(steps)]
    for i in range(2 * num_tasks):
        draws = tasks.generator("test", "episode", i % num_tasks, 0)
        log_uniform((100, 100), draws)
        torch.randint(1, 101, (), generator=draws)
        dynamic = {name: leaf[0] for name, leaf in task.sample_dynamic(draws, 1).items()}
        params = task.init(draws, dynamic)
        theta = {name: leaf[i] for name, leaf in thetas.items()}
        state = rule.init_state(theta, params, 100)
        ended = int(particles.ends[i % num_tasks])
        for t in range(min(steps, ended)):
            batch = {name: leaf[i % num_tasks] for name, leaf in data[t].items()}
            grads, loss = torch.func.grad_and_value(task.loss)(params, batch, dynamic)
            torch.testing.assert_close(task.normalizer(loss), window.losses[t, i], rtol=2e-4, atol=2e-5)
            params, state = rule.update(theta, state, params, grads, loss)


def test_episodes_end_at_their_horizon_and_the_first_one_earlier():
    rule = Gd()
    unroll = Unroll(Parabola(), rule, 64, (10, 10), ("stagger",))
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
    unroll = Unroll(Parabola(), rule, 2, (50, 50), ("mad",))
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


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_restored_worker_goes_on_bit_for_bit(config, slots):
    rule = lopt.Celo(2)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    families = distribution({"one": mlp(), "two": mlp(hidden=[3, 3])}, augment=[REPARAM], slots=slots, resample=0.4)
    first = WorkerCore(rule, families, config, 0, ("w", 0))
    for version in range(9):
        first.estimate(theta, version)
    assert max(slot.draws for slot in first._slots if slot) > 0, "no task was drawn anew"
    second = WorkerCore(rule, families, config, 0, ("w", 0))
    second.restore(first.snapshot())
    for version in range(9, 14):
        one, two = first.estimate(theta, version), second.estimate(theta, version)
        assert (one.family, one.static_digest) == (two.family, two.static_digest)
        assert torch.equal(one.estimate.gradient, two.estimate.gradient)
        assert one.estimate.gradient.isfinite().all()
        assert one.estimate.gradient.abs().max() > 0


def test_workers_rotate_through_families_from_their_slot_on_and_differ():
    rule, config = Gd(), CONFIGS["pes"]
    cores = [WorkerCore(rule, Parabolas(*"abc"), config, slot, ("w", slot)) for slot in range(2)]
    turns = [[core.estimate(rule.init_theta(None), 0) for _ in range(4)] for core in cores]
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
    WorkerCore(rule, distribution({"tiny": mlp()}), CONFIGS["pes"], 0, ("w",), path="reference").estimate(theta, 0)
    for entry in rule.spec.entries:
        spread = seen[0][entry.name].std(0, correction=0).max()
        assert (spread == 0) == entry.frozen, entry.name


def turns(slots, resample, count, config=CONFIGS["full_es"], **settings):
    core = WorkerCore(
        Gd(), Parabolas(*"abcd", slots=slots, resample=resample, **settings), config, 0, ("w", 0), path="reference"
    )
    theta = Gd().init_theta(None)
    return [core.estimate(theta, version) for version in range(count)]


def test_with_slots_families_are_drawn_by_chance_and_drawn_anew_with_the_configured_probability():
    never, always = turns(2, 0.0, 40), turns(2, 1.0, 400)
    assert len({turn.family for turn in never}) <= 2, "a task stays in its slot"
    counts = [sum(turn.family == family for turn in always) for family in "abcd"]
    assert min(counts) > 60, f"400 draws of four equal families: {counts}"
    assert turns(2, 1.0, 20)[-1].family == always[19].family, "the draws are the worker's, not chance"


def test_a_task_that_is_drawn_anew_starts_a_new_stream_of_perturbations():
    gradients = [turn.estimate.gradient for turn in turns(1, 1.0, 6)]
    assert len({tuple(gradient.tolist()) for gradient in gradients}) == 6


SCHEDULE = [HorizonPoint(10, 100, 200), HorizonPoint(20, 200, 1000)]


@pytest.mark.parametrize(
    ("version", "bounds"), [(0, (100, 200)), (10, (100, 200)), (15, (150, 600)), (99, (200, 1000))]
)
def test_the_horizon_schedule_is_linear_between_its_points_and_constant_outside(version, bounds):
    assert horizon_at(EstimatorConfig(horizon_schedule=SCHEDULE), version) == bounds


def test_without_a_schedule_the_bounds_are_those_of_the_estimator_at_every_version():
    assert {horizon_at(EstimatorConfig(horizon_low=7, horizon_high=9), version) for version in (0, 5, 10**6)} == {
        (7, 9)
    }


def test_the_size_schedule_is_a_factor_that_begins_at_its_first_point():
    time = TimeConfig(max_seconds=[1e-4], weights=[1.0])
    config = TaskConfig(
        families={"a": FamilyConfig()}, time=time, size_schedule=[SizePoint(0, 0.5), SizePoint(10, 1.5)]
    )
    assert [size_at(config, version) for version in (0, 5, 10, 50)] == [0.5, 1.0, 1.5, 1.5]
    assert size_at(TaskConfig(families={"a": FamilyConfig()}), 3) == 1.0


def test_a_workers_horizons_follow_the_version_that_it_is_told():
    config = EstimatorConfig(
        name="full_es", num_tasks=1, horizon_schedule=[HorizonPoint(0, 2, 2), HorizonPoint(4, 10, 10)]
    )
    steps = [turn.estimate.inner_steps for turn in turns(None, 0.0, 6, config)]
    assert [count // 2 for count in steps] == [2, 4, 6, 8, 10, 10]


def test_a_worker_draws_tasks_of_the_size_that_the_curriculum_has_reached():
    seen = []

    class Sized(Parabolas):
        def draw(self, rng, family=None, size=1.0):
            seen.append(size)
            return super().draw(rng, family, size)

    time = TimeConfig(max_seconds=[1.0], weights=[1.0])
    parabolas = Sized("a", time=time, size_schedule=[SizePoint(0, 1.0), SizePoint(4, 5.0)], resample=1.0)
    core = WorkerCore(Gd(), parabolas, CONFIGS["full_es"], 0, ("w",), path="reference")
    for version in (0, 1, 4, 9):
        core.estimate(Gd().init_theta(None), version)
    assert seen == [1.0, 1.0, 2.0, 5.0, 5.0]
