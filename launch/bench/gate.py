"""The speed gate: how many times the limit of its own run our loss may take.

Idea: a processor must not decide. So what is judged is time over a limit measured beside it in the
same run (``measuring/limits.py``), not time and not a ratio to a peer, which is another program's
speed. Both are lower quartiles of interleaved runs: noise adds to a few of them, and a busy minute
to both. Who fails is measured again, up to ATTEMPTS times in all, and the best counts: a kernel
that got slower is slow every time.

How much is allowed, where r is what was recorded of today's code (``shares.csv``):

    r up to 1.25        min(1.45, 1.3 r)   it meets the goal: it must not lose it, nor a third
    r above 1.25        1.3 r
    nothing recorded    1.45 for fp32 in place, else UNSEEN

So 1.5 times slower than recorded always fails. A processor, shape or number of threads that nobody
recorded cannot be held to that. fp32 in place has kept the goal on every processor measured so far;
the other ways have not, and all that is asked of them is that nothing is broken. UNSEEN is 1.3
times the worst of them: bf16 in place on an Intel Emerald Rapids, 1.75.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vocab_parallel_ce.launch.bench.shares import Key, Share, key_of

Run = dict[str, Any]

GOAL = 1.25
KEPT = 1.45
SLACK = 1.3
UNSEEN = 2.3
ATTEMPTS = 3


@dataclass(frozen=True)
class Allowed:
    """How many times the limit, and where that number comes from."""

    times: float
    words: str


def allowed_for(record: float) -> float:
    """Where today's code takes ``record`` times the limit."""
    return min(KEPT, SLACK * record) if record <= GOAL else SLACK * record


def allowed(run: Run, peer: dict[str, Any], records: dict[Key, Share]) -> Allowed:
    """For one of ours in one run."""
    record = records.get(key_of(run, peer))
    if record is not None:
        words = f"recorded {record.times_limit:.2f}x on {record.date[:10]}"
        return Allowed(allowed_for(record.times_limit), words)
    kept = peer["ours"] == "in place" and run["dtype"] == "fp32"
    return Allowed(KEPT if kept else UNSEEN, f"no record of {run['processor']}")


def judged(run: Run) -> list[dict[str, Any]]:
    """The peers of a run that the gate is about: ours, where limits were measured."""
    return [peer for peer in run["peers"] if "times_limit" in peer]


def too_slow(run: Run, records: dict[Key, Share]) -> list[str]:
    """Names of those that take more than they may."""
    return [
        peer["name"]
        for peer in judged(run)
        if peer["times_limit"] > allowed(run, peer, records).times
    ]


def look_again(run: Run, records: dict[Key, Share], measure: Callable[[list[str]], Run]) -> None:
    """Give who is too slow another chance, in place; ``measure`` runs the named peers again.

    ``attempts`` then holds every result; what led to ``times_limit`` is the best one's.
    """
    for _ in range(ATTEMPTS - 1):
        late = too_slow(run, records)
        if not late:
            return
        again = {peer["name"]: peer for peer in judged(measure(late))}
        for peer in judged(run):
            other = again.get(peer["name"])
            if other is None:
                continue
            peer.setdefault("attempts", [peer["times_limit"]]).append(other["times_limit"])
            if other["times_limit"] < peer["times_limit"]:
                peer |= {name: other[name] for name in ("times_limit", "limit_s", "taken_s")}
