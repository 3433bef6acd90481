"""VeLO equals its JAX original where told to, and is what the paper describes where the original is not."""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch import nn

import lopt
from lopt.velo import tensor_statistics
from tests.lopt_laws import LAWS, Oracle, close, particles, run

COMPAT = pytest.mark.parametrize("compat", [False, True], ids=["fixed", "compat"])


def small(compat=False):
    return lopt.Velo(lstm_size=16, bank_size=8, compat=compat)


@pytest.fixture(scope="module")
def oracle():
    return Oracle("hyper_v2_64_32")


@pytest.fixture(scope="module", params=["as installed", "reference"])
def trajectory(oracle, request):
    """Ours, on the oracle's gradients and losses, set to run as the original."""
    with lopt.kernels.reference() if request.param == "reference" else contextlib.nullcontext():
        return list(oracle.run(lopt.Velo(64, 32, compat=True)))


def test_parameters_equal_the_original_after_each_of_20_steps(oracle, trajectory):
    tolerance = 10 * json.loads(str(oracle.data["meta"]))["max_abs_jit_vs_nojit"]
    expected = oracle.group("p/")
    for t, params, _ in trajectory:
        for name, p in params.items():
            error = np.abs(p.numpy() - expected[name][t]).max()
            assert error <= max(tolerance, 1e-6 * np.abs(expected[name][t]).max()), f"step {t}, {name}: {error:.2e}"
    assert t == 19


def test_displacements_equal_the_original_to_a_few_digits_more_than_the_parameters(oracle, trajectory):
    t, params, _ = trajectory[-1]
    for name, start in oracle.group("p0/").items():
        end = oracle.group("p/")[name][t]
        noise = np.abs(end - oracle.group("pn/")[name][t]).max()
        error = np.abs(params[name].numpy() - end).max()
        assert error <= max(10 * noise, 2e-5 * np.abs(end - start).max(), 4 * np.spacing(np.abs(start).max())), name


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_state_equals_the_original(oracle, trajectory, step, prefix):
    expected, (_, _, state) = oracle.group(prefix), trajectory[step]
    kinds = {"m": "mom_rolling|m", "v": "rms_rolling|rms"}
    kinds |= {ours: f"fac_rolling|v_{ours}" for ours in ("row", "col", "diag")}
    compared = 0
    for ours, theirs in kinds.items():
        for name in oracle.group("p0/"):
            wanted = expected[f"{theirs}|{name.replace('/', '|')}"]
            if wanted.size:
                leaf = np.moveaxis(state[f"{ours}/{name}"].numpy(), 0, -1).reshape(wanted.shape)
                np.testing.assert_allclose(leaf, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max(), err_msg=name)
                compared += 1
    assert compared == 6 * 2 + 3 * 2 + 3
    for part in ("hidden", "cell"):
        for name, wanted in zip(sorted(oracle.group("p0/")), expected[f"lstm_hidden_state|{part}"], strict=True):
            np.testing.assert_allclose(state[f"lstm_{part}/{name}"].numpy(), wanted, rtol=1e-5, atol=5e-6, err_msg=name)
        assert np.ptp(expected[f"lstm_hidden_state|{part}"], axis=0).max() > 0.1, "tensors have LSTMs of their own"
    for leaf in ("means", "running_min", "decays"):
        np.testing.assert_allclose(state[f"loss/{leaf}"].numpy(), expected[f"loss_buffer|{leaf}"], rtol=2e-6)
    assert int(state["iteration"]) == int(expected["iteration"]) == int(state["loss/count"]) == step + 1
    assert int(state["num_steps"]) == int(expected["num_steps"])


@pytest.mark.parametrize(("lstm_size", "bank_size", "size"), [(512, 256, 2_320_385), (64, 32, 46_337)])
def test_number_of_meta_parameters_is_the_papers(oracle, lstm_size, bank_size, size):
    rule = lopt.Velo(lstm_size, bank_size)
    assert rule.spec.size == size
    assert sum(leaf.numel() for leaf in rule.init_theta(torch.Generator().manual_seed(0)).values()) == size
    assert rule.spec.trainable_size == size - (30 + 1) * lstm_size, "the dead mix layer is not trained"
    assert json.loads(str(oracle.data["meta"]))["n_theta"] == 46_337
    assert lopt.Velo().arguments == {"lstm_size": 512, "bank_size": 256, "compat": False}


