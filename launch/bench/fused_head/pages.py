"""What the pages say of the fused head, of the results that the repository keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.bench.fused_head.measure import ACCURACY, PRODUCTS
from vocab_parallel_ce.launch.markdown import markdown
from vocab_parallel_ce.launch.measuring.made import in_words
from vocab_parallel_ce.launch.terminal import ranks_in_words

RESULTS = Path(__file__).with_name("results.json")
OURS, EACH_TOKEN = "ours, fused", "ours, fused, a loss per token"
TORCH = "F.linear + F.cross_entropy"
BEST_OF_TORCH, MEGATRON = "F.linear_cross_entropy, our rows", "F.linear + Megatron fused"
FRONT = (PRODUCTS, OURS, TORCH, BEST_OF_TORCH, MEGATRON)
"""what the front page shows"""
CHUNK_MIB = 128
"""of logits, the default on a CPU"""
Run = dict[str, Any]


def _of(run: Run, name: str) -> dict[str, Any] | None:
    """A way that ran."""
    found = next((way for way in run["ways"] if way["name"] == name), None)
    return found if found is not None and found["milliseconds"] is not None else None


def _heading(run: Run) -> str:
    text = f"{ranks_in_words(run['ranks'])}, {run['dtype']}"
    return f"{text}, {run['ignored']:.0%} ignored" if run["ignored"] else text


def times(runs: Sequence[Run], only: Sequence[str] = ()) -> str:
    """Ways down, runs across: time in units of the three products, and peak memory."""
    names = dict.fromkeys(way["name"] for run in runs for way in run["ways"])
    lines = []
    for name in names:
        if only and name not in only:
            continue
        found = [_of(run, name) for run in runs]
        if not any(found):
            continue
        cells = []
        for way in found:
            text = "" if way is None else f"{way['products']:.2f}x"
            if way is not None and name == PRODUCTS:
                text = f"{way['milliseconds'] / 1000:.2f} s"
            elif way is not None and way["peak_mib"] is not None:
                text += f" / {way['peak_mib']:.0f}"
            cells.append(text)
        lines.append([f"**{name}**" if name.startswith("ours") else name, *cells])
    return markdown(["time / MiB", *map(_heading, runs)], lines)


def errors(run: Run) -> str:
    """Of one run: errors relative to fp64."""
    quantities = [f"{kind}, {what}" for kind in ("random", "confident") for what in _QUANTITIES]
    lines = [
        [way["name"], *(f"{error:.1e}" for error in way["errors"])]
        for way in run["ways"]
        if way["errors"]
    ]
    return markdown([f"{_heading(run)}: rows", *quantities], lines)


_ERRORS = (
    f"Errors relative to fp64, on [{ACCURACY[0]}, {ACCURACY[1]}] hidden states and a head of "
    f"{ACCURACY[2]} ids; those of gradients by their norm. In confident rows the target has a "
    "probability of about 0.99."
)
_QUANTITIES = ("loss", "hidden gradient", "head gradient")


def _gradients_mib(run: Run) -> float:
    """Of the hidden states and this rank's rows of the head."""
    numbers = (run["rows"] + run["vocab"] / run["ranks"]) * run["width"]
    return float(numbers * (4 if run["dtype"] == "fp32" else 2) / (1 << 20))


def goals(runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """What was to be reached, the number, and its limit: at most so much."""
    out = []
    for run in runs:
        where, ours = _heading(run), _of(run, OURS)
        if ours is None:
            continue
        if run["ignored"]:
            if (other := _of(run, TORCH)) is not None:
                share = ours["milliseconds"] / other["milliseconds"]
                out.append((f"{where}: time of {TORCH}", share, 1 / 3))
            continue
        out.append((f"{where}: the three products", ours["products"], 1.10))
        if (each := _of(run, EACH_TOKEN)) is not None:
            out.append((f"{where}, a loss per token: four products", each["products"] * 0.75, 1.10))
        limit = _gradients_mib(run) + CHUNK_MIB + 16
        if ours["peak_mib"] is not None:
            out.append((f"{where}: gradients + chunk + 16 MiB", ours["peak_mib"] / limit, 1.0))
        if run["dtype"] == "fp32" and (best := _of(run, BEST_OF_TORCH)) is not None:
            share = ours["milliseconds"] / best["milliseconds"]
            out.append((f"{where}: time of {BEST_OF_TORCH}", share, 1.0))
        if run["ranks"] > 1 and (other := _of(run, MEGATRON)) is not None:
            share = ours["milliseconds"] / other["milliseconds"]
            out.append((f"{where}: time of {MEGATRON}", share, 1.0))
            if ours["peak_mib"] is not None and other["peak_mib"]:
                share = ours["peak_mib"] / other["peak_mib"]
                out.append((f"{where}: memory of {MEGATRON}", share, 0.5))
    return out


def _words(found: dict[str, Any]) -> str:
    run = found["runs"][0]
    text = (
        f"[{run['rows']}, {run['width']}] hidden states, [{run['vocab']}, {run['width']}] head, "
        f"mean loss, forward and backward; {in_words(found['made'])}. Time in units of the three "
        "matrix products alone, measured in the same run; peak memory in MiB with the gradients. "
        "An empty cell was not run: torch's losses need the whole vocabulary on one rank, and with "
        "ignored rows only the two ways of the goal are compared."
    )
    return text + (" **The machine was not quiet.**" if found["busy"] else "")


def short(found: dict[str, Any]) -> str:
    """For the front page."""
    return f"{_words(found)}\n\n{times(found['runs'], FRONT)}"


def long(found: dict[str, Any]) -> str:
    """For the page of the fused head."""
    parts = [_words(found), times(found["runs"])]
    parts.append(_ERRORS)
    parts += [errors(run) for run in found["runs"] if run["ranks"] == 1 and not run["ignored"]]
    judged = goals(found["runs"])
    missed = [goal for goal in judged if goal[1] > goal[2]]
    text = f"Goals met: {len(judged) - len(missed)} of {len(judged)}."
    lines = [f"* {what}: {number:.2f}, goal {limit:.2f}" for what, number, limit in missed]
    return "\n\n".join([*parts, "\n".join([text, *lines])])
