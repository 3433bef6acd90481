"""What a practitioner does with a learned optimizer: it works like any other of ``torch.optim``."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import lopt

RULES = {
    "celo_phase1": lambda: lopt.Celo(1),
    "celo_phase2": lambda: lopt.Celo(2),
    "small_fc_lopt": lambda: lopt.SmallFcLopt(4),
}


def saved(tmp_path, make, name="opt.safetensors"):
    rule = make()
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    path = tmp_path / name
    path.write_bytes(lopt.encode(rule, theta, {"run": "test"}))
    return str(path), rule, theta


def problem(seed=0):
    """A small model and the loss of any model like it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10), nn.Tanh(), nn.Linear(10, 3)
    )
    x, y = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    return model, lambda model: nn.functional.cross_entropy(model(x), y)


def train(model, loss_of, opt, steps):
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    return losses


@pytest.fixture(params=RULES)
def make(request):
    return RULES[request.param]


def test_step_equals_the_pure_rule(tmp_path, make):
    path, rule, theta = saved(tmp_path, make)
    model, loss_of = problem()
    opt = lopt.load(path)(model.parameters(), num_steps=50)
    assert isinstance(opt, torch.optim.Optimizer)
    params = {str(i): p.detach().clone() for i, p in enumerate(model.parameters())}
    state = rule.init_state(theta, params, 50)
    for _ in range(5):
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        grads = {str(i): p.grad.clone() for i, p in enumerate(model.parameters())}
        params, state = rule.update(theta, state, params, grads, loss.detach())
        opt.step(loss=loss)
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(p.detach(), params[str(i)], rtol=1e-6, atol=1e-7)


def test_closure_and_loss_are_the_same(tmp_path, make):
    path, *_ = saved(tmp_path, make)
    first, second = problem(), problem()
    one, two = (lopt.load(path)(model.parameters(), num_steps=50) for model, _ in (first, second))
    train(*first, one, 4)

    def closure():
        two.zero_grad()
        loss = second[1](second[0])
        loss.backward()
        return loss

    for _ in range(4):
        returned = two.step(closure)
    assert returned.item() > 0
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def reload(model, opt, path, tmp_path):
    """What a training script does: save both, start again, load both."""
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "training.pt")
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    again, _ = problem()
    again.load_state_dict(saved["model"])
    resumed = lopt.load(path)(again.parameters(), num_steps=7)
    keys = sorted(saved["opt"])
    resumed.load_state_dict(saved["opt"])
    assert sorted(saved["opt"]) == keys, "the caller's dict is left alone"
    return again, resumed


COPIES = {
    "state_dict": reload,
    "pickle": lambda model, opt, *_: pickle.loads(pickle.dumps((model, opt))),
    "deepcopy": lambda model, opt, *_: copy.deepcopy((model, opt)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_training_resumes_exactly(tmp_path, make, copied):
    path, *_ = saved(tmp_path, make)
    model, loss_of = problem()
    opt = lopt.load(path)(model.parameters(), num_steps=50)
    train(model, loss_of, opt, 3)
    other_model, other_opt = copied(model, opt, path, tmp_path)
    assert train(other_model, loss_of, other_opt, 3) == train(model, loss_of, opt, 3)


def test_learning_rate_multiplies_the_learned_step(tmp_path, make):
    path, *_ = saved(tmp_path, make)
    moves = []
    for lr in (1.0, 0.5, 0.0):
        model, loss_of = problem()
        start = copy.deepcopy(model.state_dict())
        train(model, loss_of, lopt.load(path)(model.parameters(), num_steps=50, lr=lr), 1)
        moves.append(torch.cat([(p.detach() - start[n]).flatten() for n, p in model.named_parameters()]))
    torch.testing.assert_close(moves[1], moves[0] / 2, rtol=1e-2, atol=2e-7)
    assert moves[0].abs().max() > 0
    assert moves[2].abs().max() == 0


def test_lr_schedulers_and_param_groups_and_decoupled_weight_decay(tmp_path, make):
    path, *_ = saved(tmp_path, make)
    model, loss_of = problem()
    first, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    opt = lopt.load(path)([{"params": first, "lr": 0.0, "weight_decay": 0.5}, {"params": rest}], num_steps=50)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4)
    start = [p.detach().clone() for p in model.parameters()]
    train(model, loss_of, opt, 1)
    scheduler.step()
    for p, q in zip(first, start, strict=False):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)
    assert opt.param_groups[1]["lr"] == pytest.approx(0.853553, rel=1e-4)

    lone = nn.Parameter(torch.full((3, 2), 2.0))
    opt.add_param_group({"params": [lone], "weight_decay": 0.1, "lr": 1.0})
    lone.grad = torch.zeros(3, 2)
    without = lopt.load(path)([nn.Parameter(torch.full((3, 2), 2.0))], num_steps=50)
    twin = without.param_groups[0]["params"][0]
    twin.grad = torch.zeros(3, 2)
    opt.step(loss=1.0)
    without.step(loss=1.0)
    if make is not RULES["small_fc_lopt"]:  # whose step also depends on time
        torch.testing.assert_close(twin - lone, torch.full((3, 2), 0.2), rtol=0.05, atol=1e-4)


