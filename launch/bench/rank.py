"""What one rank of the benchmark does: every peer in turn on the same logits, numbers at the end.

Idea: the peers run round robin, so that a slow minute of the machine falls on all of them. Their
logits are restored before each timed run (``inputs.py``); that restore is itself timed: it is
a copy of the same size in the same minute, hence the bandwidth the peers are compared with. A
repetition takes as long as its slowest rank.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE
from vocab_parallel_ce.launch.bench.inputs import Inputs, fits, gather, make
from vocab_parallel_ce.launch.bench.peers import BY_NAME, Loss, Peer, Setting, megatron_forgets
from vocab_parallel_ce.launch.bench.truth import Reference, check, reference
from vocab_parallel_ce.launch.measuring.calibration import calibrate
from vocab_parallel_ce.launch.measuring.collectives import PARTIALS, count_collectives
from vocab_parallel_ce.launch.measuring.device import MIB, device_module, synchronize
from vocab_parallel_ce.launch.measuring.idle import wait_until_idle
from vocab_parallel_ce.launch.measuring.limits import Loops, limit, run_loops
from vocab_parallel_ce.launch.measuring.machine import processor_model
from vocab_parallel_ce.launch.measuring.memory import exact_peaks, peak_extra, settle_malloc
from vocab_parallel_ce.launch.measuring.passes import Pass
from vocab_parallel_ce.launch.measuring.rounds import lower_quartile, summary, turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WARM_UP = 2  # runs before anything is measured: compilation, caches, first touches
MEMORY_RUNS = 3
PASSES = {"forward": 1, "backward": 2, "both": 3}  # over the logits, at least: read; read, write
SETTLE = 0.005  # seconds after the restore for OpenMP's threads to stop spinning
TIMEOUT = datetime.timedelta(minutes=5)  # covers one rank compiling while the others wait
NO_ROOM = "out of memory"

Tell = Callable[[str, int], None]
"""``tell(text, steps)``: what is being done, and how many of its steps are behind"""


@dataclass(frozen=True)
class Plan:
    """What every rank is told; the same on all of them."""

    shapes: tuple[tuple[int, int], ...]
    """rows, and the vocabulary of all ranks"""
    dtypes: tuple[str, ...]
    device: str
    repeats: int
    peers: tuple[str, ...]
    wait_idle: float
    """seconds a timed run waits for a quiet machine, at most"""
    calibrate: bool = False
    """also measure what the cost model needs of a CPU"""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Plan:
        fields = json.loads(text)
        fields["shapes"] = tuple((rows, vocab) for rows, vocab in fields["shapes"])
        fields["dtypes"], fields["peers"] = tuple(fields["dtypes"]), tuple(fields["peers"])
        return cls(**fields)


def barrier(device: torch.device) -> None:
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


@dataclass
class Timed:
    """What one rank measured: a list entry for every timed run, in the same order on all ranks."""

    times: dict[str, list[Pass]] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    loops: list[Loops] = field(default_factory=list)
    """on a CPU, once a repetition"""
    quiet: list[bool | None] = field(default_factory=list)
    peaks: dict[str, list[int | None]] = field(default_factory=dict)


def _prepare(
    inputs: Inputs, peer: Peer, truth: Reference, loss_of: dict[str, Loss]
) -> dict[str, Any]:
    """Import, warm up, check and count. Any failure becomes the peer's status, on all ranks."""
    facts: dict[str, Any] = {}
    error = ""
    device = inputs.setting.device
    try:
        started = time.perf_counter()
        loss = peer.prepare(inputs.setting)
        for run in range(WARM_UP):
            inputs.restore(only=0)
            inputs.run(peer, loss)
            if run == 0:
                facts["first_call_s"] = time.perf_counter() - started
        facts.update(check(inputs, peer, loss, truth))
        inputs.restore(only=0)
        logits = inputs.logits()
        with peer.around():
            value, forward = count_collectives(lambda: loss(logits, inputs.target))
            _, backward = count_collectives(value.backward)
        facts["collectives"] = {"forward": forward, "backward": backward}
        synchronize(device)
        loss_of[peer.name] = loss
    except torch.OutOfMemoryError:  # says something about the peer, and nothing against it
        error = NO_ROOM
    except Exception as failure:  # a broken peer must not take the others' rows with it
        text = str(failure).strip().splitlines()
        error = f"failed: {type(failure).__name__}: {text[0][:300] if text else ''}"
        print(f"{peer.label}: {error}", file=sys.stderr)
    errors = [e for e in gather(error) if e]
    if errors:
        loss_of.pop(peer.name, None)
        facts["status"] = errors[0]
        gc.collect()
        if device.type != "cpu":
            device_module(device).empty_cache()
    return facts


