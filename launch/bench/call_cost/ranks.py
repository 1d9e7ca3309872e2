"""The fixed cost of a call on two ranks, which the job starts itself: Gloo, one thread each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.collectives import Payload, all_gather_flat
from vocab_parallel_ce.launch.measuring.calls import fixed_costs
from vocab_parallel_ce.launch.measuring.collectives import PARTIALS

RANKS = 2
ALONE = "its all_gather alone"


def fixed_cost_of_ranks(rows: int, columns: int, rounds: int, calls: int = 100) -> dict[str, float]:
    """Microseconds of forward and backward, ``columns`` on each rank; and of what it sends."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        arguments = (f"file://{folder}/store", str(result), rows, columns, rounds, calls)
        start_processes(_rank, arguments, nprocs=RANKS, start_method="spawn")
        cost: dict[str, float] = json.loads(result.read_text())
    return cost


def _rank(
    rank: int, store: str, result: str, rows: int, columns: int, rounds: int, calls: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        cost = fixed_costs(_steps(rows, columns), rounds, calls)
        if rank == 0:
            Path(result).write_text(json.dumps(cost))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _steps(rows: int, columns: int) -> dict[str, Callable[[], object]]:
    group = dist.group.WORLD
    assert group is not None
    # Not the same on both ranks, which would have to be told from gathered logits.
    logits = torch.full((rows, columns), float(group.rank()), requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64)
    sent = Payload.allocate(PARTIALS, rows, torch.float32, torch.device("cpu")).buffer.zero_()
    received = sent.new_empty(RANKS * sent.numel())

    def step() -> None:
        cross_entropy(logits, target, group=group).backward()

    return {ALONE: partial(all_gather_flat, received, sent, group), "cross_entropy": step}
