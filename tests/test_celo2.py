"""Celo2 equals its original, and the formula written out in float64 where the original's layout is not torch's."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lopt
from lopt import chunked
from lopt.celo2 import COLUMNS, VECTOR_COLUMNS, newton_schulz
from tests.lopt_laws import LAWS, Oracle
from tests.naive_columns import NaiveColumns, axis_scaled, mlp, normalised

# the original routes the oracle by the regular expression /b$, and its convolution is (3, 3, in, out)
AS_ORACLE = {"layout": "jax", "adam_names": "*/b", "compat": True}
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (6, 4),
    "square": (5, 5),
    "wide": (3, 8),
    "three": (4, 3, 5),
    "conv": (6, 3, 2, 2),
    "jax_conv": (2, 2, 3, 6),
    "five": (4, 2, 3, 2, 2),
}


@pytest.fixture(scope="module")
def oracle():
    return Oracle("celo2")


def test_parameters_equal_the_original_after_each_of_20_steps(oracle):
    tolerance = 10 * json.loads(str(oracle.data["meta"]))["max_abs_jit_vs_nojit"]
    for t, params, _ in oracle.run(lopt.Celo2(**AS_ORACLE)):
        for name, expected in oracle.group("p/").items():
            error = np.abs(params[name].numpy() - expected[t]).max()
            assert error <= max(tolerance, 1e-6 * np.abs(expected[t]).max()), f"step {t}, {name}: error {error:.2e}"
    assert t == 19


def test_displacements_equal_the_original_to_more_digits_than_the_parameters(oracle):
    *_, (t, params, _) = oracle.run(lopt.Celo2(**AS_ORACLE))
    for name, start in oracle.group("p0/").items():
        moved, expected = params[name].numpy() - start, oracle.group("p/")[name][t] - start
        assert np.abs(moved - expected).max() <= 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize(("step", "prefix"), [(0, "state1/"), (19, "state20/")])
def test_accumulators_equal_the_original(oracle, step, prefix):
    kinds = {"mom_rolling|m": "m", "rms_rolling|rms": "v", "v_row": "row", "v_col": "col", "v_diag": "diag"}
    [state] = [state for t, _, state in oracle.run(lopt.Celo2(**AS_ORACLE)) if t == step]
    compared = set()
    for path, expected in oracle.group(prefix).items():
        kind = next((ours for theirs, ours in kinds.items() if f"{theirs}|" in path), None)
        if kind is None or expected.size == 0:
            continue
        name = "/".join(path.split("|")[-2:])
        ours = np.moveaxis(state[f"{kind}/{name}"].numpy(), 0, -1).reshape(expected.shape)
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max(), err_msg=path)
        compared.add(f"{kind}/{name}")
    assert compared == state.keys(), "nothing unused"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("arguments", [{}, {"layout": "jax"}, {"orthogonalize": False}, {"compat": True}], ids=str)
def test_it_keeps_the_laws_of_learned_optimizers(law, arguments):
    law(lopt.Celo2(**arguments))


def random_case(seed, orthogonalize, layout):
    """A rule, theta, parameters and 4 steps of axis-scaled gradients of all shapes."""
    generator = np.random.default_rng(seed)
    rule = lopt.Celo2(orthogonalize=orthogonalize, layout=layout)
    theta = rule.init_theta(torch.Generator().manual_seed(seed))
    theta = {k: v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for k, v in theta.items()}
    params = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    grads = [{name: axis_scaled(generator, shape) for name, shape in SHAPES.items()} for _ in range(4)]
    return rule, theta, params, grads


def as_tensors(arrays):
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def naive_steps(theta, p, grads, orthogonalize, layout):
    """Parameters of one tensor after each gradient, in float64; matrices one by one."""
    p = p.astype(np.float64)
    tensor = NaiveColumns(p.shape, rms_decay=0.95, rsqrt_eps=1e-8, diag_eps=0.0)
    adam_m = adam_v = 0.0
    for g in grads:
        g = g.astype(np.float64)
        if orthogonalize and p.ndim < 2:
            adam_m, adam_v = 0.9 * adam_m + 0.1 * g, 0.95 * adam_v + 0.05 * g**2
            p = p - 0.001 * 20 * adam_m / np.sqrt(adam_v + 1e-8)
        else:
            columns = tensor.step(p, np.clip(g, -1000, 1000))
            p = p - 0.001 * naive_direction(theta, columns, p.ndim, orthogonalize, layout).reshape(p.shape)
        yield p


def naive_direction(theta, columns, ndim, orthogonalize, layout):
    if ndim < 2:
        x = np.concatenate([columns[name] for name in VECTOR_COLUMNS], -1)
        vector = {**theta, "mlp.w0": theta["mlp.w0"][:15]}
        return normalised(mlp(vector, normalised(x, 0, 1e-9))[..., 0], 0, 1e-9)
    x = np.concatenate([columns[name] for name in COLUMNS], -1)
    shape = x.shape[:-1]
    x = x.reshape(1, shape[0], -1, 30) if layout == "torch" else x.reshape(-1, *shape[-2:], 30)
    matrices = []
    for matrix in x:
        d = mlp(theta, normalised(matrix, (0, 1), 1e-9))[..., 0]
        if orthogonalize:
            d = d / np.linalg.norm(d)
            for _ in range(5):
                gram = d @ d.T
                d = 3.4445 * d + (-4.7750 * gram + 2.0315 * gram @ gram) @ d
        matrices.append(normalised(d, (0, 1), 1e-9))
    return np.stack(matrices)


@pytest.mark.parametrize("layout", ["torch", "jax"])
@pytest.mark.parametrize("orthogonalize", [True, False], ids=["celo2", "celo2-base"])
def test_every_shape_follows_the_formula_under_axis_scaled_gradients(orthogonalize, layout):
    rule, theta, params, grads = random_case(3, orthogonalize, layout)
    expected = {
        name: list(naive_steps(theta, p, [g[name] for g in grads], orthogonalize, layout)) for name, p in params.items()
    }
    ours = as_tensors(params)
    state = rule.init_state(theta, ours, 1)
    for t, g in enumerate(grads):
        ours, state = rule.update(theta, state, ours, as_tensors(g), torch.tensor(1.0))
        for name in SHAPES:
            # a step is 0.001 (RMS), for Adam up to 0.02: this is a thousandth of it
            np.testing.assert_allclose(ours[name], expected[name][t], rtol=0, atol=2e-6, err_msg=f"step {t}, {name}")


@pytest.mark.parametrize("layout", ["torch", "jax"])
def test_a_tensor_taken_in_parts_moves_as_in_one(layout, monkeypatch):
    rule, theta, params, grads = random_case(0, True, layout)
    moved = []
    for size in (7, 1 << 16):
        monkeypatch.setattr(chunked, "CHUNK", size)
        ours = as_tensors(params)
        state = rule.init_state(theta, ours, 1)
        for g in grads:
            ours, state = rule.update(theta, state, ours, as_tensors(g), torch.tensor(1.0))
        moved.append(ours)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)


def test_a_convolution_of_one_pixel_is_the_linear_layer_it_computes():
    rule, theta, params, grads = random_case(0, True, "torch")
    flat, conv = ({"x": torch.as_tensor(params["matrix"]).reshape(shape)} for shape in ((6, 4), (6, 4, 1, 1)))
    states = [rule.init_state(theta, p, 1) for p in (flat, conv)]
    for g in grads:
        g = torch.as_tensor(g["matrix"])
        flat, states[0] = rule.update(theta, states[0], flat, {"x": g}, torch.tensor(1.0))
        conv, states[1] = rule.update(theta, states[1], conv, {"x": g.reshape(6, 4, 1, 1)}, torch.tensor(1.0))
    torch.testing.assert_close(flat["x"], conv["x"].reshape(6, 4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 5, 5), (3, 4, 9), (3, 9, 4)])
def test_newton_schulz_brings_all_singular_values_near_one_and_keeps_directions(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    after = u.mT @ newton_schulz(x) @ v.mT
    values = torch.diagonal(after, dim1=-2, dim2=-1)
    torch.testing.assert_close(after, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert (s.amax(-1) / s.amin(-1)).min() > 2


def test_embedding_tables_go_to_adam_by_name_and_all_of_celo2_base_goes_to_the_mlp():
    shapes = {"embed.weight": (7, 3), "norm.weight": (3,), "head.weight": (7, 3)}
    params = {name: torch.ones(shape) for name, shape in shapes.items()}

    def by_adam(**arguments):
        rule = lopt.Celo2(**arguments)
        state = rule.init_state(rule.init_theta(torch.Generator()), params, 1)
        return {name for name in shapes if len(state[f"m/{name}"]) == 1}

    assert by_adam() == {"embed.weight", "norm.weight"}
    assert by_adam(adam_names="*embed* head.*") == set(shapes)
    assert by_adam(adam_names="") == {"norm.weight"}
    assert by_adam(compat=True) == {"embed.weight"}
    assert by_adam(orthogonalize=False) == set()


def test_named_parameters_tell_the_optimizer_which_table_is_an_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 3)})
    rule = lopt.Celo2()
    opt = lopt.Optimizer(model.named_parameters(), rule, rule.init_theta(torch.Generator().manual_seed(0)))
    start = model["embed"].weight.detach().clone()
    model["head"](model["embed"](torch.arange(5))).square().sum().backward()
    opt.step()
    moved = model["embed"].weight.detach() - start
    assert (moved[5:] == 0).all(), "Adam leaves rows without gradient alone, a direction of RMS one does not"
    assert (moved[:5] != 0).all()


def test_it_trains_a_model_with_the_rate_of_meta_training_as_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    start = [p.detach().clone() for p in model.parameters()]
    rule = lopt.Celo2()
    opt = lopt.Optimizer(model.parameters(), rule, rule.init_theta(torch.Generator().manual_seed(0)))
    nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    opt.step()
    for p, q in zip(model.parameters(), start, strict=True):
        rms = (p - q).square().mean().sqrt().item()
        # not bias-corrected, Adam's first step is 0.1 / sqrt(0.05) of 20 x 0.001
        assert rms == pytest.approx(0.001 if p.ndim > 1 else 0.1 / 0.05**0.5 * 0.02, rel=1e-2)


def test_the_number_of_meta_parameters_is_the_papers_and_a_wrong_layout_is_refused():
    assert lopt.Celo2().spec.size == lopt.Celo2(orthogonalize=False).spec.size == 347
    rule = lopt.build("celo2", layout="jax", orthogonalize=False)
    assert lopt.build(rule.name, **rule.arguments).arguments == rule.arguments
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        lopt.Celo2(layout="pytorch")
