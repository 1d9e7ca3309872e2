"""python -m vocab_parallel_ce.launch.bench.call_cost: what a call costs before the first logit.

Two fixed costs that the benchmark's large shapes hide: the microseconds of a forward and backward
at N = 1, C = 8 beside F.cross_entropy's, and the seconds that the first call of a process takes,
once with an empty kernel cache (everything is compiled) and once with the cache of that run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.launch.measuring.calls import first_call_seconds, fixed_costs

ROWS, VOCAB = 1, 8
DTYPES = ("float32", "bfloat16", "float16", "float64")
_FIRST_CALL = """
import sys, time, torch
from vocab_parallel_ce import cross_entropy
logits = torch.zeros(4, 1000, dtype=getattr(torch, sys.argv[1]), requires_grad=True)
target = torch.zeros(4, dtype=torch.int64)
start = time.perf_counter()
cross_entropy(logits, target).backward()
print(time.perf_counter() - start)
"""


def fixed_cost(rounds: int = 30, calls: int = 100) -> dict[str, float]:
    """Medians over interleaved rounds, forward and backward together, in microseconds."""
    logits = torch.zeros(ROWS, VOCAB, requires_grad=True)
    target = torch.zeros(ROWS, dtype=torch.int64)
    losses: dict[str, Callable[..., torch.Tensor]] = {
        "F.cross_entropy": F.cross_entropy,
        "cross_entropy": cross_entropy,
    }

    def step(loss: Callable[..., torch.Tensor]) -> None:
        loss(logits, target).backward()

    return fixed_costs({name: partial(step, loss) for name, loss in losses.items()}, rounds, calls)


def main(rounds: int = 30, first_calls: bool = True) -> None:
    """Print both costs."""
    console = Console()
    cost = fixed_cost(rounds)
    console.print(f"Forward and backward at N={ROWS}, C={VOCAB}, fp32, one process:")
    for name, value in cost.items():
        console.print(f"  {name:16} {value:6.0f} us")
    console.print(f"  ratio            {cost['cross_entropy'] / cost['F.cross_entropy']:6.1f}")
    if not first_calls:
        return
    table = Table("first call, cpu engine", "compiled", "from the cache on disk")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (first_call_seconds(_FIRST_CALL, dtype, cache) for _ in range(2))
        table.add_row(dtype, f"{cold:.1f} s", f"{warm:.2f} s")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
