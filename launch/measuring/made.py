"""Where and when something was measured: what a file of results begins with."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import TypedDict

import torch

from vocab_parallel_ce.launch.measuring.machine import processor


class Made(TypedDict):
    """See the head of this file."""

    machine: str
    date: str
    torch: str


def made_here() -> Made:
    """Now, on this machine."""
    return {
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "torch": torch.__version__,
    }


def in_words(made: Made) -> str:
    return f"{made['machine']}, {made['date']}, torch {made['torch']}"
