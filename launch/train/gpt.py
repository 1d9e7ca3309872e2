"""A small GPT whose embedding and head are split over the vocabulary.

The body between them is replicated over the tensor-parallel ranks: they all compute the same
hidden states from the same tokens. With a vocabulary of 32,768 and a width of 128 nearly all
parameters, and most of the work, are in the two split layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel.layers import VocabParallelEmbedding, VocabParallelHead

INITIAL_STD = 0.02


@dataclass(frozen=True)
class GPTShape:
    """Sizes of the model; `context` counts tokens. Errors name the command-line option."""

    vocab_size: int
    context: int
    width: int = 128
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                option = name.removesuffix("_size")
                raise ValueError(f"--{option} {getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} is not a multiple of --heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout {self.dropout} must be in [0, 1)")


def _linear(
    inputs: int, outputs: int, generator: torch.Generator, std: float = INITIAL_STD
) -> nn.Linear:
    """A linear layer without bias, drawn from the run's own generator."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, 0.0, std, generator=generator)
    return layer


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised first and added to the stream."""

    def __init__(self, shape: GPTShape, generator: torch.Generator) -> None:
        super().__init__()
        width = shape.width
        # The two outputs of every block add up in the stream: smaller with depth, as in GPT-2.
        output_std = INITIAL_STD / (2 * shape.layers) ** 0.5
        self.heads, self.dropout = shape.heads, shape.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = _linear(width, 3 * width, generator)
        self.attention_output = _linear(width, width, generator, output_std)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_up = _linear(width, 4 * width, generator)
        self.feed_down = _linear(4 * width, width, generator, output_std)

    def forward(self, stream: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        batch, length, width = stream.shape
        projected = self.query_key_value(self.attention_norm(stream))
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in projected.split(width, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        stream = stream + self._drop(self.attention_output(mixed))
        fed = self.feed_down(F.gelu(self.feed_up(self.feed_norm(stream)), approximate="tanh"))
        return stream + self._drop(fed)

    def _drop(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.dropout, self.training)


class GPT(nn.Module):
    """ids [B, T] -> this rank's logits [B, T, C_r].

    All weights come from one generator in one fixed order, the vocabulary's in full on every
    rank, so any number of ranks starts from the same model, bit for bit.
    """

    def __init__(
        self, shape: GPTShape, shard: VocabShard, group: dist.ProcessGroup | None, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.embedding = VocabParallelEmbedding(
            shard, shape.width, group, generator=generator, std=INITIAL_STD
        )
        positions = torch.empty(shape.context, shape.width)
        self.positions = nn.Parameter(positions.normal_(0.0, INITIAL_STD, generator=generator))
        self.blocks = nn.ModuleList(Block(shape, generator) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.width)
        self.head = VocabParallelHead(
            shard,
            shape.width,
            group,
            generator=generator,
            std=INITIAL_STD,
            weight=self.embedding.weight if shape.tied else None,
        )

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, width], what the head is given."""
        stream = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        normed: Tensor = self.final_norm(stream)
        return normed

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(ids))
        return logits
