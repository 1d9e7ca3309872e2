"""Ranks that were not started alike are told so at once, in one line, by every job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vocab_parallel_ce.launch.alike import require_alike
from vocab_parallel_ce.launch.refusal import Refusal
from vocab_parallel_ce.switches import CHECK_VARIABLE

from ..forks import run_forked

JOBS = ("doctor --selftest --quick", "train --tp 2")
PROGRAM = f"""
import os
if os.environ["RANK"] == "1":
    os.environ["{CHECK_VARIABLE}"] = "1"
from vocab_parallel_ce.launch import jobs, refusal
refusal.PATIENCE = 0.0
for words in {JOBS!r}:
    job, *options = words.split()
    try:
        jobs.run(job, [*options, "--device", "cpu", "--timeout", "30"])
    except SystemExit as end:
        assert end.code == 2
"""


def test_a_check_on_one_rank_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environ = {name: value for name, value in os.environ.items() if name != CHECK_VARIABLE}
    done = run_forked(str(tmp_path / "program.py"), ranks=2, environ=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if CHECK_VARIABLE in line]
    message = (
        f"{CHECK_VARIABLE} is not set on rank 0 and '1' on rank 1: ranks that check would wait for "
        "those that do not; set it alike on every rank"
    )
    starts = [f"vocab-parallel-ce {job.split()[0]}: " for job in JOBS]
    assert [line for line in said if "rank 1: vocab" not in line and ": rank 1: " not in line] == [
        start + message for start in starts
    ]
    assert not (tmp_path / "runs" / "train").exists()


def test_words_of_one_meaning_are_alike() -> None:
    require_alike(lambda mine: [(True, "1"), (True, "yes")])
    require_alike(lambda mine: [(False, None), (False, "off")])
    with pytest.raises(Refusal, match="is 'on' on rank 0 and not set on rank 2"):
        require_alike(lambda mine: [(True, "on"), (True, "1"), (False, None)])
