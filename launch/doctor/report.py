"""How findings look: tables on the terminal, one JSON file for a bug report. Needs no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocab_parallel_ce.launch.doctor.findings import Device, Environment
from vocab_parallel_ce.launch.doctor.scrub import Names, scrub
from vocab_parallel_ce.launch.terminal import Coloured, Table, show, show_line, words

if TYPE_CHECKING:
    from vocab_parallel_ce.launch.doctor.results import Selftest


def print_environment(found: Environment) -> None:
    """What was found; first of all why the device, or torch itself, cannot be used."""
    if found.problem:
        show_line(Coloured(f"Problem: {found.problem}", "red"))
    facts = Table("Environment", words("what", "found"))
    facts.add("Python", f"{found.python} on {found.platform}")
    facts.add("processor", f"{found.processor}, {found.cores} cores")
    for package, version in found.versions.items():
        facts.add(package, version)
    facts.add("CANN", found.cann)
    facts.add("driver", found.driver)
    for index, device in enumerate(found.devices):
        facts.add(f"{found.device} {index}", _device(device))
    if not found.devices:
        facts.add("devices", "none")
    facts.add("backend", found.backend)
    for dtype, choice in found.engines.items():
        facts.add(f"engine, {dtype}", f"{choice.engine}: {choice.why}")
    show(facts)
    variables = Table("Environment variables", words("name", "value", "verdict"))
    for v in found.variables:
        value = Coloured(f"unset ({v.default})", "dim") if v.value is None else v.value
        verdict = Coloured(f"warning: {v.word}", "yellow") if v.word else Coloured("ok", "green")
        variables.add(v.name, value or "(empty)", verdict)
    show(variables)
    for note in found.notes:
        show_line(Coloured(note, "yellow"))


def _device(device: Device) -> str:
    def gib(size: int | None) -> str:
        return "?" if size is None else f"{size / 2**30:.1f} GiB"

    return f"{device.name}, {gib(device.total)}, {gib(device.free)} of it free"


# --- the file ---------------------------------------------------------------------------------


def as_json(ranks: list[Environment], test: Selftest | None, names: Names) -> dict[str, Any]:
    """Everything that was found, fit to be shown to others."""
    report: dict[str, Any] = {"environment": asdict(ranks[0])}
    report["other_ranks"] = [asdict(found) for found in ranks[1:]]
    if test is not None:
        report["selftest"] = {
            "passed": not test.failures,
            "rule": test.rule,
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
