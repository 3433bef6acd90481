"""Several processes that train together take the step that one process with all of it would take."""

import multiprocessing
import time
from functools import cache

import pytest
import torch

from tests import distributed_worker as worker
from tests.distributed_worker import OTHERS, PER_PARAMETER, SHAPES

DEADLINE = 60
"""Seconds after which processes that wait for each other are ended and the test fails."""
_processes = multiprocessing.get_context("forkserver")
# what they all import, once; DTensors import the compiler when they are first used
_processes.set_forkserver_preload(["tests.distributed_worker", "torch._dynamo"])


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """What each of ``world`` processes returned of a scenario of the worker; every scenario runs once."""

    @cache
    def run(scenario, world=2):
        folder = tmp_path_factory.mktemp(scenario)
        deadline = time.monotonic() + DEADLINE
        group = [
            _processes.Process(target=worker.main, args=(scenario, rank, world, str(folder))) for rank in range(world)
        ]
        for process in group:
            process.start()
        for process in group:
            process.join(max(0, deadline - time.monotonic()))
        waiting = [rank for rank, process in enumerate(group) if process.is_alive()]
        for process in group:
            process.kill()
        said = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
        assert not waiting, f"after {DEADLINE} s ranks {waiting} of {world} were still at {scenario}\n{said}"
        assert all(process.exitcode == 0 for process in group), said
        return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run


@cache
def alone(name):
    """Parameters before and after the worker's steps by one process that has them whole, and its optimizer's state."""
    start, grads = worker.tensors()
    opt = worker.train(name, {key: p.clone() for key, p in start.items()}, grads)
    return start, worker.parameters(opt), dict(zip(SHAPES, opt.state.values(), strict=True))


@cache
def fitted(name, **keywords):
    """Weights before and after the worker's fit by one process with the whole batch."""
    model = worker.network()
    start = worker.weights(model)
    worker.fit(model, worker.optimizer(name, model.parameters(), **keywords), worker.batch())
    return start, worker.weights(model)


def errors(found, expected, start):
    """Largest error of every tensor, relative to how far it moved, beyond what fp32 resolves of it."""
    assert found.keys() == expected.keys()
    out = {}
    for key, p in expected.items():
        resolution = 4 * torch.finfo(torch.float32).eps * max(p.abs().max(), start[key].abs().max())
        error = (found[key] - p).abs().max()
        out[key] = ((error - resolution).clamp_min(0) / (p - start[key]).abs().max()).item()
    return out


def assert_equal_on_all(results):
    """Bit by bit."""
    first, *others = results
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


# ---- DDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["celo", "velo"])
def test_ddp_replicas_stay_bit_identical_and_equal_one_process_with_the_whole_batch(launch, name):
    _, results = launch("replicated")
    first, second = (dict(result[name]) for result in results)
    losses = [result.pop("losses") for result in (first, second)]
    assert (losses[0] != losses[1]).all(), "step returns the process's own loss"
    assert_equal_on_all([first, second])
    start, whole = fitted(name)
    worst = max(errors(first, whole, start).values())
    assert worst <= max(1e-6, 10 * rounding(name))


def rounding(name):
    """What summing over one half of the batch after the other, and a last digit of the loss, do to one process.

    Rules magnify it in their first steps.
    """
    model = worker.network()
    start, whole = fitted(name)
    halves = list(zip(*(part.chunk(2) for part in worker.batch()), strict=True))
    opt = worker.optimizer(name, model.parameters())
    for _ in range(8):
        opt.zero_grad()
        losses = [(model(x) - y).square().mean() / 2 for x, y in halves]
        for loss in losses:
            loss.backward()
        opt.step(loss=sum(losses) * (1 + torch.finfo(torch.float32).eps))
    return max(errors(worker.weights(model), whole, start).values())


