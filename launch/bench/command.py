"""python -m vocab_parallel_ce.launch.bench: the loss against what one would otherwise use.

Idea: logits-level forward and backward, on one process with all of torch's threads and on N
ranks that the benchmark starts itself (Gloo, NCCL or HCCL by device), against every peer that is
installed; what is not installed is listed as such. Under torchrun it measures the ranks it finds.

    vocab-parallel-ce bench                  1 process and 2 ranks, fp32 and bf16
    vocab-parallel-ce bench --ranks 4 --dtype bf16 --rows 2048 --vocab 131072
    vocab-parallel-ce bench --device cuda    every shape of the grid, on one card
    torchrun --nproc-per-node 8 -m vocab_parallel_ce.launch.bench --device cuda

It ends with the goals, and says plainly which are missed; bench.json holds every number, and
--csv keeps the medians in a table from which the README's is made (``pages.py``). The exit
status is 0 also when goals are missed, 1 when ranks died, and with --gate when a regression gate
was missed (``gate.py``, ``goals.py``); 2 if an option cannot be served.
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

import vocab_parallel_ce
from vocab_parallel_ce.launch import options
from vocab_parallel_ce.launch.bench import gate as bench_gate
from vocab_parallel_ce.launch.bench import goals, medians, report, shares
from vocab_parallel_ce.launch.bench.peers import BY_NAME, PEERS
from vocab_parallel_ce.launch.bench.rank import Plan, run_plan, steps
from vocab_parallel_ce.launch.command_line import (
    ROWS,
    VOCAB,
    DeviceName,
    file,
    folder,
    job,
    number,
    option,
    usable_device,
    whole,
)
from vocab_parallel_ce.launch.measuring.device import device_name
from vocab_parallel_ce.launch.measuring.machine import processor
from vocab_parallel_ce.launch.options import make_folder, make_writable
from vocab_parallel_ce.launch.refusal import FAILED, Refusal
from vocab_parallel_ce.launch.terminal import Coloured, progress, ranks_in_words, show_line
from vocab_parallel_ce.parallel.environment import environment_int

LABELS = {peer.name: peer.label for peer in PEERS}
GRID_ROWS = (4096, 8192, 16384, 32768)
GRID_VOCABS = (16384, 32768, 131072, 262144)
BESIDE = ("numba", "triton", "torch_npu")  # what peers and engines are built on


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


def peer_names(text: str) -> tuple[str, ...]:
    """From a list separated by commas; empty stands for all that the device can run."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        options.one_of(name, tuple(LABELS))
    return tuple(name for name in LABELS if name in names)


def _plan(
    device: str,
    shapes: tuple[tuple[int, int], ...],
    dtypes: list[str],
    repeats: int | None,
    peers: str,
    wait_idle: float,
    quick: bool,
) -> Plan:
    return Plan(
        shapes=shapes,
        dtypes=tuple(dtypes),
        device=device,
        repeats=repeats or (3 if quick else 11),
        peers=peer_names(peers)
        or tuple(peer.name for peer in PEERS if peer.device in ("", device)),
        # What a CPU does beside an accelerator's work does not slow it down.
        wait_idle=0.0 if quick or device != "cpu" else wait_idle,
    )


def _look_again(runs: list[dict[str, Any]], plan: Plan, out: Path) -> None:
    """Measure once more what is too slow for the gate: it must not fail a machine for its noise."""
    records = shares.read()
    for run in runs:

        def measure(names: list[str], run: dict[str, Any] = run) -> dict[str, Any]:
            print(f"too slow, measured again: {', '.join(names)}", file=sys.stderr)
            shape = ((run["rows"], run["vocab"]),)
            again = replace(plan, shapes=shape, dtypes=(run["dtype"],), peers=tuple(names))
            return start_ranks(again, run["ranks"], out)[0]

        bench_gate.look_again(run, records, measure)


def check_peers(names: Sequence[str], device: str) -> None:
    """Refusal where one that was asked for runs on another device."""
    for name in names:
        home = BY_NAME[name].device
        if home not in ("", device):
            raise Refusal(f"--peers {name}: it runs on {home}, and this would be {device}")


def check_counts(counts: Sequence[int], shapes: Sequence[tuple[int, int]], device: str) -> None:
    """Refusal where the vocabulary, or the cards, cannot be shared out."""
    present = devices(device)
    for count in counts:
        for _, size in shapes:
            if size % count:
                raise Refusal(
                    f"--vocab {size} does not divide into {count} equal shards; "
                    f"{-(-size // count) * count} does"
                )
        if present is not None and present < count:
            raise Refusal(
                f"--ranks {count} needs {count} {device} devices, this machine shows {present}"
            )


def check_table(csv: Path) -> None:
    """Refusal where medians cannot be added to it; before the work, not after."""
    make_writable("--csv", csv)
    read_table(csv)


