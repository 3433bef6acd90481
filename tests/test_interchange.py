"""Weights of other programs are read by what they are and never by what they are called; hostile files are refused."""

import io
import json
import pickle
from pathlib import Path

import fsspec
import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lopt
from deploy.config import from_yaml
from lopt.checkpoint import KEY, CheckpointError, header
from lopt.interchange.reading import MAX_BYTES
from tests.flax_files import array, packed, raw_array, tree_of
from tests.lopt_laws import Oracle

ORIGINALS = {
    "adafac_mlp_lopt": ("small_fc_lopt", {"hidden_size": 4, "step_mult": 0.001}),
    "celo": ("celo", {"phase": 2}),
    "celo_adam": ("celo_adam", {}),
    "celo2": ("celo2", {"orthogonalize": True, "layout": "torch", "adam_names": "*embed*", "compat": False}),
    "hyper_v2_64_32": ("velo", {"lstm_size": 64, "bank_size": 32, "compat": True}),
    "mlp_lopt": ("mlp_lopt", {"hidden_size": 32}),
    "nn_adam": ("nn_adam", {"lstm_size": 32}),
    "rnn_mlp_lopt": ("rnn_mlp_lopt", {}),
}


def made(rule, spread=0.1):
    generator = torch.Generator().manual_seed(7)
    theta = rule.init_theta(generator)
    return {name: leaf + spread * torch.randn(leaf.shape, generator=generator) for name, leaf in theta.items()}


def equal(theta, other):
    return theta.keys() == other.keys() and all(torch.equal(theta[name], other[name]) for name in theta)


@pytest.fixture
def file(tmp_path):
    def write(data, name="weights"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    return write


@pytest.mark.parametrize("oracle", ORIGINALS)
def test_weights_of_a_jax_original_are_recognised_by_their_leaves_alone(oracle, file):
    rule, theta, provenance = lopt.read(file(packed(tree_of(oracle)), "no_suffix_at_all"))
    assert (rule.name, rule.arguments) == ORIGINALS[oracle]
    assert equal(theta, Oracle(oracle).theta(rule))
    assert provenance["source"] == "no_suffix_at_all"
    assert len(provenance["sha256"]) == 64


@pytest.mark.parametrize("step", [3000, array(np.int32(3000)), array(np.int64(3000), code=3)])
def test_a_checkpoint_of_learned_optimization_tells_its_generation_and_step(file, step):
    checkpoint = {"params": tree_of("adafac_mlp_lopt"), "gen_id": "abc", "step": step}
    rule, theta, provenance = lopt.read(file(packed(checkpoint)))
    assert equal(theta, Oracle("adafac_mlp_lopt").theta(rule))
    assert (provenance["gen_id"], provenance["step"]) == ("abc", 3000)


def test_what_leaves_cannot_tell_is_said_by_the_caller(file):
    path = file(packed(tree_of("celo")))
    assert lopt.read(path, phase=1)[0].phase == 1
    velo = file(packed(tree_of("hyper_v2_64_32")))
    assert lopt.read(velo, compat=False)[0].arguments == {"lstm_size": 64, "bank_size": 32, "compat": False}
    small = file(packed(tree_of("adafac_mlp_lopt")))
    assert lopt.read(small, architecture="mulo")[0].arguments == {"hidden_size": 4, "step_mult": 0.01}
    with pytest.raises(CheckpointError, match=r"another architecture than velo: missing .*ff_mod_stack"):
        lopt.read(small, architecture="velo")
    with pytest.raises(CheckpointError, match="did you mean 'velo'"):
        lopt.read(small, architecture="vello")
    with pytest.raises(CheckpointError, match=r"small_fc_lopt does not take the arguments .*depth"):
        lopt.read(small, depth=3)


def test_every_architecture_with_an_original_says_where_all_of_its_theta_is():
    for kind in lopt.checkpoint.ARCHITECTURES.values():
        names = getattr(kind, "jax_names", None)
        if names is not None:
            rule = kind(phase=2) if kind.name == "celo" else kind()
            assert names.keys() == {entry.name for entry in rule.spec.entries}, kind.name


def test_leaves_of_nothing_known_name_what_is_missing_and_what_is_unknown(file):
    tree = tree_of("adafac_mlp_lopt")
    tree["nn"]["~"]["w3"] = tree["nn"]["~"].pop("w2")
    with pytest.raises(CheckpointError, match=r"missing \['nn/w2'\], unknown \['nn/w3'\]"):
        lopt.read(file(packed(tree)))
    tree = tree_of("adafac_mlp_lopt")
    tree["nn"]["~"]["b1"] = array(np.zeros(5, np.float32))
    with pytest.raises(CheckpointError, match=r"nn/b1.*\(5,\).*expected \(4,\)"):
        lopt.read(file(packed(tree)), architecture="small_fc_lopt", hidden_size=4)


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_whatever_it_is_called_and_never_run(tmp_path, file, protocol):
    canary = tmp_path / "canary"
    for name in ("optimizer.safetensors", "celo.theta.state", "optimizer.pt"):
        with pytest.raises(CheckpointError, match=r"never read|not a safetensors file"):
            lopt.load(file(pickle.dumps(Canary(canary), protocol), name))
    archive = io.BytesIO()
    torch.save(Canary(canary), archive)
    with pytest.raises(CheckpointError, match="never read"):
        lopt.load(file(archive.getvalue(), "optimizer.safetensors"))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary), protocol))
    assert canary.exists(), "the canary sings"


