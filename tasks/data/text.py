"""Text data sets: a corpus as one long run of token ids for each split, and batches of windows into it.

Owns: the splits of a corpus, truncation of ids to a task's vocabulary, and the drawing of windows on the device.
Must never know a file format (corpora.py) or how text becomes tokens (vocabulary.py), or let a byte be in two splits.

A corpus is its documents one after the other, each ended by the id 1. Splits are contiguous and cut between two
characters: of the training part, ``train`` is [0, 80 %) of the bytes and ``outer_valid`` [90 %, 100 %), as for images;
``test`` is the corpus' held-out part, or the last 10 % of a corpus that has none, taken away first. They are the same
for every vocabulary.

A batch is windows of ``sequence_length + 1`` consecutive ids at uniformly random offsets. The originals
(learned_optimization/tasks/datasets/language.py) take the beginning of a document instead, cut at that length or padded
with 0, and mask the padding: of Wikipedia at length 32 they see nothing but first lines, and at length 512 most of a
batch of LM1B is padding. Windows use all of the text, and need no mask (0 never occurs, so one has no effect). Ids of
``vocab_size`` and above become the unknown id 2. (The originals' parametric tasks fold them onto others by
``1 + id % (vocab_size - 1)`` where ``id > vocab_size``, by which the id ``vocab_size`` stays out of range.)

Ids are kept in the smallest type that holds them, in the cache, once for each corpus and vocabulary. A process maps
that file; on another device there is one copy for all tasks. LM1B takes 4.1 GB as bytes and 2 GB as ``32k``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.checks import at_least
from configs.schema import DataConfig
from tasks.base import Batch, Dataset, Datasets
from tasks.data.corpora import END, Corpus, Stream, open_corpus
from tasks.data.files import DataRoot
from tasks.data.store import Bytes, Cache, digest
from tasks.data.vocabulary import (
    BYTES_SIZE,
    END_OF_DOCUMENT,
    MAX_TRAINING_BYTES,
    RESERVED,
    UNKNOWN,
    Ids,
    Vocabulary,
    open_vocabulary,
)
from tasks.errors import DataError
from tasks.random import fold, integers

_PIECE = 1 << 20  # bytes that are made tokens at a time, to bound memory
_BLANKS = np.frombuffer(b" \t\n\r", np.uint8) + np.uint8(RESERVED)


class Tokens:
    """The ids (N,) of one split, of any integer type; ``on`` a device they are copied to it once."""

    def __init__(self, ids: Tensor) -> None:
        self._copies = {ids.device: ids}
        self._original = ids

    def __len__(self) -> int:
        return len(self._original)

    def on(self, device: torch.device) -> Tensor:
        """The ids on ``device``."""
        if device not in self._copies:
            self._copies[device] = self._original.to(device)
        return self._copies[device]


class TextDataset(Dataset):
    """Windows ``obs`` and ``target`` (one id later), each (n, batch_size, sequence_length) int64 in [0, vocab_size)."""

    def __init__(self, tokens: Tokens, vocab_size: int, sequence_length: int) -> None:
        self.num_examples = len(tokens) - sequence_length
        self.tokens = tokens
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length

    def sample(self, keys: Tensor, batch_size: int) -> Batch:
        offsets = _offsets(keys, self.num_examples, batch_size)
        steps = torch.arange(self.sequence_length + 1, device=keys.device)
        ids = self.tokens.on(keys.device)[offsets[..., None] + steps].long()
        ids = torch.where(ids < self.vocab_size, ids, UNKNOWN)
        return {"obs": ids[..., :-1], "target": ids[..., 1:]}


def _offsets(keys: Tensor, count: int, batch_size: int) -> Tensor:
    """(n, batch_size) int64, uniform on [0, count); of more than 2**31, up to 2**16 at the end are never drawn."""
    if count <= 2**31:
        return integers(keys, count, (batch_size,))
    coarse = integers(keys, count >> 16, (batch_size,))
    return (coarse << 16) + integers(fold(keys, "fine"), 1 << 16, (batch_size,))


class Tokenized(NamedTuple):
    """A corpus in a vocabulary of ``size`` ids: the tokens of train, outer_valid and test."""

    size: int
    splits: tuple[Tokens, Tokens, Tokens]


def load_text(
    corpus: str, vocabulary: str, vocab_size: int, sequence_length: int, files: DataRoot | None = None
) -> Datasets:
    """The splits of ``corpus`` as windows of ``sequence_length`` ids below ``vocab_size``.

    ``corpus`` is as in ``corpora.open_corpus``; ``vocabulary`` is ``bytes``, ``32k`` or as in vocabulary.py.
    Raises DataError for unknown names, for files that are missing, unreachable or malformed, and for a split shorter
    than one window; ConfigError for sizes out of range.
    """
    at_least("vocab_size", vocab_size, RESERVED + 1)
    at_least("sequence_length", sequence_length, 1)
    splits = tokenized(corpus, vocabulary, files or DataRoot(DataConfig())).splits
    for name, tokens in zip(Datasets.SPLITS, splits, strict=True):
        if len(tokens) <= sequence_length:
            raise DataError(
                f"corpus {corpus}: its split {name} has {len(tokens)} tokens ({vocabulary}): expected at least "
                f"sequence_length + 1 = {sequence_length + 1}"
            )
    return Datasets(*(TextDataset(tokens, vocab_size, sequence_length) for tokens in splits))


def tokenized(corpus: str, vocabulary: str, files: DataRoot) -> Tokenized:
    """All splits of ``corpus`` in ``vocabulary``; a process makes or opens each only once. Raises DataError."""
    config = files.config
    return _tokenized(corpus, vocabulary, config.root, config.cache, tuple(sorted(config.options.items())))


@cache
def _tokenized(
    corpus: str, vocabulary: str, root: str | None, cache_url: str, options: tuple[tuple[str, object], ...]
) -> Tokenized:
    files = DataRoot(DataConfig(root=root, cache=cache_url, options=dict(options)))
    source = open_corpus(corpus, files)
    train, outer_valid, test = _splits(source, files.cache)
    if vocabulary == "bytes":
        return Tokenized(BYTES_SIZE, (_tokens(train), _tokens(outer_valid), _tokens(test)))
    chosen = open_vocabulary(vocabulary, files, lambda: _training_texts(train), source.identity)

    def encoded(split: str, part: Bytes) -> Tokens:
        dtype = "<i2" if chosen.size <= 1 << 15 else "<i4"
        key = f"tokens-{digest(source.identity, split, chosen.identity, dtype)}"
        content = files.cache.kept(key, lambda: (ids.astype(dtype).tobytes() for ids in _encoded(part, chosen)))
        return _tokens(content.view(dtype))

    return Tokenized(chosen.size, (encoded("train", train), encoded("outer_valid", outer_valid), encoded("test", test)))


def _tokens(ids: NDArray[np.integer]) -> Tokens:
    return Tokens(torch.from_numpy(ids))


def _splits(source: Corpus, cache: Cache) -> tuple[Bytes, Bytes, Bytes]:
    """train, outer_valid and test as ``bytes``."""
    training = _whole(source, "training", source.training, cache)
    if source.held_out is None:
        cut = _next_character(training, len(training) * 9 // 10)
        training, test = training[:cut], training[cut:]
    else:
        test = _whole(source, "held_out", source.held_out, cache)
    n = len(training)
    return training[: _next_character(training, n * 8 // 10)], training[_next_character(training, n * 9 // 10) :], test


def _whole(source: Corpus, part: str, stream: Stream, cache: Cache) -> Bytes:
    """A part of a corpus as ``bytes``: every byte and three, by which the END of a document becomes 1."""

    def ids() -> Iterator[bytes]:
        return ((np.frombuffer(chunk, np.uint8) + np.uint8(RESERVED)).tobytes() for chunk in stream())

    if source.embedded:
        return np.frombuffer(bytearray().join(ids()), np.uint8)
    return cache.kept(f"bytes-{digest(source.identity, part)}", ids)


def _next_character(part: Bytes, at: int) -> int:
    """The first place from ``at`` on where a character, or the end of a document, begins."""
    while at < len(part) and (int(part[at]) - RESERVED) & 0xC0 == 0x80:
        at += 1
    return at


def _pieces(part: Bytes) -> Iterator[list[str]]:
    """Consecutive texts; all but the last of a list are followed by the end of a document.

    A list ends with a document, or within a long one before a blank, where no tokenizer joins what it would split.
    """
    start = 0
    while start < len(part):
        stop = _end_of_piece(part, start)
        yield [text.decode() for text in (part[start:stop] - np.uint8(RESERVED)).tobytes().split(END)]
        start = stop


def _end_of_piece(part: Bytes, start: int) -> int:
    stop = min(start + _PIECE, len(part))
    if stop == len(part):
        return stop
    piece = part[start:stop]
    ends = np.flatnonzero(piece == END_OF_DOCUMENT)
    if ends.size:
        return start + int(ends[-1]) + 1
    blank = np.isin(piece, _BLANKS)
    begins = np.flatnonzero(blank[1:] & ~blank[:-1])
    return start + int(begins[-1]) + 1 if begins.size else _next_character(part, stop)


def _encoded(part: Bytes, vocabulary: Vocabulary) -> Iterator[Ids]:
    end = np.array([END_OF_DOCUMENT], np.int32)
    for texts in _pieces(part):
        first, *rest = vocabulary.encode(texts)
        yield np.concatenate([first, *(ids for following in rest for ids in (end, following))])


def _training_texts(train: Bytes) -> Iterator[str]:
    return chain.from_iterable(_pieces(train[: _next_character(train, MAX_TRAINING_BYTES)]))
