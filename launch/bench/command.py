"""python -m vocab_parallel_ce.launch.bench: the loss against what one would otherwise use.

Idea: logits-level forward and backward, on one process with all of torch's threads and on N
ranks that the benchmark starts itself (Gloo, NCCL or HCCL by device), against every peer that is
installed; what is not installed is listed as such. Under torchrun it measures the ranks it finds.

    python -m vocab_parallel_ce.launch.bench                  1 process and 2 ranks, fp32 and bf16
    python -m vocab_parallel_ce.launch.bench --ranks 4 --dtype bf16 --rows 2048 --vocab 131072
    python -m vocab_parallel_ce.launch.bench --device cuda    every shape of the grid, on one card
    torchrun --nproc-per-node 8 -m vocab_parallel_ce.launch.bench --device cuda

It ends with the goals, and says plainly which are missed; bench.json holds every number, and
--csv keeps the medians in a table from which the README's is made (``bench_table``). The exit
status is 0 also when goals are missed, 1 when ranks died, and with --gate when a regression gate
was missed (``gate.py``, ``goals.py``).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import vocab_parallel_ce
from vocab_parallel_ce.launch.bench import gate as bench_gate
from vocab_parallel_ce.launch.bench import goals as bench_goals
from vocab_parallel_ce.launch.bench import medians as bench_csv
from vocab_parallel_ce.launch.bench import report as bench_report
from vocab_parallel_ce.launch.bench import shares as bench_shares
from vocab_parallel_ce.launch.bench.peers import PEERS
from vocab_parallel_ce.launch.bench.rank import BACKENDS, DTYPES, Plan, run_plan, steps
from vocab_parallel_ce.launch.measuring.device import device_name
from vocab_parallel_ce.launch.measuring.machine import processor

LABELS = {peer.name: peer.label for peer in PEERS}
GRID_ROWS = (4096, 8192, 16384, 32768)
GRID_VOCABS = (16384, 32768, 131072, 262144)
BESIDE = ("numba", "triton", "torch_npu")  # what peers and engines are built on


def default_device() -> str:
    for device in ("npu", "cuda"):
        if hasattr(torch, device) and getattr(torch, device).is_available():
            return device
    return "cpu"


def devices(device: str) -> int | None:
    """How many there are; None where ranks share one, as on a CPU."""
    if device == "cpu":
        return None
    return int(torch.get_device_module(torch.device(device)).device_count())


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers, or to repeat them."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = dict.fromkeys([*(peer.distribution for peer in PEERS), *BESIDE])
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "device": device_name(torch.device(device)),
        "versions": {package: version(package) for package in packages},
        "command": sys.argv[1:],
    }


def start_ranks(plan: Plan, ranks: int, logs: Path) -> list[dict[str, Any]]:
    """Run the plan on ``ranks`` fresh processes; the first one to fail ends the others."""
    present = devices(plan.device)
    if present is not None and present < ranks:
        raise RuntimeError(f"it needs {ranks} {plan.device} devices, found {present}")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "vocab_parallel_ce.launch.bench.rank"]
        command += [plan.dump(), f"file://{folder}/store", str(result)]
        # Ranks import this same library, also where it is not installed; Kineto's own log and a
        # pool of compiler processes would only disturb the measurement.
        home = str(Path(vocab_parallel_ce.__path__[0]).absolute().parent)
        base = os.environ | {
            "WORLD_SIZE": str(ranks),
            "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")])),
            "KINETO_LOG_LEVEL": "99",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        if ranks > 1 and plan.device == "cpu":
            base["OMP_NUM_THREADS"] = "1"
        processes: list[subprocess.Popen[bytes]] = []
        files = []
        ended: list[int | None] = []
        try:
            for rank in range(ranks):
                # Rank 0 draws on the terminal; what the others say is kept for when they fail.
                log = None if rank == 0 else (logs / f"rank{rank}.log").open("wb")
                files.append(log)
                processes.append(
                    subprocess.Popen(
                        command,
                        env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=log or sys.stderr.fileno(),
                        stderr=log,
                    )
                )
            while True:
                ended = [process.poll() for process in processes]
                if any(ended) or None not in ended:
                    break
                time.sleep(0.1)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
                if process.stdin:
                    process.stdin.close()
            for log in files:
                if log:
                    log.close()
        first = next((rank for rank, code in enumerate(ended) if code), None)
        if first is not None:
            said = logs / f"rank{first}.log"  # but what rank 0 says is on standard error already
            tail = said.read_text(errors="replace").splitlines()[-8:] if first else []
            words = f"rank {first} ended first, with {ended[first]}"
            print(words, *tail, sep="\n  ", file=sys.stderr)
            if not result.exists():
                raise RuntimeError(words)
        runs: list[dict[str, Any]] = json.loads(result.read_text())
        return runs


def _bad(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


def shapes_of(
    device: str, rows: list[int] | None, vocabs: list[int] | None, quick: bool
) -> tuple[tuple[int, int], ...]:
    """Every pair of the rows and the vocabularies; by default one on a CPU, a grid on CUDA."""
    default: tuple[Sequence[int], Sequence[int]]
    if quick:
        default = ([64], [1024])
    elif device == "cuda":
        default = (GRID_ROWS, GRID_VOCABS)
    else:  # an NPU needs more work than a CPU before launches stop mattering
        default = ([4096], [32768]) if device == "cpu" else ([8192], [131072])
    return tuple((n, size) for n in rows or default[0] for size in vocabs or default[1])


def _plan(
    device: str,
    shapes: tuple[tuple[int, int], ...],
    dtypes: list[str],
    repeats: int | None,
    peers: str,
    wait_idle: float,
    quick: bool,
) -> Plan:
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise _bad("--dtype", f"{unknown[0]!r} is none of {', '.join(DTYPES)}")
    names = [name.strip() for name in peers.split(",") if name.strip()]
    names = names or [peer.name for peer in PEERS if peer.device in ("", device)]
    unknown = [name for name in names if name not in LABELS]
    if unknown:
        raise _bad("--peers", f"{unknown[0]!r} is none of {', '.join(LABELS)}")
    return Plan(
        shapes=shapes,
        dtypes=tuple(dtypes),
        device=device,
        repeats=repeats or (3 if quick else 11),
        peers=tuple(name for name in LABELS if name in names),
        # What a CPU does beside an accelerator's work does not slow it down.
        wait_idle=0.0 if quick or device != "cpu" else wait_idle,
    )


def _look_again(runs: list[dict[str, Any]], plan: Plan, out: Path) -> None:
    """Measure once more what is too slow for the gate: it must not fail a machine for its noise."""
    records = bench_shares.read()
    for run in runs:

        def measure(names: list[str], run: dict[str, Any] = run) -> dict[str, Any]:
            print(f"too slow, measured again: {', '.join(names)}", file=sys.stderr)
            shape = ((run["rows"], run["vocab"]),)
            again = replace(plan, shapes=shape, dtypes=(run["dtype"],), peers=tuple(names))
            return start_ranks(again, run["ranks"], out)[0]

        bench_gate.look_again(run, records, measure)


def main(
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Process counts to measure; repeatable. [default: 1 and 2]"),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Tokens; repeatable. [default: 4096 on CPU, 4096 to 32768 on CUDA]"
        ),
    ] = None,
    vocab: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Vocabulary of all ranks; repeatable. [default: 32768 on CPU, 16384 to 262144 on "
            "CUDA]",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="fp32, bf16 or fp16; repeatable. [default: fp32 and bf16]"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or npu")] = default_device(),
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs of each. [default: 11]")
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated, of: {', '.join(LABELS)}. [default: all that the device can run]"
        ),
    ] = "",
    csv: Annotated[
        Path | None, typer.Option(help="Also add the medians to this table, replacing older ones.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where bench.json and bench.png go.")] = Path(
        "runs/bench"
    ),
    wait_idle: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a quiet machine before a timed run.")
    ] = 2.0,
    quick: Annotated[bool, typer.Option(help="Tiny shapes and 3 repeats: does it run?")] = False,
    gate: Annotated[
        bool, typer.Option(help="Fail when a goal is below its regression gate.")
    ] = False,
) -> None:
    """Time and memory of the sharded loss beside what one would otherwise use."""
    if gate and quick:
        raise _bad("--gate", "tiny shapes prove nothing: drop --quick")
    if csv is not None and quick:
        raise _bad("--csv", "tiny shapes prove nothing: drop --quick")
    if device not in BACKENDS:
        raise _bad("--device", f"{device!r} is none of {', '.join(BACKENDS)}")
    shapes = shapes_of(device, rows, vocab, quick)
    plan = _plan(device, shapes, dtype or ["fp32", "bf16"], repeats, peers, wait_idle, quick)
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if under_torchrun:
        world = int(os.environ["WORLD_SIZE"])
        if ranks and ranks != [world]:
            raise _bad("--ranks", f"torchrun started {world} ranks: leave --ranks out")
        counts = [world]
    else:
        counts = sorted(set(ranks)) if ranks else [1, 2]
        if not ranks and devices(device) == 1:
            counts = [1]
    for count in counts:
        for _, size in shapes:
            if size % count:
                raise _bad("--vocab", f"{size} does not divide into {count} equal shards")
    first = not under_torchrun or os.environ["RANK"] == "0"
    if first:
        out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    problems: list[str] = []
    if under_torchrun:
        with bench_report.progress(steps(plan), counts[0], first) as tell:
            runs = run_plan(plan, tell)
        if not first:
            return
    else:
        for count in counts:
            try:
                runs += start_ranks(plan, count, out)
            except RuntimeError as failure:
                problems.append(f"{bench_goals.ranks_in_words(count)} not measured: {failure}")
    if gate and not under_torchrun:
        _look_again(runs, plan, out)
    # A terminal tells its width; a file or a pipe gets what the tables need.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    judged = bench_goals.judge(runs, LABELS)
    bench_report.print_report(console, runs, judged)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    here = environment(plan.device)
    report = {
        "environment": here,
        "runs": runs,
        "goals": bench_goals.as_json(judged),
        "not_run": problems,
    }
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    bench_report.draw(runs, out / "bench.png")
    console.print(f"Written to {out}")
    if csv is not None:
        bench_csv.add(csv, runs, here)
        console.print(f"Medians added to {csv}")
    below = any(row.verdict == "below the gate" for row in judged)
    if problems or (gate and (below or bench_goals.failures(runs, ours_only=True))):
        raise typer.Exit(1)
