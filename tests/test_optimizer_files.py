"""An optimizer as a file: self-contained, reproducible, and refused with the reason if it is anything else."""

import pickle

import pytest
import safetensors.torch
import torch

import lopt
from tests.optimizers import RULES, problem, rule_and_theta, train


@pytest.fixture(params=RULES)
def saved(request, tmp_path):
    """Path, rule and theta."""
    rule, theta = rule_and_theta(request.param)
    path = tmp_path / "opt.safetensors"
    path.write_bytes(lopt.encode(rule, theta, {"run": "test"}))
    return path, rule, theta


def test_a_file_holds_everything_and_equal_content_gives_equal_bytes(saved):
    path, rule, theta = saved
    again, loaded, provenance = lopt.read(str(path))
    assert (again.name, again.arguments, provenance) == (rule.name, rule.arguments, {"run": "test"})
    assert all(torch.equal(theta[name], loaded[name]) for name in theta)
    assert lopt.encode(again, loaded, provenance) == path.read_bytes()


def test_a_file_trains_a_model_as_the_rule_it_was_made_of(saved):
    path, rule, theta = saved
    (model, loss_of), (twin, _) = problem(), problem()
    ours = train(model, loss_of, lopt.load(str(path))(model.parameters(), num_steps=9), 2)
    assert ours == train(twin, loss_of, lopt.Optimizer(twin.parameters(), rule, theta, num_steps=9), 2)


def test_files_that_are_no_optimizer_are_refused(tmp_path):
    rule, theta = rule_and_theta("celo")
    data = lopt.encode(rule, theta, {})
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


def test_weights_of_another_rule_are_refused_before_training():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    theta = lopt.MlpLopt(4).init_theta(torch.Generator().manual_seed(0))
    with pytest.raises(lopt.ThetaError, match=r"mlp\.w0"):
        lopt.Optimizer(parameters, lopt.MlpLopt(8), theta)
    with pytest.raises(lopt.ThetaError, match="did you mean 'learning_rate'"):
        lopt.Optimizer(parameters, lopt.Adam(), {"learning_rat": torch.tensor(0.1)})
    with pytest.raises(lopt.ThetaError, match="finite"):
        lopt.Optimizer(parameters, lopt.Adam(), {"learning_rate": float("nan")})


def test_hyper_parameters_of_hand_designed_rules_may_be_plain_numbers():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    lopt.Optimizer([p], lopt.Adam(), {"learning_rate": 0.1}).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
