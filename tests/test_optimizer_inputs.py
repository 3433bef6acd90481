"""What may go into a step, and what is refused with the reason while nothing has changed."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import lopt
from lopt import fp32
from tests.optimizers import make, rule_and_theta, with_grad

LOSSES = {
    "float": 2.0,
    "int": 2,
    "numpy": np.float32(2),
    "float64": torch.tensor(2.0, dtype=torch.float64),
    "bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
    "whole number": torch.tensor(2),
    "shape (1,)": torch.tensor([2.0]),
    "shape (1, 1)": torch.tensor([[2.0]]),
    "with a graph": torch.tensor(1.0, requires_grad=True) * 2,
}


def step(opt, loss, closure=False):
    return opt.step(lambda: loss) if closure else opt.step(loss=loss)


@pytest.mark.parametrize("closure", [False, True], ids=["loss", "closure"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_is_any_one_number(loss, closure):
    p, twin = with_grad(torch.ones(3)), with_grad(torch.ones(3))
    opt, other = make("celo", [p]), make("celo", [twin])
    for _ in range(3):
        assert step(opt, loss, closure) is loss
        other.step(loss=2.0)
    assert torch.equal(p, twin)
    assert not any(leaf.requires_grad for leaf in opt.progress["state"].values())


REFUSED = {
    "nan": (float("nan"), "loss = nan: expected a finite number; no parameter was changed"),
    "inf": (torch.tensor(torch.inf), "loss = inf: expected a finite number"),
    "beyond fp32": (1e300, "loss = inf: expected a finite number"),
    "several": (torch.ones(3), r"loss is torch.float32 of shape \(3,\): expected one real number"),
    "none of it": (torch.ones(0), r"loss is torch.float32 of shape \(0,\): expected one real number"),
    "complex": (torch.ones((), dtype=torch.complex64), r"loss is torch.complex64 of shape \(\): expected one real"),
    "None": (None, r"loss = None: celo needs the training loss: .* a closure that returns it"),
}


@pytest.mark.parametrize("closure", [False, True], ids=["loss", "closure"])
@pytest.mark.parametrize(("loss", "reason"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_and_training_goes_on(loss, reason, closure):
    p, twin = with_grad(torch.ones(3)), with_grad(torch.ones(3))
    opt, other = make("celo", [p]), make("celo", [twin])
    for _ in range(2):
        opt.step(loss=1.0)
        other.step(loss=1.0)
        with pytest.raises(ValueError, match=reason):
            step(opt, loss, closure)
    assert torch.equal(p, twin)
    assert opt.progress["steps"] == 2


def test_a_loss_in_place_of_the_closure_or_beside_it_is_refused():
    opt = make("celo", [with_grad(torch.ones(3))])
    with pytest.raises(TypeError, match=r"closure is a Tensor: expected a function, or step\(loss=loss\)"):
        opt.step(torch.tensor(1.0))
    with pytest.raises(ValueError, match="a closure and a loss"):
        opt.step(lambda: 1.0, loss=1.0)


def test_a_closure_may_differentiate():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = make("celo", [p])

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 5
    assert torch.equal(p.grad, torch.tensor([2.0, -4.0]))
    assert (p != torch.tensor([1.0, -2.0])).all()


def test_sparse_gradients_are_refused():
    p, table = with_grad(torch.ones(4, 2)), nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    opt = make("celo", [p, *table.parameters()])
    with pytest.raises(RuntimeError, match=r"celo does not take sparse gradients .torch\.sparse_coo.: use dense ones"):
        opt.step(loss=1.0)
    assert (p == 1).all()
    assert not opt.state


def test_complex_parameters_are_refused_also_in_mid_training():
    p, other = with_grad(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter 1 of the group is torch\.complex64: expected real ones"):
        make("celo", [p, other])
    opt = make("celo", [p])
    with pytest.raises(ValueError, match=r"parameter 0 of the group is torch\.complex64"):
        opt.add_param_group({"params": [other]})
    opt.step(loss=1.0)
    assert len(opt.param_groups) == 1


def test_parameters_on_several_devices_are_refused():
    p, other = with_grad(torch.ones(3)), with_grad(torch.ones(3, device="meta"))
    with pytest.raises(RuntimeError, match="parameters on cpu, meta: expected one device"):
        make("celo", [p, other]).step(loss=1.0)
    assert (p == 1).all()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["lr", "weight_decay"])
def test_rates_and_decays_are_finite_and_not_negative(field, value):
    p = with_grad(torch.ones(3))
    reason = re.escape(f"{field} = {value!r}: expected a number >= 0")
    for params, keywords in (([p], {field: value}), ([{"params": [p], field: value}], {})):
        with pytest.raises(ValueError, match=reason):
            make("celo", params, **keywords)
    opt = make("celo", [p])
    with pytest.raises(ValueError, match=reason):
        opt.add_param_group({"params": [with_grad(torch.ones(3))], field: value})
    assert len(opt.param_groups) == 1


def test_what_torch_refuses_is_refused_in_its_words():
    p = nn.Parameter(torch.ones(3))
    for params, kind, reason in (
        ([], ValueError, "empty parameter list"),
        (p, TypeError, "should be an iterable"),
        ([p * 2], ValueError, "non-leaf"),
        (["p"], TypeError, "only optimize Tensors"),
        ([("p", p), nn.Parameter(torch.ones(2))], ValueError, "with/without names"),
        ([{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
    ):
        with pytest.raises(kind, match=reason):
            make("celo", params)
    opt = make("celo", [p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})


def test_num_steps_is_asked_for_where_the_rule_has_a_schedule():
    for name in ("celo", "nadamw"):
        with pytest.raises(ValueError, match=f"num_steps = None: {name} has a learned schedule"):
            make(name, [with_grad(torch.ones(3))], num_steps=None)
    make("small_fc_lopt", [with_grad(torch.ones(3))], num_steps=None).step()


def test_a_nan_gradient_stays_in_its_tensor_and_an_infinite_one_is_clipped_where_the_rule_clips():
    for name, grad, spoiled in (("celo", torch.nan, [True, False]), ("celo", torch.inf, [False, False])):
        params = [with_grad(torch.linspace(-1, 1, 4)) for _ in range(2)]
        params[0].grad[1] = grad
        make(name, params).step(loss=1.0)
        assert [not p.isfinite().all() for p in params] == spoiled


def test_in_velo_a_nan_gradient_reaches_every_tensor():
    params = [with_grad(torch.linspace(-1, 1, 4)) for _ in range(2)]
    params[0].grad[1] = torch.nan
    opt = make("velo", params)
    for _ in range(2):
        opt.step(loss=1.0)
    assert not any(p.isfinite().all() for p in params)


class Spy(lopt.Adam):
    """Keeps what ``apply`` gets."""

    def apply(self, theta, state, params, grads, loss, lr, weight_decay):
        self.params, self.grads = params, grads
        return super().apply(theta, state, params, grads, loss, lr, weight_decay)


def test_contiguous_fp32_parameters_and_gradients_are_never_copied():
    p, other = with_grad(torch.ones(3, 2)), with_grad(torch.ones(3, 2).bfloat16())
    opt = lopt.Optimizer([p, other], Spy(), {})
    opt.step()
    assert opt.lopt.params["0"] is p
    assert opt.lopt.grads["0"] is p.grad
    assert opt.lopt.params["1"].dtype == opt.lopt.grads["1"].dtype == torch.float32
    assert torch.equal(opt.lopt.params["1"].bfloat16(), other)


def test_a_gradient_that_is_negated_by_a_flag_only_is_read_with_its_sign():
    x = torch._neg_view(torch.tensor([2.0, -4.0]))
    assert x.is_neg()
    assert x.is_contiguous()
    assert torch.equal(fp32.tensors([x])[0], torch.tensor([-2.0, 4.0]))
    assert not fp32.tensors([x])[0].is_neg()


def test_float64_parameters_keep_the_digits_that_fp32_does_not_have():
    start = torch.tensor([1.0, 2.0], dtype=torch.float64) + 1e-12
    p, twin = with_grad(start.clone()), with_grad(start.float())
    make("adam", [p]).step()
    make("adam", [twin]).step()
    torch.testing.assert_close(p - start, (twin - start.float()).double(), rtol=0, atol=1e-15)
    kept = with_grad(start.clone())
    make("adam", [kept], lr=0.0).step()
    assert torch.equal(kept, start)


def test_another_default_device_does_not_reach_the_rule():
    results = []
    for device in ("cpu", "meta"):
        p = with_grad(torch.ones(3, 2))
        opt = make("velo", [p])
        torch.set_default_device(device)
        try:
            opt.step(loss=1.0)
        finally:
            torch.set_default_device(None)
        results.append(p.detach())
    assert torch.equal(*results)


def test_parameters_whose_memory_was_replaced_are_moved_where_they_are_now():
    p = with_grad(torch.ones(3, 2))
    opt = make("celo", [p])
    opt.step(loss=1.0)
    old = p.data
    kept = old.clone()
    p.data = torch.full((3, 2), 2.0)
    opt.step(loss=1.0)
    assert torch.equal(old, kept)
    assert (p != 2).all()


def test_state_follows_parameters_to_another_device():
    p = with_grad(torch.ones(3, 2))
    opt = make("small_fc_lopt", [p])
    opt.step()
    torch.utils.swap_tensors(p, with_grad(torch.ones(3, 2, device="meta")))  # what Module.to does
    opt.step()
    assert {leaf.device.type for leaf in (*opt.state[p].values(), *opt.progress["state"].values())} == {"meta"}


def test_a_parameter_that_no_longer_has_a_gradient_is_left_out_and_comes_back():
    p, q = with_grad(torch.ones(3, 2)), with_grad(torch.ones(4))
    opt = make("velo", [p, q])
    opt.step(loss=1.0)
    p.grad, grad = None, p.grad
    kept, state = p.detach().clone(), {kind: leaf.clone() for kind, leaf in opt.state[p].items()}
    opt.step(loss=1.0)
    assert torch.equal(p, kept)
    assert all(torch.equal(leaf, state[kind]) for kind, leaf in opt.state[p].items())
    p.grad = grad
    opt.step(loss=1.0)
    assert (p != kept).all()
    assert opt.progress["state"]["iteration"].item() == 3


def test_a_step_without_any_gradient_does_nothing():
    p = nn.Parameter(torch.ones(3))
    opt = make("celo", [p], num_steps=1)
    for _ in range(3):
        assert opt.step(loss=1.0) == 1.0
    assert opt.progress["steps"] == 0
    assert not opt.state


def test_meta_parameters_may_want_gradients():
    rule, theta = rule_and_theta("celo")
    theta = {name: leaf.requires_grad_() for name, leaf in theta.items()}
    p = with_grad(torch.ones(3, 2))
    opt = lopt.Optimizer([p], rule, theta, num_steps=5)
    opt.step(loss=1.0)
    opt.step(loss=1.0)
    assert p.is_leaf
    assert not any(leaf.requires_grad for leaf in opt.state[p].values())
