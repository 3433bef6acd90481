"""Recurrent language models: an embedding, one recurrent layer, and a linear map to the logits of the next token.

Owns: their static config, distribution, initialisation and logits.
Must never know the equations of the cells (rnn_cells.py).

Facts after google/learned_optimization (tasks/parametric/lm_rnn.py, tasks/fixed/rnn_lm.py). The initializer that a
drawn task samples is for the embedding (whose fan in is the vocabulary) and the last map, as in the code; the cell
starts as haiku has it. One of the code's bugs is left out: the vanilla and GRU tasks that it draws are LSTMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.checks import at_least, one_of
from tasks.base import IDENTITY, Batch, Datasets, Dynamic, Params
from tasks.data import Library
from tasks.families.draws import Pool, choice, log_integer
from tasks.families.initializers import INITIALIZERS, draw_initializer, weight
from tasks.families.layers import linear, linear_params
from tasks.families.rnn_cells import CELLS
from tasks.families.text import LanguageModel, TextStatic, draw_text
from tasks.static import DYNAMIC, Work


@dataclass(frozen=True, kw_only=True)
class RnnLm(TextStatic, kind="rnn_lm"):
    """A recurrent language model: ``embedding`` numbers for a token, ``hidden`` for the state of ``cell``."""

    cell: str = "lstm"
    hidden: int = 32
    embedding: int = 32
    initializer: str = "haiku"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("cell", self.cell, tuple(CELLS))
        at_least("hidden", self.hidden, 1)
        at_least("embedding", self.embedding, 1)
        one_of("initializer", self.initializer, INITIALIZERS)

    def build(self, library: Library) -> RnnLmTask:
        data = library.text(self.corpus, self.vocabulary, self.vocab_size, self.sequence_length)
        return RnnLmTask(self, data)

    def work(self) -> Work:
        cell, tables = CELLS[self.cell], self.vocab_size * (self.embedding + self.hidden)
        return Work(
            parameters=tables + self.vocab_size + cell.parameters(self.embedding, self.hidden),
            flops=self.tokens * (cell.flops(self.embedding, self.hidden) + 2 * self.hidden * self.vocab_size),
            activations=self.tokens * (self.embedding + 2 * cell.gates * self.hidden + self.vocab_size),
        )


class RnnLmTask(LanguageModel):
    """One recurrent language model on one corpus."""

    def __init__(self, static: RnnLm, datasets: Datasets) -> None:
        super().__init__(static, datasets)
        self.static = static

    def sample_dynamic(self, generator: torch.Generator, n: int) -> Dynamic:
        """Kind and scale of the initializer (C.2.1) if the config leaves them open."""
        return draw_initializer(generator, n, self.static.initializer)

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """``embedding/w`` (V, embedding), the cell's ``core/...``, ``readout/w`` (hidden, V) and ``readout/b``."""
        static = self.static
        # haiku's own initializer of a table has sigma 1, cut off at 2, whatever its size.
        own = static.initializer == "haiku" or (static.initializer == DYNAMIC and not dynamic)
        table, fan_in = (static.vocab_size, static.embedding), 1 if own else static.vocab_size
        return {
            "embedding/w": weight(generator, table, fan_in, static.initializer, dynamic),
            **CELLS[static.cell].init(generator, static.embedding, static.hidden),
            **linear_params(generator, "readout", static.hidden, static.vocab_size, static.initializer, dynamic),
        }

    def logits(self, params: Params, batch: Batch) -> Tensor:
        x = F.embedding(batch["obs"], params["embedding/w"])
        return linear(params, "readout", CELLS[self.static.cell].unroll(params, x))


def draw(rng: np.random.Generator, pool: Pool) -> RnnLm:
    """C.3.6; the code's range differs in the vocabulary of bytes (``draw_text``)."""
    return RnnLm(
        **draw_text(rng, pool),
        cell=choice(rng, ("vanilla", "gru", "lstm")),
        hidden=log_integer(rng, 8, 256),
        embedding=log_integer(rng, 8, 256),
        initializer=DYNAMIC,
    )
