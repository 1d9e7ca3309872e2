"""The whole programs of docs/frameworks.md, as they are printed, on two ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.launch.running import launch

PROGRAMS = {
    name: block.code
    for block in blocks()
    for name in ("deepspeed", "torchtitan", "automodel")
    if block.page == "docs/frameworks.md"
    and block.language == "python"
    and f"vocab_parallel_ce.parallel.{name}" in block.code
}


def test_each_framework_has_one() -> None:
    assert PROGRAMS.keys() == {"deepspeed", "torchtitan", "automodel"}
    for code in PROGRAMS.values():
        assert 10 <= len(code.strip().splitlines()) <= 30


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_learns(name: str, tmp_path: Path) -> None:
    program = tmp_path / f"program_{name}.py"
    program.write_text(PROGRAMS[name])
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    ended = launch(
        str(program), ranks=2, environ={"DS_ACCELERATOR": "cpu", "PYTHONPATH": path}, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"step \d loss ([\d.]+)", ended.stdout)]
    assert len(losses) == 10
    # Both ranks hold the same loss, and it falls.
    assert sorted(losses) == sorted(2 * sorted(set(losses)))
    assert losses[0] == max(losses)
    assert min(losses) < 0.9 * max(losses)
