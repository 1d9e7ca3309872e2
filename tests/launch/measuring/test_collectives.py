"""Collectives are counted and timed, among real ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.ranks import Pool
from vocab_parallel_ce.launch.measuring.calibration import calibrate
from vocab_parallel_ce.launch.measuring.collectives import count_collectives, time_collective


def _counted(group: dist.ProcessGroup) -> tuple[int | None, int | None, list[bool], int]:
    value, aligned = torch.ones(3), []

    def two() -> str:
        dist.all_reduce(value, group=group)
        dist.all_reduce(value, group=group)
        return "result"

    result, count = count_collectives(two)
    assert result == "result"
    _, none = count_collectives(lambda: value.sum())
    times = time_collective(
        two, lambda: aligned.append(True), torch.device("cpu"), rounds=3, warm_up=2
    )
    return count, none, [seconds > 0 for seconds in times], len(aligned)


def test_every_collective_is_counted_and_nothing_else(pool: Pool) -> None:
    for found in pool.run(_counted, world=2):
        assert found == (2, 0, [True] * 3, 5)


def _calibrated(group: dist.ProcessGroup) -> tuple[list[float], dict[str, float]]:
    def gather(value: object) -> list[object]:
        out: list[object] = [None] * group.size()
        dist.all_gather_object(out, value, group=group)
        return out

    found = calibrate(group, torch.float32, 1, gather)  # type: ignore[arg-type]
    return [found.gather_latency, found.reduce_latency, found.link_bandwidth], found.rates


def test_a_calibration_is_the_same_on_every_rank(pool: Pool) -> None:
    one, other = pool.run(_calibrated, world=2)
    assert one == other
    link, rates = one
    assert min(link) > 0
    assert set(rates) == {"exp", "max", "partials", "gradient"}
    assert min(rates.values()) > 0
