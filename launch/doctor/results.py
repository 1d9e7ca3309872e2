"""What the selftest found, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vocab_parallel_ce.launch.doctor.findings import Environment
from vocab_parallel_ce.launch.doctor.selftest import Verdict
from vocab_parallel_ce.launch.doctor.speed import PassTiming, Speed
from vocab_parallel_ce.launch.doctor.truth import RULE
from vocab_parallel_ce.launch.measuring.device import MIB
from vocab_parallel_ce.launch.terminal import Coloured, Table, numbers, show, show_line, words

SHOWN_FAILURES = 30
_COLOUR = {"FAILED": "red", "not run": "yellow", "skipped": "yellow", "ok": "green"}
"""the worst first"""


@dataclass(frozen=True)
class Selftest:
    """Everything that --selftest found; the same on every rank."""

    world: int
    rows: int
    vocab: int
    verdicts: list[Verdict]
    speed: Speed
    broken: str
    """why the rest was not run; empty if all of it was"""
    differences: list[str]
    """what the ranks' environments do not have in common"""

    @property
    def rule(self) -> str:
        """By which a result is right."""
        return RULE

    @property
    def failures(self) -> list[str]:
        """One line for every problem of every rank."""
        where = [(f"{v.check}, {v.dtype}", v.problems) for v in self.verdicts]
        where += [(f"{p.dtype} {_place(p)}, timed", p.problems) for p in self.speed.passes]
        where += [(c.name, c.problems) for c in self.speed.collectives]
        lines = [f"{name}: {problem}" for name, problems in where for problem in problems]
        return lines + ([f"the rest was not run: {self.broken}"] if self.broken else [])


def compare_environments(ranks: list[Environment]) -> list[str]:
    """What should be the same on all ranks and is not."""
    own = ("RANK", "LOCAL_RANK", "HCCL_IF_IP")

    def shared(found: Environment) -> dict[str, str]:
        facts = {f"version of {name}": version for name, version in found.versions.items()}
        facts |= {"CANN": found.cann, "driver": found.driver, "Python": found.python}
        facts |= {
            v.name: v.value for v in found.variables if v.value is not None and v.name not in own
        }
        facts |= {f"engine for {dtype}": c.engine for dtype, c in found.engines.items()}
        return facts

    every = [shared(found) for found in ranks]
    names = dict.fromkeys(name for facts in every for name in facts)
    return [
        f"{name} differs: rank 0 has {every[0].get(name, 'none')!r}, rank {rank} has "
        f"{facts.get(name, 'none')!r}"
        for name in names
        for rank, facts in enumerate(every)
        if facts.get(name) != every[0].get(name)
    ]


def print_selftest(test: Selftest, device: str) -> None:
    ranks = f"{test.world} rank{'s' if test.world > 1 else ''}"
    title = f"Selftest on {ranks} of {device}, logits [{test.rows}, {test.vocab}]"
    columns = [*words("check"), *numbers("worst\nerror", "allowed"), *words("where", "verdict")]
    table = Table(title, columns)
    for name, verdicts in _by_check(test.verdicts).items():
        worst = max(verdicts, key=lambda v: v.worst.ratio if v.worst else -1.0)
        said = dict.fromkeys(v.word for v in verdicts)
        verdict = ", ".join(
            word + (_which(verdicts, word) if len(said) > 1 else "") for word in said
        )
        worst_word = min(said, key=lambda word: list(_COLOUR).index(word))
        error, allowed, where = "", "", ", ".join(v.dtype for v in verdicts)
        if worst.worst:
            error, allowed = f"{worst.worst.error:.1e}", f"{worst.worst.allowed:.1e}"
            where = f"{worst.dtype} {worst.worst.quantity}, rank {worst.worst_rank}"
        table.add(name, error, allowed, where, Coloured(verdict, _COLOUR[worst_word]))
    table.caption = f"worst of {', '.join(dict.fromkeys(v.dtype for v in test.verdicts))}; {RULE}"
    show(table)
    _print_speed(test.speed)
    skipped = [f"{v.dtype} skipped: {v.why}" for v in test.verdicts if v.word == "skipped"]
    for why in dict.fromkeys(skipped):
        show_line(Coloured(why, "yellow"))
    for difference in test.differences:
        show_line(Coloured(difference, "yellow"))
    for failure in test.failures[:SHOWN_FAILURES]:
        show_line(Coloured(f"FAILED {failure}", "red"))
    if len(test.failures) > SHOWN_FAILURES:
        show_line(f"... and {len(test.failures) - SHOWN_FAILURES} more, all in the JSON file")


def _by_check(verdicts: list[Verdict]) -> Mapping[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.check, []).append(verdict)
    return found


def _which(verdicts: list[Verdict], word: str) -> str:
    return f" ({' '.join(v.dtype for v in verdicts if v.word == word)})"


def _place(timing: PassTiming) -> str:
    return f"{'in place' if timing.inplace else 'out of place'}, {timing.engine}"


def _print_speed(speed: Speed) -> None:
    if speed.collectives:
        columns = [*words("which"), *numbers("sent\nKB", "time\nus", "received\nGB/s")]
        table = Table("Collectives of the loss", columns)
        for c in speed.collectives:
            table.add(
                c.name,
                _scaled(c.sent_bytes, 1e-3, 1),
                _scaled(c.seconds, 1e6, 0),
                _scaled(c.bytes_per_s, 1e-9, 2),
            )
        show(table)
    if not speed.passes:
        return
    headings = ("forward\nms", "share", "backward\nms", "share", "both\nshare", "moved\nMB")
    columns = [*words("logits"), *numbers(*headings, "peak +\nMiB")]
    table = Table("Forward and backward", columns)
    for p in speed.passes:
        table.add(
            f"{p.dtype} {_place(p)}",
            _scaled(p.forward_s, 1e3, 3),
            _share(p.forward_share),
            _scaled(p.backward_s, 1e3, 3),
            _share(p.backward_share),
            _share(p.share),
            _scaled(p.moved_bytes, 1e-6, 1),
            _scaled(p.peak_bytes, 1 / MIB, 1),
        )
    copies = ", ".join(
        f"{p.dtype} {p.copy_bytes_per_s / 1e9:.1f} GB/s"
        for p in speed.passes
        if (p.inplace, p.engine) == (True, speed.passes[0].engine) and p.copy_bytes_per_s
    )
    table.caption = (
        "share = bytes / time / copy bandwidth; bytes: the logits once in forward (read), twice in "
        f"backward (read, write). Copy bandwidth of all ranks in this run: {copies or 'unknown'}"
    )
    show(table)


def _scaled(value: float | None, factor: float, digits: int) -> str:
    return "?" if value is None else f"{value * factor:,.{digits}f}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"
