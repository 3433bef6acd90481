"""Corpora in their published formats, made small: LM1B as shards, archive and parquet; Wikipedia's parquet."""

import io

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from configs.schema import DataConfig
from tasks.data.files import DataRoot
from tests.image_files import tar_gz

LM1B = "1-billion-word-language-modeling-benchmark-r13output"


def sentences(count, first=0):
    return [f"Sentence {index} is über {index * index} words long ." for index in range(first, first + count)]


def lm1b_members(training, held_out):
    """Path in the archive -> content, for one list of sentences a shard."""
    parts = [
        ("training-monolingual.tokenized.shuffled/news.en-{:05d}-of-00100", training, 1),
        ("heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05d}-of-00050", held_out, 0),
    ]
    return {
        f"{LM1B}/{name.format(index)}": "".join(f"{line}\n" for line in shard).encode()
        for name, shards, first in parts
        for index, shard in enumerate(shards, first)
    }


def table(texts, column="text", kind=None, row_group_size=4):
    """Parquet as on the Hugging Face hub: a few other columns, and the text."""
    columns = {"id": [str(index) for index in range(len(texts))], column: pa.array(texts, kind)}
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def write(root, files):
    """Write ``files`` (path below the folder ``root`` -> content)."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


LONG = sentences(30), sentences(20, 30), sentences(10, 50)  # two training shards, one held out
DOCUMENTS = b"".join(line.encode() + b"\xfe" for line in LONG[0] + LONG[1])
HELD_OUT = b"".join(line.encode() + b"\xfe" for line in LONG[2])


def lm1b_files(form):
    """LM1B with DOCUMENTS for training and HELD_OUT, below a data root: as shards, archive or parquet."""
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


def damaged(kind):
    """Parquet that something is wrong with, and what the error says of it."""
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


def place(tmp_path, **config):
    """The data root ``tmp_path``, with the cache in it."""
    return DataRoot(DataConfig(**{"root": str(tmp_path), "cache": str(tmp_path / "cache"), **config}))


def content(tokens):
    """The text of ``bytes`` ids, with 0xFE where a document ends."""
    return (tokens.on(torch.device("cpu")).numpy() - np.uint8(3)).tobytes()
