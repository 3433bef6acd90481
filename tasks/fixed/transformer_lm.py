"""The transformer language models of VeLOdrome, by their published names.

Owns: the table of google/learned_optimization's tasks/fixed/transformer_lm.py, all on LM1B in 32k pieces. Must never
build a task. The twelve of MultiRuntime are in the order of their cost and of their final loss, by a search of theirs.
"""

from __future__ import annotations

from tasks.families.text import SIZES
from tasks.families.transformer_lm import TransformerLm
from tasks.static import StaticConfig

_MULTI_RUNTIME = (
    (5, 20, 1, 4, 8, 0.1),
    (6, 24, 1, 4, 8, 0.1),
    (4, 32, 2, 8, 8, 0.0),
    (4, 32, 1, 8, 16, 0.0),
    (4, 32, 2, 16, 4, 0.0),
    (4, 32, 1, 8, 32, 0.0),
    (5, 80, 1, 4, 64, 0.0),
    (7, 112, 3, 16, 32, 0.0),
    (4, 128, 1, 64, 32, 0.0),
    (4, 256, 2, 64, 64, 0.0),
    (4, 256, 3, 128, 64, 0.0),
    (19, 304, 2, 256, 32, 0.0),
)
"""Heads, width, layers, batch size, sequence length and dropout."""


def _lm1b(heads: int, width: int, layers: int, batch_size: int, sequence_length: int, dropout: float) -> TransformerLm:
    return TransformerLm(
        corpus="lm1b",
        vocabulary="32k",
        vocab_size=SIZES["32k"],
        sequence_length=sequence_length,
        batch_size=batch_size,
        width=width,
        heads=heads,
        layers=layers,
        dropout=dropout,
    )


TASKS: dict[str, StaticConfig] = {
    **{f"TransformerLM_LM1B_MultiRuntime_{i}": _lm1b(*numbers) for i, numbers in enumerate(_MULTI_RUNTIME)},
    **{f"TransformerLM_LM1B_5layer_{width}width": _lm1b(8, width, 5, 32, 128, 0.1) for width in (32, 128, 256, 512)},
}
