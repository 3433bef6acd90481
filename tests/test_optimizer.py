"""What a practitioner does with a learned optimizer: every architecture works like any optimizer of ``torch.optim``."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lopt
from tests import optimizers
from tests.optimizers import NUM_STEPS, RULES, backward, equal, problem, rule_and_theta, train, with_grad


@pytest.fixture(params=RULES)
def name(request):
    return request.param


@pytest.fixture
def make(name):
    return lambda params, **keywords: optimizers.make(name, params, **keywords)


def test_step_equals_the_pure_rule(name, make):
    model, loss_of = problem()
    rule, theta = rule_and_theta(name)
    opt = make(model.parameters())
    assert isinstance(opt, torch.optim.Optimizer)
    params = {str(i): p.detach().clone() for i, p in enumerate(model.parameters())}
    state = rule.init_state(theta, params, NUM_STEPS)
    for _ in range(5):
        loss = backward(model, loss_of, opt)
        grads = {str(i): p.grad.clone() for i, p in enumerate(model.parameters())}
        params, state = rule.update(theta, state, params, grads, loss.detach())
        opt.step(loss=loss)
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(p.detach(), params[str(i)], rtol=1e-5, atol=1e-6)


def test_closure_and_loss_are_the_same(make):
    first, second = problem(), problem()
    one, two = make(first[0].parameters()), make(second[0].parameters())
    train(*first, one, 4)
    for _ in range(4):
        returned = two.step(lambda: backward(*second, two))
    assert returned.item() > 0
    equal(first[0], second[0])


def reload(model, opt, make, tmp_path):
    """What a training script does: save both, start again, load both."""
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "training.pt")
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    again, _ = problem(seed=1)
    again.load_state_dict(saved["model"])
    resumed = make(again.parameters(), num_steps=7)
    resumed.load_state_dict(saved["opt"])
    return again, resumed


COPIES = {
    "state_dict": reload,
    "pickle": lambda model, opt, *_: pickle.loads(pickle.dumps((model, opt))),
    "deepcopy": lambda model, opt, *_: copy.deepcopy((model, opt)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_training_resumes_exactly(tmp_path, make, copied):
    model, loss_of = problem()
    opt = make(model.parameters(), weight_decay=0.01)
    train(model, loss_of, opt, 3)
    other_model, other_opt = copied(model, opt, make, tmp_path)
    kept = [p.detach().clone() for p in other_model.parameters()]
    losses = train(model, loss_of, opt, 3)
    assert all(torch.equal(p, q) for p, q in zip(other_model.parameters(), kept, strict=True)), "no memory is shared"
    assert train(other_model, loss_of, other_opt, 3) == losses
    equal(model, other_model)


def test_the_learning_rate_multiplies_the_learned_step(make):
    moves = []
    for lr in (1.0, 0.5, 0.0):
        model, loss_of = problem()
        start = copy.deepcopy(model)
        train(model, loss_of, make(model.parameters(), lr=lr), 2 if lr == 0 else 1)
        moves.append(
            torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
        )
    torch.testing.assert_close(moves[1], moves[0] / 2, rtol=1e-2, atol=2e-7)
    assert moves[2].abs().max() == 0


def test_weight_decay_is_decoupled_from_the_gradient(make):
    moved = []
    for weight_decay in (0.0, 0.25):
        p = with_grad(torch.tensor([[2.0, -1.0], [0.5, 4.0]]))
        make([p], weight_decay=weight_decay, lr=0.5).step(loss=1.0)
        moved.append(p.detach())
    lost = 0.5 * 0.25 * torch.tensor([[2.0, -1.0], [0.5, 4.0]])
    torch.testing.assert_close(moved[0] - moved[1], lost, rtol=1e-5, atol=1e-6)


def odd_parameters():
    """Parameters of every kind that a model may have, by name."""
    draws = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=draws)  # noqa: E731
    params = {
        "no_grad": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "empty": nn.Parameter(torch.ones(0, 3)),
        "scalar": nn.Parameter(normal()),
        "vector": nn.Parameter(normal(5)),
        "five_dimensions": nn.Parameter(normal(2, 3, 2, 2, 2)),
        "transposed": nn.Parameter(normal(6, 4).t()),
        "channels_last": nn.Parameter(normal(4, 3, 3, 3).to(memory_format=torch.channels_last)),
        "slice": nn.Parameter(normal(8, 6)[::2, 1:4]),
        "bfloat16": nn.Parameter(normal(4, 4).bfloat16()),
        "float16": nn.Parameter(normal(4, 4).half()),
        "float64": nn.Parameter(normal(4, 4).double()),
    }
    for name, p in params.items():
        if name not in ("no_grad", "frozen"):
            p.grad = normal(*p.shape).to(p.dtype)
    params["vector"].grad = torch.ones(1).expand(5)
    params["five_dimensions"].grad = params["five_dimensions"].grad.transpose(0, 3).contiguous().transpose(0, 3)
    return params


def test_parameters_of_every_kind_move_as_contiguous_fp32_ones_do(make):
    odd, plain = odd_parameters(), {}
    for name, p in odd.items():
        plain[name] = nn.Parameter(p.detach().float().contiguous(), requires_grad=p.requires_grad)
        plain[name].grad = None if p.grad is None else p.grad.float().contiguous()
    strides = {name: p.stride() for name, p in odd.items()}
    opt, twin = make(odd.items()), make(plain.items())
    opt.step(loss=1.0)
    twin.step(loss=1.0)
    rounding = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    for name, p in odd.items():
        assert p.stride() == strides[name]
        torch.testing.assert_close(p.float(), plain[name].float(), rtol=rounding[p.dtype], atol=rounding[p.dtype])
        assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in opt.state.get(p, {}).values())
    for name in ("no_grad", "frozen", "empty"):
        assert (odd[name] == 1).all()
        assert odd[name] not in opt.state
    opt.step(loss=1.0)  # since a warm-up begins with a rate of zero
    for name in ("scalar", "vector", "five_dimensions", "transposed", "channels_last", "slice", "float64"):
        assert (odd[name] != odd_parameters()[name]).any()


def test_a_gradient_that_comes_late_starts_with_empty_accumulators(make):
    p, late = with_grad(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    opt = make([p, late])
    for _ in range(3):
        opt.step(loss=1.0)
    assert (late == 1).all()
    assert late not in opt.state
    p.grad, late.grad = None, torch.full((3, 2), 0.3)
    kept = p.detach().clone()
    fresh = make([with_grad(torch.ones(3, 2))])
    opt.step(loss=1.0)
    fresh.step(loss=1.0)
    assert torch.equal(p, kept)
    for kind, leaf in fresh.state[fresh.param_groups[0]["params"][0]].items():
        assert leaf.shape == opt.state[late][kind].shape
    clock = opt.progress["state"].get("iteration")
    assert clock is None or clock.item() == 4
    p.grad = torch.full((3, 2), 0.3)
    opt.step(loss=1.0)
    assert p.isfinite().all()
    assert late.isfinite().all()


def test_a_group_is_added_in_mid_training(make):
    model, loss_of = problem()
    head, rest = list(model[5].parameters()), list(model[0].parameters()) + list(model[3].parameters())
    opt = make(head)
    train(model, loss_of, opt, 2)
    rest_before = [p.detach().clone() for p in rest]
    opt.add_param_group({"params": rest, "lr": 0.0, "weight_decay": 0.1})
    train(model, loss_of, opt, 2)
    assert all(torch.equal(p, q) for p, q in zip(rest, rest_before, strict=True))
    opt.param_groups[1]["lr"] = 0.5
    losses = train(model, loss_of, opt, 4)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any((p != q).any() for p, q in zip(rest, rest_before, strict=True))


def test_training_goes_on_for_ever_or_stops_with_the_reason(make):
    p = with_grad(torch.ones(3, 2))
    opt = make([p], num_steps=3)
    for _ in range(3):
        opt.step(loss=1.0)
    kept = p.detach().clone()
    if opt.lopt.needs_horizon:
        with pytest.raises(RuntimeError, match=r"step 4 of num_steps = 3.*increase_steps.*reset_steps"):
            opt.step(loss=1.0)
        assert torch.equal(p, kept)
        opt.increase_steps(2)
    for _ in range(2):
        opt.step(loss=1.0)
    assert p.isfinite().all()


def test_a_rule_that_needs_a_loss_says_so_and_no_other_looks_at_it(make):
    p = with_grad(torch.ones(3, 2))
    opt = make([p])
    if opt.lopt.needs_loss:
        with pytest.raises(ValueError, match=r"needs the training loss"):
            opt.step()
        with pytest.raises(ValueError, match=r"loss = nan: expected a finite number"):
            opt.step(loss=float("nan"))
        assert (p == 1).all()
        assert opt.progress["steps"] == 0
    else:
        other = with_grad(torch.ones(3, 2))
        opt.step()
        make([other]).step(loss=float("nan"))
        assert torch.equal(p, other)


def test_steps_are_the_same_under_autocast_and_other_defaults(make):
    results = []
    for setting in ("plain", "autocast", "float64"):
        p = with_grad(torch.linspace(-1, 1, 12).reshape(3, 4))
        opt = make([p])
        torch.set_default_dtype(torch.float64 if setting == "float64" else torch.float32)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
                for _ in range(3):
                    opt.step(loss=torch.tensor(1.0))
            assert torch.get_default_dtype() == (torch.float64 if setting == "float64" else torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_kernels_do_not_hide_the_step_from_autograd(make):
    p = nn.Parameter(torch.ones(3, 2))
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    make([p]).step(loss=loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_named_parameters_reach_the_rule_by_their_names():
    seen = []

    class Spy(lopt.Adam):
        def update_particles(self, theta, state, params, grads, loss):
            seen.append(list(params))
            return super().update_particles(theta, state, params, grads, loss)

    model, loss_of = problem()
    named = lopt.Optimizer(model.named_parameters(), Spy(), {})
    train(model, loss_of, named, 1)
    assert seen.pop() == [name for name, _ in model.named_parameters()]
    assert named.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    twin, _ = problem(1)
    groups = [{"params": list(model.named_parameters())}, {"params": list(twin.named_parameters())}]
    both = lopt.Optimizer(groups, Spy(), {})
    for p in (*model.parameters(), *twin.parameters()):
        p.grad = torch.ones_like(p)
    both.step()
    assert len(set(seen.pop())) == 12, "names that two groups share are told apart"
    unnamed = lopt.Optimizer(model.parameters(), Spy(), {})
    unnamed.step()
    assert seen.pop() == [str(i) for i in range(6)]


def test_a_parameter_may_be_called_what_a_rule_calls_its_own_state():
    params = {
        name: with_grad(torch.ones(3, 2)) for name in ("means", "iteration", "loss/means", "?", "lopt", "m/means")
    }
    opt = optimizers.make("celo", params.items())
    opt.step(loss=1.0)
    opt.step(loss=1.0)
    assert all(torch.equal(p, params["means"]) for p in params.values())
    assert opt.progress["state"]["loss/means"].shape == (10,)
    assert {frozenset(own) for own in opt.state.values()} == {frozenset(("m", "v", "row", "col"))}
    again = optimizers.make("celo", params.items())
    again.load_state_dict(opt.state_dict())
    again.step(loss=1.0)


def test_the_preset_celo_trains_a_model_by_its_name_alone():
    model, loss_of = problem()
    losses = train(model, loss_of, lopt.load("celo")(model.parameters(), num_steps=100), 100)
    assert losses[-1] < losses[0] / 3
    assert lopt.read("celo")[2]["license"] == "Apache-2.0"
    with pytest.raises(lopt.CheckpointError, match="did you mean 'celo'"):
        lopt.load("cello")


def test_adam_as_a_particle_rule_equals_torch_adam():
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    train(model, loss_of, lopt.Optimizer(model.parameters(), lopt.Adam(), {"learning_rate": torch.tensor(0.01)}), 10)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01)
    for _ in range(10):
        backward(twin, loss_of, reference)
        reference.step()
    equal(model, twin, rtol=1e-5, atol=1e-6)
