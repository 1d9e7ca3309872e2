"""Each example runs as its docstring says, on two ranks, and prints what it promises."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.forks import run_forked
from tests.launch.running import launch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _run(name: str, start: Callable[..., CompletedProcess[str]] = run_forked) -> list[str]:
    """The lines that its two ranks print, sorted."""
    done = start(str(ROOT / "examples" / name), ranks=2)
    assert done.returncode == 0, done.stderr
    # Two ranks may print into one line.
    return sorted(filter(None, re.split(r"\n|(?=rank \d)", done.stdout)))


def test_a_head_before_and_after_gives_the_same() -> None:
    """Under torchrun itself."""
    lines = _run("own_head.py", launch)
    assert len(lines) == 4
    told = {re.sub(r"(before|after )", "", line) for line in lines}
    assert len(told) == 2, lines  # one line a rank: the two ways differ in no digit
    assert len({re.search(r"loss [\d.]+, gradients: hidden [\d.]+", t)[0] for t in told}) == 1  # type: ignore[index]


def test_rl_statistics_are_the_same_on_every_rank() -> None:
    lines = _run("rl_statistics.py")
    assert len(lines) == 2
    assert len({line.partition(": ")[2] for line in lines}) == 1
    assert all(line.endswith("prompt gradient 0.0") for line in lines)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers 5.24 needs Python 3.11")
def test_a_model_of_transformers_learns() -> None:
    lines = [line.partition(": ")[2] for line in _run("transformers_finetuning.py")]
    told = sorted(line for line in lines if line.startswith("step"))
    assert told[::2] == told[1::2], "both ranks have the same loss"
    losses = [float(line.rpartition(" ")[2]) for line in told[::2]]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)


def test_megatron_forward_step_reports_loss_and_z_loss() -> None:
    pytest.importorskip("megatron.core")
    lines = [line for line in _run("megatron_forward_step.py") if "lm loss" in line]
    assert len(lines) == 2
    assert len({line.partition(": ")[2] for line in lines}) == 1
    assert "z loss" in lines[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 80
    assert f"torchrun --standalone --nproc-per-node 2 examples/{path.name}" in text
