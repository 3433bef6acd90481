"""Corpora, from published files to batches of windows: what is drawn, from where, and what damaged files say."""

import logging
import re
from pydoc_data.topics import topics

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError, DataConfig
from tasks.data import corpora, text
from tasks.data.corpora import open_corpus
from tasks.data.files import DataRoot
from tasks.data.text import TextDataset, Tokens, load_text, tokenized
from tasks.errors import DataError
from tasks.random import keys
from tests.image_files import tar_gz
from tests.text_files import LM1B, lm1b_members, sentences, table, write

CPU = torch.device("cpu")
PYDOC = b"".join(topics[name].encode() + b"\xfe" for name in sorted(topics))


@pytest.fixture(autouse=True)
def read_everything_anew():
    text._tokenized.cache_clear()


def place(tmp_path, **config):
    return DataRoot(DataConfig(**{"root": str(tmp_path), "cache": str(tmp_path / "cache"), **config}))


def content(tokens):
    """The text of ``bytes`` ids, with 0xFE where a document ends."""
    return (tokens.on(CPU).numpy() - np.uint8(3)).tobytes()


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


# Corpora


LONG = sentences(30), sentences(20, 30), sentences(10, 50)  # two training shards, one held out
DOCUMENTS = "".join(f"{line}\ufffe" for line in LONG[0] + LONG[1]).encode().replace("\ufffe".encode(), b"\xfe")
HELD_OUT = "".join(f"{line}\ufffe" for line in LONG[2]).encode().replace("\ufffe".encode(), b"\xfe")


def lm1b_files(form):
    members = lm1b_members([[*LONG[0], "  "], LONG[1]], [LONG[2]])
    if form == "shards":
        return {f"lm1b/{name}": data.removesuffix(b"\n") for name, data in members.items()}
    if form == "archive":
        return {f"lm1b/{LM1B}.tar.gz": tar_gz(members | {f"{LM1B}/README": b"\xff not text"})}
    return {
        "lm1b/plain_text/train-00000-of-00002.parquet": table([*LONG[0], "", None]),
        "lm1b/plain_text/train-00001-of-00002.parquet": table(LONG[1]),
        "lm1b/plain_text/test-00000-of-00001.parquet": table(LONG[2]),
    }


@pytest.mark.parametrize("form", ["shards", "archive", "parquet"])
def test_lm1b_in_all_its_forms(tmp_path, form):
    files = place(write(tmp_path, lm1b_files(form)))
    source = open_corpus("lm1b", files)
    assert b"".join(source.training()) == DOCUMENTS
    assert b"".join(source.held_out()) == HELD_OUT
    train, outer_valid, test = map(content, tokenized("lm1b", "bytes", files).splits)
    assert test == HELD_OUT
    assert DOCUMENTS.startswith(train)
    assert DOCUMENTS.endswith(outer_valid)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_blocks_do_not_matter(tmp_path, monkeypatch, block):
    monkeypatch.setattr(corpora, "_BLOCK", block)
    files = place(write(tmp_path, lm1b_files("archive") | {"a.txt": "aé€😀".encode() * 5}))
    assert b"".join(open_corpus("lm1b", files).training()) == DOCUMENTS
    assert b"".join(open_corpus("text:a.txt", files).training()) == "aé€😀".encode() * 5 + b"\xfe"


def test_wikipedia_is_the_texts_of_its_shards_and_a_part_of_them_will_do(tmp_path):
    shards = {
        f"wikipedia/train-{index:05d}-of-00041.parquet": table([f"Article {index}\n\nText ."] * 9) for index in (7, 2)
    }
    files = place(write(tmp_path, shards | {"wikipedia/train-00003-of-00041.parquet.part": b"half"}))
    expected = b"Article 2\n\nText .\xfe" * 9 + b"Article 7\n\nText .\xfe" * 9
    assert b"".join(open_corpus("wikipedia", files).training()) == expected
    assert open_corpus("wikipedia", files).held_out is None


