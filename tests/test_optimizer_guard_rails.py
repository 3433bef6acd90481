"""Longer training than declared, or than the rule bears: VeLO's guard rails."""

import copy

import pytest
import torch
from torch import nn

from lopt import guard_rails
from tests.optimizers import RULES, make, rule_and_theta, with_grad

HORIZON_RULES = ["celo", "velo", "celo_adam", "nadamw"]
SHAPES = ((3, 2), (4,))


def gradients(step):
    draws = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=draws) for shape in SHAPES]


def loss_at(step):
    return 2.0 / (1 + step)


def parameters():
    return [nn.Parameter(torch.linspace(-1, 1, 6).reshape(3, 2)), nn.Parameter(torch.ones(4))]


def run(opt, steps):
    """Make these steps, numbered, of the optimizer's parameters."""
    for step in steps:
        for p, g in zip(opt.param_groups[0]["params"], gradients(step), strict=True):
            p.grad = g
        opt.step(loss=loss_at(step))


def by_hand(name, first, then, **changed):
    """The pure rule over ``first`` + ``then`` steps, told of ``first``, with leaves of its state changed in between."""
    rule, theta = rule_and_theta(name)
    params = {str(i): p.detach() for i, p in enumerate(parameters())}
    state = rule.init_state(theta, params, first)
    for step in range(first + then):
        if step == first:
            state |= {leaf: torch.tensor(value) for leaf, value in changed.items()}
        grads = {str(i): g for i, g in enumerate(gradients(step))}
        params, state = rule.update(theta, state, params, grads, torch.tensor(loss_at(step)))
    return params


def assert_at(opt, params):
    for p, q in zip(opt.param_groups[0]["params"], params.values(), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HORIZON_RULES)
def test_increase_steps_goes_on_as_if_all_steps_had_been_declared(name):
    opt = make(name, parameters(), num_steps=3)
    run(opt, range(3))
    opt.increase_steps(4)
    run(opt, range(3, 7))
    assert_at(opt, by_hand(name, first=3, then=4, num_steps=7))
    with pytest.raises(RuntimeError, match="step 8 of num_steps = 7"):
        opt.step(loss=1.0)


@pytest.mark.parametrize("name", HORIZON_RULES)
def test_reset_steps_starts_the_schedule_again_and_keeps_the_rest(name):
    opt = make(name, parameters(), num_steps=3)
    run(opt, range(3))
    opt.reset_steps(4)
    run(opt, range(3, 7))
    assert_at(opt, by_hand(name, first=3, then=4, num_steps=4, iteration=0))
    with pytest.raises(RuntimeError, match="step 5 of num_steps = 4"):
        opt.step(loss=1.0)


def test_a_rule_without_a_horizon_goes_on_and_only_its_clock_is_reset():
    opt = make("small_fc_lopt", parameters(), num_steps=3, max_steps=1)
    run(opt, range(3))
    opt.increase_steps(2)
    run(opt, range(3, 6))
    opt.reset_steps(2)
    assert opt.progress["num_steps"] is None
    assert opt.progress["state"]["iteration"].item() == 0
    run(opt, range(6, 9))
    assert opt.progress["state"]["iteration"].item() == 3


@pytest.mark.parametrize("name", HORIZON_RULES)
def test_more_steps_than_the_rule_bears_become_fewer_updates(name):
    opt, few = make(name, parameters(), num_steps=10, max_steps=4), make(name, parameters(), num_steps=3)
    params, expected = opt.param_groups[0]["params"], few.param_groups[0]["params"]
    for update in range(3):
        kept = [p.detach().clone() for p in params]
        run(opt, [3 * update, 3 * update + 1])
        assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True)), "nothing moves in between"
        run(opt, [3 * update + 2])
        means = [sum(parts) / 3 for parts in zip(*(gradients(3 * update + i) for i in range(3)), strict=True)]
        for p, g in zip(expected, means, strict=True):
            p.grad = g
        few.step(loss=sum(loss_at(3 * update + i) for i in range(3)) / 3)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert all(guard_rails.GRAD_SUM not in opt.state[p] for p in params), "its memory is given back"
    run(opt, [9])  # the last of ten, which no update is left for
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="step 11 of num_steps = 10"):
        run(opt, [10])


def test_the_rule_sees_the_mean_of_the_losses(monkeypatch):
    opt, seen = make("celo", parameters(), num_steps=10, max_steps=4), []
    apply = opt.lopt.apply
    monkeypatch.setattr(opt.lopt, "apply", lambda *given: seen.append(given[4].item()) or apply(*given))
    run(opt, range(10))
    assert seen == pytest.approx([sum(loss_at(3 * update + i) for i in range(3)) / 3 for update in range(3)])


def test_gradients_that_wait_are_no_longer_the_parameters_own():
    p, twin = (with_grad(torch.linspace(-1, 1, 6).reshape(3, 2)) for _ in range(2))
    other_gradient = torch.linspace(2, -1, 6).reshape(3, 2)
    opt, other = make("celo", [p], num_steps=4, max_steps=2), make("celo", [twin], num_steps=2)
    opt.step(loss=1.0)
    opt.zero_grad(set_to_none=False)
    p.grad += other_gradient
    opt.step(loss=1.0)
    twin.grad = (0.3 + other_gradient) / 2
    other.step(loss=1.0)
    torch.testing.assert_close(p, twin, rtol=2e-7, atol=0)