def with_leaf(value):
    tree = tree_of("adafac_mlp_lopt")
    tree["nn"]["~"]["b1"] = value
    return packed(tree)


def nested(depth):
    return b"\x81\xa1a" * depth + b"\xc0"


FOUR = np.ones(4, np.float32).tobytes()
HOSTILE = {
    "an array that claims 2^32 elements": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "damaged|exceeds"),
    "a map that claims 2^32 entries": (b"\xdf\xff\xff\xff\xff", "damaged|exceeds"),
    "a text of 4 GiB": (b"\x81\xdb\xff\xff\xff\xffa", "damaged|exceeds"),
    "bytes of 4 GiB": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "damaged|exceeds"),
    "an extension of 4 GiB": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "damaged|exceeds"),
    "maps 100,000 deep": (nested(100_000), "damaged|deeper"),
    "maps 100 deep": (nested(100), "deeper than 16 maps"),
    "an array within an array": (with_leaf([raw_array((4,), "float32", FOUR)]), "damaged|exceeds"),
    "a key that is a number": (b"\x81\x01\xc0", "key"),
    "a key that is there twice": (b"\x82\xa1a\x01\xa1a\x02", "'a' is there twice"),
    "a leaf that is a text": (with_leaf("zeros"), r"nn/~/b1.*is str: expected an array"),
    "bytes after the end": (with_leaf(raw_array((4,), "float32", FOUR)) + b"x", "damaged"),
    "another extension": (with_leaf(raw_array((4,), "float32", FOUR, code=2)), "extension 2"),
    "a shape larger than its buffer": (with_leaf(raw_array((2**40,), "float32", FOUR)), r"16 bytes: expected"),
    "a shape smaller than its buffer": (with_leaf(raw_array((3,), "float32", FOUR)), r"16 bytes: expected 12"),
    "a negative size": (with_leaf(raw_array((-2, -2), "float32", FOUR)), "expected positive whole numbers"),
    "an empty axis": (with_leaf(raw_array((2**40, 0), "float32", b"")), "expected positive whole numbers"),
    "a shape that is a number": (with_leaf(raw_array(4, "float32", FOUR)), "expected positive whole numbers"),
    "a hundred dimensions": (with_leaf(raw_array((1,) * 100, "float32", FOUR[:4])), "damaged|exceeds"),
    "objects": (with_leaf(raw_array((2,), "object", FOUR)), "dtype 'object': expected one of float32"),
    "a structured dtype": (with_leaf(raw_array((1,), "f4,O", FOUR)), "dtype 'f4,O'"),
    "a dtype that is a list": (with_leaf(raw_array((1,), [["a", "O"]], FOUR)), "damaged|exceeds|dtype"),
    "doubles": (with_leaf(array(np.ones(4))), "dtype 'float64'"),
    "whole numbers": (with_leaf(array(np.ones(4, np.int32))), "dtype int32: expected float32"),
    "NaN": (with_leaf(array(np.full(4, np.nan, np.float32))), "not finite"),
    "infinity": (with_leaf(array(np.full(4, np.inf, np.float32))), "not finite"),
    "an array of two parts": (with_leaf(msgpack.ExtType(1, b"\x92\x01\x02")), "not packed as"),
    "too many leaves": (
        packed({f"a{i}": {f"b{j}": array(np.float32(1)) for j in range(40)} for i in range(40)}),
        "1024",
    ),
    "nothing": (b"", "0 bytes"),
    "an empty map": (b"\x80", "missing"),
    "a text": (b'"""Owns nothing."""', "not a safetensors file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_flax_file_is_refused_with_a_reason(what, file):
    data, reason = HOSTILE[what]
    with pytest.raises(CheckpointError, match=reason):
        lopt.read(file(data), architecture="small_fc_lopt")


def only_checkpoint_errors(data, name):
    """What comes out is an optimizer or a CheckpointError that names the file."""
    fsspec.filesystem("memory").pipe_file(f"/fuzz/{name}", data)
    try:
        rule, theta, _ = lopt.read(f"memory://fuzz/{name}")
    except CheckpointError as error:
        reason = str(error)
    else:
        rule.spec.check(theta)
        return True
    assert name in reason
    return False


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """One small file of each format."""
    directory = tmp_path_factory.mktemp("pylo")
    rule = lopt.SmallFcLopt(2)
    lopt.export_pylo(directory, rule, made(rule))
    return {
        "own": lopt.encode(rule, made(rule), {"run": "fuzz", "scores": [1.0, 2.0]}),
        "flax": packed(tree_of("adafac_mlp_lopt")),
        "pylo": (directory / "model.safetensors").read_bytes(),
    }


@pytest.mark.parametrize("kind", ["own", "flax", "pylo"])
def test_a_file_cut_off_anywhere_is_refused(intact, kind):
    data = intact[kind]
    assert only_checkpoint_errors(data, kind)
    assert not any(only_checkpoint_errors(data[:end], kind) for end in range(len(data)))


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(["own", "flax", "pylo"]),
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=8),
    near_the_start=st.booleans(),
)
def test_flipped_bits_are_refused_or_give_other_finite_numbers(intact, kind, flips, near_the_start):
    data = bytearray(intact[kind])
    for position, mask in flips:
        data[position % (64 if near_the_start else len(data))] ^= mask
    only_checkpoint_errors(bytes(data), kind)


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=200))
def test_noise_is_refused(data):
    assert not only_checkpoint_errors(data, "noise")


