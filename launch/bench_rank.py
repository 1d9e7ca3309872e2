"""What one rank of the benchmark does: make logits, run every peer in turn, hand back numbers.

Idea: the peers run round robin on the same buffer, so that a slow minute of the machine falls on
all of them. Before each timed run the buffer is restored from a master copy, outside the timed
part and for every peer alike, because some peers overwrite it. That restore is itself timed: it
is a copy of the same size in the same minute, hence the bandwidth the peers are compared with.
A repetition takes as long as its slowest rank.
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.launch import measure
from vocab_parallel_ce.launch.calibrate import calibrate
from vocab_parallel_ce.launch.peers import BY_NAME, Head, Loss, Peer, Setting, Sink

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}

WARM_UP = 2  # runs before anything is measured: compilation, caches, first touches
MEMORY_RUNS = 3
PARTIALS = 3  # k: floats a row that plain cross-entropy exchanges (max, sum, target logit)
PASSES = 3  # over the logits, at least: read forward; read and write backward
SAMPLED_ROWS = 16  # whose whole gradient is compared with fp64
SETTLE = 0.005  # seconds after the restore for OpenMP's threads to stop spinning
TIMEOUT = datetime.timedelta(minutes=5)  # covers one rank compiling while the others wait


@dataclass(frozen=True)
class Plan:
    """What every rank is told; the same on all of them."""

    rows: int
    vocab: int
    dtypes: tuple[str, ...]
    device: str
    repeats: int
    peers: tuple[str, ...]
    wait_idle: float  # seconds a timed run waits for a quiet machine, at most
    calibrate: bool = False  # also measure what the cost model needs of a CPU

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Plan:
        fields = json.loads(text)
        fields["dtypes"], fields["peers"] = tuple(fields["dtypes"]), tuple(fields["peers"])
        return cls(**fields)


@dataclass(frozen=True)
class Reference:
    """The truth, in fp64, from the logits as the peers get them (already rounded to dtype)."""

    loss: float
    gradient_norm: float
    rows: Tensor  # ids of the sampled rows
    softmax: Tensor  # this rank's part of their gradient, without the target's -1


@dataclass
class Bench:
    """One rank, one dtype: the buffers, and the peers that are ready to run."""

    plan: Plan
    setting: Setting
    rank: int
    master: Tensor
    buffer: Tensor
    target: Tensor
    anchor: Tensor
    sink: Sink

    @property
    def first_column(self) -> int:
        return self.rank * self.buffer.shape[1]

    def restore(self) -> float:
        """Undo what the last peer did to the logits; seconds the copy took."""
        return measure.time_copy(self.buffer, self.master)

    def logits(self) -> Tensor:
        out: Tensor = Head.apply(self.anchor, self.buffer, self.sink)  # type: ignore[no-untyped-call]
        return out

    def run(self, peer: Peer, loss: Loss) -> measure.Pass:
        logits = self.logits()
        measure.synchronize(self.setting.device)
        with peer.around():
            return measure.time_pass(lambda: loss(logits, self.target), self.setting.device)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def barrier(device: torch.device) -> None:
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


# --- truth ----------------------------------------------------------------------------------


def _fp64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "npu" else device  # NPUs have no fp64


def _row_chunks(tensor: Tensor) -> list[slice]:
    """Slices of rows whose fp64 copy takes about 64 MiB."""
    step = max(1, (64 * measure.MIB) // (8 * max(1, tensor.shape[1])))
    return [slice(i, i + step) for i in range(0, tensor.shape[0], step)]


def reference(bench: Bench) -> Reference:
    """Loss and gradient norm from each rank's fp64 sums, merged here and not by the library."""
    where = _fp64_device(bench.setting.device)
    target = bench.target.to(where) - bench.first_column
    local = (target >= 0) & (target < bench.master.shape[1])
    parts = []
    for rows in _row_chunks(bench.master):
        x = bench.master[rows].to(where, torch.float64)
        column = target[rows].clamp(0, x.shape[1] - 1)
        wanted = x.gather(1, column[:, None])[:, 0].masked_fill(~local[rows], -torch.inf)
        top = x.amax(1)
        e = x.sub_(top[:, None]).exp_()
        total = e.sum(1)
        parts.append(torch.stack([top, total, e.square_().sum(1), wanted]))
    every = torch.stack(gather(torch.cat(parts, 1).cpu()))  # [world, 4, N]
    tops, totals, squares, wanteds = every.unbind(1)
    top = tops.amax(0)
    shift = (tops - top).exp()
    total, square = (totals * shift).sum(0), (squares * shift.square()).sum(0)
    lse, wanted = top + total.log(), wanteds.amax(0)
    n = len(lse)
    # per row: sum of p^2 with the target's p replaced by p - 1
    norm = (square / total.square() - 2 * (wanted - lse).exp() + 1).sum().sqrt() / n
    sampled = torch.linspace(0, n - 1, min(n, SAMPLED_ROWS)).long()
    sample = bench.master[sampled.to(bench.master.device)].to("cpu", torch.float64)
    softmax = (sample - lse[sampled, None]).exp() / n
    return Reference(float((lse - wanted).mean()), float(norm), sampled, softmax)


