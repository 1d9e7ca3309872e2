"""The curve over rows and columns, run for real on its smallest shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.launch.running import invoke, launch, one_line
from vocab_parallel_ce.launch.bench import medians
from vocab_parallel_ce.launch.bench.curve import pages
from vocab_parallel_ce.launch.bench.curve.command import COLUMNS, PEERS, ROWS, grid
from vocab_parallel_ce.launch.bench.curve.picture import not_first

SMALL = "--ranks 1 --largest 64 --repeats 1 --device cpu --wait-idle 0".split()  # noqa: SIM905


def test_it_measures_keeps_and_draws(tmp_path: Path) -> None:
    csv, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    where = ["--csv", str(csv), "--picture", str(picture), "--out", str(tmp_path)]
    measured = launch("-m", "vocab_parallel_ce.launch", "curve", *SMALL, *where)
    assert measured.returncode == 0, measured.stderr
    rows = medians.read(csv)
    assert {(row.rows, row.vocab) for row in rows} == {(1, 8), (1, 64)}
    assert {row.peer for row in rows} == set(PEERS)
    assert {row.dtype for row in rows} == {"fp32", "bf16"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    drawn = invoke("curve", "--draw-only", *where)
    assert drawn.exit_code == 0, drawn.output
    assert "Where ours is not first" in drawn.output
    assert picture.exists()

    # Who is first follows from the table alone.
    faster = [replace(row, ms=0.0 if row.peer == "torch" else 1.0) for row in rows]
    assert {first.peer for _, first in not_first(faster)} == {"torch"}
    assert pages.text([replace(row, ms=row.ms + 0.5) for row in faster]) == (
        "* 1 process: ours is the fastest at 0 of 4 points. At the others F.cross_entropy is "
        "faster, by up to 3.0 times (1 row of 8 columns, bf16) and never by more than 1.0 ms; the "
        "largest of these has 64 logits."
    )
    slower = [replace(row, ms=2.0 if row.peer == "torch" else 1.0) for row in rows]
    assert not_first(slower) == []
    assert pages.text(slower) == "* 1 process: ours is the fastest at 4 of 4 points."


def test_the_grid_goes_from_end_to_end() -> None:
    shapes = grid(1 << 26)
    assert {rows for rows, _ in shapes} == set(ROWS)
    assert {columns for _, columns in shapes} == set(COLUMNS)
    assert all(rows * columns <= 1 << 26 for rows, columns in shapes)


def test_an_empty_table_is_not_drawn(tmp_path: Path) -> None:
    csv = tmp_path / "none.csv"
    ended = invoke(
        "curve", "--draw-only", "--csv", str(csv), "--picture", str(tmp_path / "curve.png")
    )
    assert one_line(ended, "curve") == (f"--csv {csv} holds no measurement; leave --draw-only out")
