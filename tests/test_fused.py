"""The fused path computes what the reference does: windows, resets, every rule, every form of MLP task."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
import tasks
from configs.checks import ConfigError
from configs.schema import DataConfig
from tests.quadratic import Gd, Parabola
from worker import fused
from worker.unroll import Unroll

LIBRARY = tasks.Library(DataConfig())
pytestmark = pytest.mark.skipif(fused.cpu.library() is None, reason="paceline was installed without a compiler")

RULES = {
    "small_fc 4": functools.partial(lopt.SmallFcLopt, 4),
    "small_fc 7": functools.partial(lopt.SmallFcLopt, 7),
    "small_fc 32": functools.partial(lopt.SmallFcLopt, 32),
    "small_fc 40": functools.partial(lopt.SmallFcLopt, 40),
    "mulo 12": functools.partial(lopt.MuLO, 12),
    "celo 1": functools.partial(lopt.Celo, 1),
    "celo 2": functools.partial(lopt.Celo, 2),
    "velo": functools.partial(lopt.Velo, 9, 5),
    "velo compat": functools.partial(lopt.Velo, 16, 4, compat=True),
    "celo2": lopt.Celo2,
    "celo2 base": functools.partial(lopt.Celo2, orthogonalize=False),
}
BUILDS = ("avx512", "avx2", "portable")


def builds():
    """Each of the kernels' builds that this processor runs, in use while it is at hand."""
    best = fused.cpu.build()
    try:
        for name in BUILDS[BUILDS.index(best) :]:
            fused.cpu.use(name)
            yield name
    finally:
        fused.cpu.use(best)


def mlp(tau=None, **changes):
    static = {"kind": "image_mlp", "hidden": [12], "batch_size": 16} | changes
    if tau is not None:
        static = {"kind": "reparam", "level": "global", "low": tau[0], "high": tau[1], "task": static}
    return tasks.static_from_dict(static).build(LIBRARY)


def trained(rule):
    """A theta under which trainings move: the published one of Celo, drawn and enlarged for the others."""
    if isinstance(rule, lopt.Celo):
        return lopt.read("celo_authors")[1]
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    return {
        name: leaf + 0.03 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
        for name, leaf in theta.items()
    }


def windows(rule, task, path, steps, count=1, num_tasks=2, horizon=(5, 20), theta=None):
    theta = trained(rule) if theta is None else theta
    flat = rule.spec.flatten(theta)
    eps = 0.01 * torch.randn(num_tasks, len(flat), generator=torch.Generator().manual_seed(2))
    thetas = rule.spec.unflatten(torch.cat([flat + eps, flat - eps]), theta)
    unroll = Unroll(task, rule, num_tasks, horizon, ("fused",), path=path)
    particles = unroll.start()
    found = [unroll.run(thetas, particles, steps, window) for window in range(count)]
    return torch.cat([w.losses for w in found]), torch.cat([w.done for w in found]), particles