def test_own_files_below_the_root_elsewhere_and_by_pattern(tmp_path):
    files = place(
        write(tmp_path / "root", {"b/2.txt": b"two", "b/1.txt": b"one", "b/c/3.txt": b"three", "b/x.md": b"no"})
    )
    files = DataRoot(DataConfig(root=str(tmp_path / "root")))
    elsewhere = DataRoot(DataConfig())
    for pattern, where in (
        ("b/*.txt", files),
        (f"{tmp_path}/root/b/*.txt", elsewhere),
        (f"file://{tmp_path}/root/b/*.txt", files),
    ):
        assert b"".join(open_corpus(f"text:{pattern}", where).training()) == b"one\xfetwo\xfe"
    assert b"".join(open_corpus("text:b/**/*.txt", files).training()) == b"one\xfetwo\xfethree\xfe"
    write(tmp_path / "root", {"t.parquet": table(["a", "b"]), "shakespeare/input.txt": b"To be"})
    assert b"".join(open_corpus("parquet:t.parquet", files).training()) == b"a\xfeb\xfe"
    assert b"".join(open_corpus("shakespeare", files).training()) == b"To be\xfe"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("lm1", "expected one of pydoc, lm1b, wikipedia, shakespeare, text:PATTERN, parquet:PATTERN.*mean 'lm1b'"),
        ("mnist", "expected one of pydoc"),
        ("lm1b", "lm1b"),
        ("wikipedia", r"wikipedia/\*\*/\*\.parquet"),
        ("text:none.txt", r"none\.txt"),
        ("text:folder", r"not a folder|folder/\*"),
        ("text:", "expected"),
    ],
)
def test_corpora_that_are_not_there(tmp_path, corpus, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        open_corpus(corpus, place(tmp_path))


def test_without_a_root_there_is_only_what_is_embedded():
    files = DataRoot(DataConfig())
    open_corpus("pydoc", files)
    with pytest.raises(DataError, match=r"data\.root = None.*lm1b"):
        open_corpus("lm1b", files)


def test_lm1b_without_what_it_consists_of(tmp_path):
    with pytest.raises(DataError, match=r"news\.en-00001-of-00100.*README"):
        open_corpus("lm1b", place(write(tmp_path, {"lm1b/README": b"x"})))
    write(tmp_path, {"lm1b/test.parquet": table(["x"])})
    with pytest.raises(DataError, match=r"training part beside .*test\.parquet"):
        open_corpus("lm1b", place(tmp_path))


# Damage


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("data", "byte", "found"),
    [(b"good \xff bad", 5, "0xff"), (b"\xc3\xa9\xc3(", 2, "0xc3"), (b"caf\xc3", 3, "0xc3"), (b"a\xfeb", 1, "0xfe")],
)
def test_invalid_utf8_names_the_file_and_the_byte(tmp_path, monkeypatch, block, data, byte, found):
    monkeypatch.setattr(corpora, "_BLOCK", block)
    write(tmp_path, {"a.txt": b"x" * 10, "b.txt": data})
    with pytest.raises(DataError, match=rf"b\.txt: expected UTF-8, found byte {found} at byte {byte}$"):
        tokenized("text:*.txt", "bytes", place(tmp_path))


def test_invalid_utf8_in_a_member_of_an_archive(tmp_path):
    members = lm1b_members([["good", "b"]], [["x"]])
    name = next(iter(members))
    files = place(write(tmp_path, {f"lm1b/{LM1B}.tar.gz": tar_gz(members | {name: b"good\nb\xffd\n"})}))
    with pytest.raises(DataError, match=rf"tar\.gz:{name}: .* 0xff at byte 6$"):
        list(open_corpus("lm1b", files).training())


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_archive(tmp_path, keep):
    whole = tar_gz(lm1b_members([sentences(900)], [sentences(900, 900)]))
    cut = int(len(whole) * keep)
    files = place(write(tmp_path, {f"lm1b/{LM1B}.tar.gz": whole[:cut]}))
    with pytest.raises(DataError, match=rf"{LM1B}\.tar\.gz: archive is truncated or damaged near byte {cut} of {cut}"):
        tokenized("lm1b", "bytes", files)


