"""Recurrent language models: the cells against haiku and torch, the published tasks, loss, distribution."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data import Library
from tasks.families.draws import Pool
from tasks.families.rnn_cells import CELLS
from tasks.families.rnn_lm import RnnLm, draw
from tasks.fixed.rnn_lm import TASKS
from tasks.keys import generator
from tasks.random import keys
from tasks.static import DYNAMIC
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count, rows

LIBRARY = RandomLibrary()
PUBLISHED = ("vanilla", "gru", "lstm")


def small(cell="lstm", **changes):
    fields = {"cell": cell, "vocab_size": 11, "hidden": 4, "embedding": 3, "batch_size": 3, "sequence_length": 6}
    return RnnLm(**{**fields, **changes})


def waves(params):
    """Parameters of the same shapes whose values anyone can compute again: leaf i is sin(0.37 n + i) / 2."""
    return {
        name: (0.5 * torch.sin(0.37 * torch.arange(leaf.numel(), dtype=torch.float64) + i)).float().reshape(leaf.shape)
        for i, (name, leaf) in enumerate(params.items())
    }


def wave_batch():
    """Three sequences of six ids below 11; the second ends in padding."""
    n = torch.arange(18).reshape(3, 6)
    obs, target = 1 + n * 7 % 10, 1 + (n * 5 + 3) % 10
    obs[1, 4:] = 0
    target[1, 3:] = 0
    return {"obs": obs, "target": target, "key": torch.tensor(0)}


def gradient_norm(grads):
    return torch.cat([leaf.flatten() for leaf in grads.values()]).norm().item()


# ---- the cells


@pytest.mark.parametrize(
    ("cell", "loss", "norm"),
    [
        ("vanilla", 2.5190892, 0.62183940),
        ("irnn", 2.5190892, 0.62183940),
        ("gru", 2.4025815, 0.62915915),
        ("lstm", 2.4015450, 0.60786777),
    ],
)
def test_loss_and_gradient_are_those_of_haiku(cell, loss, norm):
    # Golden: dm-haiku 0.0.17 (hk.Embed, hk.VanillaRNN / GRU / LSTM, tasks/rnn.py's IRNN, hk.Linear) in float32 on JAX
    # 0.10.2, given the same numbers (the LSTM's gates reordered) and the same padded batch.
    task = small(cell).build(LIBRARY)
    grads, value = torch.func.grad_and_value(task.loss)(waves(task.init(generator(0))), wave_batch())
    assert value.item() == pytest.approx(loss, abs=2e-6)
    assert gradient_norm(grads) == pytest.approx(norm, abs=2e-6)


def core(cell, inputs=5, hidden=7):
    return waves(CELLS[cell].init(generator(0), inputs, hidden)), torch.randn(2, 9, inputs, generator=generator(1))


def test_vanilla_is_torch_rnn_with_relu():
    params, x = core("vanilla")
    theirs = torch.nn.RNN(5, 7, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(params["core/input/w"].T)
        theirs.weight_hh_l0.copy_(params["core/hidden/w"].T)
        theirs.bias_ih_l0.copy_(params["core/input/b"])
        theirs.bias_hh_l0.copy_(params["core/hidden/b"])
        expected, _ = theirs(x, params["core/h0"].expand(1, 2, -1).contiguous())
    torch.testing.assert_close(CELLS["vanilla"].unroll(params, x), expected)


def test_lstm_is_torch_lstm_with_one_more_on_the_forget_gate():
    params, x = core("lstm")
    i, f, o, g = params["core/w"].chunk(4, 1)
    order = torch.cat([i, f, g, o], 1)
    i, f, o, g = params["core/b"].chunk(4)
    theirs = torch.nn.LSTM(5, 7, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(order[:5].T)
        theirs.weight_hh_l0.copy_(order[5:].T)
        theirs.bias_ih_l0.copy_(torch.cat([i, f + 1, g, o]))
        theirs.bias_hh_l0.zero_()
        start = tuple(params[f"core/{name}"].expand(1, 2, -1).contiguous() for name in ("h0", "c0"))
        expected, _ = theirs(x, start)
    torch.testing.assert_close(CELLS["lstm"].unroll(params, x), expected)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gru_is_torch_gru_only_where_the_reset_gate_commutes_with_the_product(diagonal):
    params, x = core("gru")
    recurrent = params["core/hidden/w"]
    if diagonal:
        recurrent[:, 14:] = torch.diag(recurrent[:, 14:].diagonal())
    theirs = torch.nn.GRU(5, 7, batch_first=True)

    def reordered(leaf):
        z, r, a = leaf.chunk(3, -1)
        return torch.cat([r, -z, a], -1)  # their order, and their z is what 1 - z is here

    with torch.no_grad():
        theirs.weight_ih_l0.copy_(reordered(params["core/input/w"]).T)
        theirs.weight_hh_l0.copy_(reordered(recurrent).T)
        theirs.bias_ih_l0.copy_(reordered(params["core/b"]))
        theirs.bias_hh_l0.zero_()
        expected, _ = theirs(x, params["core/h0"].expand(1, 2, -1).contiguous())
    difference = (CELLS["gru"].unroll(params, x) - expected).abs().max()
    assert (difference < 1e-6) if diagonal else (difference > 1e-3)


def test_the_three_published_cells_differ():
    x = torch.randn(2, 9, 5, generator=generator(1))
    states = [CELLS[cell].unroll(CELLS[cell].init(generator(0), 5, 7), x) for cell in PUBLISHED]
    assert [parameter_count(CELLS[cell].init(generator(0), 5, 7)) for cell in PUBLISHED] == [
        5 * 7 + 7 + 7 * 7 + 7 + 7,
        3 * 7 * (5 + 7) + 3 * 7 + 7,
        4 * 7 * (5 + 7) + 4 * 7 + 2 * 7,
    ]
    assert all((one - other).abs().max() > 0.1 for one, other in ((states[0], states[1]), (states[1], states[2])))


def test_cells_start_as_in_haiku():
    vanilla, gru, lstm, irnn = (CELLS[cell].init(generator(0), 100, 200) for cell in (*PUBLISHED, "irnn"))
    assert torch.equal(irnn["core/hidden/w"], torch.eye(200))
    cut = 0.8796
    assert vanilla["core/hidden/w"].std().item() == pytest.approx(cut * 200**-0.5, rel=0.02)
    assert vanilla["core/input/w"].std().item() == pytest.approx(cut * 100**-0.5, rel=0.02)
    assert gru["core/input/w"].std().item() == pytest.approx(100**-0.5, rel=0.02)
    assert gru["core/hidden/w"].std().item() == pytest.approx(200**-0.5, rel=0.02)
    assert lstm["core/w"].std().item() == pytest.approx(cut * 300**-0.5, rel=0.02)
    for params in (vanilla, irnn, gru, lstm):
        assert not any(leaf.any() for leaf in params.values() if leaf.ndim == 1)


# ---- the task


@pytest.mark.parametrize("initializer", ["haiku", DYNAMIC])
@pytest.mark.parametrize("cell", CELLS)
def test_laws(cell, initializer):
    error = assert_laws(small(cell, initializer=initializer, normalizer="parametric"), LIBRARY)
    assert error < 1e-5


def test_laws_on_true_text():
    assert assert_laws(RnnLm(cell="gru", batch_size=4, sequence_length=9), Library(DataConfig())) < 1e-5


@pytest.mark.parametrize("cell", CELLS)
def test_a_token_changes_no_logits_before_it(cell):
    task = small(cell).build(LIBRARY)
    params, batch = task.init(generator(0)), wave_batch()
    before = task.logits(params, batch)
    batch["obs"][:, 3] = batch["obs"][:, 3] % 10 + 1
    after = task.logits(params, batch)
    assert torch.equal(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).any((0, 2)).all()


def test_padding_is_left_out_of_the_loss():
    task = small().build(LIBRARY)
    params, batch = waves(task.init(generator(0))), wave_batch()
    nats = -task.logits(params, batch).log_softmax(-1).gather(-1, batch["target"][..., None])[..., 0]
    real = torch.cat([nats[0], nats[1, :4], nats[2]])
    torch.testing.assert_close(task.loss(params, batch), real.mean())
    assert abs(nats.mean() - real.mean()) > 1e-3
    batch["obs"].zero_()
    assert task.loss(params, batch).item() == 0


@pytest.mark.parametrize(
    ("cell", "excess", "deviation"),
    [("lstm", 0.0074, 0.0024), ("gru", 0.057, 0.009), ("vanilla", 0.182, 0.022), ("irnn", 3.10, 0.29)],
)
def test_the_first_loss_is_log_v_and_what_the_start_adds(cell, excess, deviation):
    # Golden: haiku's excess over log 259, mean and standard deviation of ten seeds on uniformly random tokens.
    task = RnnLm(cell=cell, vocab_size=259, hidden=128, embedding=64, batch_size=64).build(RandomLibrary(500))
    drawn = make_particles(task, 4)
    losses = task.losses(drawn.params, drawn.batch) - math.log(259)
    assert ((losses - excess).abs() < 4 * deviation).all()


def test_the_initializer_is_for_the_embedding_and_the_last_map():
    static = small(vocab_size=200, hidden=50, embedding=30)

    def start(initializer):
        params = dataclasses.replace(static, initializer=initializer).build(LIBRARY).init(generator(0))
        return params["embedding/w"], params["readout/w"], params["core/w"]

    haiku, normal, orthogonal = start("haiku"), start("normal"), start("orthogonal")
    assert haiku[0].std().item() == pytest.approx(0.8796, rel=0.03)
    assert normal[0].std().item() == pytest.approx(200**-0.5, rel=0.03)
    torch.testing.assert_close(orthogonal[0].T @ orthogonal[0], torch.eye(30), atol=1e-5, rtol=0)
    assert haiku[1].std().item() == pytest.approx(0.8796 * 50**-0.5, rel=0.03)
    assert normal[1].std().item() == pytest.approx(50**-0.5, rel=0.03)
    torch.testing.assert_close(orthogonal[1] @ orthogonal[1].T, torch.eye(50), atol=1e-5, rtol=0)
    assert all(torch.equal(start(DYNAMIC)[i], haiku[i]) for i in range(3))
    for params in (haiku, normal, orthogonal):
        assert params[2].std().item() == pytest.approx(0.8796 * 80**-0.5, rel=0.03)


def test_every_particle_draws_its_initializer():
    task = small(vocab_size=100, hidden=50, initializer=DYNAMIC).build(LIBRARY)
    drawn = make_particles(task, 40)
    assert set(drawn.dynamic["initializer"].tolist()) == {0, 1, 2}
    sizes = drawn.params["embedding/w"].std((1, 2)) * 10 / drawn.dynamic["initializer_scale"]
    assert ((sizes - 1).abs() < 0.15).all()
    assert drawn.params["embedding/w"].std((1, 2)).max() > 2 * drawn.params["embedding/w"].std((1, 2)).min()


def test_normalizers_are_the_originals():
    losses = torch.tensor([-1.0, 0.0, 3.0, 5.3, 9.0, math.nan, math.inf])
    nats = small(vocab_size=100).build(LIBRARY)
    torch.testing.assert_close(nats.normalizer(losses), torch.tensor([0, 0, 3, 5.3, 9, 9.210340, 9.210340]))
    scaled = small(vocab_size=100, normalizer="parametric").build(LIBRARY)
    # 10 (clip(l, 0, log 200) - log 20) / log 100
    expected = torch.tensor([-6.505150, -6.505150, 0.009267, 5, 5, 5, 5])
    torch.testing.assert_close(scaled.normalizer(losses), expected, atol=1e-5, rtol=0)
    assert scaled.worst_loss == pytest.approx(5)


@pytest.mark.parametrize("cell", PUBLISHED)
def test_it_learns_text(cell):
    task = RnnLm(cell=cell, batch_size=32, sequence_length=16, hidden=64).build(Library(DataConfig()))
    params = {name: leaf.requires_grad_() for name, leaf in task.init(generator(0)).items()}
    adam = torch.optim.Adam(params.values(), lr=0.02)
    batches = task.batch("train", keys(30, "learn"))
    for step in range(30):
        loss = task.loss(params, rows(batches, step))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 3.2  # nats for a byte; the bytes' own frequencies need 3.3


# ---- the published tasks


def count(vocab, embedding, hidden, gates, biases, states):
    """haiku's: a table, one or two maps of input and state into the gates, initial states, the last map."""
    return vocab * embedding + gates * hidden * (embedding + hidden) + biases + states * hidden + (hidden + 1) * vocab


