"""rnn_mlp_lopt equals its JAX original, and keeps the laws of learned optimizers."""

import pytest
import torch

import lopt
from tests.lopt_laws import LAWS, Oracle, close, particles, run
from tests.test_mlp_lopt import assert_close, assert_parameters_equal


@pytest.fixture(scope="module")
def oracle():
    return Oracle("rnn_mlp_lopt")


def test_parameters_equal_the_original_after_each_of_20_steps(oracle):
    assert_parameters_equal(oracle, lopt.RnnMlp(), digits=5)


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_state_equals_the_original(oracle, step, prefix):
    expected, names = oracle.group(prefix), sorted(oracle.group("p0/"))
    [state] = [state for t, _, state in oracle.run(lopt.RnnMlp()) if t == step]
    for i, name in enumerate(names):
        path = name.replace("/", "|")
        for kind, original in (("m", "mom_rolling|m"), ("v", "rms_rolling|rms")):
            ours, wanted = state[f"{kind}/{name}"].numpy(), expected[f"{original}|{path}"]
            for k in range(5):
                assert_close(ours[k], wanted[..., k].reshape(ours.shape[1:]), name)
        for part in ("hidden", "cell"):
            assert_close(state[f"lstm_{part}/{name}"].numpy(), expected[f"lstm_hidden_state|{part}"][i], name)
        assert_close(state[f"from_mlp/{name}"].numpy(), expected[f"from_mlp|{path}"], name)
    assert_close(state["from_lstm"].numpy(), expected["from_lstm"], "from_lstm")
    assert_close(state["loss.mean"].numpy(), expected["train_loss_accum|mean"], "mean")
    assert_close(state["loss.variance"].numpy(), expected["train_loss_accum|var"], "variance")
    assert_close(state["gradient_scale"].numpy(), expected["dynamic_clip|value"], "gradient_scale")
    updates = int(expected["train_loss_accum|updates"])
    assert int(state["iteration"]) == updates == int(expected["dynamic_clip|iteration"]) - 1 == step + 1
    assert len(state) == 5 * len(names) + 5, "nothing unused"


def test_number_of_meta_parameters_is_the_originals():
    rule = lopt.build("rnn_mlp_lopt")
    assert rule.spec.size == 35_799
    assert sum(leaf.numel() for leaf in rule.init_theta(torch.Generator().manual_seed(0)).values()) == 35_799


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_keeps_the_laws_of_learned_optimizers(law):
    law(lopt.RnnMlp())


def test_the_first_messages_have_the_variance_of_one_over_their_number():
    rule, draws = lopt.RnnMlp(), torch.Generator().manual_seed(0)
    thetas = [rule.init_theta(draws) for _ in range(100)]
    for name, size in (("from_lstm", 18), ("from_mlp", 16)):
        messages = torch.stack([theta[name] for theta in thetas])
        assert messages.std() == pytest.approx(size**-0.5, rel=0.05)
        assert 2.1 < messages.abs().max() * size**0.5 < 2 / 0.8796


def test_tensors_hear_of_each_other_in_the_next_step():
    rule = lopt.RnnMlp()
    batch = particles(rule)
    other = batch._replace(grads=[g | {"square": -g["square"]} for g in batch.grads])
    for steps, same in ((1, True), (2, False)):
        one, two = (run(rule, case, steps)[0] for case in (batch, other))
        assert all(torch.equal(one[name], two[name]) is same for name in one if name != "square")


def test_a_loss_in_other_units_changes_nothing_and_another_loss_does():
    rule = lopt.RnnMlp()
    assert rule.needs_loss
    assert not rule.needs_horizon
    batch = particles(rule)
    params, _ = run(rule, batch)
    close(run(rule, batch._replace(losses=100 * batch.losses))[0], params, rtol=0, atol=3e-7)
    other, _ = run(rule, batch._replace(losses=batch.losses.flip(0)))
    assert all((other[name] - p).abs().max() > 5e-6 for name, p in params.items())


def test_gradients_are_clipped_at_ten_times_what_they_have_been():
    rule = lopt.RnnMlp()
    batch = particles(rule)
    huge = [{name: torch.full_like(leaf, 1e20) for name, leaf in g.items()} for g in batch.grads]
    second = 10 * (0.99 * 0.01 + 0.01 * 10) / (1 - 0.99**2)  # they are taken to have been 1 before the first step
    for steps, momentum in ((1, 0.5 * 10), (2, 0.25 * 10 + 0.5 * second)):
        _, state = run(rule, batch._replace(grads=huge), steps)
        for name in batch.params:
            fastest = state[f"m/{name}"][:, 0]
            torch.testing.assert_close(fastest, torch.full_like(fastest, momentum), rtol=1e-5, atol=0)
