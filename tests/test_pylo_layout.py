"""PyLO's layout, read and written: its modules' names, orders and omissions as its sources have them (June 2026).

The sizes and orders here are facts copied from pylo/models and pylo/optim by hand, and the networks are evaluated as
torch would: a permuted row, a transposed matrix or a swapped decay moves the result.
"""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch

import lopt
from lopt.checkpoint import CheckpointError
from lopt.interchange import pylo
from tests.naive_columns import NaiveColumns, axis_scaled, normalised

MLP_ORDER = ("g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "row", "col", "row_rsqrt", "col_rsqrt", "factored_m")
SPLIT_ORDER = (
    "g", "clipped_g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "g_rsqrt",
    "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip
MODULES = {
    "small_fc_lopt": {
        "": {
            "network.input.weight": (32, 39),
            "network.input.bias": (32,),
            "network.linear_0.weight": (32, 32),
            "network.linear_0.bias": (32,),
            "network.output.weight": (2, 32),
            "network.output.bias": (2,),
        }
    },
    "celo2": {
        "": {
            **{f"w0.{i}": (k, 8) for i, k in enumerate((1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3))},
            "b0": (8,),
            "dense_w.0": (8, 8),
            "dense_b.0": (8,),
            "dense_w.1": (8, 3),
            "dense_b.1": (3,),
        }
    },
    "velo": {
        "VeLO_RNN": {
            **{f"{layer}.weight": (64, 30) for layer in ("mix_layer1", "mix_layer2", "final_mix_layer")},
            **{f"{layer}.bias": (64,) for layer in ("mix_layer1", "mix_layer2", "final_mix_layer")},
            "lstm.linear.weight": (256, 128),
            "lstm.linear.bias": (256,),
            "rnn_to_controls.weight": (32, 64),
            "rnn_to_controls.bias": (32,),
            "step_size.weight": (1, 64),
            "step_size.bias": (1,),
            "lstm_init_state.0": (1, 64),
            "lstm_init_state.1": (1, 64),
        },
        "VeLO_MLP": {
            "input_weights_": (32, 4, 30),
            "input_bias_": (32, 4),
            "hidden_weights_.0": (32, 4, 4),
            "hidden_bias_.0": (32, 4),
            "output_weights_": (32, 3, 4),
            "output_bias_": (32, 3),
            "input_weights": (4, 30),
            "input_bias": (4,),
            "hidden_weights.0": (4, 4),
            "hidden_bias.0": (4,),
            "output_weights": (3, 4),
            "output_bias": (3,),
        },
    },
}
CONFIGS = {
    "small_fc_lopt": {"": {"input_size": 39, "hidden_size": 32, "hidden_layers": 1}},
    "celo2": {"": {"hidden_size": 8, "hidden_layers": 2, "output_size": 3, "activation": "relu"}},
    "velo": {
        "VeLO_RNN": {"input_size": 30, "lstm_hidden_size": 64, "param_inits": 32, "mix_layers": True},
        "VeLO_MLP": {"param_inits": 32, "input_size": 30, "hidden_size": 4, "hidden_layers": 1, "output_size": 3},
    },
}
RULES = {
    "small_fc_lopt": lambda: lopt.build("small_fc_lopt", hidden_size=32, step_mult=0.01),
    "celo2": lambda: lopt.build("celo2"),
    "velo": lambda: lopt.build("velo", lstm_size=64, bank_size=32, compat=True),
}


def made(rule):
    """A theta in which no two numbers are equal."""
    generator = torch.Generator().manual_seed(5)
    return {entry.name: 0.3 * torch.randn(entry.shape, generator=generator) for entry in rule.spec.entries}


def random_tensors(shapes, seed=0):
    generator = np.random.default_rng(seed)
    return {name: 0.3 * generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(directory, tensors, config=None):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    if config is not None:
        (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


def tensors_of(directory):
    return safetensors.numpy.load((directory / "model.safetensors").read_bytes())


def linear(tensors, layer, x):
    return x @ tensors[f"{layer}.weight"].T.astype(np.float64) + tensors[f"{layer}.bias"]


@pytest.mark.parametrize("name", MODULES)
def test_what_is_exported_has_the_tensors_and_sizes_of_pylos_modules(tmp_path, name):
    rule = RULES[name]()
    lopt.export_pylo(tmp_path, rule, made(rule))
    for module, shapes in MODULES[name].items():
        assert {key: value.shape for key, value in tensors_of(tmp_path / module).items()} == shapes
        config = json.loads((tmp_path / module / "config.json").read_text())
        assert config.items() >= CONFIGS[name][module].items()


@pytest.mark.parametrize("name", MODULES)
def test_an_exported_optimizer_is_read_back_exactly(tmp_path, name):
    rule = RULES[name]()
    theta = made(rule)
    lopt.export_pylo(tmp_path, rule, theta)
    again, loaded, provenance = lopt.read(tmp_path)
    assert (again.name, again.arguments) == (rule.name, rule.arguments)
    assert loaded.keys() == theta.keys()
    assert all(torch.equal(loaded[key], theta[key]) for key in theta)
    assert provenance["format"] == "PyLO"


def test_either_half_of_velo_finds_the_other(tmp_path):
    rule = RULES["velo"]()
    theta = made(rule)
    lopt.export_pylo(tmp_path, rule, theta)
    for source in (tmp_path / "VeLO_RNN", tmp_path / "VeLO_MLP", tmp_path / "VeLO_MLP/model.safetensors"):
        assert torch.equal(lopt.read(source)[1]["mlp.w0"], theta["mlp.w0"])
    (tmp_path / "VeLO_RNN").rename(tmp_path / "half")
    with pytest.raises(CheckpointError, match="'half' is one half of VeLO: expected a name that ends in RNN or MLP"):
        lopt.read(tmp_path / "half")
    with pytest.raises(CheckpointError, match="VeLO_RNN"):
        lopt.read(tmp_path / "VeLO_MLP")


def test_a_metamlp_computes_the_step_that_we_compute(tmp_path):
    tensors = random_tensors(MODULES["small_fc_lopt"][""])
    decays = {"momentum_decays": [0.0] * 3, "rms_decays": [0.0], "adafactor_decays": [0.0] * 3}
    rule, theta, _ = lopt.read(write(tmp_path / "x", tensors, decays | {"step_mult": 0.01}))
    generator = np.random.default_rng(2)
    p, g = generator.standard_normal((7, 5)), axis_scaled(generator, (7, 5))

    columns = NaiveColumns(p.shape).step(p, g)
    inputs = normalised(np.concatenate([columns[name] for name in MLP_ORDER], -1), (0, 1), 1e-5)
    x = np.concatenate([inputs, np.full((7, 5, 11), np.tanh(-1.0))], -1)
    for layer in ("network.input", "network.linear_0"):
        x = np.maximum(linear(tensors, layer, x), 0)
    direction, magnitude = np.moveaxis(linear(tensors, "network.output", x), -1, 0)
    expected = p - direction * np.exp(0.001 * magnitude) * 0.01

    params = {"w": torch.tensor(p, dtype=torch.float32)}
    state = rule.init_state(theta, params, 1)
    moved, _ = rule.update(theta, state, params, {"w": torch.from_numpy(g)}, torch.tensor(0.0))
    np.testing.assert_allclose(moved["w"].numpy() - p, expected - p, rtol=1e-4, atol=2e-7)


def test_a_celo2mlp_computes_the_directions_that_we_compute(tmp_path):
    tensors = random_tensors(MODULES["celo2"][""])
    rule, theta, _ = lopt.read(write(tmp_path, tensors), orthogonalize=False)
    generator = np.random.default_rng(2)
    p, g = generator.standard_normal((7, 5)), axis_scaled(generator, (7, 5))

    columns = NaiveColumns(p.shape, rms_decay=0.95, rsqrt_eps=1e-8, diag_eps=0.0).step(p, g)
    x = tensors["b0"] + sum(
        normalised(columns[c], (0, 1), 1e-9) @ tensors[f"w0.{i}"] for i, c in enumerate(SPLIT_ORDER)
    )
    x = np.maximum(x, 0) @ tensors["dense_w.0"] + tensors["dense_b.0"]
    direction = (np.maximum(x, 0) @ tensors["dense_w.1"] + tensors["dense_b.1"])[..., 0]
    expected = 0.001 * normalised(direction, (0, 1), 1e-9)

    params = {"w": torch.tensor(p, dtype=torch.float32)}
    state = rule.init_state(theta, params, 1)
    moved, _ = rule.update(theta, state, params, {"w": torch.from_numpy(g)}, torch.tensor(0.0))
    np.testing.assert_allclose(p - moved["w"].numpy(), expected, rtol=2e-4, atol=3e-7)


def test_velos_halves_are_the_originals_matrices_transposed(tmp_path):
    halves = {name: random_tensors(shapes, seed) for seed, (name, shapes) in enumerate(MODULES["velo"].items())}
    for name, tensors in halves.items():
        write(tmp_path / name, tensors)
    rnn, mlp = halves["VeLO_RNN"], halves["VeLO_MLP"]
    rule, theta, _ = lopt.read(tmp_path)
    assert rule.arguments == {"lstm_size": 64, "bank_size": 32, "compat": True}
    ours = {name: leaf.numpy() for name, leaf in theta.items()}
    # what pylo/models/VeLO_RNN.py does with each: layer 1 is computed and dropped, 2 goes through the maximum
    for entry, layer in (("dead.mix", "mix_layer1"), ("mix", "mix_layer2"), ("input", "final_mix_layer")):
        np.testing.assert_array_equal(ours[f"{entry}.w"], rnn[f"{layer}.weight"].T)
        np.testing.assert_array_equal(ours[f"{entry}.b"], rnn[f"{layer}.bias"])
    for entry, layer in (("lstm", "lstm.linear"), ("controls", "rnn_to_controls"), ("step_size", "step_size")):
        np.testing.assert_array_equal(ours[f"{entry}.w"], rnn[f"{layer}.weight"].T)
        np.testing.assert_array_equal(ours[f"{entry}.b"], rnn[f"{layer}.bias"])
    np.testing.assert_array_equal(ours["lstm.hidden"], rnn["lstm_init_state.0"][0])
    np.testing.assert_array_equal(ours["lstm.cell"], rnn["lstm_init_state.1"][0])
    for i, layer in enumerate(("input_{}_", "hidden_{}_.0", "output_{}_")):
        np.testing.assert_array_equal(ours[f"mlp.w{i}"], np.swapaxes(mlp[layer.format("weights")], 1, 2))
        np.testing.assert_array_equal(ours[f"mlp.b{i}"], mlp[layer.format("bias")])


def test_what_pylo_leaves_out_is_filled_in_as_its_optimizers_do(tmp_path):
    tensors = random_tensors(MODULES["small_fc_lopt"][""])
    rule, theta, _ = lopt.read(write(tmp_path / "mulo", tensors, {"hidden_size": 32}))
    assert rule.arguments == {"hidden_size": 32, "step_mult": 0.01}
    np.testing.assert_allclose(theta["momentum_decays"], [0.15216392, 0.14245212, 0.06812963])
    np.testing.assert_allclose(theta["rms_decays"], [0.01079706])
    np.testing.assert_allclose(theta["adafactor_decays"], [0.18621896, -0.10864615, -0.06185547])
    assert lopt.read(tmp_path / "mulo", architecture="mulo")[0].name == "mulo"
    assert lopt.read(tmp_path / "mulo", step_mult=0.001)[0].arguments["step_mult"] == 0.001
    # the very same tensors are ELO's where PyLO's key says so
    rule, theta, _ = lopt.read(write(tmp_path / "elo", tensors))
    assert rule.arguments == {"hidden_size": 32, "step_mult": 0.001}
    assert all(not theta[decay].any() for decay in pylo.DECAYS)


BAD = {
    "a missing tensor": ("small_fc_lopt", "", lambda t: t.pop("network.output.bias"), None, "missing .*output.bias"),
    "a third hidden layer": (
        "small_fc_lopt", "", lambda t: t.update({"network.linear_1.bias": np.zeros(32, np.float32)}), None,
        r"unknown \['network.linear_1.bias'\]",
    ),
    "another number of inputs": (
        "small_fc_lopt", "", lambda t: t.update({"network.input.weight": np.zeros((32, 38), np.float32)}), None,
        r"nn/w0.*\(38, 32\)",
    ),
    "doubles": ("celo2", "", lambda t: t.update(b0=np.zeros(8)), None, "'b0' is F64"),
    "NaN": ("celo2", "", lambda t: t["b0"].fill(np.nan), None, "not finite"),
    "another activation": ("celo2", "", lambda t: None, {"activation": "tanh"}, "activation = 'tanh'"),
    "no mixing": ("velo", "VeLO_RNN", lambda t: None, {"mix_layers": False}, "mix_layers = False"),
    "decays that are text": ("small_fc_lopt", "", lambda t: None, {"rms_decays": "0.9"}, "rms_decays = '0.9'"),
    "too few decays": ("small_fc_lopt", "", lambda t: None, {"momentum_decays": [0.1]}, "momentum_decays"),
    "a multiplier that is text": ("small_fc_lopt", "", lambda t: None, {"step_mult": "x"}, "step_mult = 'x'"),
    "an infinite decay": ("small_fc_lopt", "", lambda t: None, '{"rms_decays": [Infinity]}', "rms_decays.*not finite"),
    "a config that is no object": ("small_fc_lopt", "", lambda t: None, "[1]", "config.json holds list"),
    "a config that is no JSON": ("small_fc_lopt", "", lambda t: None, "{", "config.json: "),
    "a config that is very deep": ("small_fc_lopt", "", lambda t: None, "[" * 100_000, "config.json: "),
    "nothing of PyLO's": ("celo2", "", lambda t: t.pop("dense_w.0"), None, "none of PyLO's modules, nor to paceline"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_pylos_is_refused_with_the_reason(tmp_path, what):
    name, module, change, config, reason = BAD[what]
    for i, (directory, shapes) in enumerate(MODULES[name].items()):
        tensors = random_tensors(shapes, i)
        if directory == module:
            change(tensors)
        write(tmp_path / "x" / directory, tensors, config if directory == module else None)
    with pytest.raises(CheckpointError, match=reason):
        lopt.read(tmp_path / "x")


def test_what_pylo_does_not_have_cannot_be_exported(tmp_path):
    rule, theta, _ = lopt.read("celo")
    with pytest.raises(CheckpointError, match="architecture 'celo': expected one that PyLO has"):
        lopt.export_pylo(tmp_path, rule, theta)
    mended = lopt.build("velo", lstm_size=4, bank_size=2)
    with pytest.raises(CheckpointError, match="velo with compat=True"):
        lopt.export_pylo(tmp_path, mended, made(mended))
    with pytest.raises(lopt.ThetaError, match="another architecture"):
        lopt.export_pylo(tmp_path, lopt.SmallFcLopt(4), theta)
    assert not list(tmp_path.iterdir())