def read_table(csv: Path) -> list[medians.Row]:
    """What it holds. Refusal where it is no table of medians."""
    try:
        return medians.read(csv)
    except ValueError as error:
        raise Refusal(f"--csv {error}; name another file") from None


def rank_counts(asked: list[int] | None, device: str) -> list[int]:
    """How many ranks to measure with; under torchrun those that there are."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            world = environment_int("WORLD_SIZE", 1)
        except ValueError as error:
            raise Refusal(error) from None
        if asked and asked != [world]:
            raise Refusal(f"--ranks {asked[0]}: torchrun started {world} ranks; leave --ranks out")
        return [world]
    if asked:
        return sorted(set(asked))
    return [1] if devices(device) == 1 else [1, 2]


def main(
    ranks: Annotated[
        list[int] | None,
        whole("Processes to measure; repeatable. [default: 1 and 2]", "--ranks"),
    ] = None,
    rows: Annotated[
        list[int] | None,
        whole("Tokens; repeatable. [default: 4096 on CPU, 4096 to 32768 on CUDA]", *ROWS),
    ] = None,
    vocab: Annotated[
        list[int] | None,
        whole(
            "Vocabulary of all ranks; repeatable. [default: 32768 on CPU, 16384 to 262144 on CUDA]",
            *VOCAB,
            least=2,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        option(
            options.dtype,
            "--dtype",
            metavar="fp32|bf16|fp16",
            help="Of the logits; repeatable. [default: fp32 and bf16]",
        ),
    ] = None,
    device: DeviceName = None,
    repeats: Annotated[int | None, whole("Timed runs of each. [default: 11]", "--repeats")] = None,
    peers: Annotated[
        str,
        option(
            lambda text: ",".join(peer_names(text)),
            "--peers",
            metavar="NAMES",
            help=f"Separated by commas, of {', '.join(LABELS)}. "
            "[default: all that the device can run]",
        ),
    ] = "",
    csv: Annotated[
        Path | None, file("Also add the medians to this table, replacing older ones.", "--csv")
    ] = None,
    out: Annotated[Path, folder("Where bench.json and bench.png go.", "--out")] = Path(
        "runs/bench"
    ),
    wait_idle: Annotated[
        float, number("Seconds to wait for a quiet machine before a timed run.", "--wait-idle")
    ] = 2.0,
    quick: Annotated[bool, typer.Option(help="Tiny shapes and 3 repeats: does it run?")] = False,
    gate: Annotated[
        bool, typer.Option(help="Fail where the loss is slower than the machine's limits allow.")
    ] = False,
) -> None:
    """Time and memory of the sharded loss beside what one would otherwise use.

    It starts the ranks itself; under torchrun it measures those that it finds.
    """
    for name, given in (("--gate", gate), ("--csv", csv is not None)):
        if given and quick:
            raise Refusal(f"{name}: tiny shapes prove nothing; drop --quick")
    kind = usable_device(device)
    shapes = shapes_of(kind, rows, vocab, quick)
    check_peers(peer_names(peers), kind)
    plan = _plan(kind, shapes, dtype or ["fp32", "bf16"], repeats, peers, wait_idle, quick)
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    counts = rank_counts(ranks, kind)
    # Ranks of torchrun may lie on several machines, and have a device each: usable_device saw that.
    check_counts(counts, shapes, "cpu" if under_torchrun else kind)
    first = not under_torchrun or os.environ["RANK"] == "0"
    if first:
        make_folder("--out", out)
        make_writable("--out", out / "bench.json")
        if csv is not None:
            check_table(csv)
    runs: list[dict[str, Any]] = []
    problems: list[str] = []
    if under_torchrun:
        with progress(steps(plan), ranks_in_words(counts[0]), first) as tell:
            runs = run_plan(plan, tell)
        if not first:
            return
    else:
        for count in counts:
            try:
                runs += start_ranks(plan, count, out)
            except RuntimeError as failure:
                problems.append(f"{ranks_in_words(count)} not measured: {failure}")
    if gate and not under_torchrun:
        _look_again(runs, plan, out)
    judged = goals.judge(runs, LABELS)
    report.print_report(runs, judged)
    for problem in problems:
        show_line(Coloured(problem, "red"))
    here = environment(plan.device)
    found = {
        "environment": here,
        "runs": runs,
        "goals": goals.as_json(judged),
        "not_run": problems,
    }
    (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    report.draw(runs, out / "bench.png")
    show_line(f"Written to {out}")
    if csv is not None:
        medians.add(csv, runs, here)
        show_line(f"Medians added to {csv}")
    below = any(row.verdict == "below the gate" for row in judged)
    if problems or (gate and (below or goals.failures(runs, ours_only=True))):
        raise typer.Exit(FAILED)


app = job("bench", main)
