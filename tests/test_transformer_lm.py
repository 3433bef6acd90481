"""Transformer language models: the model against haiku, the published tasks, dropout, distribution."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data import Library
from tasks.families.draws import Pool
from tasks.families.transformer_lm import TransformerLm, draw
from tasks.fixed.transformer_lm import TASKS
from tasks.keys import generator
from tasks.random import keys
from tests.task_laws import RandomLibrary, assert_laws, make_particles, parameter_count, rows
from tests.test_rnn_lm import gradient_norm, wave_batch, waves

LIBRARY = RandomLibrary()


def small(**changes):
    fields = {"width": 8, "heads": 2, "layers": 2, "vocab_size": 11, "batch_size": 3, "sequence_length": 6}
    return TransformerLm(**{**fields, **changes})


# ---- the model


def test_loss_and_gradient_are_those_of_haiku():
    # Golden: the originals' tasks/transformer.py on dm-haiku 0.0.17 and JAX 0.10.2 in float32, given the same numbers
    # and the same padded batch, which it masks in the attention, too.
    task = small().build(LIBRARY)
    grads, value = torch.func.grad_and_value(task.loss)(waves(task.init(generator(0))), wave_batch())
    assert value.item() == pytest.approx(2.4342129, abs=2e-6)
    assert gradient_norm(grads) == pytest.approx(6.6979194, abs=5e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_laws(dropout):
    assert assert_laws(small(dropout=dropout, normalizer="parametric"), LIBRARY) < 1e-4


def test_laws_on_true_text():
    assert assert_laws(TransformerLm(batch_size=4, sequence_length=9, dropout=0.1), Library(DataConfig())) < 1e-4


def test_a_token_changes_no_logits_before_it():
    task = small().build(LIBRARY)
    params, batch = task.init(generator(0)), wave_batch()
    before = task.logits(params, batch)
    batch["obs"][:, 3] = batch["obs"][:, 3] % 10 + 1
    after = task.logits(params, batch)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert ((after[:, 3:] - before[:, 3:]).abs().amax((0, 2)) > 1e-3).all()


def test_nothing_but_the_mask_tells_positions_apart():
    task = small().build(LIBRARY)
    params, batch = task.init(generator(0)), wave_batch()
    last = task.logits(params, batch)[:, -1]
    batch["obs"][:, :5] = batch["obs"][:, :5].flip(1)
    one_layer = small(layers=1).build(LIBRARY)
    torch.testing.assert_close(
        one_layer.logits(params, batch)[:, -1], one_layer.logits(params, wave_batch())[:, -1], atol=1e-5, rtol=0
    )
    assert (task.logits(params, batch)[:, -1] - last).abs().max() > 1e-3


def test_dropout_falls_on_both_parts_of_every_layer_anew():
    """What the four parts add is 1, 10, 100 and 1000 everywhere, so that the last norm shows what is left of each."""
    static = small(width=64, vocab_size=64, dropout=0.5, batch_size=8, sequence_length=32)
    task = static.build(LIBRARY)
    params = task.init(generator(0))
    places = ("layer0/attention/output", "layer0/mlp1", "layer1/attention/output", "layer1/mlp1")
    params |= {f"{place}/w": torch.zeros_like(params[f"{place}/w"]) for place in places}
    params |= {f"{place}/b": torch.full((64,), 10.0**i) for i, place in enumerate(places)}
    params |= {"embedding/w": torch.zeros(64, 64), "readout/w": torch.eye(64)}
    batch = rows(task.batch("train", keys(2, "dropout")), 0)

    def kept(batch):
        shown = task.logits(params, batch).flatten(0, 1)
        low, high = shown.amin(-1, keepdim=True), shown.amax(-1, keepdim=True)
        return ((shown - low) / (high - low) * 1111).round()

    sums = kept(batch)
    assert torch.equal(sums, kept(batch))
    assert not torch.equal(sums, kept({**batch, "key": batch["key"] + 1}))
    digits = torch.stack([sums // 10**i % 10 for i in range(4)])
    # The few rows in which no number lost all four parts, or none kept them, are stretched by something else.
    decoded = digits[:, digits.amax((0, 2)) == 1].flatten(1)
    assert decoded.shape[1] > 64 * 200
    assert set(decoded.unique().tolist()) == {0, 1}
    assert ((decoded.mean(1) - 0.5).abs() < 0.03).all()
    assert (torch.corrcoef(decoded) - torch.eye(4)).abs().max() < 0.04


def test_weights_start_as_in_haiku():
    static = small(width=112, heads=4, layers=3, vocab_size=200)
    params = static.build(LIBRARY).init(generator(0))
    # haiku's own: query 0.0767, attention output 0.0724, mlp0 0.0766, mlp1 0.0387, last map 0.0834, embedding 0.881
    golden = {
        "layer1/attention/query/w": math.sqrt(2 / 3 / 112),
        "layer1/attention/output/w": math.sqrt(2 / 3 / 128),
        "layer2/mlp0/w": math.sqrt(2 / 3 / 112),
        "layer2/mlp1/w": math.sqrt(2 / 3 / 448),
        "readout/w": 0.8796 * 112**-0.5,
        "embedding/w": 0.8796,
    }
    for name, deviation in golden.items():
        assert params[name].std().item() == pytest.approx(deviation, rel=0.02), name
    for name, leaf in params.items():
        if leaf.ndim == 1:
            assert (leaf == (1 if name.endswith("/scale") else 0)).all(), name


@pytest.mark.parametrize(
    ("width", "heads", "layers", "length", "excess", "deviation"),
    [(20, 5, 1, 8, 0.397, 0.047), (32, 4, 2, 8, 0.381, 0.033), (32, 4, 1, 32, 0.387, 0.028)],
)
def test_the_first_loss_is_log_v_and_what_the_start_adds(width, heads, layers, length, excess, deviation):
    # Golden: haiku's excess over log 259, mean and standard deviation of ten seeds on uniformly random tokens. The
    # last map sees a normalised vector, so logits have variance 0.88**2, half of which the loss exceeds log V by.
    task = TransformerLm(
        width=width, heads=heads, layers=layers, sequence_length=length, vocab_size=259, batch_size=64
    ).build(RandomLibrary(500))
    drawn = make_particles(task, 4)
    losses = task.losses(drawn.params, drawn.batch) - math.log(259)
    assert ((losses - excess).abs() < 4 * deviation).all()


def test_it_learns_text():
    task = TransformerLm(batch_size=32, sequence_length=16, width=64, layers=2).build(Library(DataConfig()))
    params = {name: leaf.requires_grad_() for name, leaf in task.init(generator(0)).items()}
    adam = torch.optim.Adam(params.values(), lr=0.01)
    batches = task.batch("train", keys(30, "learn"))
    for step in range(30):
        loss = task.loss(params, rows(batches, step))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 3.2  # nats for a byte; the bytes' own frequencies need 3.3


# ---- the published tasks


def count(heads, width, layers, vocab=32_100):
    """haiku's: two norms, four maps of 32 numbers a head, two of the perceptron; a table, a norm, the last map."""
    inner = 32 * heads
    attention = 3 * (width + 1) * inner + (inner + 1) * width
    perceptron = (width + 1) * 4 * width + (4 * width + 1) * width
    return vocab * width + layers * (4 * width + attention + perceptron) + 2 * width + (width + 1) * vocab


