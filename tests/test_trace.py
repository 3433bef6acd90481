"""What is recorded of an optimizer is what it did, and it costs nothing when nobody asks."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lopt
from lopt import kernels, trace
from tests.optimizers import NUM_STEPS, RULES, backward, equal, make, problem, rule_and_theta, train, with_grad

PER_PARAMETER = ["small_fc_lopt", "mulo", "velo", "celo", "celo_phase1"]


def numpy(tensors):
    return [x.detach().double().numpy().copy() for x in tensors]


def measured(before, after, grad):
    """Of one tensor, in double precision, in the order of ``trace.MEASURED``."""
    step = after - before
    cosine = -np.sum(step * grad) / np.sqrt(np.sum(step**2) * np.sum(grad**2))
    return [np.abs(step).mean(), *(np.sqrt(np.mean(x**2)) for x in (step, before, grad)), cosine]


@pytest.mark.parametrize("name", RULES)
def test_steps_are_what_the_parameters_moved(name):
    model, loss_of = problem()
    opt = make(name, model.named_parameters(), lr=0.7, weight_decay=0.01)
    losses = []
    with lopt.record(opt, every=2) as recorded:
        expected = []
        for i in range(5):
            loss = backward(model, loss_of, opt)
            before, grads = numpy(model.parameters()), numpy(p.grad for p in model.parameters())
            opt.step(loss=loss)
            if i % 2 == 0:
                losses.append(loss.item())
                loss.detach().zero_()
                expected.append([*map(measured, before, numpy(model.parameters()), grads)])
    found = recorded.arrays()
    assert found["rule"] == opt.lopt.name
    assert found["step"].tolist() == [1, 3, 5]
    assert found["tensor"].tolist() == [name for name, _ in model.named_parameters()]
    assert found["dimensions"].tolist() == [4, 1, 2, 1, 2, 1]
    values = np.stack([found[kind] for kind in trace.MEASURED], axis=-1)
    # fp32 forgets what is 1e-7 of the parameter
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-7)
    assert ("loss" in found) == opt.lopt.needs_loss
    if opt.lopt.needs_loss:
        np.testing.assert_array_equal(found["loss"], np.float32(losses))


@pytest.mark.parametrize("name", RULES)
def test_recording_changes_no_bit_of_the_training(name):
    model, loss_of = problem()
    twin = copy.deepcopy(model)
    opt, plain = make(name, model.parameters()), make(name, twin.parameters())
    with lopt.record(opt, every=2, directions=True):
        losses = train(model, loss_of, opt, 4)
    assert losses == train(twin, loss_of, plain, 4)
    equal(model, twin)
    assert str(opt.state_dict()) == str(plain.state_dict())


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_the_schedule_is_the_one_that_the_rule_predicts(name):
    model, loss_of = problem()
    rule, theta = rule_and_theta(name)
    opt = make(name, model.parameters())
    with lopt.record(opt) as recorded:
        losses = train(model, loss_of, opt, 6)
    particle = {key: leaf.unsqueeze(0) for key, leaf in theta.items()}
    state, expected = rule.init_particles(particle, {}, torch.tensor([NUM_STEPS])), []
    for loss in losses:
        scheduled, factor = lopt.schedule.update(particle, state, torch.tensor([loss]))
        state = scheduled | {"iteration": state["iteration"] + 1}
        expected.append(factor.item())
    assert len(set(expected)) == 6
    np.testing.assert_allclose(recorded.arrays()["schedule"], expected, rtol=1e-6)


def test_velos_step_factor_is_each_tensors_own():
    rule, theta = rule_and_theta("velo")
    theta["step_size.b"] -= 0.1  # some of both signs
    model, loss_of = problem()
    opt = lopt.Optimizer(model.parameters(), rule, theta, num_steps=NUM_STEPS)
    backward(model, loss_of, opt)
    with lopt.record(opt) as recorded:
        opt.step(loss=2.0)
    params = {str(i): p.detach().unsqueeze(0) for i, p in enumerate(model.parameters())}
    twin = problem()[0]
    before = {str(i): p.detach().unsqueeze(0) for i, p in enumerate(twin.parameters())}
    particle = {key: leaf.unsqueeze(0) for key, leaf in theta.items()}
    state = rule.init_particles(particle, before, torch.tensor([NUM_STEPS]))
    network, _ = rule.network(particle, state, before, params, torch.tensor([2.0]))
    found = recorded.arrays()["step_factor"]
    assert found.shape == (1, 6)
    np.testing.assert_allclose(found, network.factor / 0.001, rtol=1e-5)


@pytest.mark.parametrize("name", PER_PARAMETER)
@pytest.mark.parametrize("output", ["direction", "magnitude"])
def test_direction_and_magnitude_are_what_the_mlp_says(name, output):
    """With the other output at 1, the mean of the one is the size of the step in units of the rule's factor."""
    rule, theta = rule_and_theta(name)
    last, bias = theta["mlp.w2"], theta["mlp.b2"]  # VeLO's have the bank in front; its controls are made constant
    if name == "velo":
        theta["controls.w"].zero_()
        theta["controls.b"].fill_(0.1)
    if output == "direction":
        last[..., 1] = 0
        last[..., 0] -= 0.1
    else:
        last[..., 0] = 0
        last[..., 1] *= 10 if name == "velo" else 1000
        bias[..., 0] = -0.1 if name == "velo" else -1.0
    model, loss_of = problem()
    opt = lopt.Optimizer(model.named_parameters(), rule, theta, num_steps=NUM_STEPS)
    with lopt.record(opt, directions=True) as recorded:
        train(model, loss_of, opt, 3)
    found = recorded.arrays()
    factor = np.full_like(found["step_rms"], 0.01 if name == "mulo" else 0.001)
    if rule.parameter_scaled:
        factor *= np.sqrt(found["parameter_rms"] ** 2 + 1e-9)
    if name == "celo":
        factor *= found["schedule"][:, None]
    if name == "velo":
        factor *= np.abs(found["step_factor"])
    np.testing.assert_allclose(found[output], found["step_mean_abs"] / factor, rtol=2e-3)
    assert np.ptp(found[output]) > 0.01 * found[output].mean()
    other = found["magnitude" if output == "direction" else "direction"]
    np.testing.assert_allclose(other, 1.0, rtol=1e-5)


