"""The inner loop's benchmark: what it counts, what it reports, and that both sides begin with the same problem."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def loop():
    sys.path.insert(0, str(FOLDER))
    try:
        import inner_loop
    finally:
        sys.path.remove(str(FOLDER))
    return inner_loop


@pytest.fixture(scope="module")
def contestants(loop):
    return sys.modules["inner_contestants"]


@pytest.fixture
def contests(loop):
    """Results as after three rounds, without any process."""
    contests = object.__new__(loop.Contests)
    fused, generic = loop.Entry("small_fc/4", "fused"), loop.Entry("small_fc/4", "generic")
    contests.rates = {fused: [3e4, 1e4, 2e4], generic: [5e3]}
    contests.opened = {entry: {"first_seconds": 1.0, "bytes_per_particle": 9} for entry in (fused, generic)}
    contests.scaling, contests.fma, contests.peers = {fused: [1.9, 2.0, 1.8]}, [80.0, 100.0], {}
    return contests


def test_flops_are_those_counted_by_hand(loop):
    # 64 x (64 x 32 + 32 x 10) multiply-adds forward; backward two gradients of weights and one of the hidden layer
    assert loop.flops(4)["task"] == 2 * (64 * 64 * 32 + 64 * 32 * 10) * 2 + 2 * 64 * 32 * 10
    # 2,410 parameters: 16 columns x 4, 4 x 4 and 4 x 2 weights, two operations each
    assert loop.flops(4)["network"] == 2410 * 2 * (64 + 16 + 8)
    assert loop.flops(32)["network"] == 2410 * 3200
    assert loop.flops(8)["features"] == loop.flops(32)["features"] == 2410 * 65


@pytest.mark.parametrize(("hidden", "published"), [(4, 1.15e6), (8, 1.67e6), (32, 7.5e6)])
def test_flops_are_near_those_of_the_prototypes(loop, hidden, published):
    assert sum(loop.flops(hidden).values()) == pytest.approx(published, rel=0.15)


def test_the_plans(loop):
    quick = loop.plan(quick=True, families=False, peers=())
    assert {(entry.name, entry.path) for entry in quick} == {
        (f"small_fc/{hidden}", path) for hidden in (4, 8, 32) for path in ("fused", "generic")
    }
    full = loop.plan(quick=False, families=True, peers=loop.PEERS)
    assert len(full) == len(set(full))
    assert {entry.name for entry in full if entry.path == "jax"} >= {"celo/2", "velo_s", "vit"}
    assert not [entry for entry in loop.plan(quick=False, families=True, peers=()) if entry.path in loop.PEERS]


def test_what_json_prints(loop, contests, capsys):
    found = json.loads(json.dumps(loop.report(contests, quick=True)))
    assert found["fused"] == {"4": 2e4, "8": None, "32": None}
    assert found["generic"] == {"4": 5e3, "8": None, "32": None}
    assert found["jax"] is None
    assert found["fused_fraction_of_fma_peak"] == {"4": pytest.approx(2e4 * sum(loop.flops(4).values()) / 100e9)}
    assert found["two_cores"] == {"fused": 1.9}
    assert {"fma_gflops", "families", "versions", "bytes_per_particle", "repeats"} <= found.keys()
    loop.show(contests, found)
    shown = capsys.readouterr().out
    assert "small_fc/4, 16 particles        20.00     5.00" in shown
    assert "two cores, fused: 1.90" in shown


def test_jax_is_reported_where_there_are_peers(loop, contests, capsys):
    contests.peers = {"jax_peer.py": None}
    peer = loop.Entry("small_fc/4", "jax")
    contests.rates[peer] = [1e3, 4e3, 2e3]
    contests.opened[peer] = {"first_seconds": 1.0, "jax": "0.0", "disagreement": 1e-7}
    found = loop.report(contests, quick=False)
    assert found["jax"] == {"4": 2e3, "8": None, "32": None}
    assert found["versions"]["jax"] == "0.0"
    loop.show(contests, found)
    assert "10.00       2.50" in capsys.readouterr().out  # ours over jax, fused and generic


def test_without_a_compiler_there_is_no_peak(loop, contests, capsys):
    contests.fma = []
    found = loop.report(contests, quick=True)
    assert found["fma_gflops"] is None
    assert found["fused_fraction_of_fma_peak"] == {}
    loop.show(contests, found)
    assert "FMA peak unknown" in capsys.readouterr().out


def test_a_contest_is_timed_through_the_public_seam(contestants):
    entry, opened = {"path": "reference", "particles": 2}, {}
    reply = contestants.answer({"open": "small_fc/4", **entry}, opened)
    assert reply["bytes_per_particle"] > 5 * 4 * 2410  # parameters, three momenta, second moments
    reply = contestants.answer({"time": "small_fc/4", "seconds": 0.0, **entry}, opened)
    assert reply["steps_per_second"] > 0
    engine = opened["small_fc/4", 2, "reference"]
    assert engine.windows >= 2
    assert engine.particles.inner_step.max() <= contestants.HORIZON[1]


def test_contestants_speak_json_lines(contestants):
    echo = "import json, sys\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)"
    process = contestants.Contestant([sys.executable, "-c", echo], min(os.sched_getaffinity(0)))
    assert process.ask(open="x", particles=2) == {"got": {"open": "x", "particles": 2}}
    process.close()
    process = contestants.Contestant([sys.executable, "-c", "import sys; sys.exit(3)"], min(os.sched_getaffinity(0)))
    with pytest.raises(RuntimeError, match="exit code 3"):
        process.receive()


def test_a_path_that_does_not_serve_is_refused(contestants):
    assert "refused" in contestants.answer({"open": "image_conv", "path": "fused", "particles": 2}, {})


def test_a_start_is_the_same_for_both_sides(contestants, tmp_path):
    """The reference's losses come from what is in the file: theta, parameters and the images that the seeds name."""
    losses = contestants.write_start("small_fc/4", 2, tmp_path / "start.npz")
    assert losses.shape == (contestants.CHECK_STEPS, 2)
    with np.load(tmp_path / "start.npz") as file:
        seed = int(file["seeds"][0, 0])
        data = {name: torch.from_numpy(file[f"data/{name}"]) for name in ("image", "label")}
        w0, b0, w1, b1 = (torch.from_numpy(file[f"params/{name}"][0]) for name in ("w0", "b0", "w1", "b1"))
    rows = [_murmur((k * 0x9E3779B9 + seed) % 2**32) % len(data["label"]) for k in range(64)]
    x = data["image"][rows].flatten(1) / 255
    logits = torch.relu(x @ w0 + b0) @ w1 + b1
    expected = torch.nn.functional.cross_entropy(logits, data["label"][rows])
    torch.testing.assert_close(losses[0], expected.expand(2))
    assert (losses[1] != losses[0]).all()


