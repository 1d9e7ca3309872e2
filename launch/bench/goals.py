"""The goals, and how far measured runs met them.

Idea: a goal is data (what, against whom, how much), judged by one function. A ratio is one of
medians taken in the same run. A goal that is not about another program's speed has a regression
gate as well, at two thirds of the goal or, for the times of the CPU, where ``gate.py`` puts it:
below it something broke; between the two it is a miss, and is called one. A ratio to a peer has
none: on another processor that is another number, whatever became of our code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from vocab_parallel_ce.launch.bench import gate, shares
from vocab_parallel_ce.launch.terminal import ranks_in_words

MIB = 1 << 20
GATE = 2 / 3
SHAPE = (4096, 32768)  # the shape the CPU goals are stated for

Run = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """Our median must be ``goal`` times shorter than the other's, forward and backward together."""

    ranks: int
    dtype: str
    ours: str
    against: str
    goal: float


RATIOS = (
    Ratio(1, "fp32", "ours-inplace", "torch", 12),
    Ratio(1, "fp32", "ours-inplace", "torch-compile", 5),
    Ratio(1, "fp32", "ours-inplace", "megatron", 4),
    Ratio(1, "bf16", "ours-inplace", "torch", 8),
    Ratio(1, "fp32", "ours", "torch", 2.8),
    Ratio(2, "fp32", "ours-inplace", "megatron", 5),
    Ratio(2, "fp32", "ours-inplace", "megatron-fused", 5),
    Ratio(2, "bf16", "ours-inplace", "megatron", 12),
    Ratio(2, "bf16", "ours-inplace", "megatron-fused", 12),
    Ratio(2, "bf16", "ours", "megatron", 4),
    Ratio(2, "bf16", "ours", "megatron-fused", 4),
    Ratio(1, "fp32", "ours-eager", "torch", 1.5),
    Ratio(1, "bf16", "ours-eager", "torch", 1.5),
    Ratio(2, "fp32", "ours-eager", "megatron", 1.5),
    Ratio(2, "bf16", "ours-eager", "megatron", 1.5),
    Ratio(2, "fp32", "ours-inplace", "loss-parallel", 25),
    Ratio(2, "bf16", "ours-inplace", "loss-parallel", 25),
)
COLLECTIVES = 1  # in forward, on more than one rank, by the default path
BANDWIDTH_SHARE = 0.85  # on CUDA in bf16, in place, of the copy bandwidth at three passes
FASTEST = 1.0  # on CUDA, in place: the fastest peer's time over ours, in every shape and dtype

NO_GATE = "none"

Verdict = Literal["met", "MISSED", "below the gate", "not measured"]


@dataclass(frozen=True)
class Judged:
    """One goal as it came out. ``measured`` is in the goal's own unit."""

    what: str
    goal: str
    gate: str
    measured: str
    verdict: Verdict
    words: str


def _judge(
    what: str,
    value: float,
    goal: float,
    gate: float | None,
    show: Callable[[float], str],
    more: bool,
) -> Judged:
    """``more``: whether larger is better. Equal to the goal is met, unless the gate is closer."""

    def better(one: float, other: float) -> bool:
        return one >= other if more else one <= other

    apart = abs(value / goal - 1) if goal else 0.0
    if gate is not None and not better(value, gate):
        verdict: Verdict = "below the gate"
        missed = f"MISSED by {apart:.0%}" if not better(value, goal) else "met"
        words = f"{missed}, below the regression gate"
    elif better(value, goal):
        verdict = "met"
        words = "met exactly" if value == goal else f"met, with {apart:.0%} to spare"
    else:
        verdict, words = "MISSED", f"MISSED by {apart:.0%}"
        words += ", above the regression gate" if gate is not None else ""
    return Judged(
        what, show(goal), NO_GATE if gate is None else show(gate), show(value), verdict, words
    )


def peer_of(run: Run, name: str) -> dict[str, Any] | None:
    return next((peer for peer in run["peers"] if peer["name"] == name), None)


def times(count: float) -> str:
    return f"{count:.2f}x"


def _mib(size: float) -> str:
    return f"{size / MIB:.2f} MiB"


def where_of(run: Run) -> str:
    return f"{ranks_in_words(run['ranks'])}, [{run['rows']}, {run['vocab']}] {run['dtype']}"


def _judge_ratio(ratio: Ratio, runs: list[Run], labels: dict[str, str]) -> Judged:
    where = f"{ranks_in_words(ratio.ranks)}, {ratio.dtype}"
    what = f"{where}: {labels[ratio.ours]} against {labels[ratio.against]}"
    reason = "not among the runs"
    for run in runs:
        if (run["ranks"], run["dtype"], run["device"]) != (ratio.ranks, ratio.dtype, "cpu"):
            continue
        ours, theirs = peer_of(run, ratio.ours), peer_of(run, ratio.against)
        lacking = [
            f"{labels[name]}: {peer['status'].split(':')[0] if peer else 'not asked for'}"
            for name, peer in ((ratio.ours, ours), (ratio.against, theirs))
            if peer is None or peer["status"]
        ]
        if lacking or ours is None or theirs is None:
            reason = "; ".join(lacking)
            break
        value = theirs["total_s"]["median"] / ours["total_s"]["median"]
        return _judge(what, value, ratio.goal, None, times, more=True)
    return Judged(what, times(ratio.goal), NO_GATE, "", "not measured", f"not measured: {reason}")


