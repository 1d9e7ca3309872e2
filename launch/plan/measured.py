"""Runs a case on this machine's CPU and puts the model's prediction beside it.

The benchmark starts the ranks, over Gloo, and times every way as it always does. In the same run
the ranks measure what the model needs of the machine (``measuring/calibration.py``), and the copy
that restores the logits before every timed pass gives the bandwidth. Nothing of a preset enters
the prediction.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.bench import command as bench
from vocab_parallel_ce.launch.bench.rank import Plan
from vocab_parallel_ce.launch.measuring.machine import processor
from vocab_parallel_ce.launch.measuring.memory import available_bytes
from vocab_parallel_ce.launch.plan.devices import DEVICES, Device, Figure
from vocab_parallel_ce.launch.plan.model import Prediction, predict
from vocab_parallel_ce.launch.plan.ways import Case, ways

WAYS = ("ours-inplace", "ours", "megatron", "megatron-fused")
_MEASURED = "measured in this run, all ranks together"


@dataclass(frozen=True)
class Compared:
    """One way: what the model says and what was seen. ``status`` says why nothing was."""

    prediction: Prediction
    status: str
    forward_s: float | None = None
    backward_s: float | None = None
    total_s: float | None = None
    """median over the repetitions, of the slowest rank"""
    peak_bytes: int | None = None
    collectives: int | None = None
    """in forward, counted"""


@dataclass(frozen=True)
class Run:
    """One number of ranks."""

    case: Case
    device: Device
    """this machine, as it was while these ranks ran"""
    compared: list[Compared]


def measured_device(run: dict[str, Any]) -> Device:
    """The model's figures of this machine, from what one run of the benchmark reports."""
    found = run["calibration"]
    return Device(
        "cpu",
        f"this machine: {processor()}",
        engine="cpu",
        compiles=True,
        peak_bandwidth=DEVICES["cpu"].peak_bandwidth,
        bandwidth=Figure(run["copy_bandwidth"]["median"], f"a copy of the logits, {_MEASURED}"),
        link_bandwidth=Figure(found["link_bandwidth"], _MEASURED),
        gather_latency=Figure(found["gather_latency"], _MEASURED),
        reduce_latency=Figure(found["reduce_latency"], _MEASURED),
        shared=True,
        write_allocates=True,
        first_touch=found["first_touch"] and Figure(found["first_touch"], _MEASURED),
        rates={name: Figure(rate, _MEASURED) for name, rate in found["rates"].items()},
    )


def compare(case: Case, run: dict[str, Any]) -> Run:
    """One run of the benchmark beside the model's prediction of it."""
    device = measured_device(run)
    peers = {peer["name"]: peer for peer in run["peers"]}
    compared = []
    for prediction in predict(case, device):
        peer = peers.get(prediction.name)
        if peer is None or peer["status"]:
            compared.append(Compared(prediction, peer["status"] if peer else "not asked for"))
            continue
        compared.append(
            Compared(
                prediction,
                peer["wrong"],
                peer["forward_s"]["median"],
                peer["backward_s"]["median"],
                peer["total_s"]["median"],
                peer.get("peak_bytes"),
                peer["collectives"]["forward"],
            )
        )
    return Run(case, device, compared)


def needed_bytes(case: Case) -> int:
    """Memory of all ranks together: two copies of the logits, and the largest peak beside them."""
    peak = max(way.peak for way in ways(case, "cpu", compiles=True))
    return case.ranks * (2 * case.elements * case.itemsize + peak)


def run_case(case: Case, names: tuple[str, ...], repeats: int, wait_idle: float) -> Run:
    """Start the ranks, measure, compare. RuntimeError when a rank fails."""
    needed, available = needed_bytes(case), available_bytes()
    if available is not None and needed > available:
        raise RuntimeError(
            f"it needs {needed >> 20} MiB of memory, {available >> 20} MiB are available; "
            "give fewer --tokens or a smaller --vocab"
        )
    plan = Plan(
        shapes=((case.rows, case.vocab),),
        dtypes=(case.dtype,),
        device="cpu",
        repeats=repeats,
        peers=names,
        wait_idle=wait_idle,
        calibrate=True,
    )
    with tempfile.TemporaryDirectory() as logs:
        (run,) = bench.start_ranks(plan, case.ranks, Path(logs))
    return compare(case, run)