GOLDEN = {
    # 32100 * 20 + (4 * 20 + 3 * 21 * 160 + 161 * 20 + 21 * 80 + 81 * 20) + 2 * 20 + 21 * 32100
    "TransformerLM_LM1B_MultiRuntime_0": 1_332_820,
    "TransformerLM_LM1B_MultiRuntime_1": 1_596_804,
    "TransformerLM_LM1B_MultiRuntime_2": 2_137_124,
    "TransformerLM_LM1B_MultiRuntime_3": 2_111_844,
    "TransformerLM_LM1B_MultiRuntime_4": 2_137_124,
    "TransformerLM_LM1B_MultiRuntime_5": 2_111_844,
    "TransformerLM_LM1B_MultiRuntime_6": 5_271_940,
    "TransformerLM_LM1B_MultiRuntime_7": 7_830_212,
    "TransformerLM_LM1B_MultiRuntime_8": 8_448_228,
    "TransformerLM_LM1B_MultiRuntime_9": 17_784_420,
    "TransformerLM_LM1B_MultiRuntime_10": 18_442_724,
    "TransformerLM_LM1B_MultiRuntime_11": 22_516_548,
    "TransformerLM_LM1B_5layer_32width": 2_296_804,
    "TransformerLM_LM1B_5layer_128width": 9_570_916,
    "TransformerLM_LM1B_5layer_256width": 20_416_612,
    # 32100 * 512 + 5 * (4 * 512 + 3 * 513 * 256 + 257 * 512 + 513 * 2048 + 2049 * 512) + 2 * 512 + 513 * 32100
    "TransformerLM_LM1B_5layer_512width": 46_040_164,
}
"""Parameters as haiku counts them (jax.eval_shape of the originals' model)."""

