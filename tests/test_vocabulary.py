"""Vocabularies: which ids are reserved, what a trained one looks like, and files of others."""

import io
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from configs.schema import DataConfig
from tasks.data import vocabulary
from tasks.data.files import DataRoot
from tasks.data.vocabulary import BYTES_SIZE, T5_FILE, T5_SIZE, Bpe, SentencePiece, open_vocabulary, train_bpe
from tasks.errors import DataError
from tests.text_files import sentences, write

TEXTS = [" ".join(sentences(20, first)) for first in range(0, 200, 20)]
RESERVED = {"<pad>": 0, "</s>": 1, "<unk>": 2}


@pytest.fixture(scope="module")
def trained():
    return train_bpe(lambda: iter(TEXTS))


def sentencepiece_model(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)), model_writer=model, vocab_size=70, minloglevel=2, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def like_t5():
    return sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def place(tmp_path):
    return DataRoot(DataConfig(root=str(tmp_path), cache=str(tmp_path / "cache")))


def test_the_sizes_of_the_originals():
    assert BYTES_SIZE == 3 + 256  # seqio's ByteVocabulary
    assert T5_SIZE == 32_000 + 100  # T5's pieces and its extra ids


# BPE


def test_ids_are_ranks_by_frequency_after_the_reserved_ones(trained):
    vocab = json.loads(trained)["model"]["vocab"]
    assert {token: vocab[token] for token in RESERVED} == RESERVED
    assert sorted(vocab.values()) == list(range(len(vocab)))
    counts = Counter(np.concatenate(Bpe(trained, "trained").encode(TEXTS)).tolist())
    in_order = [counts[index] for index in range(3, len(vocab))]
    assert in_order == sorted(in_order, reverse=True)
    assert in_order[0] > 10 * in_order[len(in_order) // 3] > 0
    assert not {0, 1, 2} & set(counts)


def test_it_depends_on_the_texts_alone(trained):
    code = "import json, sys; from tasks.data.vocabulary import train_bpe; texts = json.load(sys.stdin); "
    code += "sys.stdout.write(train_bpe(lambda: iter(texts)))"
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    again = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, env=environment)
    assert again.stdout == trained, again.stderr[-2000:]
    assert train_bpe(lambda: iter(TEXTS[:-1])) != trained


