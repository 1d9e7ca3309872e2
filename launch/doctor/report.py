"""How findings look: tables for the terminal, and one JSON file for a bug report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vocab_parallel_ce.launch.doctor.environment import Device, Environment
from vocab_parallel_ce.launch.doctor.scrub import Names, scrub
from vocab_parallel_ce.launch.doctor.selftest import Verdict
from vocab_parallel_ce.launch.doctor.speed import PassTiming, Speed
from vocab_parallel_ce.launch.doctor.truth import RULE
from vocab_parallel_ce.launch.measuring.device import MIB

SHOWN_FAILURES = 30
_COLOUR = {"ok": "green", "FAILED": "red", "skipped": "yellow", "not run": "yellow"}


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
    def failures(self) -> list[str]:
        """One line for every problem of every rank."""
        where = [(f"{v.check}, {v.dtype}", v.problems) for v in self.verdicts]
        where += [(f"{p.dtype} {_place(p)}, timed", p.problems) for p in self.speed.passes]
        where += [(c.name, c.problems) for c in self.speed.collectives]
        lines = [f"{name}: {problem}" for name, problems in where for problem in problems]
        return lines + ([f"the rest was not run: {self.broken}"] if self.broken else [])


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column)
    return table


# --- the environment --------------------------------------------------------------------------


def print_environment(console: Console, found: Environment) -> None:
    facts = _table("Environment", "what", "found")
    facts.add_row("Python", f"{found.python} on {found.platform}")
    facts.add_row("processor", f"{found.processor}, {found.cores} cores")
    for package, version in found.versions.items():
        facts.add_row(package, escape(version))
    facts.add_row("CANN", escape(found.cann))
    facts.add_row("driver", escape(found.driver))
    for index, device in enumerate(found.devices):
        facts.add_row(f"{found.device} {index}", escape(_device(device)))
    if not found.devices:
        facts.add_row("devices", "none")
    facts.add_row("backend", found.backend)
    for dtype, choice in found.engines.items():
        facts.add_row(f"engine, {dtype}", escape(f"{choice.engine}: {choice.why}"))
    console.print(facts)
    variables = _table("Environment variables", "name", "value", "verdict")
    for v in found.variables:
        value = f"unset ({v.default})" if v.value is None else escape(v.value) or "(empty)"
        verdict = f"[yellow]warning: {escape(v.word)}[/]" if v.word else "[green]ok[/]"
        variables.add_row(v.name, value if v.value is not None else f"[dim]{value}[/]", verdict)
    console.print(variables)
    for note in found.notes:
        console.print(f"[yellow]{escape(note)}[/]")


def _device(device: Device) -> str:
    def gib(size: int | None) -> str:
        return "?" if size is None else f"{size / 2**30:.1f} GiB"

    return f"{device.name}, {gib(device.total)}, {gib(device.free)} of it free"


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


# --- the selftest -----------------------------------------------------------------------------


def print_selftest(console: Console, test: Selftest, device: str) -> None:
    ranks = f"{test.world} rank{'s' if test.world > 1 else ''}"
    title = f"Selftest on {ranks} of {device}, logits [{test.rows}, {test.vocab}]"
    table = _table(title, "check", "worst error", "allowed", "where", "verdict")
    for name, verdicts in _by_check(test.verdicts).items():
        worst = max(verdicts, key=lambda v: v.worst.ratio if v.worst else -1.0)
        words = dict.fromkeys(v.word for v in verdicts)
        verdict = ", ".join(
            f"[{_COLOUR[word]}]{word}[/]" + (_which(verdicts, word) if len(words) > 1 else "")
            for word in words
        )
        error, allowed, where = "", "", ", ".join(v.dtype for v in verdicts)
        if worst.worst:
            error, allowed = f"{worst.worst.error:.1e}", f"{worst.worst.allowed:.1e}"
            where = f"{worst.dtype} {worst.worst.quantity}, rank {worst.worst_rank}"
        table.add_row(name, error, allowed, where, verdict)
    table.caption = f"worst of {', '.join(dict.fromkeys(v.dtype for v in test.verdicts))}; {RULE}"
    console.print(table)
    _print_speed(console, test.speed)
    skipped = [f"{v.dtype} skipped: {v.why}" for v in test.verdicts if v.word == "skipped"]
    for why in dict.fromkeys(skipped):
        console.print(f"[yellow]{escape(why)}[/]")
    for difference in test.differences:
        console.print(f"[yellow]{escape(difference)}[/]")
    for failure in test.failures[:SHOWN_FAILURES]:
        console.print(f"[red]FAILED[/] {escape(failure)}")
    if len(test.failures) > SHOWN_FAILURES:
        console.print(f"... and {len(test.failures) - SHOWN_FAILURES} more, all in the JSON file")


def _by_check(verdicts: list[Verdict]) -> Mapping[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.check, []).append(verdict)
    return found


def _which(verdicts: list[Verdict], word: str) -> str:
    return f" ({' '.join(v.dtype for v in verdicts if v.word == word)})"


def _place(timing: PassTiming) -> str:
    return f"{'in place' if timing.inplace else 'out of place'}, {timing.engine}"


def _print_speed(console: Console, speed: Speed) -> None:
    if speed.collectives:
        table = _table("Collectives of the loss", "which", "sent\nKB", "time\nus", "received\nGB/s")
        for c in speed.collectives:
            table.add_row(
                c.name,
                _scaled(c.sent_bytes, 1e-3, 1),
                _scaled(c.seconds, 1e6, 0),
                _scaled(c.bytes_per_s, 1e-9, 2),
            )
        console.print(table)
    if not speed.passes:
        return
    columns = ("forward\nms", "share", "backward\nms", "share", "both\nshare", "moved\nMB")
    table = _table("Forward and backward", "logits", *columns, "peak +\nMiB")
    for p in speed.passes:
        table.add_row(
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
    console.print(table)


def _scaled(value: float | None, factor: float, digits: int) -> str:
    return "?" if value is None else f"{value * factor:,.{digits}f}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


# --- the file ---------------------------------------------------------------------------------


def as_json(ranks: list[Environment], test: Selftest | None, names: Names) -> dict[str, Any]:
    """Everything that was found, fit to be shown to others."""
    report: dict[str, Any] = {"environment": asdict(ranks[0])}
    report["other_ranks"] = [asdict(found) for found in ranks[1:]]
    if test is not None:
        report["selftest"] = {
            "passed": not test.failures,
            "rule": RULE,
            "failures": test.failures,
            **asdict(test),
        }
    scrubbed: dict[str, Any] = scrub(_finite(report), names)
    return scrubbed


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
