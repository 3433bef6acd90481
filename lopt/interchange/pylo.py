"""PyLO's layout: config.json and model.safetensors, as ``PyTorchModelHubMixin`` writes and reads them.

Owns the step between PyLO's modules and the JAX originals' leaves, both ways, and what PyLO leaves out of its files:
decays and multipliers, which its optimizers have as defaults of their constructors. Never reads files on its own.

Facts of Belilovsky-Lab/pylo, June 2026 (pylo/models, pylo/optim):
- MetaMLP (AdafacLO, MuLO, ELO) and VeLO store matrices as torch does, (out, in); CELO2MLP stores (in, out).
- All networks take their inputs in the originals' order, which is also ours, so no row has to move.
- The two halves of VeLO are two directories (repositories), named ``..._RNN`` and ``..._MLP``.
- VeLOMLP also saves the network mixed last, which is no weight: written as zeros, ignored when read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from lopt.base import Argument, LearnedOptimizer, Theta
from lopt.checkpoint import CheckpointError
from lopt.interchange.jax import names_of

Array = npt.NDArray[np.float32]
Tensors = Mapping[str, Array]
Config = Mapping[str, Any]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RNN, MLP = "VeLO_RNN", "VeLO_MLP"
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""How many inputs each block of VeLO's and Celo2's first layer takes."""
DECAYS = ("momentum_decays", "rms_decays", "adafactor_decays")
ADAFAC_LO = {
    "momentum_decays": [0.15216392, 0.14245212, 0.06812963],
    "rms_decays": [0.01079706],
    "adafactor_decays": [0.18621896, -0.10864615, -0.06185547],
    "step_mult": 0.01,
}
"""What AdafacLO and MuLO fill in for btherien/mulo: learned offsets of the decays, and a step ten times JAX's."""
ELO = {"momentum_decays": [0.0] * 3, "rms_decays": [0.0], "adafactor_decays": [0.0] * 3, "step_mult": 0.001}
"""What ELO computes with: the initial decays, and a default rate where AdafacLO has step_mult."""


@dataclass(frozen=True)
class Original:
    """PyLO's tensors as the JAX original's leaves, with what else they need to become an optimizer."""

    leaves: dict[str, Array]
    architecture: str
    arguments: dict[str, Argument] = field(default_factory=dict)


def original(tensors: Tensors, config: Config, name: str, twin: Callable[[str], Tensors]) -> Original:
    """Recognise one of PyLO's modules by its tensors.

    ``name`` is what the directory or repository is called: VeLO's other half, which ``twin`` reads, is named after it,
    and ``elo`` is how PyLO tells ELO's weights from muLO's. Raises ``CheckpointError``.
    """
    if "network.input.weight" in tensors:
        return _from_meta_mlp(tensors, config, name)
    if "dense_w.0" in tensors:
        return Original(_from_celo2_mlp(tensors, config), "celo2")
    for own, other, there in (("input_weights_", RNN, MLP), ("mix_layer2.weight", MLP, RNN)):
        if own in tensors:
            both = {there: tensors, other: twin(_twin_name(name))}
            return Original(
                _from_velo_mlp(both[MLP]) | _from_velo_rnn(both[RNN], config if there == RNN else {}), "velo"
            )
    raise CheckpointError(f"tensors {sorted(tensors)[:4]}, ... belong to none of PyLO's modules, nor to paceline")