@given(st.lists(st.text(), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_no_text_is_unknown_and_every_text_comes_back(trained, texts):
    decode = Tokenizer.from_str(trained).decode
    for text, ids in zip(texts, Bpe(trained, "trained").encode(texts), strict=True):
        assert ids.dtype == np.int32
        assert (ids >= 3).all()
        assert decode(ids.tolist()) == text


def test_the_names_of_reserved_tokens_are_ordinary_text(trained):
    (ids,) = Bpe(trained, "trained").encode(["<pad></s><unk>"])
    assert len(ids) > 3
    assert (ids >= 3).all()


def test_it_ends_where_pairs_are_rare_or_ids_run_out(trained, monkeypatch):
    size = Bpe(trained, "trained").size
    assert 3 + 256 < size < 1000
    monkeypatch.setattr(vocabulary, "MAX_IDS", 300)
    assert Bpe(train_bpe(lambda: iter(TEXTS)), "smaller").size == 300
    assert Bpe(train_bpe(lambda: iter(["ab"])), "smallest").size == 3 + 256


def test_a_file_of_ones_own(tmp_path, trained):
    foreign = json.loads(trained)
    vocab = foreign["model"]["vocab"]
    others = [token for token in vocab if token not in RESERVED]
    foreign["model"]["vocab"] = {token: index for index, token in enumerate(others)}  # reserves nothing
    write(tmp_path, {"own.json": trained.encode(), "foreign.json": json.dumps(foreign).encode()})
    own, moved = (open_vocabulary(f"bpe:{name}.json", place(tmp_path), iter, "") for name in ("own", "foreign"))
    assert own.size == moved.size == len(vocab)
    assert np.array_equal(own.encode(TEXTS)[0], moved.encode(TEXTS)[0])
    assert own.identity != moved.identity


def test_special_tokens_padding_and_truncation_of_a_foreign_file_are_not_used(tmp_path, trained):
    tokenizer = Tokenizer.from_str(trained)
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    found = Bpe(tokenizer.to_str(), "foreign").encode(["<pad> hello", TEXTS[0]])
    assert (found[0] >= 3).all()
    assert len(found[1]) > 16


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{}", "expected a tokenizer.json"), (b"\xff", "expected UTF-8, found byte 0xff at 0"), (b"", "tokenizer.json")],
)
def test_what_is_no_tokenizer_json(tmp_path, data, message):
    write(tmp_path, {"bad.json": data})
    with pytest.raises(DataError, match=rf"bad\.json: .*{message}"):
        open_vocabulary("bpe:bad.json", place(tmp_path), iter, "")


# SentencePiece


def test_pieces_of_a_model_that_reserves_as_t5_does(tmp_path, like_t5):
    write(tmp_path, {"own.model": like_t5})
    found = open_vocabulary("sentencepiece:own.model", place(tmp_path), iter, "")
    processor = sentencepiece.SentencePieceProcessor(model_proto=like_t5)
    assert found.size == processor.get_piece_size() == 70
    text = sentences(1)[0]
    assert found.encode([text])[0].tolist() == processor.encode(text)
    ids = found.encode(["Sentence 漢", ""])
    assert 2 in ids[0]
    assert [part.dtype for part in ids] == [np.int32] * 2
    assert len(ids[1]) == 0


def test_ids_of_another_model_are_moved_up(like_t5):
    model = sentencepiece_model()  # unknown 0, beginning 1, end 2
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    found = SentencePiece(model, "other.model")
    assert found.size == processor.get_piece_size() + 3
    text = sentences(1)[0]
    assert found.encode([text])[0].tolist() == [index + 3 for index in processor.encode(text)]
    assert found.encode(["漢"])[0].tolist()[-1] == 2
    assert found.identity != SentencePiece(like_t5, "t5").identity


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x0a\x03abc"])
def test_what_is_no_model(tmp_path, data):
    write(tmp_path, {"bad.model": data})
    with pytest.raises(DataError, match=r"bad\.model: expected a SentencePiece model"):
        open_vocabulary("sentencepiece:bad.model", place(tmp_path), iter, "")


def test_without_the_package_the_message_says_what_to_install(like_t5, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"t5\.model: needs the package sentencepiece.*paceline\[text\]"):
        SentencePiece(like_t5, "t5.model")


# Names


def test_32k_is_t5s_where_it_is_there_and_else_trained_once(tmp_path, like_t5, monkeypatch):
    trainings = []
    train = vocabulary.train_bpe
    monkeypatch.setattr(vocabulary, "train_bpe", lambda texts: (trainings.append(1), train(texts))[1])
    files = place(tmp_path)
    first, again = (open_vocabulary("32k", files, lambda: iter(TEXTS), "texts") for _ in range(2))
    assert len(trainings) == 1
    assert isinstance(first, Bpe)
    assert first.identity == again.identity
    open_vocabulary("32k", files, lambda: iter(TEXTS[:3]), "others")
    assert len(trainings) == 2
    open_vocabulary("32k", DataRoot(DataConfig(cache=str(tmp_path / "cache"))), lambda: iter(TEXTS), "texts")
    assert len(trainings) == 2
    write(tmp_path, {T5_FILE: like_t5})
    assert open_vocabulary("32k", files, lambda: iter(TEXTS), "texts").identity == SentencePiece(like_t5, "").identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("byte", r"expected one of bytes, 32k, bpe:PATH, sentencepiece:PATH \(did you mean 'bytes'\?\)"),
        ("bpe:", "expected one of bytes"),
        ("bpe:none.json", r"none\.json: expected .* found none"),
        ("sentencepiece:none.model", r"none\.model: expected .* found none"),
    ],
)
def test_vocabularies_that_are_not_there(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        open_vocabulary(name, place(tmp_path), iter, "")
