"""STAR is small_fc_lopt beside a nominal step and a weight decay, as the formula of its original in float64 says."""

import numpy as np
import pytest
import torch

import lopt
from lopt import chunked
from lopt.kernels import SMALL_FC_COLUMNS
from tests.lopt_laws import LAWS, Oracle, check_it_stays_finite, particles, run
from tests.naive_columns import NaiveColumns, axis_scaled, mlp, normalised

SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (6, 4),
    "square": (5, 5),
    "conv": (4, 3, 2, 2),
    "five": (3, 2, 3, 2, 2),
}
TIMESCALES = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
# large enough to be seen beside the learned step, whose size is about 0.001
NOMINAL, DECAY = {"nominal_stepsize": 0.01}, {"weight_decay": 0.01}
OPTIONS = [
    {},
    NOMINAL,
    DECAY,
    NOMINAL | {"nominal_controller": True},
    DECAY | {"regularization_controller": True},
    *(NOMINAL | {"nominal_grad_estimator": estimator} for estimator in ("Adam", "AggMo", "SGDM", "SGD")),
    {"aggregate_magnitude": True},
    NOMINAL | {"nominal_controller": True, "aggregate_nom_magnitude": True},
    DECAY | {"regularization_controller": True, "aggregate_reg_magnitude": True},
    {"normalize_blackbox": True},
    {"selfnormalize_blackbox": True},
    NOMINAL | DECAY | {"nominal_controller": True, "regularization_controller": True, "normalize_blackbox": True},
]


def large_theta(rule, seed=0):
    """theta with outputs in the hundreds, so that exp(0.001 output) is far from one; decays as initialised."""
    draws = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(draws)
    theta |= {
        name: leaf + 0.3 * torch.randn(leaf.shape, generator=draws) for name, leaf in theta.items() if "mlp" in name
    }
    return theta | {"mlp.w2": theta["mlp.w2"] * torch.tensor([1.0, 300.0, 300.0, 300.0])}


def naive(theta, options, shape, p, gradients):
    """Parameters of one tensor after each gradient, in float64."""
    tensor, p = NaiveColumns(shape), p.astype(np.float64).reshape(shape or (1,))
    nominal_stepsize, weight_decay = options.get("nominal_stepsize", 0), options.get("weight_decay", 0)
    for t, g in enumerate(gradients):
        g = g.astype(np.float64).reshape(p.shape)
        c = tensor.step(p, g)
        x = normalised(np.concatenate([c[name] for name in SMALL_FC_COLUMNS], -1), tuple(range(p.ndim)), 1e-5)
        time = np.broadcast_to(np.tanh(t / TIMESCALES - 1), (*p.shape, 11))
        d, a, b, r = np.moveaxis(mlp(theta, np.concatenate([x, time], -1)), -1, 0)
        b = b if options.get("nominal_controller") else np.ones_like(b)
        r = r if options.get("regularization_controller") else np.zeros_like(r)
        if options.get("aggregate_magnitude"):
            a = a.mean()
        if options.get("aggregate_nom_magnitude"):
            b = b.mean()
        if options.get("aggregate_reg_magnitude"):
            r = r.mean()
        blackbox = d * np.exp(0.001 * a) * 0.001
        if options.get("normalize_blackbox"):
            blackbox = blackbox / np.sqrt(tensor.v[..., 0] + 1e-6)
        if options.get("selfnormalize_blackbox"):
            blackbox = blackbox * g.mean()
        adam = tensor.m / np.sqrt(tensor.v + 1e-6)
        g_est = {
            "SGD": g,
            "SGDM": tensor.m[..., -1],
            "AggMo": tensor.m.mean(-1),
            "Adam": adam[..., -1],
            "AdamAggMo": adam.mean(-1),
        }[options.get("nominal_grad_estimator", "AdamAggMo")]
        nominal = nominal_stepsize * np.exp(0.001 * b) * g_est
        p = (1 - weight_decay * np.exp(0.001 * r)) * p - blackbox - nominal
        yield p.reshape(shape)


