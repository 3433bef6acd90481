"""The eleven activation functions: their formulas, and another one for every particle."""

import math

import numpy as np
import pytest
import torch

from tasks.families.activations import ACTIVATIONS, KINDS, _each, _selected, activate, draw_activation
from tasks.keys import generator

SELU = (1.0507009873554805, 1.6732632423543772)
FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "selu": lambda x: SELU[0] * (x if x > 0 else SELU[1] * (math.exp(x) - 1)),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "cos": math.cos,
    "sin": math.sin,
}
POINTS = [-7.3, -1.1, -0.2, 0.4, 1.9, 6.5]
ALL = torch.arange(len(KINDS))


def randn(*shape):
    return 3 * torch.randn(shape, generator=generator("activations"), dtype=torch.float64)


def dynamic(x, index):
    return activate("dynamic", x, {"activation": index})


def test_there_are_the_papers_eleven():
    assert set(KINDS) == set(FORMULAS)
    assert ("dynamic", *KINDS) == ACTIVATIONS


@pytest.mark.parametrize("name", KINDS)
def test_values_are_the_formulas(name):
    expected = torch.tensor([FORMULAS[name](x) for x in POINTS], dtype=torch.float64)
    x = torch.tensor(POINTS, dtype=torch.float64)
    torch.testing.assert_close(activate(name, x, {}), expected)
    torch.testing.assert_close(dynamic(x, torch.tensor(KINDS.index(name))), expected)


@pytest.mark.parametrize("name", KINDS)
def test_both_derivatives_are_those_of_the_function(name):
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(KINDS.index(name))
    assert torch.autograd.gradcheck(lambda x: dynamic(x, index), x)
    assert torch.autograd.gradgradcheck(lambda x: dynamic(x, index), x)
    for point in (0.0, 6.0):  # where some have a kink: as torch's own
        kink = torch.tensor(point, dtype=torch.float64)
        plain = torch.func.grad(lambda x: activate(name, x, {}))
        torch.testing.assert_close(torch.func.grad(lambda x: dynamic(x, index))(kink), plain(kink))


def each_alone(x, index, order):
    """The loop over particles with static activations: values, gradients or second derivatives of a scalar."""

    def scalar(x, name):
        return (activate(name, x, {}) ** 2).sum()

    def squared_gradient(x, name):
        return (torch.func.grad(scalar)(x, name) ** 2).sum()

    function = (scalar, torch.func.grad(scalar), torch.func.grad(squared_gradient))[order]
    return torch.stack([function(row, KINDS[kind]) for row, kind in zip(x, index.tolist(), strict=True)])


def scalar(x, index):
    return (dynamic(x, index) ** 2).sum()


def squared_gradient(x, index):
    return (torch.func.grad(scalar)(x, index) ** 2).sum()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_particle_has_its_own_under_vmap(order):
    x, index = randn(22, 4, 3), torch.cat([ALL.flip(0), ALL])
    function = (scalar, torch.func.grad(scalar), torch.func.grad(squared_gradient))[order]
    torch.testing.assert_close(torch.func.vmap(function)(x, index), each_alone(x, index, order))