def check(bench: Bench, peer: Peer, loss: Loss, truth: Reference) -> dict[str, Any]:
    """Run once with the gradient kept; how far loss and gradient lie from the truth."""
    bench.restore()
    bench.sink.keep = True
    try:
        logits = bench.logits()
        with peer.around():
            value = loss(logits, bench.target)
            value.backward()
        gradient = bench.sink.gradient
    finally:
        bench.sink.keep, bench.sink.gradient = False, None
    if gradient is None:
        raise RuntimeError("no gradient reached the logits")
    where = _fp64_device(bench.setting.device)
    squares = sum(
        float(gradient[rows].to(where, torch.float64).square().sum())
        for rows in _row_chunks(gradient)
    )
    sample = gradient[truth.rows.to(gradient.device)].to("cpu", torch.float64)
    columns = bench.target.cpu()[truth.rows] - bench.first_column
    away = torch.ones_like(sample, dtype=torch.bool)  # all columns but the target's
    for row, column in enumerate(columns.tolist()):
        if 0 <= column < sample.shape[1]:
            away[row, column] = False
    off = float((sample - truth.softmax)[away].square().sum())
    size = float(truth.softmax[away].square().sum())
    sums = torch.tensor(gather([squares, off, size]), dtype=torch.float64).sum(0).tolist()
    found, dtype = float(value), value.dtype
    norm_error = abs(sums[0] ** 0.5 / truth.gradient_norm - 1)
    softmax_error = (sums[1] / sums[2]) ** 0.5 if sums[2] else 0.0
    loss_error = found - truth.loss
    wrong = []
    # Tolerances tell wrong from rounded, no more: the deviations themselves are in the table.
    slack = max(1e-5, 4 * torch.finfo(dtype).eps) * abs(truth.loss)
    if not abs(loss_error) <= slack:
        wrong.append(f"loss {found:.6f} instead of {truth.loss:.6f}")
    if not norm_error <= 0.03:
        wrong.append(f"gradient norm off by {norm_error:.1%}")
    # The mean's 1/N pushes probabilities under what fp16 can hold, for everybody.
    if not softmax_error <= 0.2 and gradient.dtype != torch.float16:
        wrong.append(f"softmax part of the gradient off by {softmax_error:.1%}")
    if len(set(gather(found))) > 1:
        wrong.append("ranks return different losses")
    return {
        "loss": found,
        "loss_dtype": str(dtype).removeprefix("torch."),
        "loss_error": loss_error,
        "gradient_norm_error": norm_error,
        "softmax_gradient_error": softmax_error,
        "wrong": "; ".join(wrong),
    }


# --- one dtype ------------------------------------------------------------------------------


def make(plan: Plan, setting: Setting, rank: int, dtype: torch.dtype) -> Bench:
    """Logits like a trained head's first steps: normal, standard deviation 2."""
    if setting.device.type != "cpu":
        measure.device_module(setting.device).empty_cache()
    columns = plan.vocab // setting.world
    generator = torch.Generator().manual_seed(1000 + rank)
    master = torch.empty(plan.rows, columns, dtype=dtype, device=setting.device)
    for rows in _row_chunks(master):  # in pieces: no fp32 copy of the whole on the host
        piece = torch.randn(len(master[rows]), columns, generator=generator).mul_(2)
        master[rows] = piece.to(setting.device, dtype)
    everywhere = torch.Generator().manual_seed(7)  # targets are the same on all ranks
    target = torch.randint(plan.vocab, (plan.rows,), generator=everywhere).to(setting.device)
    anchor = torch.zeros((), device=setting.device, requires_grad=True)
    return Bench(plan, setting, rank, master, torch.clone(master), target, anchor, Sink())


