"""VeLO's augmentations: the defining property of each, and any of them around any other."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.families  # noqa: F401  # so that every kind of static config is known
from configs.checks import ConfigError
from tasks.augmentations import AUGMENTATIONS, apply_augmentation, augment, check_augmentations
from tasks.augmentations.augmented import innermost
from tasks.augmentations.bfloat16 import Bfloat16
from tasks.augmentations.delayed_gradient import DelayedGradient
from tasks.augmentations.es_gradient import EsGradient
from tasks.augmentations.normalized_gradient import NormalizedGradient
from tasks.augmentations.reduced_batch import ReducedBatch
from tasks.augmentations.reparam import Reparam
from tasks.augmentations.subspace_gradient import SubspaceGradient, projected
from tasks.families.image_mlp import ImageMlp
from tasks.families.lopt_training import LoptTraining
from tasks.random import keys
from tasks.static import static_from_dict
from tests.bowl import Bowl
from tests.task_laws import RandomLibrary, assert_laws, make_particles, rows

LIBRARY = RandomLibrary()
ONE_OF_EACH = {
    "reparam": lambda task: Reparam(task=task, level="tensor", low=0.5, high=2.0),
    "es_gradient": lambda task: EsGradient(task=task, sigma=0.05, pairs=2),
    "reduced_batch": lambda task: ReducedBatch(task=task, fraction=0.5),
    "bfloat16": lambda task: Bfloat16(task=task),
    "normalized_gradient": lambda task: NormalizedGradient(task=task),
    "subspace_gradient": lambda task: SubspaceGradient(task=task, directions=3),
    "delayed_gradient": lambda task: DelayedGradient(task=task, delay=2),
}


def start(static, count=3, seed=0):
    task = static.build(LIBRARY)
    drawn = make_particles(task, count, seed)
    return task, drawn, task.init_state(drawn.params)


def step(task, drawn, state=None):
    state = task.init_state(drawn.params) if state is None else state
    return task.losses_and_grads(drawn.params, state, drawn.batch, drawn.dynamic)


def vector(leaves):
    """(P, ...) leaves as (P, D)."""
    return torch.cat([leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None] for leaf in leaves.values()], 1)


def alike(drawn, count):
    """``count`` particles with the parameters, batch and dynamic config of the first, but each with its own key."""
    repeat = lambda leaves: {name: leaf[:1].expand(count, *leaf.shape[1:]) for name, leaf in leaves.items()}  # noqa: E731
    batch = repeat(drawn.batch) | {"key": keys(count, "alike")}
    return type(drawn)(repeat(drawn.dynamic), repeat(drawn.params), batch)


# ES gradients


def test_es_gives_the_gradient_of_a_quadratic_on_average_and_the_plain_loss():
    plain, drawn, _ = start(Bowl(), 1)
    exact, many = step(plain, drawn), alike(drawn, 20_000)
    out = step(EsGradient(task=Bowl(), sigma=0.1, pairs=2).build(LIBRARY), many)
    torch.testing.assert_close(out.losses, exact.losses.expand(20_000))
    estimates, truth = vector(out.grads), vector(exact.grads)[0]
    deviation = estimates.std(0) / math.sqrt(20_000)
    assert ((estimates.mean(0) - truth).abs() < 4.5 * deviation).all()
    # of a quadratic, sigma does not matter: the variance of one pair is |g|^2 + g_i^2
    expected = (truth.square().sum() + truth.square()) / 2
    torch.testing.assert_close(estimates.var(0), expected, rtol=0.05, atol=0)


def test_es_is_antithetic_so_an_even_loss_gives_exactly_nothing():
    task = EsGradient(task=ImageMlp(hidden=(), loss="squared"), sigma=0.1, pairs=3).build(LIBRARY)
    drawn = make_particles(task, 2)
    params = {name: torch.zeros_like(leaf) for name, leaf in drawn.params.items()}
    one_side = step(task, drawn._replace(params=params))
    assert all((leaf != 0).any() for leaf in one_side.grads.values())
    batch = drawn.batch | {"label": torch.full_like(drawn.batch["label"], 99)}  # no class: the targets are zero
    out = step(task, drawn._replace(params=params, batch=batch))
    assert all((leaf == 0).all() for leaf in out.grads.values())


def test_es_of_a_linear_loss_is_the_sum_over_its_perturbations_whatever_their_size():
    """(L(x + e) - L(x - e)) / (2 sigma^2) e is e (g.e) / sigma^2: the same for every sigma, and along g on average."""
    linear = Bowl(curvature=0.0)
    estimates = []
    for sigma in (0.01, 1.0):
        task, drawn, _ = start(EsGradient(task=linear, sigma=sigma, pairs=4), 5)
        estimates.append(vector(step(task, drawn).grads))
    torch.testing.assert_close(estimates[0], estimates[1], rtol=1e-2, atol=1e-2)
    assert (estimates[1] @ torch.full((6,), 3.0) > 0).all()  # e (g.e) never points against g


def test_pairs_particles_and_steps_have_their_own_perturbations_and_equal_keys_the_same():
    linear = Bowl(curvature=0.0)
    one, drawn, _ = start(EsGradient(task=linear, sigma=1.0, pairs=1), 4)
    first = vector(step(one, drawn).grads)
    assert len({tuple(row) for row in first.tolist()}) == 4
    torch.testing.assert_close(first, vector(step(one, drawn).grads))
    assert torch.linalg.matrix_rank(first[:1].T @ first[:1]) == 1
    many = vector(step(EsGradient(task=linear, sigma=1.0, pairs=8).build(LIBRARY), alike(drawn, 4)).grads)
    g = torch.full((6,), 3.0)
    cosine = lambda x: (x @ g) / (x.norm(dim=1) * g.norm())  # noqa: E731
    assert cosine(many).mean() > cosine(first).mean()  # a mean of different pairs is nearer
    shared = drawn._replace(batch=drawn.batch | {"key": drawn.batch["key"][:1].expand(4)})
    torch.testing.assert_close(vector(step(one, shared).grads), first[:1].expand(4, 6), rtol=1e-4, atol=1e-4)


# normalised gradients


def test_a_normalised_gradient_has_length_one_over_all_parameters_and_the_old_direction():
    plain, drawn, _ = start(Bowl(), 6)
    before, out = step(plain, drawn), step(NormalizedGradient(task=Bowl()).build(LIBRARY), drawn)
    old, new = vector(before.grads), vector(out.grads)
    torch.testing.assert_close(new.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(new * old.norm(dim=1, keepdim=True), old)
    torch.testing.assert_close(out.losses, before.losses)


def test_a_gradient_of_zero_stays_zero():
    for static in (
        NormalizedGradient(task=Bowl()),
        SubspaceGradient(task=Bowl(), directions=3),
        SubspaceGradient(task=Bowl(), directions=3, sign=True),
    ):
        new = static.build(LIBRARY).transform(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), keys(2, 0))
        assert (new[0] == 0).all()
        assert (new[1] != 0).any()
        assert new.isfinite().all()


# random subspaces


def all_directions(gradient, directions, sign, generator):
    """The definition, as google/learned_optimization has it: draw every direction."""
    u = torch.randn(len(gradient), directions, gradient.shape[1], generator=generator)
    u = u / u.norm(dim=2, keepdim=True)
    amount = (u * gradient[:, None]).sum(2)
    return ((amount.sign() if sign else amount)[..., None] * u).sum(1)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize(("dimension", "directions"), [(1, 3), (2, 2), (3, 3), (5, 1), (40, 2), (40, 20)])
def test_subspace_gradients_have_the_distribution_of_projections_on_that_many_directions(dimension, directions, sign):
    n = 10_000
    g = torch.arange(1.0, dimension + 1)
    ours = projected(g.expand(n, dimension), keys(n, dimension, directions), directions, sign)
    theirs = all_directions(g.expand(n, dimension), directions, sign, torch.Generator().manual_seed(0))
    h, e = g / g.norm(), torch.eye(dimension)[0]
    jitter = 1e-3 * torch.rand(2, n, generator=torch.Generator().manual_seed(1))  # breaks ties of equal numbers
    for measure in (lambda x: x @ h, lambda x: x @ e, lambda x: x.norm(dim=1), lambda x: (x @ h) * (x @ e)):
        a, b = (measure(x) + noise for x, noise in zip((ours, theirs), jitter, strict=True))
        at = torch.cat([a, b])
        ranks = (torch.searchsorted(x.sort().values, at, right=True) / n for x in (a, b))
        first, second = ranks
        assert (first - second).abs().max() < 2.1 * math.sqrt(2 / n)  # Kolmogorov-Smirnov at 1e-4


@pytest.mark.parametrize("sign", [False, True])
def test_more_directions_are_nearer_to_the_gradient_and_only_signs_forget_its_length(sign):
    g = torch.randn(20, generator=torch.Generator().manual_seed(0)).expand(200, 20)
    cosines = []
    for directions in (1, 10, 1000):
        new = projected(g, keys(200, directions), directions, sign)
        cosines.append(torch.nn.functional.cosine_similarity(new, g).mean().item())
        ratio = vector({"x": projected(1000 * g, keys(200, directions), directions, sign)}) / new
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1.0 if sign else 1000.0), rtol=1e-3, atol=0)
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] > 0.98
    if not sign:  # sum of u u^T over d directions is d / D on average
        mean, expected = projected(g, keys(200, 1000), 1000, False).mean(0), g[0] * 1000 / 20
        assert (mean - expected).norm() < 0.02 * expected.norm()


def test_every_particle_step_and_layer_has_its_own_directions_and_equal_keys_the_same():
    once, twice = (static.build(LIBRARY) for static in (SubspaceGradient(task=Bowl()), _twice(SubspaceGradient)))
    gradient = torch.arange(1.0, 7.0).expand(3, 6)
    new = once.transform(gradient, keys(3, 0))
    assert torch.linalg.matrix_rank(new) == 3
    assert torch.equal(new, once.transform(gradient, keys(3, 0)))
    assert torch.linalg.matrix_rank(torch.cat([new, once.transform(gradient, keys(3, 1))])) == 6
    assert torch.linalg.matrix_rank(torch.cat([new, twice.transform(gradient, keys(3, 0))])) == 6


def _twice(kind):
    return kind(task=kind(task=Bowl()))


def test_one_direction_is_a_direction_whose_derivative_is_kept():
    task, drawn, _ = start(SubspaceGradient(task=Bowl(), directions=1), 50)
    plain = vector(step(Bowl().build(LIBRARY), drawn).grads)
    new = vector(step(task, drawn).grads)
    torch.testing.assert_close((new * new).sum(1), (new * plain).sum(1), rtol=1e-4, atol=1e-4)  # (g.u) u
    task = SubspaceGradient(task=Bowl(), directions=1, sign=True).build(LIBRARY)
    torch.testing.assert_close(vector(step(task, drawn).grads).norm(dim=1), torch.ones(50))


# delayed gradients


def trajectory(task, steps, count=3):
    """Arbitrary parameters and batches of ``steps`` steps."""
    drawn = make_particles(task, count)
    for t in range(steps):
        params = {name: leaf + t * (1 + leaf.cos()) for name, leaf in drawn.params.items()}
        yield drawn._replace(params=params, batch=task.batch("train", keys(count, "batch", t)))


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_a_delayed_gradient_is_that_of_the_parameters_so_many_steps_ago(delay):
    plain, task = Bowl().build(LIBRARY), DelayedGradient(task=Bowl(), delay=delay).build(LIBRARY)
    path = list(trajectory(task, 9))
    state = task.init_state(path[0].params)
    for t, drawn in enumerate(path):
        out = step(task, drawn, state)
        old = drawn._replace(params=path[max(0, t - delay)].params)
        expected = step(plain, old)
        torch.testing.assert_close(out.losses, expected.losses)
        torch.testing.assert_close(out.grads, expected.grads)
        state = out.state
    assert not torch.allclose(vector(expected.grads), vector(step(plain, path[-1]).grads))


def test_a_particle_that_starts_anew_has_a_past_of_its_own():
    plain, task = Bowl().build(LIBRARY), DelayedGradient(task=Bowl(), delay=3).build(LIBRARY)
    path = list(trajectory(task, 7))
    state = task.init_state(path[0].params)
    for t, drawn in enumerate(path):
        if t == 4:  # an engine overwrites the rows of what begins anew
            fresh = task.init_state(drawn.params)
            state = {name: torch.cat([leaf[:1], fresh[name][1:2], leaf[2:]]) for name, leaf in state.items()}
        out = step(task, drawn, state)
        state = out.state
        ages = [3, 3 if t < 4 else min(3, t - 4), 3]
        for particle, age in enumerate(ages):
            old = drawn._replace(params=path[max(0, t - age)].params)
            assert torch.equal(out.losses[particle], step(plain, old).losses[particle])


# bfloat16


def is_bfloat16(leaf):
    return leaf.dtype == torch.float32 and torch.equal(leaf, leaf.bfloat16().float())


def test_bfloat16_has_float32_leaves_whose_values_are_representable():
    task, drawn, state = start(Bfloat16(task=ImageMlp()), 3)
    plain = ImageMlp().build(LIBRARY)
    out, exact = step(task, drawn, state), step(plain, drawn)
    assert all(is_bfloat16(leaf) for leaf in drawn.params.values())
    assert all(is_bfloat16(leaf) for leaf in out.grads.values())
    assert out.losses.dtype == task.losses(drawn.params, drawn.batch).dtype == torch.float32
    assert not torch.equal(out.losses, exact.losses)
    torch.testing.assert_close(out.losses, exact.losses, rtol=2e-2, atol=0)
    for name, leaf in exact.grads.items():
        assert 1e-4 < (out.grads[name] - leaf).norm() / leaf.norm() < 0.1


def test_in_bfloat16_the_model_computes_with_rounded_numbers_and_the_leaves_keep_what_is_too_small_for_it():
    task, drawn, _ = start(Bfloat16(task=Bowl()), 2)
    nudged = {name: leaf + 1e-4 * leaf for name, leaf in drawn.params.items()}
    assert not torch.equal(nudged["a"], drawn.params["a"])
    assert torch.equal(step(task, drawn._replace(params=nudged)).losses, step(task, drawn).losses)
    moved = {name: leaf + 1e-2 * leaf for name, leaf in drawn.params.items()}
    assert not torch.equal(step(task, drawn._replace(params=moved)).losses, step(task, drawn).losses)


FAMILIES = [
    {"kind": "image_mlp", "norm": "batch_norm", "dropout": 0.3, "activation": "dynamic", "initializer": "dynamic"},
    {"kind": "image_mlp", "norm": "layer_norm", "loss": "squared"},
    {"kind": "image_conv", "norm": "batch_norm", "activation": "dynamic"},
    {"kind": "mlp_ae", "center_data": "dynamic", "log_loss": "dynamic", "normalizer": "parametric"},
    {"kind": "mlp_vae", "center_data": "dynamic", "per_dimension_loss": "dynamic"},
    {"kind": "resnet"},
    {"kind": "vit", "dropout": 0.2, "attention_dropout": 0.2},
    {"kind": "mlp_mixer"},
    {"kind": "transformer_lm", "dropout": 0.1},
    *({"kind": "rnn_lm", "cell": cell} for cell in ("vanilla", "irnn", "gru", "lstm")),
    {"kind": "lopt_training"},
]


@pytest.mark.parametrize("fields", FAMILIES, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_every_family_can_be_trained_in_bfloat16(fields):
    static = static_from_dict(fields)
    task, drawn, state = start(Bfloat16(task=static), 2)
    out, exact = step(task, drawn, state), step(static.build(LIBRARY), drawn)
    torch.testing.assert_close(out.losses, exact.losses, rtol=3e-2, atol=0)
    assert out.losses.dtype == torch.float32
    assert all(is_bfloat16(leaf) for leaf in out.grads.values())
    difference = vector({name: leaf - exact.grads[name] for name, leaf in out.grads.items()}).norm()
    assert 1e-4 < difference / vector(exact.grads).norm() < 0.2
    by_func, losses = torch.func.vmap(torch.func.grad_and_value(task.loss))(drawn.params, drawn.batch, drawn.dynamic)
    torch.testing.assert_close(losses, out.losses, rtol=3e-2, atol=0)
    assert all(leaf.isfinite().all() for leaf in by_func.values())


# reduced batches


@pytest.mark.parametrize(("size", "fraction", "expected"), [(64, 0.5, 32), (10, 0.37, 3), (4, 0.01, 1), (7, 1.0, 7)])
def test_a_reduced_batch_is_drawn_at_its_reduced_size(size, fraction, expected):
    static = ReducedBatch(task=Reparam(task=ImageMlp(batch_size=size)), fraction=fraction)
    task = static.build(LIBRARY)
    assert task.batch_size == expected
    assert task.batch("train", keys(3, 0))["image"].shape[:2] == (3, expected)
    assert static.work().flops == ImageMlp(batch_size=expected).work().flops


def test_reductions_multiply_and_what_has_no_batch_has_none():
    inner = Bfloat16(task=ReducedBatch(task=ImageMlp(batch_size=100), fraction=0.5))
    assert ReducedBatch(task=inner, fraction=0.5).build(LIBRARY).batch_size == 25
    with pytest.raises(ConfigError, match=r"task.kind = 'lopt_training': expected a task with a batch_size"):
        ReducedBatch(task=LoptTraining(), fraction=0.5)


# all of them


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(ONE_OF_EACH)).flatmap(lambda order: st.integers(2, 7).map(lambda n: order[:n])))
def test_any_order_of_augmentations_is_a_task_whose_particles_do_not_know_each_other(order):
    static = Bowl()
    for kind in order:
        static = ONE_OF_EACH[kind](static)
    assert static_from_dict(static.to_dict()) == static
    task, drawn, state = start(static)
    alone = [{name: leaf[i : i + 1] for name, leaf in state.items()} for i in range(3)]
    for t in range(3):
        drawn = drawn._replace(batch=task.batch("train", keys(3, "batch", t)))
        out = step(task, drawn, state)
        for i in range(3):
            one = type(drawn)(*({name: leaf[i : i + 1] for name, leaf in part.items()} for part in drawn))
            single = step(task, one, alone[i])
            alone[i] = single.state
            torch.testing.assert_close(single.losses[0], out.losses[i])
            torch.testing.assert_close(rows(single.grads, 0), rows(out.grads, i), rtol=1e-4, atol=1e-5)
        assert out.losses.isfinite().all()
        assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in out.grads.values())
        assert out.state.keys() == state.keys()
        assert all((out.state[n].shape, out.state[n].dtype) == (leaf.shape, leaf.dtype) for n, leaf in state.items())
        state = out.state
        drawn = drawn._replace(params={name: leaf - 0.1 * out.grads[name] for name, leaf in drawn.params.items()})
    looped = torch.stack([task.loss(*(rows(drawn[part], i) for part in (1, 2, 0))) for i in range(3)])
    torch.testing.assert_close(task.losses(drawn.params, drawn.batch, drawn.dynamic), looped, rtol=1e-4, atol=1e-5)


def test_any_of_them_around_any_other_trains_a_network():
    for inner, outer in itertools.product(ONE_OF_EACH.values(), repeat=2):
        static = outer(inner(ImageMlp(hidden=(5,), image_size=4, batch_size=4, norm="layer_norm")))
        out = step(*start(static))
        assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in out.grads.values()), static
        assert sum(leaf.abs().sum() for leaf in out.grads.values()) > 0, static


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_two_layers_of_one_kind_are_kept_apart(kind):
    once, twice = ONE_OF_EACH[kind](Bowl()), ONE_OF_EACH[kind](ONE_OF_EACH[kind](Bowl()))
    task, drawn, state = start(twice)
    single = once.build(LIBRARY)
    assert len(state) == 2 * len(single.init_state(drawn.params))
    own = drawn.dynamic.keys() - {"shift"}
    assert len(own) == 2 * len(single.sample_dynamic(torch.Generator(), 1).keys() - {"shift"})
    assert step(task, drawn, state).losses.isfinite().all()


def test_two_delays_add_up_and_two_taus_multiply():
    path = list(trajectory(Bowl().build(LIBRARY), 8))
    plain = Bowl().build(LIBRARY)
    task = DelayedGradient(task=DelayedGradient(task=Bowl(), delay=2), delay=3).build(LIBRARY)
    state = task.init_state(path[0].params)
    for t, drawn in enumerate(path):
        out = step(task, drawn, state)
        state = out.state
        old = drawn._replace(params=path[max(0, t - 5)].params)
        torch.testing.assert_close(out.grads, step(plain, old).grads)
    task = Reparam(task=Reparam(task=Bowl(), low=2.0, high=2.0), low=3.0, high=3.0).build(LIBRARY)
    drawn = make_particles(task, 2)
    weights = {name: 6 * leaf for name, leaf in drawn.params.items()}
    expected = step(plain, drawn._replace(params=weights))
    for name, leaf in step(task, drawn).grads.items():
        torch.testing.assert_close(leaf, 6 * expected.grads[name])


@pytest.mark.parametrize("kind", ["reparam", "reduced_batch"])
def test_what_does_not_touch_the_gradient_keeps_every_law_of_tasks(kind):
    static = ImageMlp(hidden=(7,), norm="batch_norm", dropout=0.3, activation="dynamic", batch_size=6)
    assert_laws(ONE_OF_EACH[kind](static), LIBRARY)


def test_a_state_goes_through_a_checkpoint_bit_for_bit():
    static = DelayedGradient(task=ONE_OF_EACH["reparam"](DelayedGradient(task=Bowl(), delay=1)), delay=2)
    task, drawn, state = start(static)
    state = step(task, drawn, state).state
    read = safetensors.torch.load(safetensors.torch.save(state))
    later = drawn._replace(params={name: leaf + 1 for name, leaf in drawn.params.items()})
    first, second = step(task, later, state), step(task, later, read)
    assert torch.equal(first.losses, second.losses)
    assert all(torch.equal(leaf, second.grads[name]) for name, leaf in first.grads.items())


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_the_rest_of_the_task_passes_through(kind):
    plain, task = Bowl().build(LIBRARY), ONE_OF_EACH[kind](Bowl()).build(LIBRARY)
    assert task.worst_loss == plain.worst_loss
    loss = torch.tensor([0.5, math.nan, 1e9])
    assert torch.equal(task.normalizer(loss), plain.normalizer(loss))
    assert task.datasets is plain.datasets


# what VeLO draws


def draws(count, static=None):
    rng = np.random.default_rng(0)
    return [augment(rng, static or ImageMlp()) for _ in range(count)]


def layers(static):
    found = []
    while hasattr(static, "task"):
        found.append(static)
        static = static.task
    return found[::-1]


def test_velos_probabilities_order_and_ranges():
    drawn = [layers(static) for static in draws(20_000)]
    count = lambda test: sum(any(test(layer) for layer in one) for one in drawn) / len(drawn)  # noqa: E731
    is_kind = lambda kind: lambda layer: layer.kind == kind  # noqa: E731
    for kind, share in {
        "reparam": 5 / 7,
        "es_gradient": 0.08,
        "reduced_batch": 0.2,
        "bfloat16": 0.2,
        "normalized_gradient": 0.05,
        "subspace_gradient": 0.08,
        "delayed_gradient": 0.05,
    }.items():
        assert abs(count(is_kind(kind)) - share) < 4 * math.sqrt(share * (1 - share) / len(drawn)), kind
    for level, share in {"global": 2 / 7, "tensor": 2 / 7, "parameter": 1 / 7}.items():
        assert abs(count(lambda layer, level=level: getattr(layer, "level", None) == level) - share) < 0.015
    order = list(AUGMENTATIONS)
    assert order == list(ONE_OF_EACH)
    assert all([layer.kind for layer in one] == sorted((x.kind for x in one), key=order.index) for one in drawn)
    values = {}
    for layer in itertools.chain(*drawn):
        for field in dataclasses.fields(layer):
            values.setdefault((layer.kind, field.name), []).append(getattr(layer, field.name))
    assert {*zip(values["reparam", "low"], values["reparam", "high"], strict=True)} == {
        (1e-3, 1e3),
        (0.01, 100.0),
        (0.1, 10.0),
    }
    assert {*values["es_gradient", "pairs"]} == {1, 2, 4, 8, 16}
    assert {*values["delayed_gradient", "delay"]} == set(range(1, 9))
    assert {*values["subspace_gradient", "sign"]} == {True, False}
    for key, low, high, median in (
        (("es_gradient", "sigma"), 1e-3, 0.1, 0.01),
        (("reduced_batch", "fraction"), 0.01, 1.0, 0.505),
        (("subspace_gradient", "directions"), 1, 1024, 32),
    ):
        assert low <= min(values[key]) < 1.3 * low + 0.01
        assert 0.95 * high < max(values[key]) <= high
        assert abs(np.median(values[key]) / median - 1) < 0.3


def test_batches_of_learned_optimizer_training_are_not_reduced():
    drawn = draws(300, LoptTraining())
    assert all(innermost(static) == LoptTraining() for static in drawn)
    kinds = {layer.kind for static in drawn for layer in layers(static)}
    assert kinds == AUGMENTATIONS.keys() - {"reduced_batch"}


# entries of a configuration


def test_an_entry_puts_its_augmentation_around_the_task_with_its_probability():
    rng = np.random.default_rng(0)
    static = ImageMlp()
    entry = {"kind": "reparam", "level": "tensor", "low": 1, "probability": 0.3}
    applied = [apply_augmentation(rng, static, entry) for _ in range(2000)]
    assert {*applied} == {static, Reparam(task=static, level="tensor", low=1.0)}
    assert abs(sum(one != static for one in applied) / 2000 - 0.3) < 0.04
    assert entry["probability"] == 0.3
    assert apply_augmentation(rng, static, {"kind": "bfloat16"}) == Bfloat16(task=static)
    assert apply_augmentation(rng, static, {"kind": "bfloat16", "probability": 0}) == static
    assert len({apply_augmentation(rng, static, {"kind": "velo"}) for _ in range(50)}) > 10


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, r"augment.kind = None: expected one of velo, reparam"),
        ({"kind": "reparm"}, r"did you mean 'reparam'"),
        ({"kind": "image_mlp"}, r"augment.kind = 'image_mlp'"),
        ({"kind": "reparam", "levl": "global"}, r"augment.levl = 'global'.*did you mean 'level'"),
        ({"kind": "reparam", "level": "globl"}, r"augment.level = 'globl'.*did you mean 'global'"),
        ({"kind": "reparam", "high": 1e-9}, r"augment.high = 1e-09: expected a number >= 0.001"),
        ({"kind": "reparam", "low": "small"}, r"augment.low = 'small': expected a number"),
        ({"kind": "reparam", "probability": 2}, r"augment.probability = 2: expected a number from 0 to 1"),
        ({"kind": "reparam", "probability": True}, r"augment.probability"),
        ({"kind": "reparam", "probability": 0, "low": -1}, r"augment.low = -1"),
        ({"kind": "bfloat16", "task": {"kind": "image_mlp"}}, r"augment.task"),
        ({"kind": "velo", "level": "global"}, r"augment.level"),
        ({"kind": "es_gradient", "sigma": 0}, r"augment.sigma"),
        ({"kind": "es_gradient", "pairs": 0}, r"augment.pairs"),
        ({"kind": "subspace_gradient", "directions": 0}, r"augment.directions"),
        ({"kind": "delayed_gradient", "delay": 0}, r"augment.delay"),
        ({"kind": "reduced_batch", "fraction": 0}, r"augment.fraction"),
        ({"kind": "reduced_batch", "fraction": 1.5}, r"augment.fraction"),
    ],
)
def test_a_wrong_entry_is_refused_by_name_whether_or_not_it_would_be_drawn(entry, message):
    with pytest.raises(ConfigError, match=message):
        apply_augmentation(np.random.default_rng(0), ImageMlp(), entry)


def test_entries_are_checked_without_a_task():
    check_augmentations(
        [{"kind": "velo", "probability": 0.5}, *({"kind": kind} for kind in AUGMENTATIONS)], "task.augment"
    )
    with pytest.raises(ConfigError, match=r"task.augment\[1\].fraction = 0"):
        check_augmentations([{"kind": "velo"}, {"kind": "reduced_batch", "fraction": 0}], "task.augment")
