"""The recurrent language models of VeLOdrome, by their published names.

Owns: the table of google/learned_optimization's tasks/fixed/rnn_lm.py; all have batches of 128.
Must never build a task.
"""

from __future__ import annotations

from tasks.families.rnn_lm import RnnLm
from tasks.families.text import SIZES
from tasks.static import StaticConfig

_CELLS = {"IRNN": "irnn", "VanillaRNN": "vanilla", "GRU": "gru", "LSTM": "lstm"}

_TASKS = (
    ("lm1b", "bytes", 32, "IRNN", 128, 64),
    ("lm1b", "bytes", 32, "LSTM", 128, 64),
    ("lm1b", "bytes", 32, "GRU", 128, 64),
    ("lm1b", "bytes", 32, "VanillaRNN", 128, 64),
    ("lm1b", "bytes", 128, "LSTM", 128, 64),
    ("lm1b", "bytes", 32, "LSTM", 256, 128),
    ("lm1b", "bytes", 32, "GRU", 256, 128),
    ("lm1b", "32k", 32, "VanillaRNN", 256, 128),
    ("lm1b", "32k", 32, "LSTM", 256, 128),
    ("lm1b", "32k", 32, "IRNN", 256, 128),
    ("wikipediaen", "32k", 32, "LSTM", 256, 128),
    ("wikipediaen", "32k", 32, "GRU", 256, 128),
    ("wikipediaen", "bytes", 32, "LSTM", 256, 128),
    ("wikipediaen", "bytes", 32, "GRU", 256, 128),
)
"""Corpus, vocabulary, sequence length, cell, hidden and embedding size."""

_CORPORA = {"lm1b": "lm1b", "wikipediaen": "wikipedia"}

TASKS: dict[str, StaticConfig] = {
    f"RNNLM_{corpus}{vocabulary}_Patch{length}_{cell}{hidden}_Embed{embedding}": RnnLm(
        corpus=_CORPORA[corpus],
        vocabulary=vocabulary,
        vocab_size=SIZES[vocabulary],
        sequence_length=length,
        batch_size=128,
        cell=_CELLS[cell],
        hidden=hidden,
        embedding=embedding,
    )
    for corpus, vocabulary, length, cell, hidden, embedding in _TASKS
}