def test_theta_starts_as_the_originals_does():
    theta = lopt.Velo(64, 512).init_theta(torch.Generator().manual_seed(0))
    for name, fan_in in (("mlp.w0", 30), ("mlp.w1", 4), ("mlp.w2", 4), ("mix.w", 30), ("lstm.w", 128)):
        assert theta[name].std().item() == pytest.approx(0.8796 * fan_in**-0.5, rel=0.03), name
        assert theta[name].abs().max() <= 2 * fan_in**-0.5
    assert not torch.equal(theta["mlp.w0"][0], theta["mlp.w0"][1])
    for name in ("mlp.b0", "mlp.b1", "mlp.b2", "lstm.b", "lstm.hidden", "lstm.cell", "controls.b", "step_size.b"):
        assert not theta[name].any(), name


@COMPAT
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_keeps_the_laws_of_learned_optimizers(law, compat):
    law(small(compat))


def test_what_is_fixed_makes_a_difference_that_compat_takes_back(oracle, trajectory):
    theta = oracle.theta(lopt.Velo(64, 32, compat=True))
    fixed = list(oracle.run(lopt.Velo(64, 32), theta))
    close(fixed[0][2], trajectory[0][2])  # before the first gradient m and v are zero, and so are both inputs
    lstm = [key for key in fixed[1][2] if key.startswith("lstm_hidden/")]
    assert max((fixed[-1][2][key] - trajectory[-1][2][key]).abs().max() for key in lstm) > 1e-2
    assert max((fixed[-1][1][name] - trajectory[-1][1][name]).abs().max() for name in fixed[-1][1]) > 1e-4


def advance(rule, batch, state):
    """The LSTMs' outputs after one more step from ``state``."""
    params = batch.params
    _, state = rule.update_particles(batch.theta, state, params, batch.grads[0], batch.losses[0])
    return {key: leaf for key, leaf in state.items() if key.startswith("lstm_hidden/")}


def test_the_fixed_input_is_the_variance_of_v_and_the_originals_its_distance_from_m():
    batch = particles(small())
    _, state = run(small(), batch, steps=3)
    names = [key.partition("/")[2] for key in state if key.startswith("m/")]

    def with_m(change):
        return state | {f"m/{name}": change(state[f"m/{name}"], state[f"v/{name}"]) for name in names}

    shifted = with_m(lambda m, v: m + 0.5)
    close(advance(small(), batch, shifted), advance(small(), batch, state))
    before, after = advance(small(True), batch, state), advance(small(True), batch, shifted)
    assert all((after[key] - before[key]).abs().max() > 1e-4 for key in before), "every tensor's input is wrong"

    # where the means of m and v agree, the original is right
    agreeing = with_m(lambda m, v: m - (m - v).flatten(2).mean(-1).reshape(*m.shape[:2], *[1] * (m.ndim - 2)))
    close(advance(small(True), batch, agreeing), advance(small(), batch, agreeing))
    wider = agreeing | {f"v/{name}": 3 * state[f"v/{name}"] - 2 * state[f"v/{name}"].mean() for name in names}
    assert (
        max(
            (advance(small(), batch, wider)[key] - advance(small(), batch, agreeing)[key]).abs().max() for key in before
        )
        > 1e-3
    )


def test_statistics_are_those_of_the_tensor_for_every_rank():
    batch = particles(small())
    params, state = run(small(), batch, steps=3)
    found = tensor_statistics(state, params).numpy()
    assert found.shape == (3, len(params), 9)
    for t, (name, p) in enumerate(params.items()):
        m, v = (state[f"{kind}/{name}"].double().flatten(2).numpy() for kind in ("m", "v"))
        wanted = [p.double().reshape(3, -1).square().mean(1, keepdim=True).numpy(), m.mean(-1), v.mean(-1)]
        wanted += [m.var(-1), v.var(-1)]
        np.testing.assert_allclose(found[:, t], np.concatenate(wanted, axis=1), rtol=1e-5, atol=1e-12, err_msg=name)


def test_statistics_keep_their_digits_where_the_mean_is_far_larger_than_the_spread():
    m = 1e3 + torch.randn(1, 3, 5000)
    found = tensor_statistics({"m/p": m, "v/p": m[:, :1]}, {"p": m[:, 0]})
    np.testing.assert_allclose(found[0, 0, 5:8], m.double().var(-1, correction=0)[0], rtol=1e-3)


@COMPAT
def test_the_order_of_the_tensors_does_not_matter(compat):
    rule = small(compat)
    batch = particles(rule)
    backwards = lambda leaves: dict(reversed(leaves.items()))  # noqa: E731
    params, state = run(rule, batch)
    other, other_state = run(rule, batch._replace(params=backwards(batch.params), grads=[*map(backwards, batch.grads)]))
    close(other, params)
    close(other_state, state)


