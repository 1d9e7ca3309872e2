"""What can be found out without torch: versions of packages, CANN and driver, and variables.

Nothing here raises or hangs: what is not there is said in words, and tools get a time limit. And
nothing here imports torch, typer or rich: the doctor begins here on any machine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import vocab_parallel_ce
from vocab_parallel_ce.launch.doctor.findings import Environment
from vocab_parallel_ce.launch.doctor.variables import judge
from vocab_parallel_ce.launch.doctor.worker import Worker
from vocab_parallel_ce.launch.measuring.machine import processor

PACKAGES = ("torch", "torch_npu", "numba", "triton", "triton-ascend", "numpy", "megatron-core")
NOT_FOUND = "not found"
TOOL_SECONDS = 10.0


def without_torch(device: str, npu_problem: str, torch_problem: str = "") -> Environment:
    """What is known before any device is asked. ``npu_problem``: why torch_npu does not import.

    ``torch_problem``: why torch does not; then nothing more will be known.
    """
    found = Environment(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=sys.argv[1:],
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        cores=os.cpu_count() or 1,
        versions=package_versions(npu_problem),
        cann=cann_version(),
        driver="",
        device=device,
        problem=torch_problem,
        notes=[],
        devices=[],
        backend=NOT_FOUND,
        engines={},
        variables=[],
    )
    return replace(
        found, driver=driver_version(found.kinds), variables=judge(os.environ, found.kinds)
    )


def package_versions(npu_problem: str) -> dict[str, str]:
    """Installed packages, this one first; torch_npu with why it does not import, if so."""
    found = {"vocab_parallel_ce": _own_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch_npu" in found and "torch_npu" not in sys.modules and npu_problem:
        found["torch_npu"] += f", does not import: {npu_problem}"
    return found


def _own_version() -> str:
    version = vocab_parallel_ce.__version__
    try:
        importlib.metadata.version("vocab_parallel_ce")
    except importlib.metadata.PackageNotFoundError:
        return f"{version} (not installed, run from its source)"
    return version


def _field(path: Path, names: tuple[str, ...]) -> str:
    """``name=value`` of the first of ``names`` that a small text file holds; else empty."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    for name in names:
        found = re.search(rf"^\s*{name}\s*=\s*\[?([^\]\s]+)", text, re.MULTILINE | re.IGNORECASE)
        if found:
            return found[1]
    return ""


def cann_version() -> str:
    """Of the CANN that the environment points to, or that lies where it is usually installed."""
    roots = [os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    usual = Path("/usr/local/Ascend")
    places = [Path(root) for root in roots if root]
    places += [usual / "ascend-toolkit" / "latest", usual / "cann", usual / "latest"]
    for root in places:
        files = [
            *sorted(root.glob("*-linux/ascend_toolkit_install.info")),
            root / "ascend_toolkit_install.info",
            root / "version.cfg",
            *(root / part / "version.info" for part in ("compiler", "runtime", "opp")),
        ]
        for path in files:
            version = _field(path, ("version", r"toolkit\w*version", r"\w*running_version"))
            if version:
                return f"{version} ({path})"
    return NOT_FOUND


def _say(*command: str) -> str:
    """Standard output of a tool; empty if it is missing, fails or takes too long."""

    def run() -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TOOL_SECONDS
        )
        return done.stdout if done.returncode == 0 else ""

    try:
        # The limit outside is for a tool that hangs in the driver, where no signal reaches it.
        return Worker().call(run, TOOL_SECONDS + 2)
    except Exception:
        return ""


def driver_version(kinds: tuple[str, ...]) -> str:
    """Of the cards' driver, for every kind of card that is meant to be here."""
    known = {"npu": _npu_driver, "cuda": _cuda_driver}
    found = [f"{kind} {known[kind]() or NOT_FOUND}" for kind in kinds if kind in known]
    return ", ".join(found) or "none needed"


def _npu_driver() -> str:
    version = _field(Path("/usr/local/Ascend/driver/version.info"), ("version",))
    said = None if version else re.search(r"Version:\s*(\S+)", _say("npu-smi", "info"))
    return said[1] if said else version


def _cuda_driver() -> str:
    lines = _say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines else ""