def test_parameters_without_gradient_frozen_empty_scalar_and_half(tmp_path, make):
    path, *_ = saved(tmp_path, make)
    params = {
        "no_grad": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "empty": nn.Parameter(torch.ones(0, 3)),
        "scalar": nn.Parameter(torch.tensor(1.0)),
        "half": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)),
        "strided": nn.Parameter(torch.ones(6, 4).t()),
        "five": nn.Parameter(torch.ones(2, 3, 2, 2, 2)),
    }
    opt = lopt.load(path)(params.values(), num_steps=10)
    for name, p in params.items():
        if name not in ("no_grad", "frozen"):
            p.grad = torch.full_like(p, 0.3)
    for _ in range(3):
        opt.step(loss=1.0)
    for name, p in params.items():
        assert p.isfinite().all()
        moved = name in ("scalar", "strided", "five")
        if moved:
            assert (p != 1).any(), name
        elif name != "half":
            assert (p == 1).all(), name
    assert params["half"].dtype == torch.bfloat16
    assert opt.state[params["half"]]["m"].dtype == torch.float32


def test_misuse_is_refused_with_the_reason(tmp_path):
    path, *_ = saved(tmp_path, RULES["celo_phase2"])
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="num_steps"):
        lopt.load(path)([p])
    with pytest.raises(ValueError, match="num_steps = 0"):
        lopt.load(path)([p], num_steps=0)
    opt = lopt.load(path)([p], num_steps=10)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="training loss"):
        opt.step()
    for loss in (float("nan"), float("inf"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="finite"):
            opt.step(loss=loss)
    assert (p == 1).all()
    with pytest.raises(ValueError, match="lopt"):
        opt.load_state_dict(torch.optim.Adam([p]).state_dict())
    table = nn.Embedding(4, 2, sparse=True)
    sparse = lopt.load(path)(table.parameters(), num_steps=10)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        sparse.step(loss=1.0)


def test_files_that_are_no_optimizer_are_refused(tmp_path):
    _, rule, theta = saved(tmp_path, RULES["celo_phase1"])
    data = (tmp_path / "opt.safetensors").read_bytes()
    cases = {
        "missing.safetensors": None,
        "empty.safetensors": b"",
        "cut.safetensors": data[: len(data) // 2],
        "pickle.safetensors": pickle.dumps({"a": 1}),
        "foreign.safetensors": safetensors.torch.save({"w": torch.ones(2)}),
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(lopt.CheckpointError, match=name.split(".")[0]):
            lopt.load(str(tmp_path / name))
    bad = dict(theta) | {"mlp.b0": torch.full((4,), float("nan"))}
    with pytest.raises(lopt.ThetaError, match=r"mlp\.b0"):
        lopt.encode(rule, bad, {})
    with pytest.raises(lopt.CheckpointError, match="did you mean 'celo'"):
        lopt.build("cello")


def test_the_preset_celo_trains_a_model_by_its_name_alone():
    model, loss_of = problem()
    losses = train(model, loss_of, lopt.load("celo")(model.parameters(), num_steps=100), 100)
    assert losses[-1] < losses[0] / 3
    assert lopt.read("celo")[2]["license"] == "MIT"
    with pytest.raises(lopt.CheckpointError, match="did you mean 'celo'"):
        lopt.load("cello")


def test_a_file_holds_everything_and_equal_content_gives_equal_bytes(tmp_path, make):
    path, rule, theta = saved(tmp_path, make)
    again, loaded, provenance = lopt.read(path)
    assert (again.name, again.arguments, provenance) == (rule.name, rule.arguments, {"run": "test"})
    assert all(torch.equal(theta[name], loaded[name]) for name in theta)
    assert lopt.encode(again, loaded, provenance) == lopt.encode(rule, theta, provenance)


def test_adam_as_a_particle_rule_equals_torch_adam():
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    train(model, loss_of, lopt.Optimizer(model.parameters(), lopt.Adam(), {"learning_rate": torch.tensor(0.01)}), 10)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01)
    for _ in range(10):
        reference.zero_grad()
        loss_of(twin).backward()
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
