"""Published corpora in all their forms, and damaged ones: what is read, and what the errors name."""

import numpy as np
import pyarrow as pa
import pytest

from configs.schema import DataConfig
from tasks.data import corpora, text
from tasks.data.corpora import open_corpus
from tasks.data.files import DataRoot
from tasks.data.text import tokenized
from tasks.errors import DataError
from tests.image_files import tar_gz
from tests.text_files import (
    DOCUMENTS,
    HELD_OUT,
    LM1B,
    content,
    damaged,
    lm1b_files,
    lm1b_members,
    place,
    sentences,
    table,
    write,
)


@pytest.fixture(autouse=True)
def read_everything_anew():
    text._tokenized.cache_clear()


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
