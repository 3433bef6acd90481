"""What is saved of an optimizer and loaded again: exact, in the dtype it had, and only where it belongs."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.optimizers import backward, equal, make, problem, train, with_grad


def trained(name="celo", steps=3, named=False, **keywords):
    """Model, loss and an optimizer in mid-training."""
    model, loss_of = problem()
    opt = make(name, model.named_parameters() if named else model.parameters(), **keywords)
    train(model, loss_of, opt, steps)
    return model, loss_of, opt


def leaves(tree):
    """All tensors and numbers of nested dictionaries and lists, copied."""
    if isinstance(tree, dict):
        return {key: leaves(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [leaves(value) for value in tree]
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree


def test_the_callers_dictionary_is_left_alone_while_loading_and_training():
    model, loss_of, opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    before = leaves(saved)
    again = make("celo", model.parameters())
    again.load_state_dict(saved)
    train(model, loss_of, again, 2)
    assert leaves(saved) == before
    assert leaves(again.state_dict()) != before


def test_loading_restores_rates_decays_names_and_the_number_of_steps():
    model, _ = problem()
    names = [name for name, _ in model.named_parameters()]
    pairs = list(model.named_parameters())
    groups = lambda: [{"params": pairs[:2], "lr": 0.5}, {"params": pairs[2:], "weight_decay": 0.25}]  # noqa: E731
    opt = make("celo", groups(), num_steps=9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step(loss=1.0)
    again = make("celo", [{"params": pairs[:2]}, {"params": pairs[2:]}], num_steps=100)
    again.load_state_dict(opt.state_dict())
    shown = [{key: group[key] for key in ("lr", "weight_decay", "param_names")} for group in again.param_groups]
    assert shown == [
        {"lr": 0.5, "weight_decay": 0.0, "param_names": names[:2]},
        {"lr": 1.0, "weight_decay": 0.25, "param_names": names[2:]},
    ]
    assert (again.progress["num_steps"], again.progress["steps"]) == (9, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_accumulators_and_clocks_keep_their_dtype_whatever_the_parameters_is(dtype):
    p = with_grad(torch.linspace(-1, 1, 6).reshape(3, 2).to(dtype))
    opt = make("celo", [p])
    opt.step(loss=1.0)
    again = make("celo", [p])
    again.load_state_dict(opt.state_dict())
    assert leaves(again.state_dict()) == leaves(opt.state_dict())
    state = again.state_dict()
    assert {leaf.dtype for leaf in state["state"][0].values()} == {torch.float32}
    assert state["param_groups"][0]["lopt"]["state"]["iteration"].dtype == torch.int64


def test_state_moves_to_parameters_of_another_dtype():
    model, loss_of, opt = trained()
    wide = copy.deepcopy(model).double()
    again = make("celo", wide.parameters())
    again.load_state_dict(opt.state_dict())
    loss = loss_of(model)
    loss.backward()
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.double()
    again.step(loss=loss.double())
    opt.step(loss=loss)
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=1e-6, atol=1e-7)


def test_a_state_dict_stored_in_half_precision_is_widened_again():
    model, loss_of, opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    for own in saved["state"].values():
        own |= {kind: leaf.bfloat16() for kind, leaf in own.items()}
    opt.load_state_dict(saved)
    assert all(leaf.dtype == torch.float32 for own in opt.state.values() for leaf in own.values())
    train(model, loss_of, opt, 1)


def test_state_dict_hooks_are_honoured():
    _, _, opt = trained()
    seen = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda _, saved: saved | {"epoch": 3})
    saved = opt.state_dict()
    assert (seen, saved["epoch"]) == (["before saving"], 3)
    assert "lopt" in saved["param_groups"][0]

    again = make("celo", problem()[0].bfloat16().parameters())

    def without_epoch(_, given):
        given.pop("epoch")
        return {**given, "state": {**given["state"], 0: {k: leaf * 0 for k, leaf in given["state"][0].items()}}}

    def afterwards(opt):
        first = opt.param_groups[0]["params"][0]
        seen.append({leaf.dtype for leaf in opt.state[first].values()})
        opt.state[first]["m"] = opt.state[first]["m"] + 1

    again.register_load_state_dict_pre_hook(without_epoch)
    again.register_load_state_dict_post_hook(afterwards)
    again.load_state_dict(saved)
    assert saved["epoch"] == 3
    first = again.param_groups[0]["params"][0]
    assert seen[1:] == [{torch.float32}]
    assert (again.state[first]["m"] == 1).all()
    assert (again.state[first]["v"] == 0).all()


def test_parameters_without_state_are_loaded_as_such():
    late = nn.Parameter(torch.ones(3))
    opt = make("celo", [with_grad(torch.ones(3)), late])
    opt.step(loss=1.0)
    again = make("celo", opt.param_groups[0]["params"])
    again.load_state_dict(opt.state_dict())
    assert late not in again.state
    late.grad = torch.ones(3)
    again.step(loss=1.0)
    assert late in again.state


def test_an_optimizer_that_has_not_stepped_is_saved_and_loaded():
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    opt, again = make("velo", model.parameters(), num_steps=9), make("velo", twin.parameters(), num_steps=7)
    again.load_state_dict(opt.state_dict())
    assert train(model, loss_of, opt, 2) == train(twin, loss_of, again, 2)


def test_numbers_of_parameters_and_groups_are_compared_by_torch():
    _, _, opt = trained()
    model, _ = problem()
    for params, reason in (
        (list(model.parameters())[:3], "doesn't match the size"),
        ([{"params": [p]} for p in model.parameters()], "different number of parameter groups"),
    ):
        with pytest.raises(ValueError, match=reason):
            make("celo", params).load_state_dict(opt.state_dict())


def other_rule():
    return trained("small_fc_lopt")[2].state_dict()


def other_shapes():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(7, 10), nn.Linear(10, 3))
    opt = make("celo", model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step(loss=1.0)
    return opt.state_dict()


def without_a_leaf():
    state = copy.deepcopy(trained()[2].state_dict())
    del state["state"][2]["m"]
    return state


def of_torch():
    return torch.optim.Adam(problem()[0].parameters()).state_dict()


@pytest.mark.parametrize(
    ("make_state", "reason"),
    [
        (of_torch, "no entry 'lopt': not a learned optimizer's"),
        (other_rule, r"param_groups\[0\]\['lopt'\] has \['iteration'\]: expected .*num_steps"),
        (other_shapes, r"state of parameter '3.weight', 'm' has shape \(3, 10, 7\): expected \(3, 10, 144\)"),
        (without_a_leaf, r"state of parameter '3.weight' has \['col', 'row', 'v'\]: expected \['col', 'm'"),
    ],
)
def test_state_of_something_else_is_refused_before_anything_changes(make_state, reason):
    model, loss_of, opt = trained(named=True)
    before = leaves(opt.state_dict())
    with pytest.raises(ValueError, match=reason):
        opt.load_state_dict(make_state())
    assert leaves(opt.state_dict()) == before
    assert not opt._optimizer_load_state_dict_pre_hooks
    train(model, loss_of, opt, 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["celo", "velo", "nn_adam", "adamw"])
def test_torch_distributed_checkpoint_saves_and_restores_all_of_it(tmp_path, name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, loss_of, opt = trained(name, lr=0.5, num_steps=9)
    weights = copy.deepcopy(model.state_dict())
    dcp.save({"opt": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path, no_dist=True)
    losses = train(model, loss_of, opt, 3)

    fresh, _ = problem(seed=1)
    fresh.load_state_dict(weights)
    again = make(name, fresh.parameters(), num_steps=7)
    state = {"opt": get_optimizer_state_dict(fresh, again, options=options)}
    equal(fresh, model_with(weights))
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(fresh, again, state["opt"], options=options)
    assert again.param_groups[0]["lr"] == 0.5
    assert train(fresh, loss_of, again, 3) == losses


def model_with(weights):
    model, _ = problem()
    model.load_state_dict(weights)
    return model


def test_only_an_optimizer_without_state_and_rate_steps_without_a_loss():
    model, loss_of, opt = trained(lr=0.0)
    with pytest.raises(ValueError, match="needs the training loss"):
        opt.step()
    fresh = make("celo", model.parameters(), lr=0.0)
    backward(model, loss_of, fresh)
    assert fresh.step() is None
    assert fresh.progress["steps"] == 0
    assert fresh.progress["state"]["iteration"].item() == 0


def test_an_optimizer_made_of_anothers_groups_starts_anew():
    _, _, opt = trained(lr=0.5)
    other = make("celo", opt.param_groups)
    assert other.param_groups[0]["lr"] == 0.5
    assert (other.progress["steps"], opt.progress["steps"]) == (0, 3)
    assert not other.state


def test_state_that_a_user_clears_starts_again():
    model, loss_of, opt = trained()
    opt.state.clear()
    train(model, loss_of, opt, 1)
    assert len(opt.state) == 6
