"""Runs the checks on all ranks, one after the other, and judges them together.

A check has failed if any rank found something wrong, raised, did not end in time, or returned other
bits than its neighbours where bits must agree. Every rank comes to the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from vocab_parallel_ce.launch.doctor.behaviour import reach
from vocab_parallel_ce.launch.doctor.cases import Found, Place
from vocab_parallel_ce.launch.doctor.checks import Check, for_dtype
from vocab_parallel_ce.launch.doctor.environment import DTYPES
from vocab_parallel_ce.launch.doctor.ranks import Outcome, Ranks
from vocab_parallel_ce.testing import Comparison

Word = Literal["ok", "FAILED", "skipped", "not run"]


@dataclass(frozen=True)
class Verdict:
    check: str
    dtype: str
    word: Word
    worst: Comparison | None = None
    worst_rank: int = 0
    problems: list[str] = field(default_factory=list)
    """each names its rank"""
    why: str = ""
    """it was not run or skipped"""


def judge(check: str, dtype: str, outcomes: list[Outcome[Found]]) -> Verdict:
    """One verdict from what every rank says."""
    problems, worst, worst_rank, digests, skipped = [], None, 0, [], ""
    # A rank that is late mostly waits for one that raised: that one is named first.
    for rank, outcome in sorted(enumerate(outcomes), key=lambda item: item[1].late):
        found = outcome.value
        if found is None:
            problems.append(f"rank {rank}: {outcome.error}")
            continue
        problems += [f"rank {rank}: {text}" for text in found.wrong]
        for comparison in found.comparisons:
            if comparison.ratio > 1:
                problems.append(
                    f"rank {rank}: {comparison.quantity} is off by {comparison.error:.1e}, "
                    f"allowed is {comparison.allowed:.1e}"
                )
            if worst is None or comparison.ratio > worst.ratio:
                worst, worst_rank = comparison, rank
        digests.append(found.digest)
        skipped = skipped or found.skipped
    if len(set(digests)) > 1:
        problems.append(f"ranks {list(range(len(digests)))}: not the same bits on every rank")
    word: Word = "FAILED" if problems else "skipped" if skipped else "ok"
    return Verdict(check, dtype, word, worst, worst_rank, problems, skipped)


Tell = Callable[[str, int], None]
"""what is being done, and how many steps are behind"""


def plan(place: Place) -> list[tuple[str, Check]]:
    """(dtype, check) of the whole selftest, the same on every rank."""
    first = [("fp32", Check("ranks reach each other", reach))] if place.world > 1 else []
    return first + [(name, c) for name, dtype in DTYPES.items() for c in for_dtype(place, dtype)]


def run_checks(ranks: Ranks, place: Place, tell: Tell) -> list[Verdict]:
    """Every check of every dtype."""
    verdicts: list[Verdict] = []
    closed: dict[str, str] = {}
    for dtype, check in plan(place):
        tell(f"{dtype}: {check.name}", 1)
        if ranks.broken:
            verdicts.append(Verdict(check.name, dtype, "not run", why=ranks.broken))
        elif dtype in closed:
            verdicts.append(Verdict(check.name, dtype, "skipped", why=closed[dtype]))
        else:
            verdict = judge(check.name, dtype, ranks.run(_bound(check, place, DTYPES[dtype])))
            verdicts.append(verdict)
            if check.gate and verdict.word == "skipped":
                closed[dtype] = verdict.why
    return verdicts


def _bound(check: Check, place: Place, dtype: torch.dtype) -> Callable[[], Found]:
    return lambda: check.run(place, dtype)