def _prepare(
    bench: Bench, peer: Peer, truth: Reference, loss_of: dict[str, Loss]
) -> dict[str, Any]:
    """Import, warm up, check and count. Any failure becomes the peer's status, on all ranks."""
    facts: dict[str, Any] = {}
    error = ""
    device = bench.setting.device
    try:
        started = time.perf_counter()
        loss = peer.prepare(bench.setting)
        for run in range(WARM_UP):
            bench.restore()
            bench.run(peer, loss)
            if run == 0:
                facts["first_call_s"] = time.perf_counter() - started
        facts.update(check(bench, peer, loss, truth))
        bench.restore()
        logits = bench.logits()
        with peer.around():
            value, forward = measure.count_collectives(lambda: loss(logits, bench.target))
            _, backward = measure.count_collectives(value.backward)
        facts["collectives"] = {"forward": forward, "backward": backward}
        measure.synchronize(device)
        loss_of[peer.name] = loss
    except Exception as failure:  # a broken peer must not take the others' rows with it
        text = str(failure).strip().splitlines()
        error = f"failed: {type(failure).__name__}: {text[0][:300] if text else ''}"
        print(f"{peer.label}: {error}", file=sys.stderr)
    errors = [e for e in gather(error) if e]
    if errors:
        loss_of.pop(peer.name, None)
        facts["status"] = errors[0]
    return facts


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "all": values}


def budget(ours: str, rows: int, gradient: int, world: int) -> int:
    """Bytes a rank that this library may add at its peak: the design's promise."""
    small = measure.MIB + (64 + 4 * PARTIALS * (world + 1)) * rows
    return small if ours == "in place" else gradient + small