def assert_same(rule, task, steps=12, count=2, rtol=2e-5, theta=None, **settings):
    """Losses and the whole state differ by rounding, or by little more than a last digit of theta changes them."""
    theta = trained(rule) if theta is None else theta
    nudged = {name: leaf * (1 + 2**-22) for name, leaf in theta.items()}
    run = functools.partial(windows, rule, task, steps=steps, count=count, **settings)
    expected, done, reference = run("reference", theta=theta)
    other, _, perturbed = run("reference", theta=nudged)
    theirs, changed = reference.tensors() | {"losses": expected}, perturbed.tensors() | {"losses": other}
    for build in builds():
        losses, our_done, particles = run("fused", theta=theta)
        assert torch.equal(done, our_done)
        ours = particles.tensors() | {"losses": losses}
        assert ours.keys() == theirs.keys()
        for name, leaf in theirs.items():
            assert ours[name].dtype == leaf.dtype, name
            assert ours[name].shape == leaf.shape, name
            x, y, z = (values.double() for values in (leaf, ours[name], changed[name]))
            assert y.isfinite().all(), (build, name)
            allowed = rtol * x.abs().max() + 10 * (z - x).abs().max()
            assert float((y - x).abs().max()) <= float(allowed), (build, name)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_is_the_reference_over_windows_with_resets(rule):
    rule = rule()
    assert_same(rule, mlp(), rtol=1e-3 if rule.needs_horizon else 2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": []},
        {"hidden": [5, 40, 9], "batch_size": 7},
        {"loss": "squared", "hidden": [33]},
        {"shift": 2, "noise": 0.3},
        {"tau": (1e-3, 1e3)},
        {"tau": (1e-2, 1e2), "shift": 1, "noise": 0.1, "activation": "dynamic"},
        {"kind": "mlp_ae"},
        {"kind": "mlp_ae", "constrain_output": False, "center_data": True},
        {
            "kind": "mlp_ae", "log_loss": "dynamic", "center_data": "dynamic", "constrain_output": "dynamic",
            "normalizer": "parametric", "activation": "dynamic",
        },
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_task_is_the_reference(changes):
    assert_same(lopt.SmallFcLopt(4), mlp(**changes))
    assert_same(lopt.Celo(1), mlp(**changes), count=1, rtol=1e-4)


@pytest.mark.parametrize("activation", tasks.families.activations.KINDS)
def test_every_activation_is_the_reference(activation):
    assert_same(lopt.SmallFcLopt(4), mlp(activation=activation, hidden=[9, 17], noise=5.0), num_tasks=1)


def axis_scale(task, low, high):
    """Pixels whose sizes differ by orders of magnitude, from ``low`` to ``high``: what Adafactor's axes are for."""
    images, labels, order = task.datasets.train.pixels.on(torch.device("cpu"))
    scales = torch.logspace(math.log10(low), math.log10(high), images[0].numel()).reshape(images.shape[1:])
    pixels = tasks.data.images.Pixels(images * scales, labels, order, 1000)
    train = tasks.data.images.ImageDataset(pixels, range(1000), 8)
    task.datasets = tasks.Datasets(train, train, train)


def test_axis_scaled_data_are_the_reference():
    task = mlp()
    axis_scale(task, 1e-6, 1e4)
    assert_same(lopt.SmallFcLopt(4), task)
    assert_same(lopt.Celo(1), task, rtol=1e-4)


def calm(rule):
    """A theta under which 200 steps neither stand still nor diverge: what differs is rounding, not chaos."""
    theta = trained(rule)
    if isinstance(rule, lopt.Velo):
        for name in ("controls.w", "step_size.w"):  # as drawn, they make steps of the parameters' own size
            theta[name] = theta[name] * 0.03
    return theta


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "axis-scaled"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_200_steps_of_every_rule_and_path_grow_apart_as_rounding_does(rule, scaled):
    """Losses and state, with resets inside the window and differing horizons.

    The yardstick is the reference against itself, its theta and its losses changed in the last digit but one.
    """
    rule, task, nudged = rule(), mlp(), mlp()
    if scaled:
        axis_scale(task, 1e-6, 10.0)
    nudged.datasets, exact = task.datasets, nudged.loss
    nudged.loss = lambda *of: exact(*of) * (1 + 2**-22)
    theta = calm(rule)
    close = {name: leaf * (1 + 2**-22) for name, leaf in theta.items()}
    run = functools.partial(windows, rule, steps=200, horizon=(60, 150))
    expected, done, reference = run(task, "reference", theta=theta)
    assert done.any(0).all(), "every particle is reset within the window"
    losses, _, other = run(nudged, "reference", theta=close)
    theirs, changed = reference.tensors() | {"losses": expected}, other.tensors() | {"losses": losses}
    for path, build in itertools.chain((("fused", build) for build in builds()), [("generic", None)]):
        losses, _, particles = run(task, path, theta=theta)
        ours = particles.tensors() | {"losses": losses}
        for name, leaf in theirs.items():
            x, y, z = (values.double() for values in (leaf, ours[name], changed[name]))
            allowed = 3e-6 * x.abs().max() + 4 * (z - x).abs().max()
            assert float((y - x).abs().max()) <= float(allowed), (path, build, name)


@given(
    hidden=st.lists(st.integers(1, 70), max_size=3),
    batch=st.integers(1, 40),
    width=st.integers(1, 40),
    num_tasks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_widths_are_the_reference(hidden, batch, width, num_tasks, seed):
    rule = lopt.SmallFcLopt(width)
    theta = rule.init_theta(torch.Generator().manual_seed(seed))
    assert_same(
        rule, mlp(hidden=hidden, batch_size=batch), 6, 1, 5e-5, num_tasks=num_tasks, theta=theta, horizon=(2, 5)
    )


def test_threads_change_nothing():
    one = windows(lopt.Celo(2), mlp(), "fused", 30, num_tasks=5)
    torch.set_num_threads(3)
    try:
        three = windows(lopt.Celo(2), mlp(), "fused", 30, num_tasks=5)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], three[0])
    for name, leaf in one[2].tensors().items():
        assert torch.equal(leaf, three[2].tensors()[name]), name


