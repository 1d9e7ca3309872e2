"""Cross-entropy over logits whose vocabulary is split across ranks."""

from .api import (
    CrossEntropyLossOutput,
    TokenStatistics,
    cross_entropy,
    cross_entropy_loss,
    token_statistics,
)
from .modules import VocabParallelCrossEntropyLoss
from .shard import VocabShard

__all__ = [
    "CrossEntropyLossOutput",
    "TokenStatistics",
    "VocabParallelCrossEntropyLoss",
    "VocabShard",
    "cross_entropy",
    "cross_entropy_loss",
    "token_statistics",
]