def export_pylo(directory: str | Path, lopt: LearnedOptimizer, theta: Theta) -> None:
    """Write ``theta`` into ``directory`` so that PyLO's ``from_pretrained(directory)`` reads it.

    small_fc_lopt becomes a MetaMLP and Celo2 a CELO2MLP; VeLO becomes two directories, VeLO_RNN and VeLO_MLP. The
    decays and the multiplier of small_fc_lopt go into config.json under the names of AdafacLO's arguments: PyLO does
    not look there and has to be given them, ``lopt.read`` does. Raises ``CheckpointError`` for what PyLO does not have.
    """
    lopt.spec.check(theta)
    leaves = _leaves(lopt, theta)
    modules: dict[str, tuple[dict[str, Array], dict[str, Any]]]
    if lopt.name in ("small_fc_lopt", "mulo"):
        modules = {"": _to_meta_mlp(lopt, leaves)}
    elif lopt.name == "celo2":
        modules = {"": _to_celo2_mlp(leaves)}
    elif lopt.name == "velo" and lopt.arguments["compat"]:
        modules = {RNN: _to_velo_rnn(leaves), MLP: _to_velo_mlp(leaves)}
    else:
        known = "small_fc_lopt, mulo, celo2, or velo with compat=True"
        raise CheckpointError(f"architecture {lopt.name!r}: expected one that PyLO has: {known}")
    for name, (tensors, config) in modules.items():
        path = Path(directory) / name
        path.mkdir(parents=True, exist_ok=True)
        contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        (path / WEIGHTS).write_bytes(safetensors.numpy.save(contiguous, {"format": "pt"}))
        (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _from_meta_mlp(tensors: Tensors, config: Config, name: str) -> Original:
    layers = {"nn/w0": "network.input", "nn/w1": "network.linear_0", "nn/w2": "network.output"}
    _expect(tensors, {f"{layer}.{kind}" for layer in layers.values() for kind in ("weight", "bias")})
    leaves = {}
    for leaf, layer in layers.items():
        leaves[leaf] = tensors[f"{layer}.weight"].T
        leaves[leaf.replace("w", "b")] = tensors[f"{layer}.bias"]
    filled = (ELO if name.lower() == "elo" else ADAFAC_LO) | {k: config[k] for k in ADAFAC_LO if k in config}
    for decay in DECAYS:
        leaves[decay] = _numbers(decay, filled[decay])
    step_mult = filled["step_mult"]
    if isinstance(step_mult, bool) or not isinstance(step_mult, int | float):
        raise CheckpointError(f"{CONFIG}: step_mult = {step_mult!r:.80}: expected a number")
    return Original(leaves, "small_fc_lopt", {"step_mult": float(step_mult)})


def _to_meta_mlp(lopt: LearnedOptimizer, leaves: Tensors) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors = {}
    for i, layer in enumerate(("input", "linear_0", "output")):
        tensors[f"network.{layer}.weight"] = leaves[f"nn/w{i}"].T
        tensors[f"network.{layer}.bias"] = leaves[f"nn/b{i}"]
    inputs, hidden = leaves["nn/w0"].shape
    config: dict[str, Any] = {"input_size": inputs, "hidden_size": hidden, "hidden_layers": 1}
    config |= {decay: leaves[decay].tolist() for decay in DECAYS} | {"step_mult": lopt.arguments["step_mult"]}
    return tensors, config


def _from_celo2_mlp(tensors: Tensors, config: Config) -> dict[str, Array]:
    if config.get("activation", "relu") != "relu":
        raise CheckpointError(f"{CONFIG}: activation = {config['activation']!r:.80}: expected 'relu'")
    names = {f"ff_mod_stack/w0__{i}": f"w0.{i}" for i in range(len(WIDTHS))} | {"ff_mod_stack/b0": "b0"}
    for i in (1, 2):
        names |= {f"ff_mod_stack/w{i}": f"dense_w.{i - 1}", f"ff_mod_stack/b{i}": f"dense_b.{i - 1}"}
    _expect(tensors, set(names.values()))
    return {leaf: tensors[name] for leaf, name in names.items()}


def _to_celo2_mlp(leaves: Tensors) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors = {f"w0.{i}": leaves[f"ff_mod_stack/w0__{i}"] for i in range(len(WIDTHS))} | {
        "b0": leaves["ff_mod_stack/b0"]
    }
    for i in (1, 2):
        tensors |= {f"dense_w.{i - 1}": leaves[f"ff_mod_stack/w{i}"], f"dense_b.{i - 1}": leaves[f"ff_mod_stack/b{i}"]}
    hidden, outputs = leaves["ff_mod_stack/w2"].shape
    config = {
        "feature_dims": list(WIDTHS),
        "hidden_size": hidden,
        "hidden_layers": 2,
        "output_size": outputs,
        "activation": "relu",
    }
    return tensors, config


_VELO_MLP = {"0": "input_{}_", "1": "hidden_{}_.0", "2": "output_{}_"}
_VELO_MIXED = {"0": "input_{}", "1": "hidden_{}.0", "2": "output_{}"}
_VELO_RNN = {
    "rnn_params/linear": "mix_layer1",
    "rnn_params/linear_1": "mix_layer2",
    "rnn_params/linear_2": "final_mix_layer",
    "rnn_params/rnn/linear": "lstm.linear",
    "rnn_params/rnn_to_controls": "rnn_to_controls",
    "rnn_params/step_size": "step_size",
}
_VELO_STATE = {"lstm_init_state/hidden": "lstm_init_state.0", "lstm_init_state/cell": "lstm_init_state.1"}


def _from_velo_mlp(tensors: Tensors) -> dict[str, Array]:
    kinds = ("weights", "bias")
    mixed = {name.format(kind) for name in _VELO_MIXED.values() for kind in kinds}
    weights = {name: tensor for name, tensor in tensors.items() if name not in mixed}
    _expect(weights, {name.format(kind) for name in _VELO_MLP.values() for kind in kinds})
    leaves = {}
    for i, name in _VELO_MLP.items():
        leaves[f"ff_mod_stack/w{i}"] = np.swapaxes(weights[name.format("weights")], -1, -2)
        leaves[f"ff_mod_stack/b{i}"] = weights[name.format("bias")]
    first = leaves.pop("ff_mod_stack/w0")
    return leaves | _split("ff_mod_stack/w0__", first)


def _to_velo_mlp(leaves: Tensors) -> tuple[dict[str, Array], dict[str, Any]]:
    blocks = [leaves[f"ff_mod_stack/w0__{i}"] for i in range(len(WIDTHS))]
    whole = {**leaves, "ff_mod_stack/w0": np.concatenate(blocks, axis=-2)}
    tensors: dict[str, Array] = {}
    for i, name in _VELO_MLP.items():
        weight, bias = np.swapaxes(whole[f"ff_mod_stack/w{i}"], -1, -2), whole[f"ff_mod_stack/b{i}"]
        tensors |= {name.format("weights"): weight, name.format("bias"): bias}
        mixed = _VELO_MIXED[i]
        tensors |= {mixed.format("weights"): np.zeros_like(weight[0]), mixed.format("bias"): np.zeros_like(bias[0])}
    bank, hidden, inputs = tensors["input_weights_"].shape
    sizes = {"param_inits": bank, "input_size": inputs, "hidden_size": hidden, "hidden_layers": 1}
    return tensors, sizes | {"output_size": tensors["output_bias_"].shape[1]}


def _from_velo_rnn(tensors: Tensors, config: Config) -> dict[str, Array]:
    if config.get("mix_layers", True) is not True:
        raise CheckpointError(f"{CONFIG}: mix_layers = {config['mix_layers']!r:.80}: expected true")
    _expect(
        tensors, {f"{n}.{kind}" for n in _VELO_RNN.values() for kind in ("weight", "bias")} | {*_VELO_STATE.values()}
    )
    leaves = {leaf: tensors[name] for leaf, name in _VELO_STATE.items()}
    for leaf, name in _VELO_RNN.items():
        leaves |= {f"{leaf}/w": tensors[f"{name}.weight"].T, f"{leaf}/b": tensors[f"{name}.bias"]}
    return leaves


def _to_velo_rnn(leaves: Tensors) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors = {name: leaves[leaf].reshape(1, -1) for leaf, name in _VELO_STATE.items()}
    for leaf, name in _VELO_RNN.items():
        tensors |= {f"{name}.weight": leaves[f"{leaf}/w"].T, f"{name}.bias": leaves[f"{leaf}/b"]}
    bank, hidden = tensors["rnn_to_controls.weight"].shape
    inputs = tensors["mix_layer1.weight"].shape[1]
    sizes = {"input_size": inputs, "lstm_hidden_size": hidden, "param_inits": bank}
    return tensors, sizes | {"mix_layers": True}


def _leaves(lopt: LearnedOptimizer, theta: Theta) -> dict[str, Array]:
    """The inverse of ``theta_from_jax``, without the originals' leading axes of size one."""
    leaves: dict[str, Array] = {}
    for entry, source in names_of(lopt).items():
        leaf = theta[entry].detach().cpu().numpy()
        leaves |= {source: leaf} if isinstance(source, str) else dict(zip(source, _blocks(leaf), strict=True))
    return leaves


def _blocks(first_layer: Array) -> list[Array]:
    return np.split(first_layer, list(accumulate(WIDTHS))[:-1], axis=-2)


def _split(prefix: str, first_layer: Array) -> dict[str, Array]:
    if first_layer.ndim < 2 or first_layer.shape[-2] != sum(WIDTHS):
        raise CheckpointError(f"the first layer has shape {first_layer.shape}: expected {sum(WIDTHS)} inputs")
    return {f"{prefix}{i}": block for i, block in enumerate(_blocks(first_layer))}


def _expect(tensors: Tensors, names: set[str]) -> None:
    if tensors.keys() != names:
        missing, unknown = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
        raise CheckpointError(f"tensors of another module of PyLO: missing {missing}, unknown {unknown}")


def _numbers(name: str, values: object) -> Array:
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise CheckpointError(f"{CONFIG}: {name} = {values!r:.80}: expected a list of numbers")
    return np.array(values, np.float32)


def _twin_name(name: str) -> str:
    for own, other in (("RNN", "MLP"), ("MLP", "RNN")):
        if name.endswith(own):
            return name.removesuffix(own) + other
    raise CheckpointError(f"{name!r} is one half of VeLO: expected a name that ends in RNN or MLP, to find the other")
