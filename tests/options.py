"""Options of the loss, and engines and collectives in turn: for tests against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.testing import Sharding

from .device import move

REDUCTIONS = ("none", "mean", "sum")
ROWS = 96  # the naive error of few rows may be small by luck

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": True},
    "ignore 0": {"ignore_index": 0},
    "ignore 7, weight": {"ignore_index": 7, "weight": True},
    "ignore -1": {"ignore_index": -1},
    "smoothing": {"label_smoothing": 0.3},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"lse_square_scale": 0.02},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 3.0, "scale": 0.8},
    "scale of each row": {"scale": torch.linspace(0.25, 2.0, ROWS, dtype=torch.float64)},
    "all": {
        "weight": True,
        "ignore_index": 7,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "scale": 1.7,
        "softcap": 5.0,
    },
}


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {k: move(v) if isinstance(v, Tensor) else v for k, v in options.items()}


def all_ways() -> Iterator[tuple[str, str]]:
    """(engine, collective) for ever, so that options meet every pair without the full product."""
    while True:
        yield "auto", "all_gather"
        yield "eager", "all_reduce"
        yield "auto", "all_reduce"
        yield "eager", "all_gather"
        yield "auto", "auto"


def local_leaf(sharding: Sharding, logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rank = 0 if group is None else dist.get_rank(group)
    return move(sharding.local(logits, rank)).requires_grad_()