@settings(deadline=None, max_examples=300)
@given(
    tree=st.recursive(
        st.none() | st.integers(-(2**60), 2**60) | st.floats() | st.binary(max_size=8) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    ),
    kind=st.sampled_from(["msgpack", "extension"]),
)
def test_well_formed_msgpack_of_anything_is_refused(tree, kind):
    data = msgpack.packb(tree)
    assert not only_checkpoint_errors(packed({"nn": msgpack.ExtType(1, data)}) if kind == "extension" else data, kind)


def with_header(change):
    """Our own format with another header."""
    rule = lopt.SmallFcLopt(2)
    stated = header(rule, {"run": "test"})
    text = change(stated) or json.dumps(stated)
    tensors = {name: leaf.contiguous() for name, leaf in made(rule).items()}
    from safetensors.torch import save

    return save(tensors, {KEY: text})


def test_a_file_of_format_1_which_had_no_constants_is_still_read(file):
    def older(stated):
        stated["format"] = 1
        del stated["constants"], stated["arguments"]["step_mult"]

    rule, _, provenance = lopt.read(file(with_header(older)))
    assert rule.arguments == {"hidden_size": 2, "step_mult": 0.001}
    assert provenance == {"run": "test"}


def test_a_file_says_what_it_computes_with_and_is_refused_where_this_code_computes_otherwise(file):
    constants = json.loads(json.dumps(header(lopt.Celo(phase=2), {})))["constants"]
    assert constants["step_mult"] == constants["exp_mult"] == 0.001
    assert constants["momentum_decays"] == [0.9, 0.99, 0.999]
    assert constants["max_gradient"] == 1000.0
    assert constants["columns"][:3] == ["g", "clipped_g", "p"]

    def another_decay(stated):
        stated["constants"]["momentum_decays"] = [0.9, 0.99, 0.9999]

    def unknown(stated):
        stated["constants"]["exp_mul"] = 0.001

    with pytest.raises(CheckpointError, match=r"momentum_decays.*0\.9999.*this code computes with.*0\.999"):
        lopt.read(file(with_header(another_decay)))
    with pytest.raises(CheckpointError, match=r"no 'exp_mul'.*did you mean 'exp_mult'"):
        lopt.read(file(with_header(unknown)))