GOLDEN = {
    # 259 * 64 + 128 * (64 + 128) + 2 * 128 (double bias) + 128 + 129 * 259
    "RNNLM_lm1bbytes_Patch32_IRNN128_Embed64": 74_947,
    # 259 * 64 + 4 * 128 * (64 + 128) + 4 * 128 + 2 * 128 + 129 * 259
    "RNNLM_lm1bbytes_Patch32_LSTM128_Embed64": 149_059,
    # 259 * 64 + 3 * 128 * (64 + 128) + 3 * 128 + 128 + 129 * 259
    "RNNLM_lm1bbytes_Patch32_GRU128_Embed64": 124_227,
    "RNNLM_lm1bbytes_Patch32_VanillaRNN128_Embed64": 74_947,
    "RNNLM_lm1bbytes_Patch128_LSTM128_Embed64": 149_059,
    # 259 * 128 + 4 * 256 * (128 + 256) + 4 * 256 + 2 * 256 + 257 * 259
    "RNNLM_lm1bbytes_Patch32_LSTM256_Embed128": 494_467,
    "RNNLM_lm1bbytes_Patch32_GRU256_Embed128": 395_651,
    # 32100 * 128 + 256 * (128 + 256) + 2 * 256 + 256 + 257 * 32100
    "RNNLM_lm1b32k_Patch32_VanillaRNN256_Embed128": 12_457_572,
    "RNNLM_lm1b32k_Patch32_LSTM256_Embed128": 12_753_252,
    "RNNLM_lm1b32k_Patch32_IRNN256_Embed128": 12_457_572,
    "RNNLM_wikipediaen32k_Patch32_LSTM256_Embed128": 12_753_252,
    "RNNLM_wikipediaen32k_Patch32_GRU256_Embed128": 12_654_436,
    "RNNLM_wikipediaenbytes_Patch32_LSTM256_Embed128": 494_467,
    "RNNLM_wikipediaenbytes_Patch32_GRU256_Embed128": 395_651,
}
"""Parameters as haiku counts them (jax.eval_shape of the originals' model)."""