def test_a_damaged_archive(tmp_path):
    whole = bytearray(tar_gz(lm1b_members([sentences(9)], [sentences(9)])))
    whole[-6] ^= 1  # gzip's checksum
    files = place(write(tmp_path, {f"lm1b/{LM1B}.tar.gz": bytes(whole)}))
    with pytest.raises(DataError, match=r"tar\.gz: archive is truncated or damaged.*CRC"):
        tokenized("lm1b", "bytes", files)
    files = place(write(tmp_path, {f"lm1b/{LM1B}.tar.gz": tar_gz({"other/file": b"x"})}))
    with pytest.raises(DataError, match=r"tar\.gz: expected members called .*news.*found none"):
        tokenized("lm1b", "bytes", files)


def damaged(kind):
    whole = table([f"text {index} {'x' * 50}" for index in range(50)])
    at = len(whole)
    middle = bytearray(whole)
    middle[60:400] = b"\0" * 340
    half = at // 2
    return {
        "truncated": (whole[:half], rf"not a whole parquet file of {half} bytes: expected b'PAR1' at byte {half - 4}"),
        "empty": (b"", "not a whole parquet file of 0 bytes: expected b'PAR1' at byte 0, found b''"),
        "text": (b"just some text", "not a whole parquet file of 14 bytes: expected b'PAR1' at byte 0, found b'just'"),
        "footer": (whole[:-8] + b"\xff\xff\xff\x7f" + b"PAR1", "parquet is truncated or damaged"),
        "pages": (bytes(middle), "parquet is truncated or damaged"),
        "column": (table(["a"], column="content"), "expected a column text, found id, content"),
        "kind": (table([1, 2]), "expected strings in the column text, found int64"),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "footer", "pages", "column", "kind"])
def test_damaged_parquet_names_the_file(tmp_path, kind):
    data, message = damaged(kind)
    write(tmp_path, {"wikipedia/train-0.parquet": table(["good"] * 40), "wikipedia/train-1.parquet": data})
    with pytest.raises(DataError, match=rf"train-1\.parquet: {message}"):
        tokenized("wikipedia", "bytes", place(tmp_path))
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("rows", [1, 1024])
def test_invalid_utf8_in_parquet_names_the_row(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(corpora, "_ROWS", rows)
    good, bad = b"fine", b"ab\xffc"
    values = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(np.array([0, 4, 8, 12], np.int32).tobytes()), pa.py_buffer(good + bad + good)],
    )
    files = place(write(tmp_path, {"t.parquet": table(values)}))
    with pytest.raises(DataError, match=r"t\.parquet: .* 0xff at byte 2 of row 1$"):
        tokenized("parquet:t.parquet", "bytes", files)


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
    from fsspec.core import url_to_fs

    system, base = url_to_fs(root, **options)
    for path, data in lm1b_files("parquet").items():
        system.pipe_file(f"{base}/{path}", data)
    system.pipe_file(f"{base}/shakespeare/input.txt", b"To be, or not to be " * 20)
    files = DataRoot(DataConfig(root=root, cache=cache, options=options))
    for _ in range(2):
        text._tokenized.cache_clear()
        assert content(tokenized("lm1b", "bytes", files).splits[2]) == HELD_OUT
        assert len(tokenized("shakespeare", "32k", files).splits[0]) > 30
        assert b"".join(open_corpus("text:shake*/*.txt", files).training()).startswith(b"To be")
    system.pipe_file(f"{base}/lm1b/plain_text/test-00000-of-00001.parquet", damaged("truncated")[0])
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