def test_gradients_that_wait_when_the_steps_are_reset_are_part_of_the_next_update():
    p, twin = (with_grad(torch.linspace(-1, 1, 6).reshape(3, 2)) for _ in range(2))
    other_gradient = torch.linspace(2, -1, 6).reshape(3, 2)
    opt, other = make("celo", [p], num_steps=9, max_steps=3), make("celo", [twin], num_steps=2)
    opt.step(loss=1.0)
    opt.reset_steps(2)
    p.grad = other_gradient.clone()
    opt.step(loss=1.0)
    twin.grad = (0.3 + other_gradient) / 2
    other.step(loss=1.0)
    torch.testing.assert_close(p, twin, rtol=2e-7, atol=0)
    assert guard_rails.GRAD_SUM not in opt.state[p]
    opt.step(loss=1.0)
    assert not opt.progress["waiting"]


def test_the_default_is_velos_150_000():
    at, above = (guard_rails.begin(steps, guard_rails.MAX_STEPS) for steps in (150_000, 150_001))
    assert (guard_rails.gradients_per_update(at), guard_rails.horizon(at)) == (1, 150_000)
    assert (guard_rails.gradients_per_update(above), guard_rails.horizon(above)) == (2, 75_000)
    assert make("celo", parameters(), num_steps=150_001).progress["max_steps"] == 150_000


def test_a_gradient_that_is_missing_in_some_calls_counts_as_zero_in_them():
    opt = make("celo", parameters(), num_steps=8, max_steps=4)
    p, sometimes = opt.param_groups[0]["params"]
    run(opt, [0])
    p.grad, sometimes.grad = gradients(1)[0], None
    opt.step(loss=1.0)
    other = make("celo", parameters(), num_steps=4)
    q, twin = other.param_groups[0]["params"]
    q.grad, twin.grad = (gradients(0)[0] + gradients(1)[0]) / 2, gradients(0)[1] / 2
    other.step(loss=(loss_at(0) + 1.0) / 2)
    torch.testing.assert_close((p, sometimes), (q, twin), rtol=2e-7, atol=0)


@pytest.mark.parametrize("calls", [1, 4, 5])
def test_training_resumes_exactly_between_two_updates(tmp_path, calls):
    opt = make("velo", parameters(), num_steps=9, max_steps=3)
    run(opt, range(calls))
    torch.save((opt.state_dict(), opt.param_groups[0]["params"]), tmp_path / "training.pt")
    state, params = torch.load(tmp_path / "training.pt", weights_only=True)
    again = make("velo", params, num_steps=100)
    again.load_state_dict(state)
    copied = copy.deepcopy(opt)
    for one in (opt, again, copied):
        run(one, range(calls, 9))
        with pytest.raises(RuntimeError, match="step 10 of num_steps = 9"):
            one.step(loss=1.0)
    for p, q, r in zip(*(one.param_groups[0]["params"] for one in (opt, again, copied)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_increase_steps_keeps_the_fraction_of_training_where_more_gradients_make_an_update():
    opt = make("celo", parameters(), num_steps=4, max_steps=4)
    run(opt, range(4))
    opt.increase_steps(8)  # of 12 calls in all, 3 make an update: 4 calls were one and a third
    state = opt.progress["state"]
    assert (state["iteration"].item(), state["num_steps"].item()) == (1, 4)
    run(opt, range(4, 12))
    assert state["iteration"].item() == 3


def test_a_refused_loss_is_not_averaged():
    opt, other = (make("celo", parameters(), num_steps=4, max_steps=2) for _ in range(2))
    run(opt, [0])
    run(other, [0, 1])
    with pytest.raises(ValueError, match="finite"):
        opt.step(loss=float("inf"))
    run(opt, [1])
    assert_at(opt, dict(enumerate(p.detach() for p in other.param_groups[0]["params"])))


@pytest.mark.parametrize("value", [0, -3, 1e4, "10", 2.5])
def test_a_number_of_steps_is_whole_and_positive(value):
    for keywords in ({"num_steps": value}, {"max_steps": value}):
        with pytest.raises(ValueError, match=f"{next(iter(keywords))} = .*: expected a whole number >= 1"):
            make("celo", parameters(), **keywords)
    opt = make("celo", parameters())
    for change in (opt.increase_steps, opt.reset_steps):
        with pytest.raises(ValueError, match=r"num_steps = .*: expected a whole number >= 1"):
            change(value)
    assert opt.progress["num_steps"] == 50


def test_a_closure_is_not_called_after_the_last_step():
    opt, called = make("celo", [with_grad(torch.ones(2))], num_steps=1), []
    opt.step(lambda: 1.0)
    with pytest.raises(RuntimeError, match="step 2 of num_steps = 1"):
        opt.step(lambda: called.append(1))
    assert not called


def test_a_rule_with_a_horizon_keeps_its_clock_where_the_guard_rails_find_it():
    for name in RULES:
        opt = make(name, parameters())
        run(opt, range(1))
        if opt.lopt.needs_horizon:
            assert {"iteration", "num_steps"} <= opt.progress["state"].keys(), name
