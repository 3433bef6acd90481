"""Corpora, from published files to batches of windows: what is drawn, from where, and what damaged files say."""

import logging
import re
from pydoc_data.topics import topics

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from configs.schema import DataConfig
from tasks.data import corpora, text
from tasks.data.corpora import open_corpus
from tasks.data.files import DataRoot
from tasks.data.text import TextDataset, Tokens, load_text, tokenized
from tasks.errors import DataError
from tasks.random import keys
from tests.text_files import HELD_OUT, content, damaged, lm1b_files, place, sentences, write

CPU = torch.device("cpu")
PYDOC = b"".join(topics[name].encode() + b"\xfe" for name in sorted(topics))


@pytest.fixture(autouse=True)
def read_everything_anew():
    text._tokenized.cache_clear()


def dataset(ids, vocab_size=256, sequence_length=4):
    return TextDataset(Tokens(torch.as_tensor(ids)), vocab_size, sequence_length)


# Windows


def test_a_window_is_consecutive_ids_and_the_target_is_one_later():
    found = load_text("pydoc", "bytes", 256, 32)
    for split in (found.train, found.outer_valid, found.test):
        batch = split.sample(keys(3, "windows"), 5)
        assert batch["obs"].shape == batch["target"].shape == (3, 5, 32)
        assert batch["obs"].dtype == batch["target"].dtype == torch.int64
        assert torch.equal(batch["obs"][..., 1:], batch["target"][..., :-1])
        whole = content(split.tokens)
        for obs, target in zip(batch["obs"].reshape(-1, 32), batch["target"].reshape(-1, 32), strict=True):
            window = torch.cat([obs, target[-1:]]).numpy().astype(np.uint8) - np.uint8(3)
            assert window.tobytes() in whole


def test_a_row_depends_on_its_own_key_alone():
    split = load_text("pydoc", "bytes", 256, 8).train
    several = keys(4, "rows")
    together = split.sample(several, 3)["obs"]
    for row in range(4):
        assert torch.equal(split.sample(several[row : row + 1], 3)["obs"][0], together[row])
    assert len({tuple(window.tolist()) for window in together.reshape(-1, 8)}) > 6


def test_every_offset_is_as_likely():
    split = dataset(torch.arange(3, 23, dtype=torch.uint8), sequence_length=4)  # 20 ids, 16 windows
    assert split.num_examples == 16
    first = split.sample(keys(50, "offsets"), 64)["obs"][..., 0].flatten() - 3
    counts = torch.bincount(first, minlength=16)
    assert len(counts) == 16
    assert counts.min() > 140
    assert counts.max() < 260  # 200 expected, standard deviation 14


def test_more_than_2_to_the_31_offsets():
    count = (1 << 33) + 12345
    offsets = text._offsets(keys(64, "many"), count, 64)
    assert 0 <= offsets.min() < count // 100
    assert count - count // 100 < offsets.max() < count
    assert len(offsets.unique()) > 4000
    halves = torch.stack([offsets >> 16, offsets & 0xFFFF]).flatten(1).double()
    assert torch.corrcoef(halves)[0, 1].abs() < 0.1  # 4,096 of them: standard deviation 0.016
    assert torch.equal(text._offsets(keys(2, "few"), 10, 3), text._offsets(keys(2, "few"), 10, 3))


def test_ids_from_vocab_size_on_are_unknown():
    ids = torch.tensor([3, 98, 99, 100, 101, 259, 31999], dtype=torch.int16)
    batch = dataset(ids, vocab_size=100, sequence_length=6).sample(keys(1, "x"), 1)
    assert batch["obs"][0, 0].tolist() == [3, 98, 99, 2, 2, 2]
    assert batch["target"][0, 0].tolist() == [98, 99, 2, 2, 2, 2]


