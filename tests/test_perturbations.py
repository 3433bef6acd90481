"""Perturbations: keyed draws, sizes by part of theta, meta-gradients rebuilt from seeds; diagnostics."""

import pytest
import torch

import lopt
from configs.checks import ConfigError
from configs.schema import EstimatorConfig, SigmaConfig
from deploy.config import load
from tests.quadratic import Gd, Parabola
from tests.tiny_mlp import TinyMlp
from worker.estimators import Backprop, build
from worker.perturbations import contributions, draw, rebuild, sigmas
from worker.unroll import Unroll
from worker.variance import by_family, quality, variance_by_horizon

KEY = ("run", 3, "worker", 1)


def test_a_draw_depends_on_key_window_and_pair_alone():
    pair = torch.tensor([0, 5, 2, 5])
    window = torch.tensor([7, 0, 7, 1])
    rows = draw(KEY, window, pair, 9)
    for i in range(4):
        assert torch.equal(draw(KEY, window[i : i + 1], pair[i : i + 1], 9)[0], rows[i])
    assert not torch.equal(draw(("run", 4, "worker", 1), window, pair, 9), rows)


def test_draws_of_neighbouring_windows_and_pairs_are_independent_standard_normals():
    window, pair = (grid.flatten() for grid in torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij"))
    z = draw(KEY, window, pair, 1000)
    assert z.mean().abs() < 3 / 400_000**0.5
    assert (z.var() - 1).abs() < 3 * (2 / 400_000) ** 0.5
    correlation = z @ z.T / 1000
    off = correlation - torch.diag(correlation.diag())
    assert off.abs().max() < 6 / 1000**0.5
    assert torch.linalg.matrix_norm(off) / 400 < 1.05 / 1000**0.5


def test_the_draws_are_these():
    z = draw(("golden",), torch.tensor([0, 3]), torch.tensor([1, 0]), 3)
    expected = [[0.6699576, 0.4996714, -0.1099743], [0.0044071, 0.5657638, 0.0934310]]
    torch.testing.assert_close(z, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_sigma_by_glob_pattern_the_first_that_matches_counts():
    spec = lopt.Celo(2).spec
    values = sigmas(spec, 0.01, {"lstm.w*": 0.5, "lstm*": 0.003})
    for entry, part in zip(
        [entry for entry in spec.entries if not entry.frozen],
        values.split([entry.size for entry in spec.entries if not entry.frozen]),
        strict=True,
    ):
        expected = 0.5 if entry.name.startswith("lstm.w") else 0.003 if entry.name.startswith("lstm") else 0.01
        assert part.unique().tolist() == pytest.approx([expected]), entry.name
    assert len(values.unique()) >= 2


@pytest.mark.parametrize("pattern", ["ltsm.*", "unused"])
def test_a_pattern_without_a_trainable_part_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"estimator\.sigmas.*rate"):
        sigmas(Gd().spec, 0.01, {pattern: 0.1})


NAMES = ("pes", "gpes", "nres", "truncated_es", "full_es")


def config(name, **changes):
    period = {"noise_period": 12} if name == "gpes" else {}
    return EstimatorConfig(name, window=4, num_tasks=3, **period | changes)


@pytest.mark.parametrize("horizon", [(3, 6), (3, 60)])
@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_coefficients_alone_rebuild_the_meta_gradient(name, horizon):
    rule, key, n = Gd(), ("rebuild", 7), 5
    estimator = build(Unroll(Parabola(), rule, n, horizon, key), config(name, sigmas=[SigmaConfig("rate", 0.003)]))
    sigma = sigmas(rule.spec, 0.01, {"rate": 0.003})
    state = estimator.init()
    for _ in range(25):
        estimate, state = estimator.estimate(rule.init_theta(None), state)
        parts = contributions(key, estimate.terms, sigma, 2, n)
        # positive and negative contributions cancel, and what is left has the rounding of what was added
        rounding = 1e-5 * float(parts.abs().sum(0).max())
        torch.testing.assert_close(rebuild(key, estimate.terms, sigma, 2), estimate.gradient, rtol=0, atol=rounding)
        torch.testing.assert_close(parts.sum(0), estimate.gradient, rtol=0, atol=rounding)
        assert estimate.gradient.abs().max() > 100 * rounding
    assert name == "full_es" or state["episode"].min() >= 1


def test_a_pes_gradient_has_one_seed_for_each_window_of_the_episode():
    pes = build(Unroll(Parabola(), Gd(), 3, (40, 40), ("seeds",)), config("pes"))
    state = pes.init()
    for _ in range(12):
        estimate, state = pes.estimate(Gd().init_theta(None), state)
    for i in range(3):
        seeds = estimate.terms.window[estimate.terms.pair == i].unique()
        begun_at = 11 - (int(state["inner_step"][i]) - 1) // 4
        assert seeds.tolist() == list(range(begun_at, 12)), "the task's episode did not end in this window"


@pytest.mark.parametrize("name", NAMES)
def test_only_what_has_a_sigma_of_its_own_is_perturbed_differently_and_frozen_parts_not_at_all(name):
    rule = Gd()
    unroll = Unroll(Parabola(), rule, 200, (4, 4), ("spread",))
    seen, run = [], unroll.run
    unroll.run = lambda thetas, *rest, **kw: seen.append(thetas) or run(thetas, *rest, **kw)
    estimator = build(unroll, config(name, sigmas=[SigmaConfig("ra*", 0.03)]))
    estimator.estimate(rule.init_theta(None), estimator.init())
    spread = seen[0]["rate"][:200].std(0)
    assert ((spread / 0.03 - 1).abs() < 0.2).all()
    torch.testing.assert_close(
        seen[0]["rate"][:200] + seen[0]["rate"][200:], 2 * rule.init_theta(None)["rate"].expand(200, 2)
    )
    assert (seen[0]["unused"] == 1).all()


REFUSED = [
    ({"name": "pes", "objective": "final"}, "objective", "mean, because pes"),
    ({"name": "nres", "objective": "min"}, "objective", "mean, because nres"),
    ({"name": "full_es", "split": "outer_valid"}, "split", "objective: final"),
    ({"name": "truncated_backprop", "split": "outer_valid"}, "split", "train"),
    ({"name": "gpes"}, "noise_period", "a multiple of window = 50"),
    ({"name": "gpes", "noise_period": 75}, "noise_period", "a multiple of window = 50"),
    ({"name": "gpes", "noise_period": 0}, "noise_period", ">= 1"),
    ({"name": "nres", "noise_period": 100}, "noise_period", "only gpes"),
    ({"clip_loss_diff": -1.0}, "clip_loss_diff", "> 0"),
    ({"clip_loss_diff": 1.0, "sign_delta_loss": 1.0}, "clip_loss_diff", "null"),
    ({"name": "backprop", "sigmas": [SigmaConfig("a", 1.0)]}, "sigmas", "perturbs nothing"),
    ({"name": "truncated_backprop", "clip_loss_diff": 1.0}, "clip_loss_diff", "perturbs nothing"),
    ({"name": "nrse"}, "name", "did you mean 'nres'"),
    ({"split": "valid"}, "split", "outer_valid"),
]


@pytest.mark.parametrize(("changes", "field", "expected"), REFUSED)
def test_combinations_that_mean_nothing_are_refused_by_field(changes, field, expected):
    with pytest.raises(ConfigError) as caught:
        EstimatorConfig(**changes)
    assert caught.value.field == field
    assert expected in caught.value.expected


def test_sigmas_are_given_on_the_command_line_and_refused_by_place():
    chosen = load(["estimator=nres", "estimator.sigmas=[{match: 'lstm.*', sigma: 0.003}]"]).estimator
    assert chosen.sigmas == [SigmaConfig("lstm.*", 0.003)]
    with pytest.raises(ConfigError, match=r"estimator\.sigmas\[0\]\.sigma = 0\.0"):
        load(["estimator.sigmas=[{match: a, sigma: 0}]"])


def test_tasks_whose_gradients_are_no_derivative_are_not_back_propagated_through():
    class Rounded(TinyMlp):
        def losses_and_grads(self, *args):
            out = super().losses_and_grads(*args)
            return out._replace(grads={name: leaf.sign() for name, leaf in out.grads.items()})

    unroll = Unroll(Rounded(), lopt.SmallFcLopt(4), 2, (5, 5), ("r",), path="reference")
    with pytest.raises(ConfigError, match="Rounded computes gradients that are not the derivative"):
        Backprop(unroll, objective="mean")


def samples_with(mean, spread, m, d, seed=0):
    z = torch.randn(m, d, generator=torch.Generator().manual_seed(seed))
    return mean + spread * z


def test_quality_finds_signal_noise_and_their_ratio():
    found = by_family({"good": samples_with(1.0, 0.5, 4000, 10), "lost": samples_with(0.0, 0.5, 4000, 10)})
    assert found["good"].signal == pytest.approx(10.0, rel=0.05)
    assert found["good"].variance == pytest.approx(2.5, rel=0.05)
    assert found["good"].signal_to_noise == pytest.approx(4.0, rel=0.1)
    assert found["good"].cosine > 0.99
    assert abs(found["lost"].signal) < 0.01
    assert quality(torch.ones(4, 3)).signal_to_noise == float("inf")


def test_the_variance_is_shared_out_by_horizon():
    rows = torch.cat([samples_with(0.0, 1.0, 3000, 5), samples_with(0.0, 2.0, 3000, 5, seed=1)])
    horizons = torch.tensor([100] * 3000 + [1000] * 3000)
    shares = variance_by_horizon(rows, horizons, [100, 500])
    assert shares[0] == 0
    torch.testing.assert_close(shares[1:], torch.tensor([0.2, 0.8]).double(), rtol=0.05, atol=0)