def as_tensors(arrays):
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_every_option_follows_the_formula_under_axis_scaled_gradients(options):
    generator = np.random.default_rng(0)
    rule = lopt.Star(**options)
    theta = large_theta(rule)
    params = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    grads = [{name: axis_scaled(generator, shape) for name, shape in SHAPES.items()} for _ in range(4)]
    expected = {n: list(naive(theta, options, SHAPES[n], p, [g[n] for g in grads])) for n, p in params.items()}
    ours = as_tensors(params)
    state = rule.init_state(theta, ours, 10)
    for t, g in enumerate(grads):
        ours, state = rule.update(theta, state, ours, as_tensors(g), torch.tensor(1.0))
        for name in SHAPES:
            moved, wanted = ours[name].numpy() - params[name], expected[name][t] - params[name]
            tolerance = 2e-5 * np.abs(wanted).max() + 2 * (t + 1) * np.spacing(np.abs(params[name]).max())
            np.testing.assert_allclose(moved, wanted, rtol=0, atol=tolerance, err_msg=f"step {t}, {name}")


def test_a_tensor_taken_in_parts_moves_as_in_one(monkeypatch):
    rule = lopt.Star(nominal_stepsize=0.01, nominal_controller=True, aggregate_magnitude=True)
    batch, moved = particles(rule), []
    for size in (7, 1 << 16):
        monkeypatch.setattr(chunked, "CHUNK", size)
        moved.append(run(rule, batch)[0])
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("hidden_size", [4, 32])
def test_with_the_originals_defaults_it_is_small_fc_lopt(hidden_size):
    star, small = lopt.Star(hidden_size), lopt.SmallFcLopt(hidden_size)
    batch = particles(star)
    first_two = batch.theta | {"mlp.w2": batch.theta["mlp.w2"][..., :2], "mlp.b2": batch.theta["mlp.b2"][..., :2]}
    thetas, params = (batch.theta, first_two), [batch.params, batch.params]
    states = [
        rule.init_particles(theta, batch.params, batch.horizons)
        for rule, theta in zip((star, small), thetas, strict=True)
    ]
    assert states[0].keys() == states[1].keys()
    for g, loss in zip(batch.grads, batch.losses, strict=True):
        for i, rule in enumerate((star, small)):
            params[i], states[i] = rule.update_particles(thetas[i], states[i], params[i], g, loss)
    for name, start in batch.params.items():
        torch.testing.assert_close(params[0][name] - start, params[1][name] - start, rtol=1e-4, atol=2e-6)
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-5, atol=1e-6)


def test_the_defaults_equal_small_fc_lopts_oracle():
    oracle, small, star = Oracle("adafac_mlp_lopt"), lopt.SmallFcLopt(), lopt.Star()
    theta = lopt.theta_from_jax(small, oracle.group("theta/"))
    draws = torch.Generator().manual_seed(0)
    theta["mlp.w2"] = torch.cat([theta["mlp.w2"], torch.randn(4, 2, generator=draws)], dim=1)
    theta["mlp.b2"] = torch.cat([theta["mlp.b2"], torch.randn(2, generator=draws)])
    for t, params, _ in oracle.run(star, theta):
        for name, expected in oracle.group("p/").items():
            assert np.abs(params[name].numpy() - expected[t]).max() <= 1e-6 * max(1, np.abs(expected[t]).max()), name
    assert t == 19


# without a bound on gradients, as in the original, the squares of 1e28 are infinite
@pytest.mark.parametrize("law", [law for law in LAWS if law is not check_it_stays_finite], ids=lambda law: law.__name__)
def test_it_keeps_the_laws_of_learned_optimizers(law):
    law(lopt.Star(nominal_stepsize=0.01, weight_decay=0.01, nominal_controller=True, aggregate_magnitude=True))


def test_the_number_of_meta_parameters_is_the_originals_and_names_find_their_places():
    rule = lopt.Star()
    assert rule.spec.size == 207
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    leaves = {path.replace("nn/", "nn|~|"): theta[name].numpy() for name, path in rule.jax_names.items()}
    assert all(torch.equal(leaf, theta[name]) for name, leaf in lopt.theta_from_jax(rule, leaves).items())


def test_a_file_keeps_the_options_and_a_misspelt_estimator_is_refused():
    rule = lopt.Star(hidden_size=8, nominal_stepsize=1e-3, nominal_grad_estimator="SGDM", normalize_blackbox=True)
    again, *_ = lopt.decode(lopt.encode(rule, rule.init_theta(torch.Generator()), {}))
    assert again.arguments == rule.arguments
    assert again.arguments["nominal_grad_estimator"] == "SGDM"
    with pytest.raises(ValueError, match="did you mean 'AdamAggMo'"):
        lopt.Star(nominal_grad_estimator="AdamAggmo")