def _judge_fastest(run: Run, ours: dict[str, Any]) -> Judged | None:
    """Against the fastest peer that is right, by name; None where no other one ran."""
    others = [p for p in run["peers"] if not (p["ours"] or p["status"] or p.get("wrong"))]
    if not others:
        return None
    best = min(others, key=lambda peer: peer["total_s"]["median"])
    what = f"{where_of(run)}: {ours['label']}, faster than every peer ({best['label']})"
    value = best["total_s"]["median"] / ours["total_s"]["median"]
    return _judge(what, value, FASTEST, None, times, more=True)


def judge_times(runs: list[Run], labels: dict[str, str]) -> list[Judged]:
    """The goals of speed, those that were not measured included.

    The CPU ratios are left out where only accelerators ran.
    """
    out = []
    if not runs or any(run["device"] == "cpu" for run in runs):
        out += [_judge_ratio(ratio, runs, labels) for ratio in RATIOS]
    for run in runs:
        ours = peer_of(run, "ours-inplace")
        if run["device"] != "cuda" or ours is None or ours["status"]:
            continue
        fastest = _judge_fastest(run, ours)
        if fastest is not None:
            out.append(fastest)
        if run["dtype"] == "bf16":
            what = f"{where_of(run)}: {ours['label']}, share of the copy bandwidth"
            share, goal = ours["bandwidth_share"], BANDWIDTH_SHARE
            out.append(_judge(what, share, goal, goal * GATE, "{:.0%}".format, more=True))
    if not any((run["device"], run["dtype"]) == ("cuda", "bf16") for run in runs):
        what = f"cuda, bf16: {labels['ours-inplace']}, share of the copy bandwidth"
        aim, floor = f"{BANDWIDTH_SHARE:.0%}", f"{BANDWIDTH_SHARE * GATE:.0%}"
        out.append(Judged(what, aim, floor, "", "not measured", "not measured: not among the runs"))
    return out


def judge_limits(run: Run, records: dict[shares.Key, shares.Share]) -> list[Judged]:
    """How many times the limit measured in the same run ours takes, at the shape of the goals."""
    out = []
    for peer in gate.judged(run) if (run["rows"], run["vocab"]) == SHAPE else []:
        what = f"{where_of(run)}: {peer['label']}, times the limit of memory and arithmetic"
        most = gate.allowed(run, peer, records)
        found = _judge(what, peer["times_limit"], gate.GOAL, most.times, times, more=False)
        out.append(replace(found, words=f"{found.words} ({most.words})"))
    return out


def judge(runs: list[Run], labels: dict[str, str]) -> list[Judged]:
    """Every goal: speed, memory and collectives."""
    out = judge_times(runs, labels)
    records = shares.read()
    for run in runs:
        out += judge_limits(run, records)
    for run in runs:
        for name in ("ours-inplace", "ours"):
            peer = peer_of(run, name)
            if peer is None or peer["status"]:
                continue
            where = f"{where_of(run)}: {labels[name]}"
            what = f"{where}: extra memory at peak"
            size = peer["budget_bytes"]
            if "peak_bytes" in peer:
                out.append(_judge(what, peer["peak_bytes"], size, size / GATE, _mib, more=False))
            else:
                words = "not measured: this system does not tell"
                out.append(Judged(what, _mib(size), _mib(size / GATE), "", "not measured", words))
            count = peer["collectives"]["forward"]
            if run["ranks"] > 1 and count is not None:
                what = f"{where}: collectives in forward"
                out.append(_judge(what, count, COLLECTIVES, COLLECTIVES, "{:.0f}".format, False))
    return out


def failures(runs: list[Run], ours_only: bool = False) -> list[str]:
    """Peers whose results are wrong or that failed: what makes numbers worthless."""
    out = []
    for run in runs:
        for peer in run["peers"]:
            if ours_only and not peer["ours"]:
                continue
            if peer["status"].startswith("failed"):
                out.append(f"{where_of(run)}: {peer['label']} {peer['status']}")
            elif peer.get("wrong"):
                out.append(f"{where_of(run)}: {peer['label']} is WRONG: {peer['wrong']}")
    return out


VERDICTS: tuple[Verdict, ...] = ("met", "MISSED", "below the gate", "not measured")


def as_json(judged: list[Judged]) -> list[dict[str, str]]:
    return [asdict(row) for row in judged]
