"""What all language models share: the data half of their static config, their loss and their meta-loss.

Owns: which text a task sees and in what windows, and the cross entropy of next tokens.
Must never know a model or split text into tokens (tasks.data does).

Facts after google/learned_optimization (tasks/fixed/rnn_lm.py, tasks/parametric/lm_rnn.py): the loss is the mean cross
entropy in nats over the positions whose token ``obs`` is not the padding id 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from configs.checks import ConfigError, at_least, one_of
from tasks.base import IDENTITY, Batch, Datasets, Dynamic, Params, Task
from tasks.data.corpora import NAMES, OWN_TEXTS
from tasks.data.vocabulary import BYTES_SIZE, RESERVED, T5_SIZE
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.image import CLASSIFIER_NORMALIZERS, MetaLoss, classifier_meta_loss
from tasks.families.layers import cross_entropies
from tasks.static import StaticConfig

OWN_VOCABULARIES = ("bpe", "sentencepiece")
"""The kinds of a user's own vocabularies, as in ``bpe:PATH``; only reading one tells how many ids it has."""

SIZES = {"bytes": BYTES_SIZE, "32k": T5_SIZE}
"""How many ids the originals' two vocabularies have: seqio's ByteVocabulary and T5's SentencePiece model."""


@dataclass(frozen=True, kw_only=True)
class TextStatic(StaticConfig):
    """The data of a language model: windows of ``sequence_length`` ids of ``corpus``, each id to be predicted.

    ``vocab_size`` is how many ids the model knows; larger ones count as unknown, so that a vocabulary is truncated
    (VeLO, C.3.6). 256 covers all that text in bytes can hold; the fixed tasks have all 259 ids. ``normalizer`` is the
    form of meta-loss: ``fixed`` or ``parametric``, as the originals' fixed and drawn tasks have it.
    """

    corpus: str = "pydoc"
    vocabulary: str = "bytes"
    vocab_size: int = 256
    sequence_length: int = 32
    batch_size: int = 64
    normalizer: str = "fixed"

    def __post_init__(self) -> None:
        _check_name("corpus", self.corpus, NAMES, OWN_TEXTS)
        _check_name("vocabulary", self.vocabulary, tuple(SIZES), OWN_VOCABULARIES)
        at_least("vocab_size", self.vocab_size, RESERVED + 1)
        if self.vocab_size > SIZES.get(self.vocabulary, self.vocab_size):
            raise ConfigError("vocab_size", self.vocab_size, f"at most {SIZES[self.vocabulary]} for {self.vocabulary}")
        at_least("sequence_length", self.sequence_length, 1)
        at_least("batch_size", self.batch_size, 1)
        one_of("normalizer", self.normalizer, CLASSIFIER_NORMALIZERS)

    @property
    def tokens(self) -> int:
        """Positions in one batch."""
        return self.batch_size * self.sequence_length


def _check_name(field: str, value: str, names: tuple[str, ...], own: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``names`` or KIND:PATH with one of the kinds ``own``."""
    kind, _, path = value.partition(":")
    if not (path and kind in own):
        one_of(field, value, (*names, *(f"{kind}:PATH" for kind in own)))


def draw_text(rng: np.random.Generator, pool: Pool) -> dict[str, Any]:
    """The fields of a ``TextStatic``, as C.3.6 and C.3.7 draw them.

    In the paper all of the bytes are known; the code truncates them, too (and makes a table of up to 10,000 rows for
    259 ids, where this stops at 259).
    """
    corpus, vocabulary = choice(rng, pool.texts)
    batch_size, sequence_length = log_integer(rng, 4, 512), log_integer(rng, 4, 512)
    vocab_size = log_integer(rng, 100, 10_000)
    if vocabulary == "bytes":
        vocab_size = 256 if pool.ranges == "paper" else min(vocab_size, BYTES_SIZE)
    return {
        "corpus": corpus,
        "vocabulary": vocabulary,
        "vocab_size": vocab_size,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "normalizer": "parametric",
    }


class LanguageModel(Task):
    """A model that gives every position the logits of the token after it."""

    def __init__(self, static: TextStatic, datasets: Datasets) -> None:
        self.datasets = datasets
        self.batch_size = static.batch_size
        self._meta_loss = _meta_loss(static)
        self.worst_loss = self._meta_loss.worst

    @abstractmethod
    def logits(self, params: Params, batch: Batch) -> Tensor:
        """(B, S, V) of ``batch["obs"]`` (B, S); position t depends on the tokens up to t alone."""

    def loss(self, params: Params, batch: Batch, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The mean over all positions that are not padding of the nats for ``target`` (B, S)."""
        nats = cross_entropies(self.logits(params, batch), batch["target"])
        real = (batch["obs"] != 0).to(nats.dtype)
        return (nats * real).sum() / real.sum().clamp(min=1)

    def normalizer(self, loss: Tensor, dynamic: Dynamic = IDENTITY) -> Tensor:
        """The loss in nats up to 2 log V, or as the drawn tasks scale it (``classifier_meta_loss``, V for C)."""
        return self._meta_loss(loss)


def _meta_loss(static: TextStatic) -> MetaLoss:
    """The originals' fixed tasks have no bound; here it is above the start of all, 1.7 log V of an identity RNN."""
    if static.normalizer == "fixed":
        return MetaLoss(2 * math.log(static.vocab_size))
    return classifier_meta_loss(static.normalizer, static.vocab_size)