def _murmur(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("family", ["image_conv", "rnn_lm", "transformer_lm", "vit"])
def test_the_families_begin_as_their_tasks_do(contestants, family, tmp_path):
    losses = contestants.write_start(family, 2, tmp_path / "start.npz")
    assert torch.isfinite(losses).all()
    with np.load(tmp_path / "start.npz") as file:
        assert any(name.startswith("params/") for name in file.files)


def test_disagreement_is_relative(contestants):
    expected = torch.full((5, 2), 2.0)
    assert contestants.disagreement([[2.0, 2.0]] * 50, expected) == 0
    assert contestants.disagreement([[2.0, 2.2]] * 50, expected) == pytest.approx(0.1)


def test_a_python_without_jax_has_no_peers(loop):
    assert bool(loop.peers_at(sys.executable)) == (importlib.util.find_spec("jax") is not None)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
def test_the_peer_gives_the_losses_of_the_reference(loop, contestants, tmp_path):
    peer = contestants.Contestant([sys.executable, str(FOLDER / "jax_peer.py"), "--serve"], 0)
    expected = contestants.write_start("celo/1", 2, tmp_path / "start.npz")
    reply = peer.ask(open="celo/1", path="jax", particles=2, start=str(tmp_path / "start.npz"))
    peer.close()
    assert contestants.disagreement(reply["losses"], expected) < loop.CHECK_TOLERANCE
