"""The update as an operation: the rule's own update, lawful by torch's checks, and one call in compiled code."""

from contextlib import nullcontext

import pytest
import torch

from lopt import kernels
from lopt.kernels import op
from tests.test_kernels import RULES, needs_kernels, problem

SHAPES = [(6, 4), (4,), (), (3, 3, 2, 5)]


def first_step(name):
    """The rule and the arguments of ``op.update`` at its first step, after which accumulators are not zero."""
    rule = RULES[name]()
    theta, params, grads = problem(rule, SHAPES)
    state = rule.init_particles(theta, params, torch.tensor([50, 70]))
    params, state = rule.update_particles(theta, state, params, grads[0], torch.ones(2))
    network, _ = rule.network(theta, state, params, grads[1], torch.ones(2))
    return rule, network, state, params, grads[1]


def packed(rule, network, state, params, grads):
    accumulators = [state[f"{kind}/{name}"] for name, p in params.items() for kind in op._kinds(p)]
    parts = (params.values(), grads.values(), accumulators, network.weights, network.biases, network.decays)
    return (op.text(rule), *(list(part) for part in parts), network.factor)


def same(actual, expected):
    return all(
        got.keys() == wanted.keys() and all(torch.equal(got[key], leaf) for key, leaf in wanted.items())
        for got, wanted in zip(actual, expected, strict=True)
    )


@needs_kernels
@pytest.mark.parametrize("name", ["small_fc_4", "celo_phase2", "velo_s"])
def test_the_operation_is_the_kernel(name):
    rule, *step = first_step(name)
    assert same(op.update(rule, *step), kernels.update(rule, *step))


@pytest.mark.parametrize("name", ["small_fc_4", "celo_phase2", "velo_s"])
def test_where_no_kernel_serves_it_is_the_reference(name):
    rule, *step = first_step(name)
    with kernels.reference():
        assert same(op.update(rule, *step), rule._reference(*step))


@pytest.mark.parametrize("path", [pytest.param(nullcontext, marks=needs_kernels), kernels.reference])
def test_the_operation_keeps_torchs_rules(path):
    with path():
        done = torch.library.opcheck(op.per_parameter_update, packed(*first_step("celo_phase2")))
    assert set(done.values()) == {"SUCCESS"}


def test_it_is_one_call_in_compiled_code():
    rule, network, state, params, grads = first_step("small_fc_4")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(params, state, grads):
        return op.update(rule, network, state, params, {name: 2 * g for name, g in grads.items()})

    actual = step(params, state, grads)
    assert same(actual, op.update(rule, network, state, params, {name: 2 * g for name, g in grads.items()}))
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if "per_parameter" in str(node.target)]
    assert len(calls) == 1
