"""Cross-entropy over logits whose vocabulary is split across ranks."""
# ruff: noqa: E402

from .torch_import import require_torch

require_torch()  # before anything that imports torch: one line where that cannot work

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