def test_published_tasks_have_the_parameters_of_haiku():
    assert {name: static.work().parameters for name, static in TASKS.items()} == GOLDEN
    assert count(259, 64, 128, 4, 4 * 128, 2) == GOLDEN["RNNLM_lm1bbytes_Patch32_LSTM128_Embed64"]
    assert count(259, 64, 128, 3, 3 * 128, 1) == GOLDEN["RNNLM_lm1bbytes_Patch32_GRU128_Embed64"]
    assert count(259, 64, 128, 1, 2 * 128, 1) == GOLDEN["RNNLM_lm1bbytes_Patch32_VanillaRNN128_Embed64"]


@pytest.mark.parametrize("name", [name for name in TASKS if "32k" not in name and "128" in name])
def test_published_tasks_are_built_as_their_names_say(name):
    static = TASKS[name]
    task = static.build(LIBRARY)
    params = task.init(generator(0))
    assert parameter_count(params) == GOLDEN[name]
    _, data, length, cell, embedding = name.split("_")
    assert f"{static.corpus}{static.vocabulary}".replace("wikipedia", "wikipediaen") == data
    assert params["embedding/w"].shape == (259, int(embedding.removeprefix("Embed")))
    assert cell == f"{ {'vanilla': 'VanillaRNN', 'irnn': 'IRNN'}.get(static.cell, static.cell.upper()) }{static.hidden}"
    batch = task.batch("train", keys(1, "published"))
    assert batch["obs"].shape == (1, 128, int(length.removeprefix("Patch")))
    assert (task.batch_size, static.initializer, static.normalizer) == (128, "haiku", "fixed")