@given(st.integers(4, 300), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_no_id_reaches_vocab_size_and_none_is_padding(vocab_size, sequence_length):
    batch = load_text("pydoc", "bytes", vocab_size, sequence_length).test.sample(keys(2, "x"), 4)
    for leaf in batch.values():
        assert leaf.shape == (2, 4, sequence_length)
        assert leaf.min() >= 1
        assert leaf.max() < vocab_size


def test_tokens_are_copied_to_a_device_once():
    tokens = Tokens(torch.arange(9))
    meta = torch.device("meta")
    assert tokens.on(meta) is tokens.on(meta)
    assert tokens.on(meta).device == meta
    assert tokens.on(CPU) is tokens.on(CPU)


# Splits


def test_the_splits_of_a_single_text_are_disjoint_and_contiguous(tmp_path):
    write(tmp_path, {"a.txt": bytes(range(32, 127)) * 10})
    source = bytes(range(32, 127)) * 10 + b"\xfe"  # 951 bytes: 855 for training
    train, outer_valid, test = map(content, tokenized("text:a.txt", "bytes", place(tmp_path)).splits)
    assert train == source[:684]
    assert outer_valid == source[769:855]
    assert test == source[855:]


def test_pydoc_is_its_topics_in_order():
    train, outer_valid, test = map(content, tokenized("pydoc", "bytes", DataRoot(DataConfig())).splits)
    training = len(PYDOC) - len(test)
    assert PYDOC.startswith(train)
    assert PYDOC[:training].endswith(outer_valid)
    assert PYDOC.endswith(test)
    assert [round(len(part) / len(PYDOC), 3) for part in (train, outer_valid, test)] == [0.72, 0.09, 0.1]
    assert len(train) + len(outer_valid) + len(test) < len(PYDOC)


@given(st.text(min_size=40, max_size=200))
@settings(max_examples=50, deadline=None)
def test_no_character_is_cut_in_two(tmp_path_factory, written):
    root = tmp_path_factory.mktemp("cut")
    write(root, {"a.txt": written.encode(errors="ignore")})
    for part in tokenized("text:a.txt", "bytes", place(root)).splits:
        content(part).replace(b"\xfe", b"").decode()


def test_the_splits_are_the_same_in_every_vocabulary(tmp_path):
    from tokenizers import Tokenizer

    write(tmp_path, {"a.txt": "\n".join(sentences(400)).encode()})
    files = place(tmp_path)
    plain, merged = tokenized("text:a.txt", "bytes", files), tokenized("text:a.txt", "32k", files)
    (vocabulary,) = (tmp_path / "cache").glob("bpe-*")
    decode = Tokenizer.from_str(vocabulary.read_text()).decode
    for left, right in zip(plain.splits, merged.splits, strict=True):
        ids = right.on(CPU)
        assert ids.dtype == torch.int16
        assert len(ids) < len(left) / 2
        assert decode(ids[ids != 1].tolist()).encode() == content(left).replace(b"\xfe", b"")
    assert merged.splits[2].on(CPU)[-1] == 1  # the end of the document


def test_a_split_too_short_for_a_window_is_an_error_that_counts(tmp_path):
    write(tmp_path, {"a.txt": b"x" * 99})  # test 10, training 90: train 72, outer_valid 9
    files = place(tmp_path)
    load_text("text:a.txt", "bytes", 256, 8, files).outer_valid.sample(keys(1, "x"), 2)
    with pytest.raises(DataError, match=r"text:a.txt.*outer_valid has 9 tokens \(bytes\).*sequence_length \+ 1 = 10"):
        load_text("text:a.txt", "bytes", 256, 9, files)
    write(tmp_path, {"empty.txt": b""})
    with pytest.raises(DataError, match="train has 0 tokens"):
        load_text("text:empty.txt", "bytes", 256, 9, files)


@pytest.mark.parametrize(("field", "sizes"), [("vocab_size", (3, 8)), ("sequence_length", (256, 0))])
def test_sizes_out_of_range(field, sizes):
    with pytest.raises(ConfigError, match=field):
        load_text("pydoc", "bytes", *sizes)


# The cache, and other places than a disk


def test_a_corpus_is_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    reads = []
    read = corpora._checked
    monkeypatch.setattr(corpora, "_checked", lambda stream, name: (reads.append(name), read(stream, name))[1])
    write(tmp_path, {"a.txt": b"one " * 50})
    for expected in (1, 1):
        text._tokenized.cache_clear()
        assert content(tokenized("text:a.txt", "bytes", place(tmp_path)).splits[0]).startswith(b"one ")
        assert len(reads) == expected
    write(tmp_path, {"a.txt": b"other " * 50})
    text._tokenized.cache_clear()
    assert content(tokenized("text:a.txt", "bytes", place(tmp_path)).splits[0]).startswith(b"other ")
    assert len(reads) == 2


def test_tokens_of_another_vocabulary_are_not_taken(tmp_path):
    write(tmp_path, {"a.txt": b"one two " * 50, "bpe.json": b"{}"})
    files = place(tmp_path)
    first = tokenized("text:a.txt", "32k", files)
    (kept,) = (tmp_path / "cache").glob("bpe-*")
    write(tmp_path, {"other.json": kept.read_text().replace('"<unk>"', '"[UNK]"').encode()})
    before = {path.name for path in (tmp_path / "cache").iterdir()}
    second = tokenized("text:a.txt", "bpe:other.json", files)
    assert torch.equal(first.splits[0].on(CPU), second.splits[0].on(CPU))
    assert len({path.name for path in (tmp_path / "cache").iterdir()} - before) == 3


def test_a_damaged_entry_is_made_again(tmp_path):
    write(tmp_path, {"a.txt": b"abcdefgh" * 30})
    expected = content(tokenized("text:a.txt", "bytes", place(tmp_path)).splits[0])
    (entry,) = (tmp_path / "cache").iterdir()
    damage = bytearray(entry.read_bytes())
    damage[5] ^= 64
    entry.write_bytes(damage)
    text._tokenized.cache_clear()
    assert content(tokenized("text:a.txt", "bytes", place(tmp_path)).splits[0]) == expected
    assert entry.read_bytes() != bytes(damage)


def test_without_a_place_for_the_cache_it_is_made_in_memory(tmp_path, caplog):
    write(tmp_path, {"a.txt": b"abcdefgh " * 30, "cache": b"a file where the folder should be"})
    with caplog.at_level(logging.WARNING):
        found = tokenized("text:a.txt", "32k", place(tmp_path))
    assert len(found.splits[0]) > 20
    assert re.search(r"cache .*going on without it", caplog.text)


def check_remote(root, options, cache):
    files = DataRoot(DataConfig(root=root, cache=cache, options=options))
    system, base = files.resolve("")
    for path, data in lm1b_files("parquet").items():
        system.pipe_file(f"{base}{path}", data)
    system.pipe_file(f"{base}shakespeare/input.txt", b"To be, or not to be " * 20)
    for _ in range(2):
        text._tokenized.cache_clear()
        assert content(tokenized("lm1b", "bytes", files).splits[2]) == HELD_OUT
        assert len(tokenized("shakespeare", "32k", files).splits[0]) > 30
        assert b"".join(open_corpus("text:shake*/*.txt", files).training()).startswith(b"To be")
    system.pipe_file(f"{base}lm1b/plain_text/test-00000-of-00001.parquet", damaged("truncated")[0])
    system.invalidate_cache()
    text._tokenized.cache_clear()
    with pytest.raises(DataError, match=r"text-tests/lm1b/plain_text/test-0.*not a whole parquet"):
        tokenized("lm1b", "bytes", files)


def test_in_memory():
    check_remote("memory://text-tests", {}, "memory://text-cache")


@pytest.mark.s3
def test_on_s3(seaweed, monkeypatch):
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": seaweed.endpoint}
    )  # what FSSPEC_S3_ENDPOINT_URL sets, at import
    check_remote(f"{seaweed.root}/text-tests", seaweed.options, f"{seaweed.root}/text-cache")


# Pieces


@given(st.lists(st.text(" \n\taé€😀", max_size=30), max_size=8), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_whole_text(documents, size):
    stream = b"".join(document.encode() + b"\xfe" for document in documents)
    part = np.frombuffer(stream, np.uint8) + np.uint8(3)
    whole = text._PIECE
    text._PIECE = size
    try:
        pieces = list(text._pieces(part))
    finally:
        text._PIECE = whole
    assert b"".join(b"\xfe".join(piece.encode() for piece in texts) for texts in pieces) == stream


def test_pieces_do_not_change_the_tokens(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "\n\n  ".join(sentences(300)).encode(), "b.txt": b"x\n\n  y " * 50})
    files = place(tmp_path)
    expected = tokenized("text:*.txt", "32k", files)
    for entry in (tmp_path / "cache").glob("tokens-*"):
        entry.unlink()
    monkeypatch.setattr(text, "_PIECE", 100)
    text._tokenized.cache_clear()
    for left, right in zip(expected.splits, tokenized("text:*.txt", "32k", files).splits, strict=True):
        assert torch.equal(left.on(CPU), right.on(CPU))
