"""MLP classifiers: the originals' values, how they start, their laws, their distribution, and that they train."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data.library import Library
from tasks.families.activations import ACTIVATIONS
from tasks.families.draws import RANGES, Pool
from tasks.families.image import ImageStatic
from tasks.families.image_mlp import ImageMlp, draw
from tasks.families.initializers import INITIALIZERS
from tasks.keys import generator
from tasks.random import keys
from tasks.static import static_from_dict, static_from_json
from tests.image_oracles import META_LOSSES, ORIGINALS, measured, meta_losses
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count, rows

DIGITS = Library(DataConfig())
RANDOM = RandomLibrary()
DYNAMIC = {"activation": "dynamic", "initializer": "dynamic", "normalizer": "parametric"}


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name.startswith("mlp")])
def test_loss_and_gradient_are_the_originals(name):
    assert measured(name) == pytest.approx(ORIGINALS[name], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in META_LOSSES if name.startswith("mlp")])
def test_meta_losses_are_the_originals(name):
    assert meta_losses(name) == pytest.approx(META_LOSSES[name], rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 64 * 32 + 32 + 32 * 10 + 10),
        ({"hidden": ()}, 64 * 10 + 10),
        ({"hidden": (7, 5), "norm": "batch_norm"}, 64 * 7 + 7 + 7 * 5 + 5 + 5 * 10 + 10 + 2 * (7 + 5)),
        ({"hidden": (7, 5), "norm": "layer_norm"}, 64 * 7 + 7 + 7 * 5 + 5 + 5 * 10 + 10 + 2 * (7 + 5)),
        ({"dataset": "cifar100", "image_size": 4, "hidden": (3,)}, 3 * 16 * 3 + 3 + 3 * 100 + 100),
        ({"dataset": "cifar100", "image_size": 4, "hidden": (3,), "grey": True}, 16 * 3 + 3 + 3 * 100 + 100),
        ({"num_classes": 12}, 64 * 32 + 32 + 32 * 12 + 12),
    ],
)
def test_it_has_the_parameters_it_should(fields, parameters):
    static = ImageMlp(**fields)
    assert static.work().parameters == parameters
    assert parameter_count(static.build(RANDOM).init(generator(0))) == parameters


def test_parameters_are_named_and_shaped_as_before():
    params = ImageMlp(hidden=(32, 16), norm="layer_norm").build(DIGITS).init(generator(0))
    assert {name: tuple(leaf.shape) for name, leaf in params.items()} == {
        "w0": (64, 32),
        "b0": (32,),
        "w1": (32, 16),
        "b1": (16,),
        "w2": (16, 10),
        "b2": (10,),
        "norm0/scale": (32,),
        "norm0/offset": (32,),
        "norm1/scale": (16,),
        "norm1/offset": (16,),
    }
    assert list(params)[:3] == ["w0", "b0", "w1"]


LAWS = [
    {},
    {"hidden": (), "normalizer": "parametric"},
    {"hidden": (12, 7), "activation": "tanh", "shift": 1, "noise": 0.1},
    {"norm": "batch_norm"},
    {"norm": "layer_norm", "activation": "gelu"},
    {"dropout": 0.5, "loss": "squared", "hidden": (16, 16)},
    {"dropout": 0.2, "activation": "dynamic", "norm": "batch_norm"},
    {"hidden": (12, 7), **DYNAMIC},
]


@pytest.mark.parametrize("fields", LAWS)
def test_it_keeps_the_laws_of_tasks(fields):
    assert assert_laws(ImageMlp(**fields), DIGITS, particles=4) < 1e-5


def test_it_keeps_the_laws_with_every_activation_at_once():
    static = ImageMlp(hidden=(6,), batch_size=8, **DYNAMIC)
    task = static.build(RANDOM)
    assert len(set(task.sample_dynamic(generator(0, "dynamic"), 80)["activation"].tolist())) == 11
    assert assert_laws(static, RANDOM, particles=80) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"activation": "tanh", "hidden": (20, 20, 20)}, {"normalizer": "parametric"}])
@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100), ("imagenet16", 1000)])
def test_the_loss_starts_near_log_c(dataset, classes, fields):
    task = ImageMlp(dataset=dataset, image_size=16, **fields).build(RANDOM)
    drawn = make_particles(task, 10)
    assert task.losses(drawn.params, drawn.batch).mean().item() == pytest.approx(math.log(classes), rel=0.1)


def test_dropout_is_before_the_activation_and_differs_between_layers_and_keys():
    task = ImageMlp(hidden=(500, 500), dropout=0.5, activation="sigmoid").build(RANDOM)
    params, batch = (rows(leaves, 0) for leaves in make_particles(task, 1)[1:])
    identity = {"w1": torch.eye(500), "w0": torch.zeros(64, 500), "b0": torch.full((500,), 20.0)}
    # Of the first layer each unit is sigmoid(40) or, dropped, sigmoid(0); of the second sigmoid(2) or sigmoid(1), or
    # dropped sigmoid(0). Were dropout after the activation there would be zeros.
    hidden = torch.tensor([1 / (1 + math.exp(-x)) for x in (0, 1, 2)])
    logit = {"w2": torch.zeros(500, 10), "b2": torch.zeros(10)}
    logit["w2"][:, 0] = 1 / 500
    fixed = {**params, **identity, **logit, "b1": torch.zeros(500)}
    expected = hidden @ torch.tensor([0.5, 0.25, 0.25])
    label = {**batch, "label": torch.zeros(64, dtype=torch.int64)}
    # The first logit is the mean of the second layer's units, the others are 0: -log softmax inverted gives it.
    logits = [_first_logit(task.loss(fixed, {**label, "key": key}).item()) for key in keys(20, "dropout")]
    assert np.mean(logits) == pytest.approx(expected.item(), abs=0.005)
    assert len(set(logits)) == 20


def _first_logit(loss):
    share = math.exp(-loss)
    return math.log(9 * share / (1 - share))


def test_the_loss_is_the_mean_cross_entropy_of_raw_pixels():
    task = ImageMlp(hidden=(9,), activation="tanh").build(DIGITS)
    params, batch = (rows(leaves, 0) for leaves in make_particles(task, 1)[1:])
    pixels = batch["image"].reshape(64, 64)
    assert 0 <= pixels.min() < pixels.max() <= 1
    logits = torch.tanh(pixels @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
    torch.testing.assert_close(task.loss(params, batch), F.cross_entropy(logits, batch["label"]))


@pytest.mark.parametrize("fields", [{}, {"shift": 1, "noise": 0.1}, {"norm": "batch_norm"}, {"activation": "dynamic"}])
def test_sgd_trains_it(fields):
    task = ImageMlp(**fields).build(DIGITS)
    dynamic, params, _ = make_particles(task, 2)
    history, state = [], task.init_state(params)
    for step in range(200):
        batch = task.batch("train", keys(2, "sgd", step))
        losses, grads, state = task.losses_and_grads(params, state, batch, dynamic)
        params = {name: leaf - 0.3 * grads[name] for name, leaf in params.items()}
        history.append(losses.mean().item())
    assert np.mean(history[-20:]) < 0.7 * history[0]


def test_gradients_come_out_under_no_grad_and_leave_the_callers_tensors_alone():
    task = ImageMlp().build(DIGITS)
    dynamic, params, batch = make_particles(task, 2)
    kept = {name: leaf.clone() for name, leaf in params.items()}
    with torch.no_grad():
        out = task.losses_and_grads(params, {}, batch, dynamic)
    assert all(leaf.abs().sum() > 0 for leaf in out.grads.values())
    assert not any(leaf.requires_grad for leaf in params.values())
    assert all(torch.equal(leaf, kept[name]) for name, leaf in params.items())


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from(["fixed", "parametric"]))
def test_the_normalizer_is_bounded_and_maps_what_is_not_finite_to_the_worst(values, normalizer):
    task = ImageMlp(normalizer=normalizer).build(RANDOM)
    loss = torch.tensor(values, dtype=torch.float32)
    out = task.normalizer(loss)
    assert task.worst_loss == pytest.approx({"fixed": 1.5 * math.log(10), "parametric": 10}[normalizer])
    assert out.shape == loss.shape
    assert (out <= task.worst_loss).all()
    assert out.isfinite().all()
    assert (out[~loss.isfinite()] == task.worst_loss).all()
    if normalizer == "fixed":
        inside = loss.isfinite() & (loss >= 0) & (loss <= task.worst_loss)
        assert torch.equal(out[inside], loss[inside])


# ---- the static config


@settings(max_examples=50)
@given(
    st.builds(
        ImageMlp,
        dataset=st.sampled_from(["digits", "cifar100", "imagenet32"]),
        image_size=st.integers(1, 64),
        grey=st.booleans(),
        batch_size=st.integers(1, 512),
        shift=st.integers(0, 3),
        noise=st.floats(0, 1),
        num_classes=st.none() | st.integers(2, 2000),
        hidden=st.lists(st.integers(1, 512), max_size=4).map(tuple),
        activation=st.sampled_from(ACTIVATIONS),
        initializer=st.sampled_from(INITIALIZERS),
        norm=st.sampled_from(["none", "layer_norm", "batch_norm"]),
        dropout=st.floats(0, 0.99),
        loss=st.sampled_from(["cross_entropy", "squared"]),
        normalizer=st.sampled_from(["fixed", "parametric"]),
    )
)
def test_a_static_config_round_trips_and_its_digest_names_it(static):
    again = static_from_json(static.to_json())
    assert again == static
    assert hash(again) == hash(static)
    assert again.digest() == static.digest()
    assert dataclasses.replace(static, batch_size=static.batch_size + 1).digest() != static.digest()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": [32, 0]}, r"task.hidden\[1\] = 0: expected a number >= 1"),
        ({"activation": "rellu"}, "task.activation = 'rellu'.*did you mean 'relu'"),
        ({"initializer": "xavier"}, "task.initializer = 'xavier'.*orthogonal"),
        ({"norm": "layernorm"}, "task.norm = 'layernorm'.*did you mean 'layer_norm'"),
        ({"dropout": 1.0}, r"task.dropout = 1.0: expected a number in \[0, 1\)"),
        ({"loss": "mse"}, "task.loss = 'mse'.*squared"),
        ({"normalizer": "none"}, "task.normalizer = 'none'.*parametric"),
        ({"dataset": "cifar"}, "task.dataset = 'cifar'.*did you mean 'cifar"),
        ({"dataset": "pydoc"}, "task.dataset = 'pydoc'.*is text"),
        ({"image_size": 0}, "task.image_size = 0"),
        ({"batch_size": 0}, "task.batch_size = 0"),
        ({"shift": -1}, "task.shift = -1"),
        ({"noise": -0.5}, "task.noise = -0.5"),
        ({"num_classes": 1}, "task.num_classes = 1: expected a number >= 2"),
        ({"dataset": "folder:mine"}, "task.num_classes = None: expected how many classes folder:mine has"),
        ({"hiden": [3]}, "task.hiden.*did you mean 'hidden'"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        static_from_dict({"kind": "image_mlp", **fields})


def test_a_set_of_ones_own_has_three_channels_and_the_classes_that_are_given():
    static = ImageMlp(dataset="folder:mine", num_classes=7, image_size=4, hidden=())
    assert (static.channels, static.classes, static.pixels) == (3, 7, 48)
    assert ImageMlp(dataset="folder:mine", num_classes=7, grey=True).channels == 1


def test_the_digest_is_pinned_because_it_crosses_the_wire():
    assert ImageMlp().to_json() == (
        '{"activation": "relu", "batch_size": 64, "dataset": "digits", "dropout": 0.0, "grey": false, "hidden": [32], '
        '"image_size": 8, "initializer": "haiku", "kind": "image_mlp", "loss": "cross_entropy", "noise": 0.0, '
        '"norm": "none", "normalizer": "fixed", "num_classes": null, "shift": 0}'
    )
    assert ImageMlp().digest() == "8998fd591ba8c7ad"


def test_the_library_is_asked_for_what_the_config_says():
    class Asked(RandomLibrary):
        def images(self, *args, **kwargs):
            self.asked = (args, kwargs)
            return super().images(*args, **kwargs)

    library = Asked()
    ImageMlp(dataset="svhn", image_size=5, grey=True, shift=2, noise=0.3, num_classes=11).build(library)
    assert library.asked == (("svhn", 5, True, 2, 0.3), {"classes": 11})


# ---- the distribution


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(RANGES))
def test_draws_are_in_the_papers_ranges_and_run(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    assert isinstance(static, ImageStatic)
    assert len(static.hidden) <= 4
    assert len(set(static.hidden)) <= 1
    assert all(8 <= width <= 128 for width in static.hidden)
    assert 4 <= static.image_size <= 32
    assert 4 <= static.batch_size <= 512
    assert static.dataset in Pool().images
    assert (static.activation, static.initializer, static.normalizer) == ("dynamic", "dynamic", "parametric")
    task = static.build(RANDOM)
    dynamic, params, batch = make_particles(task, 2)
    assert set(dynamic) == {"activation", "initializer", "initializer_scale"}
    losses = task.losses(params, batch, dynamic)
    assert losses.isfinite().all()
    assert task.normalizer(losses, dynamic).abs().max() <= 10 * math.log(5) / math.log(10) + 5


def test_draws_reach_the_whole_distribution():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Pool()) for _ in range(3000)]
    layers = Counter(len(static.hidden) for static in drawn)
    assert all(layers[count] == pytest.approx(600, abs=120) for count in range(5))
    assert all(count == pytest.approx(600, abs=120) for count in Counter(static.dataset for static in drawn).values())
    # Log-uniform, both ends included: half of them are below the geometric mean.
    widths = [static.hidden[0] for static in drawn if static.hidden]
    for values, low, high in (
        (widths, 8, 128),
        ([static.image_size for static in drawn], 4, 32),
        ([static.batch_size for static in drawn], 4, 512),
    ):
        assert (min(values), max(values)) == (low, pytest.approx(high, rel=0.01))
        below = np.mean([value < math.sqrt(low * (high + 1)) for value in values])
        assert below == pytest.approx(0.5, abs=0.06)