def test_directions_are_of_whole_tensors_however_they_are_cut(monkeypatch):
    found = []
    for chunk in (1 << 16, 7):
        monkeypatch.setattr("lopt.chunked.CHUNK", chunk)
        model, loss_of = problem()
        opt = make("celo", model.parameters())
        with lopt.record(opt, directions=True) as recorded:
            train(model, loss_of, opt, 2)
        found.append(recorded.arrays())
    for output in trace.OUTPUTS:
        np.testing.assert_allclose(found[0][output], found[1][output], rtol=1e-5)


@pytest.mark.parametrize("serving", ["kernels", "reference"])
def test_what_is_recorded_does_not_depend_on_the_kernels(serving):
    model, loss_of = problem()
    opt = make("celo", model.parameters())
    with lopt.record(opt, directions=True) as recorded, kernels.reference():
        train(model, loss_of, opt, 2)
    fused, loss_of = problem()
    opt = make("celo", fused.parameters())
    with lopt.record(opt, directions=serving == "reference") as other:
        train(fused, loss_of, opt, 2)
    for kind, values in other.arrays().items():
        if kind not in ("rule", "tensor"):
            np.testing.assert_allclose(values, recorded.arrays()[kind], rtol=1e-4, atol=1e-6)


def test_recording_may_start_and_stop_at_any_time():
    model, loss_of = problem()
    opt = make("celo", model.parameters())
    train(model, loss_of, opt, 3)
    recorded = lopt.record(opt, every=3)
    train(model, loss_of, opt, 5)
    with pytest.raises(ValueError, match="being recorded already"):
        lopt.record(opt)
    recorded.stop()
    recorded.stop()
    train(model, loss_of, opt, 5)
    assert recorded.arrays()["step"].tolist() == [4, 7]
    with lopt.record(opt) as second:
        train(model, loss_of, opt, 2)
    assert second.arrays()["step"].tolist() == [14, 15]
    for every in (0, 1.5):
        with pytest.raises(ValueError, match=f"every = {every}: expected a whole number >= 1"):
            lopt.record(opt, every=every)


