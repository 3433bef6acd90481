"""What torch's own tools do with optimizers, they do with a learned one: schedulers, scalers, hooks, compilation."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.optimizers import backward, equal, make, problem, train, with_grad

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.5),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=1, gamma=0.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5), lr_scheduler.PolynomialLR(opt, total_iters=6)]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_lr_schedulers_give_the_rates_that_they_give_to_sgd(schedule, lr):
    params, twin = ([with_grad(torch.ones(4))] for _ in range(2))
    opt, sgd = make("sgd", params, lr=copy.deepcopy(lr)), torch.optim.SGD(twin, lr=copy.deepcopy(lr))
    ours, theirs = schedule(opt), schedule(sgd)
    rates = []
    for _ in range(6):
        rates.append(float(opt.param_groups[0]["lr"]))
        moved = [p.detach().clone() for p in (*params, *twin)]
        opt.step()
        sgd.step()
        torch.testing.assert_close(moved[0] - params[0], 0.01 * (moved[1] - twin[0]), rtol=1e-4, atol=2e-7)
        ours.step()
        theirs.step()
        assert float(opt.param_groups[0]["lr"]) == pytest.approx(float(sgd.param_groups[0]["lr"]))
    assert len(set(rates)) > 2
    assert isinstance(opt.param_groups[0]["lr"], torch.Tensor) == isinstance(lr, torch.Tensor)


def test_the_rate_is_reduced_on_a_plateau():
    opt = make("celo", [with_grad(torch.ones(4))])
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.25)
    for _ in range(3):
        opt.step(loss=1.0)
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] == 0.25**2


def test_every_group_has_its_own_rate_and_decay():
    still, decayed, moved = (with_grad(torch.full((3, 2), 2.0)) for _ in range(3))
    groups = [
        {"params": still, "lr": 0.0, "weight_decay": 9.0},
        {"params": [decayed], "weight_decay": 0.25},
        {"params": (p for p in [moved])},
    ]
    opt = make("adam", groups, lr=0.5)
    opt.step()
    assert (still == 2).all()
    torch.testing.assert_close(moved - decayed, torch.full((3, 2), 0.5 * 0.25 * 2))
    assert set(groups[0]) == {"params", "lr", "weight_decay"}, "the caller's dictionaries are left alone"
    assert [group["lr"] for group in opt.param_groups] == [0.0, 0.5, 0.5]


def test_a_step_that_the_grad_scaler_finds_infinite_is_skipped():
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    opt, plain = make("velo", model.parameters()), make("velo", twin.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        opt.zero_grad()
        loss = loss_of(model)
        scaler.scale(loss).backward()
        if step == 2:
            next(model.parameters()).grad[0] = torch.inf
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        kept = copy.deepcopy(model)
        scaler.step(opt, loss=loss)
        scaler.update()
        if step == 2:
            equal(model, kept)
            assert scaler.get_scale() == 512
        else:
            loss = backward(twin, loss_of, plain)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            plain.step(loss=loss)
    assert opt.progress["steps"] == 3
    equal(model, twin, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: loss)


def test_a_model_trains_under_autocast():
    model, loss_of = problem()
    opt = make("celo", model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    opt.step(loss=loss.bfloat16())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_zeroed(set_to_none):
    p = with_grad(torch.ones(3))
    opt = make("celo", [p])
    opt.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else (p.grad == 0).all()
    opt.step(loss=1.0)
    assert len(opt.state) == (0 if set_to_none else 1)


def test_gradients_may_be_accumulated_by_hand():
    whole, parts = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    one, many = make("celo", [whole]), make("celo", [parts])
    for _ in range(3):
        one.zero_grad()
        many.zero_grad()
        (whole**2).sum().backward()
        for part in parts.split(2):
            (part**2).sum().backward()
        one.step(loss=1.0)
        many.step(loss=1.0)
    assert torch.equal(whole, parts)


def test_hooks_around_a_step_are_called_and_may_give_the_loss():
    p = with_grad(torch.ones(3))
    opt, seen = make("celo", [p]), []
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_pre_hook(lambda _, args, keywords: (args, keywords | {"loss": 2.0})),
        opt.register_step_post_hook(lambda _, args, keywords: seen.append(keywords)),
        register_optimizer_step_post_hook(lambda *_: seen.append("every optimizer")),
    ]
    try:
        assert opt.step() == 2.0
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", {"loss": 2.0}, "every optimizer"]
    with pytest.raises(ValueError, match="needs the training loss"):
        opt.step()


def test_a_step_has_its_name_in_the_profiler():
    opt = make("celo", [with_grad(torch.ones(3))])
    with torch.profiler.profile() as profile:
        opt.step(loss=1.0)
    assert "Optimizer.step#Optimizer.step" in {event.key for event in profile.key_averages()}


def test_print_shows_the_rule_and_the_groups_but_no_state():
    opt = make("velo", [with_grad(torch.ones(3))], lr=0.5)
    opt.step(loss=1.0)
    assert str(opt) == "Optimizer (velo, 1 steps made\nParameter Group 0\n    lr: 0.5\n    weight_decay: 0.0\n)"


COMPILED = ["celo", "velo", "adamw"]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_equals_an_eager_one_and_is_compiled_once(name):
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    opt, eager = make(name, model.parameters()), make(name, twin.parameters())
    scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
    other = lr_scheduler.ExponentialLR(eager, 0.9)
    torch._dynamo.reset()
    step = torch.compile(opt.step, backend="aot_eager")
    for i in range(4):
        loss = backward(model, loss_of, opt)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            step(loss=loss.detach())
        eager.step(loss=backward(twin, loss_of, eager))
        scheduler.step()
        other.step()
    equal(model, twin)


def test_a_compiled_train_step_equals_an_eager_one_and_is_compiled_once():
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    opt, eager = make("celo", model.parameters()), make("celo", twin.parameters())

    def train_step():
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        opt.step(loss=loss)
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(train_step, backend="aot_eager")
    losses = []
    for i in range(4):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            losses.append(compiled().item())
    assert losses == pytest.approx(train(twin, loss_of, eager, 4), rel=1e-5)
    equal(model, twin, rtol=1e-5, atol=1e-6)


def test_importing_lopt_does_not_import_the_compiler():
    code = "import sys, lopt; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
