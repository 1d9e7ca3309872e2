"""Cross-entropy over logits whose vocabulary is split across ranks.

Names are resolved when they are first used (PEP 562), so that ``import vocab_parallel_ce`` works,
and the doctor starts, where torch cannot be imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .torch_import import require_torch

if TYPE_CHECKING:
    from .api import cross_entropy, cross_entropy_loss, token_statistics
    from .linear_api import linear_cross_entropy, linear_token_statistics
    from .modules import VocabParallelCrossEntropyLoss, VocabParallelLinearCrossEntropyLoss
    from .results import CrossEntropyLossOutput, TokenStatistics
    from .shard import VocabShard

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLossOutput",
    "TokenStatistics",
    "VocabParallelCrossEntropyLoss",
    "VocabParallelLinearCrossEntropyLoss",
    "VocabShard",
    "__version__",
    "cross_entropy",
    "cross_entropy_loss",
    "linear_cross_entropy",
    "linear_token_statistics",
    "token_statistics",
]

_HOMES = {
    "CrossEntropyLossOutput": "results",
    "TokenStatistics": "results",
    "VocabParallelCrossEntropyLoss": "modules",
    "VocabParallelLinearCrossEntropyLoss": "modules",
    "VocabShard": "shard",
    "cross_entropy": "api",
    "cross_entropy_loss": "api",
    "linear_cross_entropy": "linear_api",
    "linear_token_statistics": "linear_api",
    "token_statistics": "api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_torch()  # one line where torch cannot be imported
    value: object = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
