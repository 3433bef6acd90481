"""The fused kernels equal the reference in torch, on gradients whose axes have very different scales."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
from lopt import accumulators, chunked, kernels
from lopt.kernels import cpu

SHAPES = [
    (64, 32), (32, 64), (32,), (), (10, 10), (3, 3, 3, 8), (24, 20, 3, 3), (20, 3, 16, 16), (2, 5, 7, 3, 4), (1, 7),
    (7, 1), (3000,), (70, 1030), (4, 30, 40), (1, 1, 1), (130, 3),
]  # fmt: skip
RULES = {
    "small_fc_4": lambda: lopt.SmallFcLopt(4),
    "small_fc_6": lambda: lopt.SmallFcLopt(6),
    "small_fc_8": lambda: lopt.SmallFcLopt(8),
    "small_fc_32": lambda: lopt.SmallFcLopt(32),
    "celo_phase1": lambda: lopt.Celo(1),
    "celo_phase2": lambda: lopt.Celo(2),
    "velo_s": lambda: lopt.Velo(lstm_size=16, bank_size=4),
}
needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="installed without a compiler")


def axis_scaled(shape, generator, scale=1.0):
    """Gradients (2, *shape) of two particles whose rows, columns, ... differ by orders of magnitude."""
    g = torch.randn(2, *shape, generator=generator)
    for axis, size in enumerate(shape):
        factor = torch.exp(1.5 * torch.randn(size, generator=generator))
        g = g * factor.reshape(-1, *(1 for _ in shape[axis + 1 :]))
    return g * scale


def problem(rule, shapes, seed=0):
    """theta of two particles, their parameters and a sequence of gradients."""
    generator = torch.Generator().manual_seed(seed)
    thetas = [rule.init_theta(generator) for _ in range(2)]
    theta = {
        name: torch.stack([t[name] + 0.1 * torch.randn(t[name].shape, generator=generator) for t in thetas])
        for name in thetas[0]
    }
    theta |= {name: torch.zeros_like(leaf) for name, leaf in theta.items() if name.endswith("decays")}
    if rule.name == "velo":  # whose networks are a hundred times their bank: untrained, they would explode
        theta |= {name: 0.1 * leaf for name, leaf in theta.items() if name.startswith("mlp.")}
    params = {f"tensor/{i}": 0.1 * torch.randn(2, *shape, generator=generator) for i, shape in enumerate(shapes)}
    grads = [
        {f"tensor/{i}": axis_scaled(s, generator, 10.0 ** (i % 5 - 3)) for i, s in enumerate(shapes)} for _ in range(3)
    ]
    return theta, params, grads


def train(rule, theta, params, grads):
    state = rule.init_particles(theta, params, torch.tensor([50, 70]))
    for t, g in enumerate(grads):
        params, state = rule.update_particles(theta, state, params, g, torch.tensor([1.0, 2.0]) / (t + 1))
    return params, state


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernels), False])
def test_a_stepper_takes_the_steps_of_the_rule_and_leaves_alone_what_it_was_given(name, kernel):
    rule = RULES[name]()
    theta, params, grads = problem(rule, [(6, 4), (4,), (), (3, 3, 2, 5), (70, 10)])
    state = rule.init_particles(theta, params, torch.tensor([50, 70]))
    given = {key: leaf.clone() for key, leaf in (params | state).items()}
    with nullcontext() if kernel else kernels.reference():
        expected_params, expected_state = train(rule, theta, params, grads)
        stepper = rule.stepper(theta, state, params)
        for t, g in enumerate(grads):
            if kernel:  # which must find its way in any layout; the reference would round differently
                g = {key: leaf.mT.contiguous().mT if leaf.ndim == 3 else leaf for key, leaf in g.items()}
            stepper.step(g, torch.tensor([1.0, 2.0]) / (t + 1))
    for found, expected in ((stepper.params, expected_params), (stepper.state, expected_state)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], leaf) for key, leaf in expected.items())
    assert all(torch.equal((params | state)[key], leaf) for key, leaf in given.items())


def assert_same(found, expected, start, what=""):
    """Displacements agree to float32's rounding of the parameters and a little more."""
    for name, p in expected.items():
        moved = (p - start[name]).abs().max().item()
        rounding = 4 * float(np.spacing(np.float32(p.abs().max())))
        error = (found[name] - p).abs().max().item()
        assert error <= rounding + 1e-4 * moved, f"{what} {name} {tuple(p.shape)}: {error:.2e} of {moved:.2e}"
        assert moved > 0


@pytest.fixture(params=["avx512", "avx2", "portable"])
def build(request):
    best = cpu.build()
    try:
        cpu.use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.use(best)


@needs_kernels
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_kernels_equal_the_reference_for_every_shape(build, make):
    rule = make()
    theta, start, grads = problem(rule, SHAPES)
    assert kernels.serves(rule, start, [theta["mlp.w0"]])
    params, state = train(rule, theta, start, grads)
    with kernels.reference():
        expected, expected_state = train(rule, theta, start, grads)
    assert_same(params, expected, start, build)
    assert state.keys() == expected_state.keys()
    for key, leaf in expected_state.items():
        torch.testing.assert_close(state[key], leaf, rtol=1e-5, atol=2e-6 * leaf.abs().max().item(), msg=key)


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 40), max_size=5).filter(lambda s: np.prod(s) < 5_000), seed=st.integers(0, 99))
def test_kernels_equal_the_reference_for_any_shape(shape, seed):
    rule = lopt.Celo(1)
    theta, start, grads = problem(rule, [tuple(shape)], seed)
    params, _ = train(rule, theta, start, grads)
    with kernels.reference():
        expected, _ = train(rule, theta, start, grads)
    assert_same(params, expected, start)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_the_reference_in_chunks_equals_the_reference_in_one_piece(make, monkeypatch):
    rule = make()
    theta, start, grads = problem(rule, SHAPES)
    with kernels.reference():
        monkeypatch.setattr(chunked, "CHUNK", 1 << 40)
        expected, _ = train(rule, theta, start, grads)
        monkeypatch.setattr(chunked, "CHUNK", 1000)
        params, _ = train(rule, theta, start, grads)
    assert_same(params, expected, start)


