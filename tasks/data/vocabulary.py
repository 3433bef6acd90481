"""Vocabularies: text to token ids.

Owns: the ids that are reserved, what ``32k`` and the other names of vocabularies mean, and the training of a
byte-level BPE vocabulary. Must never read a corpus, or decide how large a task's vocabulary is (text.py truncates).

In every vocabulary 0 is padding, 1 ends a document and 2 is the unknown token, as in T5's and in ByT5's:

- ``bytes``: the UTF-8 byte b is 3 + b, as in the originals (seqio's ByteVocabulary, BYTES_SIZE ids). No byte of UTF-8
  is above 0xF4, so that 248 ids suffice and a vocab_size of 256 loses nothing.
- ``sentencepiece:PATH``: a SentencePiece model. ``bpe:PATH``: a tokenizer.json of the ``tokenizers`` package. Ids of a
  file that does not reserve 0, 1 and 2 for the same purpose are moved up by three.
- ``32k``: the file ``vocabulary/t5_32k.model`` below ``data.root``, the 32,000 pieces of T5 that the originals use (as
  T5_SIZE ids, of which the last 100 never occur). Where it is not there, BPE of at most 32,000 ids, trained on the
  first 64 MiB of the corpus' training split. Ids 3, 4, ... are then its tokens from the most to the least frequent, so
  that, as with T5's, a truncated vocabulary keeps what is common. A small corpus reaches fewer, because merges of pairs
  that occur only once are not made: pydoc about 5,800, Shakespeare about 10,500 (``paceline data verify`` says).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.checks import did_you_mean
from tasks.data.files import DataRoot
from tasks.data.store import Cache, digest
from tasks.errors import DataError

PADDING, END_OF_DOCUMENT, UNKNOWN = 0, 1, 2
RESERVED = 3
BYTES_SIZE = 259
T5_SIZE = 32_100
T5_FILE = "vocabulary/t5_32k.model"
MAX_IDS = 32_000
MAX_TRAINING_BYTES = 1 << 26

_SPECIAL = (("<pad>", "[PAD]"), ("</s>", "<eos>", "[EOS]"), ("<unk>", "[UNK]"))
_NAMES = ("bytes", "32k", "bpe:PATH", "sentencepiece:PATH")

Ids = NDArray[np.int32]


class Vocabulary(ABC):
    """``size`` ids, of which the first three are reserved; ``identity`` changes with what ``encode`` does."""

    size: int
    identity: str

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, in [2, size)."""


class Bpe(Vocabulary):
    """The content ``text`` of a tokenizer.json; ``name`` is for messages. Raises DataError if it is none."""

    def __init__(self, text: str, name: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:
            if type(error) is not Exception:  # the package raises no class of its own
                raise
            raise DataError(f"{name}: expected a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True  # a text that has "<pad>" in it gets no padding
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        reserves = all(self._tokenizer.id_to_token(index) in names for index, names in enumerate(_SPECIAL))
        self._shift = 0 if reserves else RESERVED
        self.size = self._tokenizer.get_vocab_size() + self._shift
        self.identity = digest("bpe", text)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) + self._shift for encoding in found]


class SentencePiece(Vocabulary):
    """The content ``model`` of a SentencePiece model file. Raises DataError if it is none."""

    def __init__(self, model: bytes, name: str) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise DataError(f"{name}: needs the package sentencepiece (pip install 'paceline[text]')") from error
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{name}: expected a SentencePiece model of {len(model)} bytes: {error}") from error
        if not model:
            raise DataError(f"{name}: expected a SentencePiece model, found an empty file")
        specials = self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id()
        self._shift = 0 if specials == (PADDING, END_OF_DOCUMENT, UNKNOWN) else RESERVED
        self.size = self._processor.get_piece_size() + self._shift
        self.identity = digest("sentencepiece", model.hex())

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        unknown = self._processor.unk_id()
        found = [np.array(ids, np.int32) for ids in self._processor.encode(list(texts), out_type=int)]
        return [np.where(ids == unknown, UNKNOWN, ids + self._shift).astype(np.int32) for ids in found]


def open_vocabulary(name: str, files: DataRoot, training: Callable[[], Iterator[str]], identity: str) -> Vocabulary:
    """The vocabulary ``name``, which is not ``bytes``: ``32k``, ``bpe:PATH`` or ``sentencepiece:PATH``.

    ``training`` gives the text that ``32k`` is trained on where T5's model is not there, and ``identity`` is that of
    the text. Raises DataError for an unknown name, and for a file that is not there or is no vocabulary.
    """
    kind, _, path = name.partition(":")
    if kind == "bpe" and path:
        file = files.find((path,))
        return Bpe(_decoded(file.read(), file.name), file.name)
    if kind == "sentencepiece" and path:
        file = files.find((path,))
        return SentencePiece(file.read(), file.name)
    if name != "32k":
        expected = f"one of {', '.join(_NAMES)}{did_you_mean(name, _NAMES)}"
        raise DataError(f"vocabulary = {name!r}: expected {expected}")
    published = files.get(T5_FILE) if files.config.root is not None else None
    if published is not None:
        return SentencePiece(published.read(), published.name)
    return Bpe(_trained(training, identity, files.cache), f"the vocabulary of {files.cache.url}")


def train_bpe(texts: Callable[[], Iterator[str]]) -> str:
    """A tokenizer.json of byte-level BPE with at most MAX_IDS ids; ``texts`` is gone through twice.

    It depends on the texts and on nothing else. Every byte has an id, so no text is unknown to it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_IDS,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[names[0] for names in _SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.encode_special_tokens = True
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for text in texts():
        counts += np.bincount(tokenizer.encode(text).ids, minlength=len(counts))
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    order = sorted(tokenizer.get_vocab().items(), key=lambda item: (min(item[1], RESERVED), -counts[item[1]], item[0]))
    described["model"]["vocab"] = {token: rank for rank, (token, _) in enumerate(order)}
    described["added_tokens"] = []
    return json.dumps(described)


def _trained(texts: Callable[[], Iterator[str]], identity: str, cache: Cache) -> str:
    key = f"bpe-{digest(identity, version('tokenizers'), str(MAX_IDS))}"
    return cache.kept(key, lambda: (train_bpe(texts).encode(),)).tobytes().decode()


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: expected UTF-8, found byte {content[error.start]:#04x} at {error.start}") from error