def test_a_scalar_is_a_vector_of_one_element():
    rule = small()
    batch = particles(rule)
    scalar = lambda leaves: {"s": leaves["one"].squeeze(1)}  # noqa: E731
    vector = lambda leaves: {"s": leaves["one"]}  # noqa: E731
    ours, _ = run(rule, batch._replace(params=scalar(batch.params), grads=[scalar(g) for g in batch.grads]))
    theirs, _ = run(rule, batch._replace(params=vector(batch.params), grads=[vector(g) for g in batch.grads]))
    torch.testing.assert_close(ours["s"], theirs["s"].squeeze(1), rtol=0, atol=0)


def test_a_tensor_of_five_axes_has_no_rank_among_the_inputs():
    rule, draws = small(), torch.Generator().manual_seed(0)
    batch = particles(rule)
    for axes, heard in ((4, True), (5, False)):
        only = batch._replace(
            params={"p": torch.randn(3, *[2] * axes, generator=draws)},
            grads=[{"p": torch.randn(3, *[2] * axes, generator=draws)}],
        )
        _, state = run(rule, only, steps=1)
        louder = {name: batch.theta[name].clone() for name in ("mix.w", "input.w")}
        for weight in louder.values():
            weight[:, 19:24] += 1  # after the time left (9), losses (9) and the mean of v (1)
        _, other = run(rule, only._replace(theta=batch.theta | louder), steps=1)
        assert torch.equal(state["lstm_hidden/p"], other["lstm_hidden/p"]) != heard


def test_tensors_hear_of_each_other():
    rule = small()
    batch = particles(rule)
    _, together = run(rule, batch, steps=3)
    only = lambda leaves: {"bias": leaves["bias"]}  # noqa: E731
    _, alone = run(rule, batch._replace(params=only(batch.params), grads=[only(g) for g in batch.grads]), steps=3)
    assert (together["lstm_hidden/bias"] - alone["lstm_hidden/bias"]).abs().max() > 1e-4


def test_the_step_size_may_be_negative_and_turns_the_step_around():
    rule = small()
    batch = particles(rule)
    theta = batch.theta | {"step_size.w": torch.zeros_like(batch.theta["step_size.w"])}
    moved = []
    for sign in (1.0, -1.0):
        towards = batch._replace(theta=theta | {"step_size.b": torch.full_like(theta["step_size.b"], sign)})
        params, _ = run(rule, towards, steps=1)
        moved.append({name: p - batch.params[name] for name, p in params.items()})
    close(moved[0], {name: -move for name, move in moved[1].items()})
    assert all(move.abs().max() > 1e-4 for move in moved[0].values())


def test_a_bank_of_equal_rules_under_equal_controls_is_that_rule():
    """100 mean_k(control_k bank_k) with controls 0.01: the rule itself, which Celo's phase 1 applies unscaled."""
    rule, celo = small(), lopt.Celo(phase=1)
    batch = particles(rule)
    one = {name: leaf[:, 0] for name, leaf in batch.theta.items() if name.startswith("mlp.")}
    fixed = {name: torch.zeros_like(batch.theta[name]) for name in ("controls.w", "step_size.w")}
    fixed |= {"controls.b": torch.full((3, 8), 0.01), "step_size.b": torch.ones(3, 1)}
    bank = {name: leaf.unsqueeze(1).expand_as(batch.theta[name]) for name, leaf in one.items()}
    ours, _ = run(rule, batch._replace(theta=batch.theta | bank | fixed))
    theirs, _ = run(celo, batch._replace(theta=particles(celo).theta | one))
    close(ours, theirs)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="bank_size = 0: expected"):
        lopt.Velo(bank_size=0)
    with pytest.raises(ValueError, match="lstm_size = -1: expected"):
        lopt.Velo(lstm_size=-1)


@COMPAT
def test_it_trains_a_model_as_an_optimizer_and_survives_a_checkpoint(tmp_path, compat):
    rule = lopt.build("velo", lstm_size=16, bank_size=8, compat=compat)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    (tmp_path / "opt.safetensors").write_bytes(lopt.encode(rule, theta, {}))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 1, 6)
    start = [p.detach().clone() for p in model.parameters()]
    opt = lopt.load(str(tmp_path / "opt.safetensors"))(model.parameters(), num_steps=50)
    assert (opt.lopt.name, opt.lopt.compat) == ("velo", compat)
    params, state = {str(i): p.clone() for i, p in enumerate(start)}, None
    state = rule.init_state(theta, params, 50)
    for _ in range(5):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        grads = {str(i): p.grad.clone() for i, p in enumerate(model.parameters())}
        params, state = rule.update(theta, state, params, grads, loss.detach())
        opt.step(loss=loss)
    close({str(i): p.detach() for i, p in enumerate(model.parameters())}, params)
    assert opt.state[next(model.parameters())]["lstm_hidden"].shape == (16,)
    with pytest.raises(ValueError, match="num_steps"):
        lopt.load(str(tmp_path / "opt.safetensors"))(model.parameters())
