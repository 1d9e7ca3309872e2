"""`make quick` touches every folder of the sources; no list of files is stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .longest import LONGEST
from .quick import QUICK, is_quick

ROOT = Path(__file__).resolve().parents[1]
# Where the tests of a folder are that has none of its name.
ELSEWHERE = {
    "vocab_parallel_ce": "tests",
    "vocab_parallel_ce/engines/npu": None,  # needs an environment of its own: make unit-npu
    "vocab_parallel_ce/engines/npu/linear": None,
    "vocab_parallel_ce/engines/triton": None,  # the same: make unit-triton
    "vocab_parallel_ce/testing/engine": "tests/engines",
    "launch/bench/call_cost": "tests/launch/bench",
    "launch/doctor/tune": "tests/launch/doctor",
    "launch/bench/curve": "tests/launch/bench",
    "launch/bench/fused_head": "tests/launch/bench",
}


@pytest.mark.parametrize("file", QUICK)
def test_every_entry_exists(file: str) -> None:
    text = (ROOT / file).read_text()
    for function in QUICK[file]:
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), f"{file} has no {function}"


@pytest.mark.parametrize("file", LONGEST)
def test_who_comes_first_exists(file: str) -> None:
    assert (ROOT / file).is_file()


def _folders() -> list[str]:
    tops = ("vocab_parallel_ce", "parallel", "launch")
    links = [ROOT / "vocab_parallel_ce" / name for name in ("launch", "parallel")]
    files = [p for top in tops for p in (ROOT / top).rglob("*.py")]
    inside = {p.parent for p in files if not any(p.is_relative_to(link) for link in links)}
    return sorted(str(folder.relative_to(ROOT)) for folder in inside)


@pytest.mark.parametrize("folder", _folders())
def test_every_folder_of_the_sources_has_a_quick_test(folder: str) -> None:
    tests = ELSEWHERE.get(folder, f"tests/{folder.removeprefix('vocab_parallel_ce/')}")
    if tests is not None:
        assert any(str(Path(file).parent) == tests for file in QUICK), (
            f"{folder}: nothing in {tests}"
        )


def test_a_function_of_a_listed_file_may_be_left_out() -> None:
    file, functions = next((f, names) for f, names in QUICK.items() if names)
    assert is_quick(f"{file}::{functions[0]}[any case]")
    assert not is_quick(f"{file}::{functions[0]}_and_more")
    assert not is_quick("tests/test_large.py::test_more_than_2_to_the_31_in_place")