def run_dtype(
    plan: Plan, setting: Setting, rank: int, dtype: str, tell: Callable[[str, int], None]
) -> dict[str, Any]:
    """All peers on one dtype; the numbers of all ranks, merged (the same on every rank).

    ``tell(text, steps)`` is told what is being done and how many of its steps are behind.
    """
    device, world = setting.device, setting.world
    bench = make(plan, setting, rank, DTYPES[dtype])
    tell(f"{dtype}: the fp64 reference", 0)
    truth = reference(bench)
    peers = [BY_NAME[name] for name in plan.peers]
    loss_of: dict[str, Loss] = {}
    result: dict[str, dict[str, Any]] = {}
    for peer in peers:
        facts: dict[str, Any] = {"name": peer.name, "label": peer.label}
        facts.update(ours=peer.ours, status=peer.status(world))
        tell(f"{dtype}: preparing {peer.label}", 0)
        if not facts["status"]:
            facts.update(_prepare(bench, peer, truth, loss_of))
        result[peer.name] = facts
        tell(f"{dtype}: prepared {peer.label}", 1)
    ready = [peer for peer in peers if peer.name in loss_of]

    gc.collect()
    gc.freeze()  # what the libraries left behind is not searched again before every timed run

    # Times, round robin; the start moves on, so that nobody always follows the same neighbour.
    times: dict[str, list[measure.Pass]] = {peer.name: [] for peer in ready}
    copies: list[float] = []
    quiet: list[bool | None] = []
    for repeat in range(plan.repeats):
        for turn in range(len(ready)):
            peer = ready[(repeat + turn) % len(ready)]
            tell(f"{dtype}: timing, repetition {repeat + 1} of {plan.repeats}", 0)
            gc.collect()
            if rank == 0:  # the others wait at the barrier, asleep
                quiet.append(measure.wait_until_idle(plan.wait_idle))
            barrier(device)
            copies.append(bench.restore())
            time.sleep(SETTLE)
            barrier(device)
            measure.synchronize(device)
            times[peer.name].append(bench.run(peer, loss_of[peer.name]))
            tell(f"{dtype}: timing, repetition {repeat + 1} of {plan.repeats}", 1)

    # Peaks afterwards: they need another setting of malloc than times do.
    peaks: dict[str, list[int | None]] = {peer.name: [] for peer in ready}
    measure.settle_malloc(strict=True)
    for peer in ready:
        tell(f"{dtype}: memory of {peer.label}", 0)
        for run in range(MEMORY_RUNS + 1):
            bench.restore()
            barrier(device)
            peak = measure.peak_extra(partial(bench.run, peer, loss_of[peer.name]), device)
            if run:  # the first one warms up under the new setting
                peaks[peer.name].append(peak)
        tell(f"{dtype}: memory of {peer.label}", 1)
    measure.settle_malloc(strict=False)
    gc.unfreeze()
    found = None
    if plan.calibrate:
        tell(f"{dtype}: calibrating", 0)
        found = calibrate(setting.group, DTYPES[dtype], plan.repeats, gather)

    every = gather((times, copies, peaks))
    size = bench.buffer.nbytes
    bandwidth = [
        2 * size * world / max(ranks) for ranks in zip(*(e[1] for e in every), strict=True)
    ]
    speed = statistics.median(bandwidth) if bandwidth else 0.0
    for peer in ready:
        facts = result[peer.name]
        passes = list(zip(*(e[0][peer.name] for e in every), strict=True))  # [repeat][rank]
        facts["forward_s"] = _summary([max(p.forward for p in ranks) for ranks in passes])
        facts["backward_s"] = _summary([max(p.backward for p in ranks) for ranks in passes])
        facts["total_s"] = _summary([max(p.total for p in ranks) for ranks in passes])
        facts["faults"] = statistics.median(max(p.faults for p in ranks) for ranks in passes)
        ideal = PASSES * size * world
        facts["ideal_bytes"] = ideal
        facts["bandwidth_share"] = ideal / facts["total_s"]["median"] / speed
        seen = [e[2][peer.name] for e in every]
        if all(peak is not None for rank_peaks in seen for peak in rank_peaks):
            runs = [max(ranks) for ranks in zip(*seen, strict=True)]
            facts["peak_bytes"], facts["peak_bytes_all"] = int(statistics.median(runs)), runs
        if peer.ours:
            facts["bytes_moved"] = ideal  # one read forward, one read and one write backward
            facts["budget_bytes"] = budget(peer.ours, plan.rows, size, world)
    return {
        "ranks": world,
        "dtype": dtype,
        "rows": plan.rows,
        "vocab": plan.vocab,
        "device": device.type,
        "threads_per_rank": torch.get_num_threads(),
        "repeats": plan.repeats,
        "logits_bytes_per_rank": size,
        "copy_bandwidth": _summary(bandwidth) if bandwidth else None,
        "timed_runs": len(quiet),
        "busy_runs": sum(state is False for state in quiet),
        "idle_checked": any(state is not None for state in quiet),
        "calibration": None if found is None else asdict(found),
        "reference": {"loss": truth.loss, "gradient_norm": truth.gradient_norm},
        "peers": [result[name] for name in plan.peers],
    }


def steps(plan: Plan) -> int:
    """How many steps ``tell`` will count at most, for a progress bar."""
    return len(plan.dtypes) * len(plan.peers) * (plan.repeats + 2)


def run_plan(
    plan: Plan, tell: Callable[[str, int], None], init_method: str | None = None
) -> list[dict[str, Any]]:
    """Join the other ranks and run every dtype. RANK, WORLD_SIZE and LOCAL_RANK say who we are."""
    warnings.filterwarnings("ignore")  # peers announce their deprecations on every rank
    logging.disable(logging.WARNING)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(plan.device)
    if plan.device == "npu":
        importlib.import_module("torch_npu")  # registers the device
    if plan.device != "cpu":
        device = torch.device(plan.device, int(os.environ.get("LOCAL_RANK", rank)))
        measure.device_module(device).set_device(device)
    measure.settle_malloc(strict=False)
    dist.init_process_group(
        BACKENDS[plan.device],
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        setting = Setting(group, world, device)
        return [run_dtype(plan, setting, rank, dtype, tell) for dtype in plan.dtypes]
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
    from vocab_parallel_ce.launch.bench_report import progress

    rank = int(os.environ["RANK"])
    todo = Plan.load(plan)
    with progress(steps(todo), int(os.environ["WORLD_SIZE"]), rank == 0) as tell:
        runs = run_plan(todo, tell, init_method)
    if rank == 0:
        Path(result).write_text(json.dumps(runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
