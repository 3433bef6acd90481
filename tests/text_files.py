"""Corpora in their published formats, made small: LM1B as shards, archive and parquet; Wikipedia's parquet."""

import io

import pyarrow as pa
from pyarrow import parquet

LM1B = "1-billion-word-language-modeling-benchmark-r13output"
TRAINING, HELD_OUT = "training-monolingual.tokenized.shuffled", "heldout-monolingual.tokenized.shuffled"


def sentences(count, first=0):
    return [f"Sentence {index} is über {index * index} words long ." for index in range(first, first + count)]


def lm1b_members(training, held_out):
    """Path in the archive -> content, for one list of sentences a shard."""
    parts = [
        (TRAINING, "news.en-{:05d}-of-00100", training, 1),
        (HELD_OUT, "news.en.heldout-{:05d}-of-00050", held_out, 0),
    ]
    return {
        f"{LM1B}/{folder}/{name.format(index)}": "".join(f"{line}\n" for line in shard).encode()
        for folder, name, shards, first in parts
        for index, shard in enumerate(shards, first)
    }  # fmt: skip


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