def test_a_window_cut_in_two_is_the_same_state():
    """What a particle is at the end of a window is all that the next one needs."""
    rule, task = lopt.Celo(2), mlp()
    whole = windows(rule, task, "fused", 10, 3)
    unroll = Unroll(task, rule, 2, (5, 20), ("fused",), path="fused")
    flat = rule.spec.flatten(trained(rule))
    eps = 0.01 * torch.randn(2, len(flat), generator=torch.Generator().manual_seed(2))
    thetas = rule.spec.unflatten(torch.cat([flat + eps, flat - eps]), trained(rule))
    particles, losses = unroll.start(), []
    for window in range(3):
        shuffled = dict(sorted(particles.tensors().items(), reverse=True))  # as a file may return them
        particles = type(particles).from_tensors(shuffled, torch.device("cpu"))
        losses.append(unroll.run(thetas, particles, 10, window).losses)
    assert torch.equal(torch.cat(losses), whole[0])


def test_a_diverged_side_reports_the_worst_loss_and_leaves_the_others_alone():
    rule, task = lopt.SmallFcLopt(4), mlp()
    theta = trained(rule)
    flat = rule.spec.flatten(theta).repeat(4, 1)
    mad = rule.spec.unflatten(flat, theta)
    mad["mlp.b2"] = mad["mlp.b2"] + torch.tensor([1e30, 0, 0, 0]).unsqueeze(1)
    results = []
    for thetas in (rule.spec.unflatten(flat, theta), mad):
        unroll = Unroll(task, rule, 2, (50, 50), ("mad",), path="fused")
        results.append(unroll.run(thetas, unroll.start(), 20, 0).losses)
    sane, diverged = results
    assert diverged.isfinite().all()
    assert float(diverged[-1, 0]) == task.worst_loss
    assert torch.equal(sane[:, 1:], diverged[:, 1:])


def test_auto_takes_the_fused_path_where_it_serves_and_the_generic_one_elsewhere():
    def chosen(task, rule, path="auto"):
        return Unroll(task, rule, 1, (5, 5), ("path",), path=path).path.name

    assert chosen(mlp(), lopt.Celo(1)) == "fused"
    assert chosen(mlp(tau=(0.1, 10.0)), lopt.Celo(2)) == "fused"
    assert chosen(mlp(), lopt.Celo(1), "reference") == "reference"
    assert chosen(mlp(norm="layer_norm"), lopt.Celo(1)) == "generic"
    assert chosen(mlp(dropout=0.5), lopt.Celo(1)) == "generic"
    assert chosen(Parabola(), Gd()) == "generic"
    assert chosen(mlp(), lopt.Celo2(compat=True)) == "generic"


@pytest.mark.parametrize(
    ("changes", "rule", "reason"),
    [
        ({"norm": "batch_norm"}, lopt.Celo(1), "norms or dropout"),
        ({"image_size": 16}, lopt.Celo(1), None),
        ({}, lopt.Celo2(adam_names="w*"), "routing"),
    ],
)
def test_a_forced_path_that_does_not_serve_is_refused_with_the_reason(changes, rule, reason):
    task = mlp(**changes)
    if reason is None:
        assert Unroll(task, rule, 1, (5, 5), ("path",), path="fused").path.name == "fused"
        return
    with pytest.raises(ConfigError, match=reason) as error:
        Unroll(task, rule, 1, (5, 5), ("path",), path="fused")
    assert error.value.field == "worker.path"


def test_bytes_become_pixels_as_division_rounds_them():
    """255 levels through a network of one layer whose loss is their sum of squares: exact if every level is."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    pixels = tasks.data.images.Pixels(images, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1)
    train = tasks.data.images.ImageDataset(pixels, range(1), 16)
    task = mlp(hidden=[], image_size=16, batch_size=1)
    task.datasets = tasks.Datasets(train, train, train)
    assert_same(lopt.SmallFcLopt(4), task, rtol=1e-6)
