"""Transformer language models: decoder-only, normalised before each part, without position embedding.

Owns: their static config, distribution, initialisation and logits. Must never know how attention mixes positions
(attention.py).

Facts after google/learned_optimization (tasks/transformer.py, tasks/parametric/lm_transformer.py):

- each head has 32 numbers, whatever the width; nothing but the causal mask tells positions apart;
- weights in the layers start with variance 2 / (layers * fan in), made up for the truncation;
- dropout (0.1 in the drawn tasks) of what attention and perceptron add, always on, also when a loss is measured.

The originals also hide padding from the queries. It only follows text, so behind a causal mask, and with padding left
out of the loss, this changes nothing, and it is not done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.checks import ConfigError, at_least
from tasks.base import IDENTITY, Batch, Datasets, Dynamic, Params
from tasks.data import Library
from tasks.families.attention import attention, attention_layers, attention_work
from tasks.families.draws import Pool, log_integer
from tasks.families.initializers import weight
from tasks.families.layers import dropout, layer_norm, linear, linear_params, norm_params
from tasks.families.rnn_cells import TRUNCATED_STD
from tasks.families.text import LanguageModel, TextStatic, draw_text
from tasks.random import fold
from tasks.static import Work

HEAD_SIZE = 32
WIDENING = 4


@dataclass(frozen=True, kw_only=True)
class TransformerLm(TextStatic, kind="transformer_lm"):
    """A transformer language model of ``layers`` layers, ``width`` numbers at each position and ``heads`` heads."""

    width: int = 32
    heads: int = 4
    layers: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("width", self.width, 1)
        at_least("heads", self.heads, 1)
        at_least("layers", self.layers, 1)
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", self.dropout, "a number >= 0 and < 1")

    def build(self, library: Library) -> TransformerLmTask:
        data = library.text(self.corpus, self.vocabulary, self.vocab_size, self.sequence_length)
        return TransformerLmTask(self, data)

    def work(self) -> Work:
        width, wide, vocab = self.width, WIDENING * self.width, self.vocab_size
        mixing = attention_work(self.batch_size, self.sequence_length, width, self.heads * HEAD_SIZE, self.heads)
        layer_parameters = mixing.parameters + 2 * width * wide + wide + width + 4 * width
        layer_activations = mixing.activations + self.tokens * (5 * width + 2 * wide)
        return Work(
            parameters=self.layers * layer_parameters + 2 * vocab * width + vocab + 2 * width,
            flops=self.layers * (mixing.flops + 4 * self.tokens * width * wide) + 2 * self.tokens * width * vocab,
            activations=self.layers * layer_activations + self.tokens * (3 * width + vocab),
        )


class TransformerLmTask(LanguageModel):
    """One transformer language model on one corpus."""

    def __init__(self, static: TransformerLm, datasets: Datasets) -> None:
        super().__init__(static, datasets)
        self.static = static

    def init(self, generator: torch.Generator, dynamic: Dynamic = IDENTITY) -> Params:
        """``embedding/w``, each layer's ``norm0``, ``attention``, ``norm1`` and ``mlp``, ``norm`` and ``readout``."""
        static = self.static
        width, wide = static.width, WIDENING * static.width
        scale = math.sqrt(2 / static.layers) / TRUNCATED_STD
        params = {"embedding/w": weight(generator, (static.vocab_size, width), fan_in=1)}
        for layer in range(static.layers):
            name = f"layer{layer}"
            maps = {
                **attention_layers(f"{name}/attention", width, static.heads * HEAD_SIZE),
                f"{name}/mlp0": (width, wide),
                f"{name}/mlp1": (wide, width),
            }
            params |= norm_params(f"{name}/norm0", width) | norm_params(f"{name}/norm1", width)
            for part, (fan_in, fan_out) in maps.items():
                params[f"{part}/w"] = weight(generator, (fan_in, fan_out), fan_in) * scale
                params[f"{part}/b"] = torch.zeros(fan_out)
        return params | norm_params("norm", width) | linear_params(generator, "readout", width, static.vocab_size)

    def logits(self, params: Params, batch: Batch) -> Tensor:
        x = F.embedding(batch["obs"], params["embedding/w"])
        for layer in range(self.static.layers):
            name = f"layer{layer}"
            y = layer_norm(params, f"{name}/norm0", x)
            y = attention(params, f"{name}/attention", y, self.static.heads, causal=True)
            x = x + dropout(y, fold(batch["key"], f"{name}/attention"), self.static.dropout)
            y = layer_norm(params, f"{name}/norm1", x)
            y = linear(params, f"{name}/mlp1", F.gelu(linear(params, f"{name}/mlp0", y), approximate="tanh"))
            x = x + dropout(y, fold(batch["key"], f"{name}/mlp"), self.static.dropout)
        return linear(params, "readout", layer_norm(params, "norm", x))


def draw(rng: np.random.Generator, pool: Pool) -> TransformerLm:
    """C.3.7; the code's range differs in the vocabulary of bytes (``draw_text``)."""
    text = draw_text(rng, pool)
    heads = log_integer(rng, 8, 128)
    return TransformerLm(
        **text, width=heads * log_integer(rng, 8, 128), heads=heads, layers=log_integer(rng, 1, 8), dropout=0.1
    )