# ---- the distribution

RANGES = {"hidden": (8, 256), "embedding": (8, 256), "batch_size": (4, 512), "sequence_length": (4, 512)}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["paper", "code"]))
def test_draws_are_in_range_and_run(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    for field, (low, high) in RANGES.items():
        assert low <= getattr(static, field) <= high
    assert static.cell in PUBLISHED
    assert (static.initializer, static.normalizer) == (DYNAMIC, "parametric")
    if static.vocabulary == "bytes":
        assert 100 <= static.vocab_size <= 259
    else:
        assert 100 <= static.vocab_size <= 10_000
    task = dataclasses.replace(static, batch_size=2, sequence_length=min(static.sequence_length, 8)).build(LIBRARY)
    drawn = make_particles(task, 2, seed)
    assert task.losses(drawn.params, drawn.batch, drawn.dynamic).isfinite().all()
    assert parameter_count(rows(drawn.params, 0)) == static.work().parameters


def test_draws_cover_the_distribution():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Pool()) for _ in range(3000)]
    for field, (low, high) in RANGES.items():
        values = sorted(getattr(static, field) for static in drawn)
        assert values[1500] == pytest.approx(math.sqrt(low * (high + 1)), rel=0.12), field
        assert values[0] < low * 1.2
        assert values[-1] > high / 1.2
    large = sorted(static.vocab_size for static in drawn if static.vocabulary == "32k")
    assert large[len(large) // 2] == pytest.approx(1000, rel=0.15)
    for field, options in (("cell", 3), ("vocabulary", 2), ("corpus", 2)):
        counts = Counter(getattr(static, field) for static in drawn)
        assert len(counts) == options
        assert min(counts.values()) > 0.9 * 3000 / options


def test_the_code_truncates_bytes_too():
    sizes = {}
    for ranges in ("paper", "code"):
        pool, rng = Pool(texts=(("pydoc", "bytes"),), ranges=ranges), np.random.default_rng(0)
        sizes[ranges] = [draw(rng, pool).vocab_size for _ in range(400)]
    assert set(sizes["paper"]) == {256}
    assert min(sizes["code"]) < 105
    assert max(sizes["code"]) == 259
    assert sum(size < 259 for size in sizes["code"]) / 400 == pytest.approx(math.log(2.59) / math.log(100), abs=0.06)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cell": "gur"}, "cell"),
        ({"vocabulary": "byte"}, "vocabulary"),
        ({"vocabulary": "bpe"}, "vocabulary"),
        ({"corpus": "pydocs"}, "corpus"),
        ({"corpus": "text"}, "corpus"),
        ({"vocab_size": 260}, "vocab_size"),
        ({"vocab_size": 3}, "vocab_size"),
        ({"vocabulary": "32k", "vocab_size": 32_101}, "vocab_size"),
        ({"hidden": 0}, "hidden"),
        ({"embedding": 0}, "embedding"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"batch_size": 0}, "batch_size"),
        ({"initializer": "zeros"}, "initializer"),
        ({"normalizer": "none"}, "normalizer"),
    ],
)
def test_what_cannot_be_is_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        RnnLm(**changes)
    assert caught.value.field == field
