"""Celo-Adam equals its JAX original, and is Adam under Celo's schedule."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lopt
from tests.lopt_laws import LAWS, Oracle, particles, run


@pytest.fixture(scope="module")
def oracle():
    return Oracle("celo_adam")


def test_parameters_equal_the_original_after_each_of_20_steps(oracle):
    tolerance = 10 * json.loads(str(oracle.data["meta"]))["max_abs_jit_vs_nojit"]
    expected, start = oracle.group("p/"), oracle.group("p0/")
    for t, params, _ in oracle.run(lopt.CeloAdam()):
        for name, p in params.items():
            error = np.abs(p.numpy() - expected[name][t]).max()
            assert error <= max(tolerance, 1e-6 * np.abs(expected[name][t]).max()), f"step {t}, {name}: {error:.2e}"
            # the moves are small beside the parameters: they are compared to as many digits as fp32 parameters leave
            moved, wanted = p.numpy() - start[name], expected[name][t] - start[name]
            spacing = np.spacing(np.abs(start[name]).max().astype(np.float32))
            assert np.abs(moved - wanted).max() <= max(2e-6 * np.abs(wanted).max(), 2 * (t + 1) * spacing)
    assert t == 19


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_state_equals_the_original(oracle, step, prefix):
    expected = oracle.group(prefix)
    [state] = [state for t, _, state in oracle.run(lopt.CeloAdam()) if t == step]
    for name in oracle.group("p0/"):
        path = name.replace("/", "|")
        for kind, original in (("m", "mom_rolling|m"), ("v", "rms_rolling|rms")):
            wanted = expected[f"{original}|{path}"][..., 0]
            ours = state[f"{kind}/{name}"].numpy()
            np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max(), err_msg=name)
    for part in ("hidden", "cell"):
        # the original's copies for its six tensors are all the same
        for row in expected[f"lstm_hidden_state|{part}"]:
            np.testing.assert_allclose(state[f"lstm.{part}"].numpy(), row, rtol=1e-5, atol=2e-6)
    for leaf in ("means", "running_min", "decays"):
        np.testing.assert_allclose(state[f"loss/{leaf}"].numpy(), expected[f"loss_buffer|{leaf}"], rtol=2e-6)
    assert int(state["iteration"]) == int(expected["iteration"]) == int(state["loss/count"]) == step + 1
    assert len(state) == 2 * len(oracle.group("p0/")) + 8, "moments; iteration, horizon, LSTM, losses; nothing unused"


def test_number_of_meta_parameters_is_the_originals(oracle):
    rule = lopt.CeloAdam()
    assert rule.spec.size == json.loads(str(oracle.data["meta"]))["n_theta"] == 36_865
    assert sum(leaf.numel() for leaf in rule.init_theta(torch.Generator().manual_seed(0)).values()) == 36_865
    assert rule.spec.trainable_size == 36_865 - (18 * 64 + 64), "the dead mix layer is not trained"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_keeps_the_laws_of_learned_optimizers(law):
    law(lopt.CeloAdam())


def test_a_constant_schedule_makes_it_adam():
    rule, draws = lopt.CeloAdam(), torch.Generator().manual_seed(0)
    theta = rule.init_theta(draws)
    theta |= {"step_size.w": torch.zeros(64, 1), "step_size.b": torch.log(torch.tensor([100.0]))}
    p = nn.Parameter(torch.randn(6, 4, generator=draws))
    params = {"p": p.detach().clone()}
    state, adam = rule.init_state(theta, params, 20), torch.optim.Adam([p], lr=0.01)
    for _ in range(20):
        p.grad = torch.randn(p.shape, generator=draws)
        params, state = rule.update(theta, state, params, {"p": p.grad}, torch.tensor(1.0))
        adam.step()
    torch.testing.assert_close(params["p"], p.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_of_any_size_give_steps_of_the_learned_size():
    rule = lopt.CeloAdam()
    batch = particles(rule)
    for scale in (1e-8, 1.0, 1e8):
        params, _ = run(rule, batch._replace(grads=[{n: g * scale for n, g in step.items()} for step in batch.grads]))
        for name, p in params.items():
            assert (p - batch.params[name]).abs().max() < 10 * 10 * 1e-4


def test_a_tensor_may_be_cut_anywhere():
    rule = lopt.CeloAdam()
    assert rule.elementwise
    batch = particles(rule)
    halves = lambda leaves: {f"{i}": part for i, part in enumerate(leaves["conv"].split(1, dim=2))}  # noqa: E731
    whole, _ = run(rule, batch)
    cut, _ = run(rule, batch._replace(params=halves(batch.params), grads=[halves(g) for g in batch.grads]))
    torch.testing.assert_close(torch.cat([cut["0"], cut["1"]], dim=2), whole["conv"], rtol=0, atol=0)


def test_it_trains_a_model_as_an_optimizer_and_survives_a_checkpoint(tmp_path):
    rule = lopt.build("celo_adam")
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    theta |= {"step_size.b": torch.tensor([4.0])}
    (tmp_path / "opt.safetensors").write_bytes(lopt.encode(rule, theta, {}))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 4)
    opt = lopt.load(str(tmp_path / "opt.safetensors"))(model.parameters(), num_steps=200)
    losses = []
    for _ in range(200):
        opt.zero_grad()
        loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
