"""Measured runs -> the CSV -> the README's table, and the README that is committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vocab_parallel_ce.launch.bench import medians
from vocab_parallel_ce.launch.bench import table as readme_table
from vocab_parallel_ce.launch.bench.medians import Row
from vocab_parallel_ce.launch.bench.peers import BY_NAME

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
    text = readme_table.table(rows)
    assert "Some card, 2026-01-02." in text
    assert "| ms | ours, in place | F.cross_entropy |" in text
    assert "| 1 process, [1000, 2000], bf16 | 0.02 (75%) | 3.00 |" in text
    assert (
        "| 1 process, [2000, 2000], bf16 | 16 (0%) |  |" in text
    )  # the other one did not fit there
    assert readme_table.NO_CUDA not in text


def test_a_cpu_has_ratios_to_ours_in_place() -> None:
    rows = rows_of(
        run(peer("ours-inplace", 0.01, 0.03), peer("torch", 0.4, 0.5), device="cpu"),
        run(peer("ours-inplace", 0.02, 0.03), device="cpu", ranks=2),
        device="Some CPU",
    )
    text = readme_table.table(rows)
    assert "Some CPU, 2 cores, 2026-01-02." in text
    assert "| ms | 1 process, bf16 | 2 ranks, bf16 |" in text
    assert "| **ours, in place** | **40** | **50** |" in text
    assert "| F.cross_entropy | 900 (22.5x) |  |" in text
    assert readme_table.NO_CUDA in text


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
    assert readme_table.goals(rows) == (
        f"Goals of speed met: 2 of 4. Missed: {where} faster than every peer (F.cross_entropy): "
        f"0.50x, goal 1.00x; {where} share of the copy bandwidth: 0%, goal 85%."
    )
    cpu = rows_of(
        run(peer("ours-inplace", 0.01, 0.01), peer("torch", 0.1, 0.1), device="cpu", dtype="fp32")
    )
    assert readme_table.goals(cpu) == (
        "Goals of speed met: 0 of 1. Missed: 1 process, fp32: ours, in place against "
        "F.cross_entropy: 10.00x, goal 12.00x."
    )


def test_a_busy_machine_is_told() -> None:
    busy = run(peer("ours", 1, 1), device="cpu", idle_checked=True, busy_runs=7, timed_runs=9)
    assert "found the machine busy: 7 of 9." in readme_table.table(rows_of(busy))


def invoke(*options: str) -> int:
    try:
        readme_table.main(options)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_only_what_lies_between_the_markers_is_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, table = tmp_path / "README.md", tmp_path / "bench.csv"
    readme.write_text(f"before\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nafter\n")
    medians.add(table, [run(peer("ours", 1e-6, 2e-6))], HERE)
    options = ["--csv", str(table), "--page", str(readme)]
    assert invoke(*options, "--check") == 1
    assert "run this without --check" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert invoke(*options) == 0
    assert invoke(*options, "--check") == 0
    text = readme.read_text()
    assert text.startswith(f"before\n\n{readme_table.BEGIN}\n")
    assert text.endswith(f"{readme_table.END}\n\nafter\n")
    assert "old" not in text
    medians.write([replace(row, ms=row.ms * 2) for row in medians.read(table)], table)
    assert invoke(*options, "--check") == 1


@pytest.mark.parametrize("text", ["nothing", f"{readme_table.END} {readme_table.BEGIN}"])
def test_a_readme_without_markers_is_left_alone(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert invoke("--page", str(readme)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vocab-parallel-ce bench.table: a page must hold")
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--csv", "/not/there.csv"], "--csv /not/there.csv: No such file or directory"),
        (["--page", "/not/there.md"], "--page /not/there.md: No such file or directory"),
        (["--xyzzy"], "there is no option --xyzzy; see --help"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("--check", *options) == 2
    assert capsys.readouterr().err == f"vocab-parallel-ce bench.table: {words}\n"


@pytest.mark.parametrize("page", readme_table.PAGES, ids=lambda page: page.name)
def test_the_committed_pages_are_what_the_committed_csv_gives(page: Path) -> None:
    text, rows = page.read_text(), medians.read()
    assert rows, "the CSV holds no measurement"
    assert readme_table.rewritten(text, rows) == text, (
        "run python -m vocab_parallel_ce.launch.bench.table"
    )
