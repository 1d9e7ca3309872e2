"""Measured runs -> the CSV -> what the pages say of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.bench import medians, pages
from vocab_parallel_ce.launch.bench.medians import Row
from vocab_parallel_ce.launch.bench.peers import BY_NAME
from vocab_parallel_ce.launch.bench.shares import Share

HERE = {
    "device": "Some card",
    "cores": 2,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0", "triton": None, "vocab_parallel_ce": "0.1.0"},
}


def peer(name: str, forward: float, backward: float, **changes: Any) -> dict[str, Any]:
    def summary(seconds: float) -> dict[str, float]:
        return {"median": seconds, "min": seconds / 2}

    found = {"name": name, "label": BY_NAME[name].label, "status": "", "wrong": ""}
    times = {"forward_s": forward, "backward_s": backward, "total_s": forward + backward}
    return found | {key: summary(value) for key, value in times.items()} | changes


def run(*found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """[1000, 2000] bf16: two million elements, 4 MB."""
    made: dict[str, Any] = {"ranks": 1, "rows": 1000, "vocab": 2000, "dtype": "bf16"}
    made |= {"device": "cuda", "logits_bytes_per_rank": 4_000_000, "peers": list(found)}
    made |= {"copy_bandwidth": {"median": 1e12}, "idle_checked": False}
    return made | {"busy_runs": 0, "timed_runs": 0} | changes


def test_rows_by_hand() -> None:
    """Forward 4 us at 1 TB/s: a copy would have moved 2 bytes an element, which is all it reads."""
    mine = peer("ours-inplace", 4e-6, 12e-6, peak_bytes=2**20)
    absent = {"name": "torch", "label": "F", "status": "not installed"}
    wrong = peer("ours", 1e-6, 1e-6, wrong="loss 1 instead of 2")
    forward, backward, both = medians.rows_of(run(mine, absent, wrong), HERE)
    assert [row.pass_ for row in (forward, backward, both)] == ["forward", "backward", "both"]
    assert (forward.ms, forward.min_ms, both.ms) == (0.004, 0.002, 0.016)
    assert [row.ideal_bytes for row in (forward, backward, both)] == [2, 4, 6]
    assert [row.copy_bytes for row in (forward, backward, both)] == [2.0, 6.0, 8.0]
    assert [row.share for row in (forward, backward, both)] == [1.0, 0.6667, 0.75]
    assert both.peak_mib == 1.0
    assert both.package == "vocab_parallel_ce 0.1.0"
    assert (both.card, both.torch, both.triton) == ("Some card", "2.13.0", "")


def test_several_ranks_count_the_elements_of_all(tmp_path: Path) -> None:
    shared = run(peer("ours", 4e-6, 8e-6), ranks=2, logits_bytes_per_rank=2_000_000)
    both = medians.rows_of(shared, HERE)[2]
    assert (both.ideal_bytes, both.copy_bytes) == (6, 6.0)


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bench.csv"
    medians.add(path, [run(peer("ours", 1e-6, 2e-6), peer("torch", 3e-6, 4e-6))], HERE)
    rows = medians.read(path)
    assert len(rows) == 6
    assert rows == medians.rows_of(run(peer("ours", 1e-6, 2e-6), peer("torch", 3e-6, 4e-6)), HERE)
    assert rows[0].peak_mib is None
    assert medians.read(tmp_path / "none.csv") == []


def test_a_new_run_replaces_its_own_group_and_no_other(tmp_path: Path) -> None:
    """Rows of two runs never stand in one group: their ratio would mean nothing."""
    path = tmp_path / "bench.csv"
    old = run(peer("ours", 1e-6, 2e-6), peer("torch", 3e-6, 4e-6))
    medians.add(path, [old, run(peer("ours", 5e-6, 5e-6), dtype="fp32")], HERE)
    medians.add(path, [run(peer("ours", 7e-6, 7e-6))], HERE)
    medians.add(path, [run(peer("ours", 9e-6, 9e-6))], HERE | {"device": "Another"})
    medians.add(path, [run(copy_bandwidth=None)], HERE)  # nothing was timed: nothing is lost
    found = {(row.card, row.dtype, row.peer): row.ms for row in medians.read(path)}
    assert found == {
        ("Another", "bf16", "ours"): 0.018,
        ("Some card", "bf16", "ours"): 0.014,
        ("Some card", "fp32", "ours"): 0.010,
    }


def rows_of(*runs: dict[str, Any], **here: Any) -> list[Row]:
    return [row for one in runs for row in medians.rows_of(one, HERE | here)]


def test_a_card_has_shapes_down_and_implementations_across() -> None:
    rows = rows_of(
        run(peer("ours-inplace", 4e-6, 12e-6), peer("torch", 1e-3, 2e-3)),
        run(peer("ours-inplace", 4e-3, 12e-3), rows=2000, logits_bytes_per_rank=8_000_000),
    )
    text = pages.table(rows)
    assert "Some card, 2026-01-02." in text
    assert "| ms | ours, in place | F.cross_entropy |" in text
    assert "| 1 process, [1000, 2000], bf16 | 0.02 (75%) | 3.00 |" in text
    assert (
        "| 1 process, [2000, 2000], bf16 | 16 (0%) |  |" in text
    )  # the other one did not fit there
    assert pages.NO_CUDA not in text


def test_a_cpu_has_ratios_to_ours_in_place() -> None:
    rows = rows_of(
        run(peer("ours-inplace", 0.01, 0.03), peer("torch", 0.4, 0.5), device="cpu"),
        run(peer("ours-inplace", 0.02, 0.03), device="cpu", ranks=2),
        device="Some CPU",
    )
    text = pages.table(rows)
    assert "Some CPU, 2 cores, 2026-01-02." in text
    assert "| ms | 1 process, bf16 | 2 ranks, bf16 |" in text
    assert "| **ours, in place** | **40** | **50** |" in text
    assert "| F.cross_entropy | 900 (22.5x) |  |" in text
    assert pages.NO_CUDA in text


def test_missed_goals_are_named() -> None:
    """On the card the smaller shape meets both goals, and the larger one neither."""
    rows = rows_of(
        run(peer("ours-inplace", 4e-6, 8e-6), peer("torch", 1e-3, 2e-3)),
        run(
            peer("ours-inplace", 8e-3, 24e-3),
            peer("torch", 8e-3, 8e-3),
            rows=2000,
            logits_bytes_per_rank=8_000_000,
        ),
    )
    where = "1 process, [2000, 2000] bf16: ours, in place,"
    assert pages.goals(rows) == (
        f"Goals of speed met: 2 of 4. Missed: {where} faster than every peer (F.cross_entropy): "
        f"0.50x, goal 1.00x; {where} share of the copy bandwidth: 0%, goal 85%."
    )
    cpu = rows_of(
        run(peer("ours-inplace", 0.01, 0.01), peer("torch", 0.1, 0.1), device="cpu", dtype="fp32")
    )
    assert pages.goals(cpu) == (
        "Goals of speed met: 0 of 1. Missed: 1 process, fp32: ours, in place against "
        "F.cross_entropy: 10.00x, goal 12.00x."
    )


def test_a_busy_machine_is_told() -> None:
    busy = run(peer("ours", 1, 1), device="cpu", idle_checked=True, busy_runs=7, timed_runs=9)
    assert "found the machine busy: 7 of 9." in pages.table(rows_of(busy))


def test_memory_of_the_cpu_alone() -> None:
    rows = rows_of(
        run(
            peer("ours-inplace", 1, 1, peak_bytes=2**20),
            peer("torch", 1, 1, peak_bytes=3 * 2**30),
            device="cpu",
        ),
        run(peer("ours-inplace", 1, 1, peak_bytes=2**21), device="cpu", ranks=2),
        run(peer("ours-inplace", 1, 1, peak_bytes=5)),
    )
    assert pages.memory(rows).splitlines() == [
        "| MiB | 1 process, bf16 | 2 ranks, bf16 |",
        "| --- | --- | --- |",
        "| ours, in place | 1.0 | 2.0 |",
        "| F.cross_entropy | 3,072.0 |  |",
    ]


def test_shares_by_processor() -> None:
    share = Share("Some", 2, 1, 8, 8, "fp32", "ours-inplace", 0.714, 1, 2, "", "2026-01-02", "", "")
    records = [
        share,
        replace(share, dtype="bf16", times_limit=1.2, date="2026-01-03T00:00"),
        replace(share, peer="ours", times_limit=9.0),
        replace(share, processor="Other"),
    ]
    assert pages.shares(records).splitlines() == [
        "* Some, 2026-01-02 to 2026-01-03: 0.71 (fp32), 1.20 (bf16)",
        "* Other, 2026-01-02: 0.71 (fp32)",
    ]
