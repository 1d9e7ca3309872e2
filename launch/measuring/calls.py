"""What a call costs beside its work: its fixed microseconds, and the first call of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch

from vocab_parallel_ce.launch.measuring.clock import wall_seconds
from vocab_parallel_ce.launch.measuring.rounds import in_turns


def microseconds(step: Callable[[], object], calls: int) -> float:
    """Mean time of one of ``calls`` calls."""

    def many() -> None:
        for _ in range(calls):
            step()

    return wall_seconds(many, torch.device("cpu")) / calls * 1e6


def fixed_costs(
    steps: Mapping[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, float]:
    """Median microseconds of a call of each, taken in turns."""
    runs = {name: partial(microseconds, step, calls) for name, step in steps.items()}
    return {name: median(values) for name, values in in_turns(runs, rounds).items()}


def first_call_seconds(program: str, argument: str, cache: str) -> float:
    """What ``program``, in a fresh process whose kernel cache is the folder ``cache``, prints."""
    run = subprocess.run(
        [sys.executable, "-c", program, argument],
        env=os.environ | {"NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)