SHAPES = {  # batch size, sequence length, dropout
    **dict(
        zip(
            (f"TransformerLM_LM1B_MultiRuntime_{i}" for i in range(12)),
            (
                *((4, 8, 0.1), (4, 8, 0.1), (8, 8, 0), (8, 16, 0), (16, 4, 0), (8, 32, 0)),
                *((4, 64, 0), (16, 32, 0), (64, 32, 0), (64, 64, 0), (128, 64, 0), (256, 32, 0)),
            ),
            strict=True,
        )
    ),
    **{f"TransformerLM_LM1B_5layer_{width}width": (32, 128, 0.1) for width in (32, 128, 256, 512)},
}


def test_published_tasks_have_the_parameters_of_haiku():
    assert {name: static.work().parameters for name, static in TASKS.items()} == GOLDEN
    assert count(5, 20, 1) == GOLDEN["TransformerLM_LM1B_MultiRuntime_0"]
    assert count(19, 304, 2) == GOLDEN["TransformerLM_LM1B_MultiRuntime_11"]
    assert count(8, 512, 5) == GOLDEN["TransformerLM_LM1B_5layer_512width"]


def test_published_tasks_have_their_data():
    assert {name: (one.batch_size, one.sequence_length, one.dropout) for name, one in TASKS.items()} == SHAPES
    assert {(one.corpus, one.vocabulary, one.vocab_size) for one in TASKS.values()} == {("lm1b", "32k", 32_100)}
    assert {one.normalizer for one in TASKS.values()} == {"fixed"}


@pytest.mark.parametrize("name", ["TransformerLM_LM1B_MultiRuntime_0", "TransformerLM_LM1B_MultiRuntime_2"])
def test_a_published_task_is_built_and_starts_near_log_v(name):
    task = TASKS[name].build(LIBRARY)
    drawn = make_particles(task, 1)
    assert parameter_count(drawn.params) == GOLDEN[name]
    # haiku's own, of two seeds each: 10.87 and 10.89, 10.72 and 10.81
    assert 0 < task.losses(drawn.params, drawn.batch).item() - math.log(32_100) < 1


# ---- the distribution

RANGES = {"heads": (8, 128), "layers": (1, 8), "batch_size": (4, 512), "sequence_length": (4, 512)}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["paper", "code"]))
def test_draws_are_in_range_and_run(seed, ranges):
    static = draw(np.random.default_rng(seed), Pool(ranges=ranges))
    for field, (low, high) in RANGES.items():
        assert low <= getattr(static, field) <= high
    assert static.width % static.heads == 0
    assert 8 <= static.width // static.heads <= 128
    assert (static.dropout, static.normalizer) == (0.1, "parametric")
    if static.vocabulary == "bytes":
        assert 100 <= static.vocab_size <= 259
    else:
        assert 100 <= static.vocab_size <= 10_000
    shrunk = {"batch_size": 2, "sequence_length": 4, "heads": min(static.heads, 16), "layers": min(static.layers, 3)}
    static = dataclasses.replace(static, **shrunk, width=min(static.width, 128))
    task = static.build(LIBRARY)
    drawn = make_particles(task, 2, seed)
    assert task.losses(drawn.params, drawn.batch).isfinite().all()
    assert parameter_count(rows(drawn.params, 0)) == static.work().parameters


def test_draws_cover_the_distribution():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Pool()) for _ in range(3000)]
    per_head = sorted(static.width // static.heads for static in drawn)
    heads = sorted(static.heads for static in drawn)
    layers = [static.layers for static in drawn]
    for values in (per_head, heads):
        assert values[1500] == pytest.approx(math.sqrt(8 * 129), rel=0.12)
        assert (values[0], values[-1]) == (8, 128)
    assert set(layers) == set(range(1, 9))
    assert layers.count(1) / 3000 == pytest.approx(math.log(2) / math.log(9), abs=0.04)
    assert abs(np.corrcoef([s.heads for s in drawn], [s.width // s.heads for s in drawn])[0, 1]) < 0.07


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width": 0}, "width"),
        ({"heads": 0}, "heads"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"vocab_size": 260}, "vocab_size"),
    ],
)
def test_what_cannot_be_is_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        TransformerLm(**changes)
    assert caught.value.field == field
