"""doctor --tune from the sizes to the tables, the file and the lines to keep."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vocab_parallel_ce.launch.doctor.environment import DTYPES
from vocab_parallel_ce.launch.doctor.findings import Environment
from vocab_parallel_ce.launch.doctor.report import as_json, write_json
from vocab_parallel_ce.launch.doctor.scrub import Names, scrub
from vocab_parallel_ce.launch.doctor.tune import blocks, head, ways
from vocab_parallel_ce.launch.doctor.tune.blocks import Block
from vocab_parallel_ce.launch.doctor.tune.head import Headed
from vocab_parallel_ce.launch.doctor.tune.ways import MEGATRON, Size, Timed
from vocab_parallel_ce.launch.refusal import Refusal
from vocab_parallel_ce.launch.terminal import Coloured, Table, numbers, show, show_line, words
from vocab_parallel_ce.parallel.devices import local_device

USUAL, QUICK = (8192, 16_384), (32, 1024)


@dataclass(frozen=True)
class Asked:
    """Of one rank's logits."""

    rows: int
    columns: int
    dtype: str
    quick: bool


def checked(rows: int | None, columns: int | None, dtype: str, quick: bool, world: int) -> Asked:
    """Refusal where several ranks were started: a card is tuned alone."""
    if world > 1:
        raise Refusal(
            f"--tune measures one card alone, but WORLD_SIZE is {world}; start it without torchrun"
        )
    usual = QUICK if quick else USUAL
    return Asked(rows or usual[0], columns or usual[1], dtype, quick)


def tune(found: Environment, asked: Asked, path: Path) -> None:
    """Measure, show, write; nothing is judged, so there is no exit status but 0."""
    device = local_device(found.device)
    unreal = why_unreal(device)
    if unreal:
        show_line(Coloured(f"{unreal}: times mean nothing here", "yellow"))
    size = Size(asked.rows, asked.columns, DTYPES[asked.dtype], 2 if asked.quick else 7)
    scratch = ways.QUICK_SCRATCH_MIB if asked.quick else ways.SCRATCH_MIB
    timed = list(ways.time_ways(device, size, scratch))
    show(ways_table(timed, asked))
    width = head.QUICK_WIDTH if asked.quick else head.WIDTH
    heads = list(head.time_head(device, size, width))
    show(head_table(heads, asked, width))
    kernels = list(blocks.measure(device, blocks.QUICK if asked.quick else blocks.Sizes()))
    show(blocks_table(kernels))
    best = ways.best(timed)
    lines = [*([] if best is None else ways.exports(best)), *head.exports(heads)]
    if lines:
        show_line("The fastest of these, for every shell that trains:")
        for line in lines:
            show_line(line)
    else:
        show_line(f"No way of the npu engine ran on {found.device}: there is nothing to export")
    report = as_json([found], None, Names.of_this_process())
    tuned = _as_json(asked, unreal, timed, heads, kernels, lines)
    report["tune"] = scrub(tuned, Names.of_this_process())
    write_json(path, report)
    print(f"Written to {path}", flush=True)


def why_unreal(device: torch.device) -> str:
    """Why no time of this device says anything of a card; empty on one."""
    if device.type != "npu":
        return f"this is {device.type}, not an Ascend card"
    if "NPU_SIM_CANN" in os.environ:  # what tests/npu_sim sets
        return "this is the stand-in for CANN, on the host's processor"
    return ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def ways_table(timed: list[Timed], asked: Asked) -> Table:
    table = Table(
        f"Ways, [{asked.rows}, {asked.columns}] {asked.dtype}, in place",
        [
            *words("way"),
            *numbers("scratch\nMiB", "forward\nms", "backward\nms", "both\nms", "Megatron /\nthis"),
            *words("remark"),
        ],
    )
    other = next((one.total_s for one in timed if one.way == MEGATRON and not one.problem), 0.0)
    for one in timed:
        total = "" if one.problem else _ms(one.total_s)
        share = f"{other / one.total_s:.2f}x" if other and one.total_s else ""
        mib = "" if one.scratch_mib is None else str(one.scratch_mib)
        table.add(one.way, mib, _ms(one.forward_s), _ms(one.backward_s), total, share, one.problem)
    return table


def head_table(heads: list[Headed], asked: Asked, width: int) -> Table:
    table = Table(
        f"The fused head, [{asked.rows}, {width}] x [{asked.columns}, {width}] {asked.dtype}",
        [*words("way", "loss"), *numbers("both\nms", "three\nproducts"), *words("remark")],
    )
    alone = heads[0].seconds
    for one in heads:
        share = f"{one.seconds / alone:.2f}x" if one.seconds and alone else ""
        table.add(one.way, one.loss, _ms(one.seconds), share, one.problem)
    return table


def blocks_table(kernels: list[Block]) -> Table:
    table = Table(
        "Kernels, each alone",
        [*words("kernel"), *words("shape"), *numbers("us", "GB/s"), *words("remark")],
    )
    for one in kernels:
        us = "" if one.seconds is None else f"{one.seconds * 1e6:.1f}"
        rate = "" if one.bytes_per_s is None else f"{one.bytes_per_s / 1e9:.0f}"
        remark = one.problem or ("" if one.value is None else f"{one.value:.2f}")
        if one.seconds is not None and one.bytes is None and "launch" not in one.what:
            remark = "bytes unknown"
        table.add(one.what, one.shape, us, rate, remark)
    table.caption = "GB/s of the bytes that engines/npu/traffic.py says a kernel reads and writes"
    return table


def _as_json(
    asked: Asked,
    unreal: str,
    timed: list[Timed],
    heads: list[Headed],
    kernels: list[Block],
    lines: list[str],
) -> dict[str, Any]:
    return {
        "asked": asdict(asked),
        "times_mean_nothing": unreal,
        "ways": [asdict(one) for one in timed],
        "fused_head": [asdict(one) for one in heads],
        "kernels": [asdict(one) | {"bytes_per_s": one.bytes_per_s} for one in kernels],
        "exports": lines,
    }