@needs_kernels
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_the_number_of_threads_changes_no_bit(make):
    rule = make()
    theta, start, grads = problem(rule, [(300, 1100), (900, 40), (33,)])
    threads = torch.get_num_threads()
    results = []
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(train(rule, theta, start, grads)[0])
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_kernels), False], ids=["kernels", "reference"])
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_in_place_with_a_rate_and_a_decay_per_tensor_equals_the_pure_rule(make, fused):
    rule = make()
    theta, start, grads = problem(rule, [(40, 30), (30,), (8, 3, 3, 5)])
    theta, start, grads = ({n: x[0].contiguous() for n, x in tree.items()} for tree in (theta, start, grads[0]))
    state = rule.init_state(theta, start, 50)
    params = {name: p.clone() for name, p in start.items()}
    lr, decay = [1.0, 0.5, 2.0], [0.0, 0.1, 0.01]
    pure, pure_state = rule.update(theta, state, start, grads, torch.tensor(1.0))
    if fused:
        new_state = rule.apply(theta, state, params, grads, torch.tensor(1.0), lr, decay)
    else:
        with kernels.reference():
            new_state = rule.apply(theta, state, params, grads, torch.tensor(1.0), lr, decay)
    for (name, p), a, b in zip(start.items(), lr, decay, strict=True):
        expected = p - a * ((p - pure[name]) + b * p)
        torch.testing.assert_close(params[name], expected, rtol=1e-6, atol=1e-7)
    assert new_state.keys() == pure_state.keys()
    for key, leaf in pure_state.items():
        torch.testing.assert_close(new_state[key], leaf, rtol=1e-5, atol=1e-7, msg=key)


@needs_kernels
def test_accumulators_that_are_not_contiguous_are_refused_not_corrupted():
    rule = lopt.Celo(1)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    params = {"w": torch.ones(6, 4)}
    state = rule.init_state(theta, params, 10)
    state["m/w"] = torch.zeros(3, 4, 6).transpose(1, 2)
    with pytest.raises(ValueError, match="not contiguous"):
        rule.apply(theta, state, params, {"w": torch.ones(6, 4)}, torch.tensor(1.0), [1.0], [0.0])


@needs_kernels
def test_values_that_are_not_finite_stay_in_their_tensor():
    rule = lopt.SmallFcLopt(4)
    theta, start, grads = problem(rule, [(40, 30), (30,)])
    grads[0]["tensor/1"][0, 3] = float("nan")
    params, _ = train(rule, theta, start, grads[:1])
    assert params["tensor/1"][0].isnan().all()
    assert params["tensor/0"].isfinite().all()
    assert params["tensor/1"][1].isfinite().all()


def test_an_unknown_build_is_refused():
    with pytest.raises(ValueError, match="avx9000"):
        cpu.use("avx9000")


def test_without_a_compiler_everything_works(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert cpu.build() is None
    rule = lopt.Celo(1)
    theta, start, grads = problem(rule, [(40, 30)])
    params, _ = train(rule, theta, start, grads)
    assert (params["tensor/0"] != start["tensor/0"]).any()


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_an_update_can_be_differentiated_and_vmapped(make):
    rule = make()
    theta, start, grads = problem(rule, [(6, 5), (5,)])
    theta, start, grads = ({n: x[0].contiguous() for n, x in tree.items()} for tree in (theta, start, grads[0]))
    state = rule.init_state(theta, start, 50)

    def after(params):
        moved, _ = rule.update(theta, state, params, grads, torch.tensor(1.0))
        return sum(p.sum() for p in moved.values())

    tracked = {name: p.clone().requires_grad_() for name, p in start.items()}
    after(tracked).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tracked.values())
    many = {name: torch.stack([p, 2 * p]) for name, p in start.items()}
    found = torch.func.vmap(after)(many)
    expected = torch.stack([after(start), after({name: 2 * p for name, p in start.items()})])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_kernels), False], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("shape", "d1", "d0"), [((4, 4), 0, 1), ((6, 6, 3, 3), 0, 1), ((3, 5, 5), 1, 2), ((5, 5, 5), 1, 2)]
)
def test_of_equal_axes_the_last_is_averaged_into_the_row(shape, d1, d0, fused):
    # numpy's default sort breaks such ties as the processor likes; learned weights know one order only
    assert accumulators.factored_axes(shape) == (d1, d0)
    rule = lopt.Celo(1)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    g = axis_scaled(shape, torch.Generator().manual_seed(1))[0]
    params = {"w": torch.ones(shape)}
    state = rule.init_state(theta, params, 10)
    with nullcontext() if fused else kernels.reference():
        _, state = rule.update(theta, state, params, {"w": g}, torch.tensor(1.0))
    square = g.clamp(-1000, 1000).square()
    for k, decay in enumerate((0.9, 0.99, 0.999)):
        torch.testing.assert_close(state["row/w"][k], (1 - decay) * square.mean(d0), rtol=1e-4, atol=0)
        torch.testing.assert_close(state["col/w"][k], (1 - decay) * square.mean(d1), rtol=1e-4, atol=0)