def _time(
    inputs: Inputs, ready: list[Peer], loss_of: dict[str, Loss], plan: Plan, tell: Tell
) -> Timed:
    """Round robin; the start moves on, so that nobody always follows the same neighbour."""
    device = inputs.setting.device
    timed = Timed({peer.name: [] for peer in ready})
    limited = device.type == "cpu"
    if limited:
        run_loops(inputs.master, inputs.buffers[0])  # compiled, and its memory touched
    for repeat, peer in turns(ready, plan.repeats):
        text = f"timing, repetition {repeat + 1} of {plan.repeats}"
        if limited and len(timed.loops) == repeat:
            gc.collect()
            wait_until_idle(plan.wait_idle if inputs.rank == 0 else 0)
            barrier(device)
            timed.loops.append(run_loops(inputs.master, inputs.buffers[0]))
        tell(text, 0)
        gc.collect()
        if inputs.rank == 0:  # the others wait at the barrier, asleep
            timed.quiet.append(wait_until_idle(plan.wait_idle))
        barrier(device)
        timed.copies += inputs.restore()
        time.sleep(SETTLE)
        for turn in range(len(inputs.buffers)):
            barrier(device)
            synchronize(device)
            timed.times[peer.name].append(inputs.run(peer, loss_of[peer.name], turn))
        tell(text, 1)
    return timed


def _weigh(
    inputs: Inputs, ready: list[Peer], loss_of: dict[str, Loss], timed: Timed, tell: Tell
) -> None:
    """Peaks of memory, after the times: they need another setting of malloc than times do."""
    device = inputs.setting.device
    with exact_peaks():
        for peer in ready:
            tell(f"memory of {peer.label}", 0)
            timed.peaks[peer.name] = []
            for run in range(MEMORY_RUNS + 1):
                inputs.restore(only=0)
                barrier(device)
                peak = peak_extra(partial(inputs.run, peer, loss_of[peer.name]), device)
                if run:  # the first one warms up under the new setting
                    timed.peaks[peer.name].append(peak)
            tell(f"memory of {peer.label}", 1)


def budget(ours: str, rows: int, gradient: int, world: int) -> int:
    """Bytes a rank that this library may add at its peak: the design's promise."""
    small = MIB + (64 + 4 * PARTIALS * (world + 1)) * rows
    return small if ours == "in place" else gradient + small


def _merge(every: list[Timed], peer: Peer, rows: int, size: int, speed: float) -> dict[str, Any]:
    """One peer's numbers of all ranks as one; ``size`` is the logits' bytes a rank."""
    world = len(every)
    passes = list(zip(*(timed.times[peer.name] for timed in every), strict=True))  # [run][rank]
    facts: dict[str, Any] = {
        "forward_s": summary([max(p.forward for p in ranks) for ranks in passes]),
        "backward_s": summary([max(p.backward for p in ranks) for ranks in passes]),
        "total_s": summary([max(p.total for p in ranks) for ranks in passes]),
        "faults": statistics.median(max(p.faults for p in ranks) for ranks in passes),
    }
    ideal = PASSES["both"] * size * world
    facts["ideal_bytes"] = ideal
    facts["bandwidth_share"] = ideal / facts["total_s"]["median"] / speed
    seen = [timed.peaks[peer.name] for timed in every]
    known = [[peak for peak in ranks if peak is not None] for ranks in zip(*seen, strict=True)]
    if all(len(ranks) == world for ranks in known):
        runs = [max(ranks) for ranks in known]
        facts["peak_bytes"], facts["peak_bytes_all"] = int(statistics.median(runs)), runs
    if peer.ours:
        facts["bytes_moved"] = ideal  # one read forward, one read and one write backward
        facts["budget_bytes"] = budget(peer.ours, rows, size, world)
    return facts