@pytest.mark.parametrize("batched", [True, False])
def test_autograd_through_vmap_and_through_particles_in_front(batched):
    x, index = randn(11, 4, 3).requires_grad_(), ALL.flip(0)
    values = torch.func.vmap(scalar)(x, index) if batched else (dynamic(x, index) ** 2).sum((1, 2))
    torch.testing.assert_close(values, each_alone(x, index, 0))
    (grads,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    torch.testing.assert_close(grads, each_alone(x, index, 1))
    (second,) = torch.autograd.grad((grads**2).sum(), x)
    torch.testing.assert_close(second, each_alone(x, index, 2))


def test_one_index_serves_a_batch_and_one_input_many_indices():
    x = randn(11, 4)
    for kind in ALL:
        together = torch.func.vmap(dynamic, in_dims=(1, None), out_dims=1)(x, kind)
        torch.testing.assert_close(together, activate(KINDS[kind], x, {}))
    several = torch.func.vmap(dynamic, in_dims=(None, 0))(x, ALL)
    torch.testing.assert_close(several, torch.stack([activate(name, x, {}) for name in KINDS]))


def test_vmap_may_be_nested():
    x, index = randn(2, 11, 5, 3), torch.stack([ALL, ALL.flip(0)])
    inner = torch.func.vmap(torch.func.grad(scalar))
    together = torch.func.vmap(inner)(x, index)
    torch.testing.assert_close(together, torch.stack([each_alone(x[i], index[i], 1) for i in range(2)]))
    torch.testing.assert_close(torch.func.vmap(inner, in_dims=1)(x.movedim(0, 1), index.T), together)
    # The outer level batches the data alone: index is (11,) inside it.
    data = torch.func.vmap(torch.func.vmap(dynamic), in_dims=(0, None))(x, ALL)
    torch.testing.assert_close(data[1], dynamic(x[1], ALL))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_selecting_among_all_as_on_a_gpu_is_the_same(order):
    x, index = randn(22, 4, 3), torch.cat([ALL, ALL.flip(0)])
    arguments = (x, index, x.flip(0), order)
    torch.testing.assert_close(_selected(*arguments), _each(*arguments))


def test_it_compiles():
    x, index = randn(11, 4, 3).requires_grad_(), ALL.flip(0)
    torch._dynamo.reset()
    values = torch.compile(dynamic, backend="eager", fullgraph=True)(x, index)
    torch.testing.assert_close(values, dynamic(x, index))
    (grads,) = torch.autograd.grad((values**2).sum(), x)
    torch.testing.assert_close(grads, each_alone(x.detach(), index, 1))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_a_broken_particle_leaves_the_others_alone(poison):
    x = randn(11, 6).float()
    whole = torch.func.vmap(torch.func.grad_and_value(scalar))(x, ALL)
    for broken in range(11):
        rows = [i for i in range(11) if i != broken]
        out = torch.func.vmap(torch.func.grad_and_value(scalar))(x.index_fill(0, torch.tensor(broken), poison), ALL)
        assert all(torch.equal(ours[rows], theirs[rows]) for ours, theirs in zip(out, whole, strict=True))


@pytest.mark.parametrize("x", [-1e12, -1e6, -90.0, 90.0, 1e6, 1e12])
def test_derivatives_are_finite_far_out(x):
    grads = torch.func.vmap(torch.func.grad(dynamic))(torch.full((11,), x), ALL)
    limits = {"selu": SELU[0], "silu": 1, "swish": 1, "gelu": 1, "relu": 1} if x > 0 else {"leaky_relu": 0.01}
    assert grads.isfinite().all()
    for name, limit in limits.items():
        assert grads[KINDS.index(name)].item() == pytest.approx(limit), name


def test_lower_precision_is_kept():
    out = dynamic(randn(11, 6).bfloat16(), ALL)
    assert out.dtype == torch.bfloat16


def test_a_third_derivative_is_refused():
    def once(function):
        return lambda x: torch.func.grad(lambda x: function(x).sum())(x)

    third = once(once(once(lambda x: dynamic(x, torch.tensor(3)))))
    with pytest.raises(NotImplementedError, match="twice"):
        third(torch.ones(2))


def test_activations_are_drawn_uniformly_and_only_if_dynamic():
    index = draw_activation(generator(0), 11_000, "dynamic")["activation"]
    assert index.dtype == torch.int64
    assert np.abs(index.bincount().numpy() - 1000).max() < 150
    assert all(draw_activation(generator(0), 3, name) == {} for name in KINDS)


def test_a_dynamic_activation_without_a_draw_is_relu():
    x = randn(5)
    assert torch.equal(activate("dynamic", x, {}), torch.relu(x))
