"""vocab-parallel-ce call-cost: the fixed cost of a call, however few its logits.

Fixed costs that the benchmark's large shapes hide. The microseconds of a forward and backward at
N = 1, C = 8: on one process, beside F.cross_entropy's; on two ranks, beside the exchange alone; and
those of the host where the Triton engine serves, without the launches of kernels (``host_side.py``
says what that is). And the seconds that the first call of a process takes, once with an empty
kernel cache (everything is compiled) and once with the cache of that run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.launch.bench.call_cost.ranks import ALONE, fixed_cost_of_ranks
from vocab_parallel_ce.launch.command_line import Json, job, whole
from vocab_parallel_ce.launch.measuring.calls import first_call_seconds, fixed_costs
from vocab_parallel_ce.launch.measuring.host_side import (
    Launches,
    launches,
    triton_without_launches,
)
from vocab_parallel_ce.launch.measuring.made import made_here
from vocab_parallel_ce.launch.options import make_writable
from vocab_parallel_ce.launch.terminal import Table, numbers, show, words

ROWS, VOCAB = 1, 8
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
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


def host_cost(rounds: int = 30, calls: int = 100) -> tuple[float, Launches]:
    """Microseconds of the host where the Triton engine serves, and the launches not in it."""
    logits = torch.zeros(ROWS, VOCAB, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(ROWS, dtype=torch.int64)

    def step() -> None:
        cross_entropy(logits, target, engine="triton").backward()

    with triton_without_launches() as kernels:
        step()  # the gradient is there from now on
        counted = launches(step, kernels)
        return fixed_costs({"host": step}, rounds, calls)["host"], counted


def _show(what: str, cost: dict[str, float], against: str) -> None:
    table = Table(
        f"Forward and backward at N={ROWS}, C={VOCAB}, {what}",
        [*words("loss"), *numbers("us", f"against {against}")],
    )
    for name, value in cost.items():
        table.add(name, f"{value:.0f}", f"{value / cost[against]:.1f}x")
    show(table)


def main(
    rounds: Annotated[int, whole("Timed rounds; the median is shown.")] = 30,
    first_calls: Annotated[
        bool, typer.Option(help="Also time the first call of a process; takes a minute.")
    ] = True,
    json_file: Json = None,
) -> None:
    """Microseconds of a call on one row of 8 logits, and seconds of a process's first call."""
    if json_file is not None:
        make_writable("--json", json_file)
    alone, ranks = fixed_cost(rounds), fixed_cost_of_ranks(ROWS, VOCAB, rounds)
    _show("fp32, one process", alone, "F.cross_entropy")
    _show("fp32, two ranks", ranks, ALONE)
    micros, counted = host_cost(rounds)
    table = Table(
        "The host on the Triton engine's path, bf16, one process: without launches, seen on CPU "
        "tensors",
        numbers("us", "launches of\nthe engine", "launches of\ntorch"),
    )
    table.add(f"{micros:.0f}", str(counted.own), str(counted.torch))
    show(table)
    first = _first_calls() if first_calls else {}
    if json_file is not None:
        host = {"us": micros, "own": counted.own, "torch": counted.torch}
        costs = {"one process": alone, "two ranks": ranks, "host": host, "first call": first}
        json_file.write_text(json.dumps({"made": made_here(), **costs}, indent=1) + "\n")


def _first_calls() -> dict[str, tuple[float, float]]:
    """Seconds by dtype, compiled and from the cache; shows them."""
    columns = [*words("dtype"), *numbers("compiled\ns", "from the cache\non disk, s")]
    table = Table("First call of a process, on CPU tensors", columns)
    found = {}
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (first_call_seconds(_FIRST_CALL, dtype, cache) for _ in range(2))
        found[name] = cold, warm
        table.add(name, f"{cold:.1f}", f"{warm:.2f}")
    show(table)
    return found


app = job("call-cost", main)