def test_every_learned_architecture_states_its_constants():
    for kind in lopt.checkpoint.ARCHITECTURES.values():
        if hasattr(kind, "jax_names"):
            stated = header(kind(phase=1) if kind.name == "celo" else kind(), {})["constants"]
            assert stated, kind.name
            assert json.loads(json.dumps(stated)) == stated


BAD_HEADERS = {
    "deep JSON": (lambda stated: "[" * 100_000, "damaged metadata field"),
    "no JSON": (lambda stated: "{", "damaged metadata field"),
    "a list": (lambda stated: "[1]", r"format = \[1\]"),
    "a later format": (lambda stated: stated.update(format=3), "format = 3: expected one of"),
    "no format": (lambda stated: stated.pop("format") and None, "format = None"),
    "an architecture that is a list": (lambda stated: stated.update(architecture=[1]), r"'architecture' = \[1\]"),
    "an unknown architecture": (lambda stated: stated.update(architecture="celo3"), "did you mean 'celo"),
    "arguments that are a list": (lambda stated: stated.update(arguments=[["hidden_size", 2]]), "'arguments'"),
    "an argument that is a list": (lambda stated: stated.update(arguments={"hidden_size": [2]}), "numbers and texts"),
    "an argument that is a text": (
        lambda stated: stated.update(arguments={"hidden_size": "2"}),
        r"does not take {'hidden_size': '2'}",
    ),
    "an argument of nobody": (lambda stated: stated.update(arguments={"hiden_size": 2}), "hiden_size"),
    "a negative size": (lambda stated: stated.update(arguments={"hidden_size": -2}), "expected"),
    "no constants": (lambda stated: stated.pop("constants") and None, "'constants' = None"),
    "provenance that is a text": (lambda stated: stated.update(provenance="me"), "'provenance' = 'me'"),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_damaged_header_is_refused_with_the_fields_name(what, file):
    change, reason = BAD_HEADERS[what]
    with pytest.raises(CheckpointError, match=reason):
        lopt.read(file(with_header(change)))


def test_a_file_larger_than_any_optimizer_is_not_even_opened(file):
    path = file(b"")
    with open(path, "wb") as sparse:
        sparse.truncate(2 * MAX_BYTES)
    with pytest.raises(CheckpointError, match=f"{2 * MAX_BYTES} bytes or more"):
        lopt.read(path)


def test_our_own_file_is_held_to_what_the_caller_expects(file):
    rule = lopt.SmallFcLopt(2)
    path = file(lopt.encode(rule, made(rule), {}))
    assert lopt.read(Path(path), architecture="small_fc_lopt", hidden_size=2)[0].hidden_size == 2
    with pytest.raises(CheckpointError, match="architecture = 'small_fc_lopt': expected 'celo'"):
        lopt.read(path, architecture="celo")
    with pytest.raises(CheckpointError, match="hidden_size = 2: expected 4"):
        lopt.read(path, hidden_size=4)


def test_weights_are_found_by_path_directory_url_and_preset(tmp_path, file):
    rule = lopt.SmallFcLopt(2)
    theta = made(rule)
    data = lopt.encode(rule, theta, {})
    path = file(data, "some/optimizer.safetensors")
    fsspec.filesystem("memory").pipe_file("/found/optimizer.safetensors", data)
    for source in (path, Path(path), tmp_path / "some", f"file://{path}", "memory://found/optimizer.safetensors"):
        assert equal(lopt.read(source)[1], theta)
    assert lopt.read("celo")[0].name == "celo"
    file(data, "some/another.safetensors")
    with pytest.raises(CheckpointError, match=r"expected one .*another\.safetensors, optimizer\.safetensors"):
        lopt.read(tmp_path / "some")
    with pytest.raises(CheckpointError, match=r"neither a readable path or URL .* nor a preset .* nor a hub id"):
        lopt.read(str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match="Protocol not known"):
        lopt.read("nowhere://bucket/optimizer")


def test_a_path_that_exists_is_not_looked_up_on_the_hub(tmp_path, file, monkeypatch):
    rule = lopt.SmallFcLopt(2)
    theta = made(rule)
    file(lopt.encode(rule, theta, {}), "owner/name/optimizer.safetensors")
    monkeypatch.chdir(tmp_path)
    assert equal(lopt.read("owner/name")[1], theta)
    with pytest.raises(CheckpointError, match="expected hf://owner/name"):
        lopt.read("hf://owner")


@pytest.mark.parametrize("name", ["celo_authors", "celo_adam"])
def test_the_presets_are_the_authors_files_by_their_checksum(name):
    rule, theta, provenance = lopt.read(name)
    rule.spec.check(theta)
    sums = {
        "celo_authors": "35683c6123069c101d62ec1f8b2e6d70d50a43e67ebe09953b27620a7dcb836b",
        "celo_adam": "99c65fa0218a739c32eac4e8a99523b6fed92e2926d0c5d64e83835637b75d38",
    }
    assert (provenance["license"], provenance["sha256"]) == ("MIT", sums[name])


def test_the_preset_celo_is_our_own_and_says_how_it_was_made_and_how_it_scored():
    rule, theta, provenance = lopt.read("celo")
    rule.spec.check(theta)
    config = from_yaml(provenance["config"])
    assert (provenance["license"], provenance["run"]) == ("Apache-2.0", config.run.name)
    assert set(provenance["scores"]["tasks"]) == set(config.evaluation.tasks)
    trained_on = [family.task for family in config.task.families.values()]
    assert not any(entry.task in trained_on for entry in config.evaluation.tasks.values())
    assert [made["run"] for made in provenance["phases"]] == ["celo_phase1", "celo_phase2"]
    ours, authors = (provenance[key]["final_loss"]["iqm"] for key in ("scores", "scores_of_the_authors_weights"))
    assert ours > max(authors, 1), "kept because it is better than the authors' weights and than tuned Adam"


def test_the_name_of_an_architecture_without_weights_says_what_to_do():
    with pytest.raises(CheckpointError, match=r"'velo' is an architecture without published weights.*build\('velo'\)"):
        lopt.load("velo")