def test_steps_count_on_when_the_schedule_starts_again():
    model, loss_of = problem()
    opt = make("celo", model.parameters(), num_steps=5)
    with lopt.record(opt, every=2) as recorded:
        train(model, loss_of, opt, 5)
        opt.reset_steps(4)
        train(model, loss_of, opt, 4)
        opt.increase_steps(1)
        train(model, loss_of, opt, 1)
    assert recorded.arrays()["step"].tolist() == [1, 3, 5, 7, 9]


def test_accumulated_gradients_are_recorded_as_the_update_that_they_make():
    p = nn.Parameter(torch.ones(3, 2))
    opt = make("celo", [p], num_steps=12, max_steps=4)
    with lopt.record(opt, every=2) as recorded:
        for i in range(12):
            p.grad = torch.full_like(p, float(i))
            opt.step(loss=float(i))
    found = recorded.arrays()
    assert found["step"].tolist() == [3, 9]
    assert found["gradient_rms"].tolist() == [[1.0], [7.0]]
    assert found["loss"].tolist() == [1.0, 7.0]
    assert (found["step_rms"] > 0).all()


class Operations(TorchDispatchMode):
    """Names of all operations of torch within it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["celo", "velo", "celo_adam"])
def test_an_update_that_is_not_recorded_costs_nothing(name):
    model, loss_of = problem()
    opt = make(name, model.parameters())
    train(model, loss_of, opt, 1)

    def operations():
        loss = backward(model, loss_of, opt)
        with Operations() as found:
            opt.step(loss=loss)
        return found.seen

    never = operations()
    recorded = lopt.record(opt, every=2)
    during = operations()
    between = operations()
    recorded.stop()
    after = operations()
    assert never == between == after
    assert len(during) > len(never)
    assert len(recorded._updates) == 1
    assert trace.observed(opt, opt.lopt) is opt.lopt
    trace.note("schedule", None)  # nobody listens: what is said is not even looked at
    trace.note_outputs("tensor", None)


def test_a_record_keeps_nothing_of_the_model():
    model, loss_of = problem()
    opt = make("velo", model.parameters())
    recorded = lopt.record(opt, directions=True)
    train(model, loss_of, opt, 2)
    kept = sum(x.untyped_storage().nbytes() for u in recorded._updates for x in u.values.values())
    assert kept < 2000
    gone = [weakref.ref(opt), weakref.ref(model[0].weight)]
    del opt, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert len(recorded.arrays()["step"]) == 2


def test_parameters_may_come_late_and_go():
    first, late, other = (with_grad(torch.linspace(1, 2, 6).reshape(3, 2)) for _ in range(3))
    late.grad = None
    opt = make("velo", [("first", first), ("late", late)])
    with lopt.record(opt, directions=True) as recorded:
        opt.step(loss=1.0)
        late.grad = torch.ones_like(late)
        opt.step(loss=1.0)
        opt.add_param_group({"params": [("other", other)], "lr": 0.0})
        first.grad = None
        opt.step(loss=1.0)
        late.grad = other.grad = None
        opt.step(loss=1.0)
    found = recorded.arrays()
    assert found["tensor"].tolist() == ["first", "late", "other"]
    assert found["step"].tolist() == [1, 2, 3]
    took_part = [[True, False, False], [True, True, False], [False, True, True]]
    for kind in ("step_rms", "gradient_rms", "step_factor", "direction", "magnitude"):
        assert np.isfinite(found[kind]).tolist() == took_part
    assert found["step_rms"][2, 2] == 0
    assert np.isnan(found["cosine"][2, 2])
    lopt.plot(recorded)


COPIES = {"pickle": lambda opt: pickle.loads(pickle.dumps(opt)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_optimizer_is_not_recorded(copied):
    p = with_grad(torch.ones(3, 2))
    opt = make("celo", [p])
    with lopt.record(opt) as recorded:
        opt.step(loss=1.0)
        other = copied(opt)
        other.param_groups[0]["params"][0].grad = torch.ones(3, 2)
        other.step(loss=1.0)
        assert recorded.arrays()["step"].tolist() == [1]
        lopt.record(other).stop()
        opt.load_state_dict(other.state_dict())
        opt.step(loss=1.0)
    assert recorded.arrays()["step"].tolist() == [1, 3]
    again = pickle.loads(pickle.dumps(recorded))
    assert again.arrays()["step"].tolist() == [1, 3]


def test_a_step_that_fails_is_not_recorded(monkeypatch):
    p = with_grad(torch.ones(3, 2))
    opt = make("celo", [p])
    recorded = lopt.record(opt, every=10, directions=True)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    with pytest.raises(ValueError, match="loss = nan"):
        opt.step(loss=float("nan"))
    for where in ("update", "apply"):
        with monkeypatch.context() as patch:
            patch.setattr(opt.lopt, where, lambda *_: exec("raise MemoryError"))
            with pytest.raises(MemoryError):
                opt.step(loss=1.0)
        assert trace._notes.get() is None
        trace.note("schedule", None)
    assert recorded.arrays()["step"].tolist() == []
    opt.step(loss=1.0)
    assert recorded.arrays()["step"].tolist() == [1]


def test_a_step_within_a_closure_is_its_own_optimizers():
    outer, inner = with_grad(torch.ones(3, 2)), with_grad(torch.ones(2))
    opt, other = make("celo", [("outer", outer)]), make("velo", [("inner", inner)])

    def closure():
        other.step(loss=3.0)
        return 1.0

    with lopt.record(opt) as recorded, lopt.record(other) as others:
        opt.step(closure)
    assert recorded.arrays()["tensor"].tolist() == ["outer"]
    assert "step_factor" not in recorded.arrays()
    assert others.arrays()["tensor"].tolist() == ["inner"]
    assert others.arrays()["loss"].tolist() == [3.0]


def test_half_precision_parameters_show_the_step_before_it_is_rounded():
    p = with_grad(torch.full((3, 2), 100.0, dtype=torch.bfloat16))
    opt = make("sgd", [p])
    with lopt.record(opt) as recorded:
        opt.step()
    assert (p == 100).all()
    assert recorded.arrays()["step_rms"] > 0


def test_a_compiled_training_step_is_recorded():
    model, loss_of = problem()
    opt = make("celo", model.parameters())
    torch._dynamo.reset()
    step = torch.compile(opt.step, backend="aot_eager")
    with lopt.record(opt, directions=True) as recorded:
        for _ in range(3):
            step(loss=backward(model, loss_of, opt).detach())
    assert recorded.arrays()["step"].tolist() == [1, 2, 3]
    assert np.isfinite(recorded.arrays()["direction"]).all()


def test_a_compiled_rule_may_speak_too():
    rule, theta = rule_and_theta("celo_adam")
    params = {"p": torch.ones(3, 2)}
    arguments = (theta, rule.init_state(theta, params, 10), params, {"p": torch.ones(3, 2)}, torch.tensor(1.0))
    torch._dynamo.reset()
    compiled = torch.compile(rule.update, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments)[0], rule.update(*arguments)[0])


SPREAD = ("celo", "celo_adam", "nn_adam")
"""Rules for each way in which ``lopt.sharded`` applies one."""


def record_spread(name, place):
    """The record of two tensors that ``place`` may spread over processes."""
    draws = torch.Generator().manual_seed(0)
    normal = lambda *shape: place(torch.randn(shape, generator=draws))  # noqa: E731
    params = {"matrix": nn.Parameter(normal(5, 3)), "bias": nn.Parameter(normal(3))}
    opt = make(name, params.items())
    with lopt.record(opt, directions=True) as recorded:
        for _ in range(2):
            for p in params.values():
                p.grad = normal(*p.shape)
            opt.step(loss=1.0)
    return recorded


WORKER = """
import sys
import torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from tests import test_trace

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for name in test_trace.SPREAD:
    recorded = test_trace.record_spread(name, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
    recorded.save(f"{path}/{name}-{rank}.npz")
dist.barrier()
dist.destroy_process_group()
"""


def test_what_is_recorded_of_parameters_on_two_processes_is_that_of_one(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for name in SPREAD:
        one = record_spread(name, lambda x: x).arrays()
        for rank in range(2):
            with np.load(tmp_path / f"{name}-{rank}.npz") as other:
                assert other["tensor"].tolist() == ["matrix", "bias"]
                assert set(one) - set(other) <= set(trace.OUTPUTS)
                for kind in set(other) - {"rule", "tensor"}:
                    np.testing.assert_allclose(one[kind], other[kind], rtol=1e-4, atol=1e-7)
