"""Right answers for whoever tests the loss, changes it, or ports an engine to a new device.

    cross_entropy     the oracle: loss and statistics of whole logits in fp64
    naive, expected   what plain torch would compute, and both together for one batch
    assert_close      the one rule of how exact a result must be; ``compare`` measures by it
    check_engine      an engine's three functions against all of the contract
    shard_sums        loss and gradient norm of logits that are too large for the oracle
    Sharding, Batch   ways to lay a vocabulary on ranks, and batches that every rank can rebuild

It needs torch alone: no test framework, no process group, no device.
"""

from .batches import Batch, batch
from .engine import EngineReport, check_engine, move
from .expectation import Expected, expected, inherited_error, worst
from .naive import naive
from .reference import ReferenceLoss, cross_entropy
from .shardings import KINDS, Sharding, even, sharding, shardings, sized
from .sums import MeanLoss, merge_sums, shard_sums
from .tolerance import (
    Blocks,
    Comparison,
    assert_close,
    compare,
    error_with_device,
    naive_error,
    ulp,
)

__all__ = [
    "KINDS",
    "Batch",
    "Blocks",
    "Comparison",
    "EngineReport",
    "Expected",
    "MeanLoss",
    "ReferenceLoss",
    "Sharding",
    "assert_close",
    "batch",
    "check_engine",
    "compare",
    "cross_entropy",
    "error_with_device",
    "even",
    "expected",
    "inherited_error",
    "merge_sums",
    "move",
    "naive",
    "naive_error",
    "shard_sums",
    "sharding",
    "shardings",
    "sized",
    "ulp",
    "worst",
]
