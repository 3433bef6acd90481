"""Variational auto-encoders: the originals' values, the likelihood, the ELBO, their laws, and their distribution."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data.library import Library
from tasks.families.draws import RANGES, Pool
from tasks.families.mlp_vae import MlpVae, divergence, draw, quantized_normal
from tasks.keys import generator
from tasks.random import keys
from tasks.static import static_from_dict
from tests.image_oracles import META_LOSSES, ORIGINALS, measured, meta_losses
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count, rows

DIGITS = Library(DataConfig())
RANDOM = RandomLibrary()
SWITCHES = ("center_data", "per_dimension_loss")
DYNAMIC = dict.fromkeys(("activation", "initializer", *SWITCHES), "dynamic")


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name.startswith("vae")])
def test_loss_and_gradient_are_the_originals(name):
    assert measured(name) == pytest.approx(ORIGINALS[name], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in META_LOSSES if name.startswith("vae")])
def test_meta_losses_are_the_originals(name):
    assert meta_losses(name) == pytest.approx(META_LOSSES[name], rel=1e-9)


# ---- the likelihood


@given(
    st.floats(-2, 2),
    st.floats(-5, 3),
    st.floats(-1, 1),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1 / 255, 2 / 255]),
)
def test_the_log_probability_is_that_of_the_normals_density_times_the_bin(mean, log_sigma, pixel, noise, width):
    ours = quantized_normal(*(torch.tensor(x, dtype=torch.float64) for x in (mean, log_sigma, pixel, noise, width)))
    place = pixel + (noise - 0.5) * width
    expected = stats.norm.logpdf(place, mean, math.exp(log_sigma)) + math.log(width)
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("low", "width"), [(0.0, 1 / 255), (-1.0, 2 / 255)])
@pytest.mark.parametrize(("mean", "log_sigma"), [(0.45, -3.0), (0.3, -1.6), (0.5, -7.0)])
def test_the_256_levels_have_the_quantised_normals_probabilities_which_sum_to_one(low, width, mean, log_sigma):
    mean = 2 * mean - 1 if low else mean
    levels = low + width * torch.arange(256, dtype=torch.float64)[:, None]
    noise = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # every place of the bin, evenly
    parameters = (torch.tensor(x, dtype=torch.float64) for x in (mean, log_sigma))
    estimates = quantized_normal(*parameters, levels, noise, torch.tensor(width, dtype=torch.float64)).exp()
    law = stats.norm(mean, math.exp(log_sigma))
    edges = levels.numpy().ravel()
    expected = law.cdf(edges + width / 2) - law.cdf(edges - width / 2)
    np.testing.assert_allclose(estimates.mean(1).numpy(), expected, atol=1e-6)
    inside = law.cdf(edges[-1] + width / 2) - law.cdf(edges[0] - width / 2)
    assert estimates.mean(1).sum().item() == pytest.approx(inside, abs=1e-6)
    assert inside > 0.9


@pytest.mark.parametrize(("mean", "log_sigma"), [(0.0, 0.0), (1.3, -0.7), (-0.4, 0.9)])
def test_the_divergence_is_the_integral(mean, log_sigma):
    q = stats.norm(mean, math.exp(log_sigma))
    integral, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), -30, 30)
    ours = divergence(torch.tensor(mean, dtype=torch.float64), torch.tensor(log_sigma, dtype=torch.float64))
    assert ours.item() == pytest.approx(integral, abs=1e-7)


# ---- the ELBO


def constant(static, log_sigma):
    """Parameters whose posterior is the prior and whose pixels are N(0.5, e^log_sigma) whatever the latents."""
    params = {name: torch.zeros_like(leaf) for name, leaf in static.build(RANDOM).init(generator(0)).items()}
    bias = params[f"decoder/b{len(static.decoder)}"]
    bias[: static.pixels] = 0.5
    bias[static.pixels :] = log_sigma
    return params


@pytest.mark.parametrize("per_dimension_loss", [True, False])
def test_the_loss_is_the_mean_negative_elbo(per_dimension_loss):
    static = MlpVae(batch_size=500, per_dimension_loss=per_dimension_loss)
    task = static.build(RANDOM)
    batch = rows(make_particles(task, 1).batch, 0)
    # The mean over a bin of (x + u)^2 is that of x^2 plus width^2 / 12.
    square = (batch["image"] - 0.5).square().mean().item() + (1 / 255) ** 2 / 12
    per_pixel = 0.5 * square / 0.3**2 + math.log(0.3) + 0.5 * math.log(2 * math.pi) + math.log(255)
    expected = per_pixel * (1 if per_dimension_loss else 64)
    assert task.loss(constant(static, math.log(0.3)), batch).item() == pytest.approx(expected, rel=2e-3)


def test_deviations_are_clipped():
    static = MlpVae()
    task = static.build(RANDOM)
    batch = rows(make_particles(task, 1).batch, 0)
    ends = [task.loss(constant(static, end), batch) for end in (10.0, 10.5, 1e9)]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], task.loss(constant(static, 9.5), batch))


def test_the_divergence_counts_once_for_an_example():
    static = MlpVae(encoder=(), latent=5, per_dimension_loss=False)
    task = static.build(RANDOM)
    params, batch = constant(static, 0.0), rows(make_particles(task, 1).batch, 0)
    moved = {**params, "encoder/b0": torch.cat([torch.full((5,), 0.3), torch.full((5,), -0.2)])}
    expected = 5 * (0.5 * (0.3**2 + math.exp(-0.4) - 1) + 0.2)
    assert (task.loss(moved, batch) - task.loss(params, batch)).item() == pytest.approx(expected, abs=1e-3)


def test_latents_and_noise_come_from_the_batchs_key():
    static = MlpVae(encoder=(), decoder=(), latent=3)
    task = static.build(RANDOM)
    params, batch = (rows(leaves, 0) for leaves in make_particles(task, 1)[1:])
    losses = {task.loss(params, {**batch, "key": key}).item() for key in keys(5, "vae")}
    assert len(losses) == 5
    assert task.loss(params, batch).item() == task.loss(params, batch).item()


def test_every_particle_has_its_own_choices():
    task = MlpVae(**DYNAMIC).build(RANDOM)
    _, params, batch = make_particles(task, 4)
    flags = torch.tensor([[False, False], [False, True], [True, False], [True, True]])
    dynamic = dict(zip(SWITCHES, flags.T, strict=True)) | {"activation": torch.full((4,), 3)}
    together = task.losses(params, batch, dynamic)
    for i, (center, per_dimension) in enumerate(flags.tolist()):
        alone = MlpVae(activation="tanh", center_data=center, per_dimension_loss=per_dimension).build(RANDOM)
        loss = alone.loss(rows(params, i), rows(batch, i))
        torch.testing.assert_close(together[i], loss)
        torch.testing.assert_close(task.normalizer(together, dynamic)[i], alone.normalizer(loss))
    assert len({round(loss, 3) for loss in together.tolist()}) == 4


# ---- as a task


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 64 * 32 + 32 + 32 * 64 + 64 + 32 * 32 + 32 + 32 * 128 + 128),
        ({"encoder": (), "decoder": (), "latent": 3}, 64 * 6 + 6 + 3 * 128 + 128),
        (
            {"encoder": (7, 5), "decoder": (6,), "latent": 2, "dataset": "cifar10", "image_size": 2},
            12 * 7 + 7 + 7 * 5 + 5 + 5 * 4 + 4 + 2 * 6 + 6 + 6 * 24 + 24,
        ),
    ],
)
def test_it_has_the_parameters_it_should(fields, parameters):
    static = MlpVae(**fields)
    assert static.work().parameters == parameters
    assert parameter_count(static.build(RANDOM).init(generator(0))) == parameters


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"encoder": (), "decoder": (), "per_dimension_loss": False},
        {"center_data": True, "encoder": (6, 5), "activation": "tanh", "shift": 1, "noise": 0.1},
        DYNAMIC,
    ],
)
def test_it_keeps_the_laws_of_tasks(fields):
    assert assert_laws(MlpVae(latent=8, **fields), DIGITS, particles=6) < 5e-5


def test_gradient_descent_trains_it():
    task = MlpVae(latent=4).build(DIGITS)
    dynamic, params, _ = make_particles(task, 2)
    history, state = [], task.init_state(params)
    for step in range(150):
        losses, grads, state = task.losses_and_grads(params, state, task.batch("train", keys(2, step)), dynamic)
        params = {name: leaf - 0.1 * grads[name] for name, leaf in params.items()}
        history.append(losses.mean().item())
    assert np.mean(history[-10:]) < history[0] - 0.5


@given(st.lists(st.floats(width=32), min_size=1), st.booleans())
def test_the_normalizer_is_the_clipped_loss_of_a_dimension(values, per_dimension_loss):
    task = MlpVae(per_dimension_loss=per_dimension_loss).build(RANDOM)
    assert task.worst_loss == 10
    for loss, meta_loss in zip(values, task.normalizer(torch.tensor(values)).tolist(), strict=True):
        expected = min(max(loss / (1 if per_dimension_loss else 64), 0), 10) if math.isfinite(loss) else 10
        assert meta_loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": [3, 0]}, r"task.encoder\[1\] = 0"),
        ({"decoder": [-1]}, r"task.decoder\[0\] = -1"),
        ({"latent": 0}, "task.latent = 0"),
        ({"activation": "x"}, "task.activation"),
        ({"initializer": "x"}, "task.initializer"),
        ({"center_data": "x"}, "task.center_data"),
        ({"per_dimension_loss": "x"}, "task.per_dimension_loss"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        static_from_dict({"kind": "mlp_vae", **fields})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(RANGES))
def test_draws_are_in_the_papers_ranges_and_run(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    for widths in (static.encoder, static.decoder):
        assert len(widths) <= 4
        assert len(set(widths)) <= 1
        assert all(4 <= width <= 128 for width in widths)
    assert 2 <= static.latent <= 128
    assert 4 <= static.image_size <= 32
    assert 4 <= static.batch_size <= 512
    assert static.dataset in Pool().images
    assert {name: getattr(static, name) for name in DYNAMIC} == DYNAMIC
    task = static.build(RANDOM)
    dynamic, params, batch = make_particles(task, 2)
    assert set(dynamic) == {"activation", "initializer", "initializer_scale", *SWITCHES}
    assert (task.normalizer(task.losses(params, batch, dynamic), dynamic) <= 10).all()


def test_draws_reach_the_whole_distribution():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Pool()) for _ in range(2500)]
    for name in ("encoder", "decoder"):
        layers = Counter(len(getattr(static, name)) for static in drawn)
        assert all(layers[count] == pytest.approx(500, abs=100) for count in range(5))
    assert any(static.encoder[:1] != static.decoder[:1] for static in drawn if static.encoder and static.decoder)
    latents = [static.latent for static in drawn]
    assert min(latents) == 2
    assert np.mean([latent < math.sqrt(2 * 129) for latent in latents]) == pytest.approx(0.5, abs=0.06)