@pytest.mark.parametrize("case", ["velo/own", "velo/group"])
def test_who_shares_the_loss_can_be_chosen(launch, case):
    """With no group, or a group of one, replicas see different losses: and diverge, which is why it is the default."""
    _, (first, second) = launch("replicated")
    start, _ = fitted("velo")
    first, second = ({key: p for key, p in result[case].items() if key != "losses"} for result in (first, second))
    assert max(errors(first, second, start).values()) > 0.01
    _, (other, _) = launch("replicated")
    torch.testing.assert_close(first, {key: other["velo/own"][key] for key in first}, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_on_one_process_is_refused_on_all_and_training_goes_on(launch):
    _, results = launch("refused")
    for result in results:
        assert "loss = nan: expected a finite number" in result["message"]
        assert result["unchanged"]
    assert_equal_on_all([result["weights"] for result in results])


def test_replicas_agree_where_a_parameter_has_no_part_in_the_loss_of_one_process_or_of_any(launch):
    _, results = launch("unused")
    assert_equal_on_all(results)
    for branch, moves in enumerate((True, True, False)):
        start = worker.weights(worker.network(branch))
        moved = [not torch.equal(results[0][f"branches.{branch}.{key}"], p) for key, p in start.items()]
        assert moved == [moves] * len(moved)


# ---- FSDP2 and DTensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PER_PARAMETER, *OTHERS, "celo/max_steps"])
def test_fsdp2_equals_one_process_with_the_whole_model_and_batch(launch, name):
    _, results = launch("fully_sharded")
    assert_equal_on_all([result[name] for result in results])
    rule, _, averaged = name.partition("/")
    start, whole = fitted(rule, **({"max_steps": 50} if averaged else {}))
    worst = max(errors(results[0][name], whole, start).values())
    assert worst <= max(2e-6, 10 * rounding(rule) if rule == "velo" else 0)


@pytest.mark.parametrize("name", worker.TENSOR_PARALLEL)
def test_fsdp2_over_tensor_parallelism_equals_one_process(launch, name):
    _, results = launch("tensor_parallel", 4)
    assert_equal_on_all([result[name] for result in results])
    model = worker.perceptron()
    start = worker.weights(model)
    worker.fit(model, worker.optimizer(name, model.parameters()), worker.flat(worker.batch()))
    assert max(errors(results[0][name], worker.weights(model), start).values()) <= 5e-6


CUTS = [
    *(("sharded", 2, name) for name in PER_PARAMETER + OTHERS),
    *(("sharded", 3, name) for name in PER_PARAMETER + OTHERS),
    *(("sharded_in_two_dimensions", 4, name) for name in PER_PARAMETER),
    *(("sharded_in_chunks", 2, name) for name in PER_PARAMETER),
]


@pytest.mark.parametrize(("scenario", "world", "name"), CUTS)
def test_tensors_cut_along_any_axis_into_unequal_and_empty_parts_are_updated_as_whole_ones(
    launch, scenario, world, name
):
    _, results = launch(scenario, world)
    start, whole, state = alone(name)
    for shift in (0, 1):
        assert_equal_on_all([result[f"{name}/{shift}"] for result in results])
        found, found_state = results[0][f"{name}/{shift}"]
        assert max(errors(found, whole, start).values()) <= 5e-6
        for key, leaves in state.items():
            assert found_state[key].keys() == leaves.keys()
            for kind, leaf in leaves.items():
                scale = leaf.abs().max().item()
                torch.testing.assert_close(found_state[key][kind], leaf, rtol=2e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("name", PER_PARAMETER)
def test_statistics_of_the_parts_alone_would_be_clearly_wrong(name):
    """What the tests above would have to miss: every process applies the rule to its parts as if they were whole."""
    start, whole, _ = alone(name)
    _, grads = worker.tensors()
    for shift in (0, 1):
        found, cut = dict(whole), set()
        for i, key in enumerate(SHAPES):
            placement = worker.placements(1, SHAPES[key], i + shift)[0]
            if placement.is_replicate() or SHAPES[key][placement.dim] == 1:
                continue
            cut.add(key)
            parts = [
                worker.parameters(worker.train(name, {key: p.clone()}, [{key: g} for g in gs]))[key]
                for p, *gs in zip(*(x[key].chunk(2, placement.dim) for x in (start, *grads)), strict=True)
            ]
            found[key] = torch.cat(parts, placement.dim)
        wrong = errors(found, whole, start)
        assert len(cut) >= 6
        assert min(wrong[key] for key in cut) > 1e-3


@pytest.mark.parametrize("name", PER_PARAMETER + OTHERS)
def test_some_tensors_may_be_whole_and_all_may_be_half_precision(launch, name):
    _, results = launch("sharded_in_part")
    assert_equal_on_all([result[name] for result in results])
    start, whole, _ = alone(name)
    assert max(errors(results[0][name], whole, start).values()) <= 5e-6
    start, grads = worker.tensors()
    half = [{key: x.bfloat16() for key, x in tree.items()} for tree in (start, *grads)]
    expected = worker.parameters(worker.train(name, half[0], half[1:]))
    for key, p in expected.items():
        assert results[0][f"{name}/half"][key].dtype == torch.bfloat16
        torch.testing.assert_close(results[0][f"{name}/half"][key].float(), p.float(), rtol=2**-7, atol=1e-6)


def test_a_step_costs_the_same_few_collectives_whatever_the_number_of_tensors(launch):
    _, results = launch("costs")
    for result in results:
        averages = 1
        assert result["celo/1"] == result[f"celo/{len(SHAPES)}"] == averages + 2
        assert result["velo/1"] == result[f"velo/{len(SHAPES)}"] == averages + 2
        assert result["adamw/1"] == result[f"adamw/{len(SHAPES)}"] == 0


@pytest.mark.parametrize(("name", "momenta"), [("celo", 3), ("adamw", 1)])
def test_each_process_holds_the_state_of_its_parts_only(launch, name, momenta):
    _, results = launch("costs")
    sizes = {key: torch.Size(shape).numel() for key, shape in SHAPES.items()}
    replicated = sizes["scalar"]
    assert sum(result[f"{name}/m"] for result in results) == momenta * (sum(sizes.values()) + replicated)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["saved by torch", "saved in parts", *worker.STATE_OPTIONS])
@pytest.mark.parametrize("name", worker.CHECKPOINTED)
def test_fsdp2_training_resumes_exactly(launch, name, case):
    _, results = launch("checkpoint")
    for result in results:
        torch.testing.assert_close(result[f"{name}/{case}"], result[f"{name}/uninterrupted"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("name", worker.CHECKPOINTED)
def test_a_checkpoint_of_two_processes_is_resumed_by_one(launch, name):
    folder, results = launch("checkpoint")
    expected = results[0][f"{name}/uninterrupted"]
    model = worker.network(seed=1)
    opt = worker.optimizer(name, model.parameters())
    worker.load_parts(model, opt, folder / name, no_dist=True)
    start = worker.weights(model)
    worker.fit(model, opt, worker.batch(), steps=2)
    worst = max(errors(worker.weights(model), expected, start).values())
    assert worst <= max(2e-6, 10 * rounding(name) if name == "velo" else 0)