def _limit(loops: list[Loops], run: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """What this machine allows in memory and arithmetic, and how many times that ours took."""
    elements = run["rows"] * (run["vocab"] // run["ranks"])
    inplace = peer["ours"] == "in place"
    found = limit(Loops.usual(loops), elements, DTYPES[run["dtype"]], inplace)
    taken = lower_quartile(peer["total_s"]["all"])
    return {"limit_s": asdict(found), "taken_s": taken, "times_limit": taken / found.total}


def _facts_of_run(
    plan: Plan, shape: tuple[int, int], dtype: str, setting: Setting
) -> dict[str, Any]:
    """What a run is called and how large it is; its peers, each with why it cannot run, if so."""
    rows, vocab = shape
    peers = [
        {
            "name": name,
            "label": BY_NAME[name].label,
            "ours": BY_NAME[name].ours,
            "status": BY_NAME[name].status(setting.world, setting.device.type),
        }
        for name in plan.peers
    ]
    return {
        "ranks": setting.world,
        "dtype": dtype,
        "rows": rows,
        "vocab": vocab,
        "device": setting.device.type,
        "processor": processor_model(),
        "threads_per_rank": torch.get_num_threads(),
        "repeats": plan.repeats,
        "logits_bytes_per_rank": rows * (vocab // setting.world) * DTYPES[dtype].itemsize,
        "peers": peers,
    }


_NOTHING_TIMED = {
    "copy_bandwidth": None,
    "timed_runs": 0,
    "busy_runs": 0,
    "idle_checked": False,
}


def run_case(
    plan: Plan, shape: tuple[int, int], dtype: str, setting: Setting, rank: int, tell: Tell
) -> dict[str, Any]:
    """All peers on one shape and dtype; the numbers of all ranks, merged (alike on every rank)."""
    rows, vocab = shape
    name = dtype if len(plan.shapes) == 1 else f"[{rows}, {vocab}] {dtype}"

    def say(text: str, steps: int) -> None:
        tell(f"{name}: {text}", steps)

    run = _facts_of_run(plan, shape, dtype, setting)
    peers = [BY_NAME[name] for name in plan.peers]
    result = {facts["name"]: facts for facts in run["peers"]}
    if not all(gather(fits(rows, vocab // setting.world, DTYPES[dtype], setting.device))):
        for facts in result.values():
            facts["status"] = facts["status"] or f"{NO_ROOM}: the logits alone"
        say("no room", len(peers) * (plan.repeats + 2))
        return run | _NOTHING_TIMED

    if "torch._dynamo" in sys.modules:
        # Compiled peers meet each shape as a fresh process would: static, and never beyond the
        # number of recompilations after which they would run uncompiled.
        importlib.import_module("torch._dynamo").reset()
    inputs = make(rows, vocab, setting, rank, DTYPES[dtype])
    run["buffers"] = len(inputs.buffers)
    say("the fp64 reference", 0)
    truth = reference(inputs)
    run["reference"] = {"loss": truth.loss, "gradient_norm": truth.gradient_norm}
    loss_of: dict[str, Loss] = {}
    for peer in peers:
        say(f"preparing {peer.label}", 0)
        if not result[peer.name]["status"]:
            result[peer.name].update(_prepare(inputs, peer, truth, loss_of))
        say(f"prepared {peer.label}", 1)
    ready = [peer for peer in peers if peer.name in loss_of]

    gc.collect()
    gc.freeze()  # what the libraries left behind is not searched again before every timed run
    timed = _time(inputs, ready, loss_of, plan, say)
    _weigh(inputs, ready, loss_of, timed, say)
    gc.unfreeze()
    if plan.calibrate:
        say("calibrating", 0)
        run["calibration"] = asdict(calibrate(setting.group, DTYPES[dtype], plan.repeats, gather))
    return run | _merge_run(gather(timed), ready, run)


def _merge_run(every: list[Timed], ready: list[Peer], run: dict[str, Any]) -> dict[str, Any]:
    """The times of all ranks into the peers of ``run``; returns what is said of the run itself."""
    if not every[0].copies:
        return _NOTHING_TIMED
    size, result = run["logits_bytes_per_rank"], {facts["name"]: facts for facts in run["peers"]}
    copies = zip(*(timed.copies for timed in every), strict=True)
    bandwidth = [2 * size * len(every) / max(ranks) for ranks in copies]
    speed = statistics.median(bandwidth)
    for peer in ready:
        result[peer.name].update(_merge(every, peer, run["rows"], size, speed))
    loops = [Loops.slowest(r) for r in zip(*(timed.loops for timed in every), strict=True)]
    if loops:
        run["loops"] = {
            f"{column.name}_s": summary([getattr(one, column.name) for one in loops])
            for column in fields(Loops)
        }
        for peer in ready:
            if peer.ours:
                result[peer.name].update(_limit(loops, run, result[peer.name]))
    quiet = every[0].quiet
    return {
        "copy_bandwidth": summary(bandwidth),
        "timed_runs": len(quiet),
        "busy_runs": sum(state is False for state in quiet),
        "idle_checked": any(state is not None for state in quiet),
    }


def steps(plan: Plan) -> int:
    """How many steps ``tell`` will count at most, for a progress bar."""
    return len(plan.shapes) * len(plan.dtypes) * len(plan.peers) * (plan.repeats + 2)


def run_plan(plan: Plan, tell: Tell, init_method: str | None = None) -> list[dict[str, Any]]:
    """Join the other ranks and run every case. RANK, WORLD_SIZE and LOCAL_RANK say who we are."""
    warnings.filterwarnings("ignore")  # peers announce their deprecations on every rank
    logging.disable(logging.WARNING)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(plan.device)
    if plan.device == "npu":
        importlib.import_module("torch_npu")  # registers the device
    if plan.device != "cpu":
        device = torch.device(plan.device, int(os.environ.get("LOCAL_RANK", rank)))
        device_module(device).set_device(device)
    settle_malloc(strict=False)
    dist.init_process_group(
        BACKEND_OF_DEVICE[plan.device],
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        setting = Setting(group, world, device)
        with megatron_forgets():
            return [
                run_case(plan, shape, dtype, setting, rank, tell)
                for shape in plan.shapes
                for dtype in plan.dtypes
            ]
    finally:
        dist.destroy_process_group()


def _leave_with_parent() -> None:
    """Exit when standard input closes: the parent holds it open for as long as it lives."""

    def watch() -> None:
        # Not sys.stdin: its lock, held here, would abort the interpreter's own exit.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(plan: str, init_method: str, result: str) -> None:
    """A rank started by the benchmark itself: rank 0 draws progress and writes the result."""
    _leave_with_parent()
    from vocab_parallel_ce.launch.terminal import progress, ranks_in_words

    rank = int(os.environ["RANK"])
    todo = Plan.load(plan)
    name = ranks_in_words(int(os.environ["WORLD_SIZE"]))
    with progress(steps(todo), name, rank == 0) as tell:
        runs = run_plan(todo, tell, init_method)
    if rank == 0:
        Path(result).write_text(json.dumps(runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
