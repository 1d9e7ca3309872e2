"""Every code block of the README and of the pages runs as printed, or says why it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..launch.running import invoke, launch
from ..ranks import Pool
from .pages import PAGES, ROOT, Block, blocks

BLOCKS = blocks()
PYTHON = [b for b in BLOCKS if b.language == "python" and b.runs]
SHELL = [b for b in BLOCKS if b.is_shell]
ROWS, WIDTH, VOCAB = 6, 8, 50


def _given(group: Any) -> dict[str, Any]:
    """Every name that a block may ask for."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    size = VOCAB // world
    full = torch.randn(VOCAB, WIDTH, generator=g)
    hidden = torch.randn(ROWS, WIDTH, generator=g, requires_grad=True)
    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    leaf = torch.randn(ROWS, size, requires_grad=True)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    start, stop = (0, 30_000) if rank == 0 else (30_000, 50_257)
    return {
        "logits": leaf * 1,  # as a layer made them
        "target": target,
        "tokens": target,
        "tp_group": group,
        "dp_group": alone,
        "hidden": hidden,
        "full_weight": full.requires_grad_(),
        "vocab_size": VOCAB,
        "temperature": 0.7,
        "old_log_prob": torch.zeros(ROWS),
        "local_size": size,
        "start": start,
        "stop": stop,
    }


def _run(group: Any, programs: list[tuple[str, str, str]]) -> list[str]:
    """What each (name, code, wanted names) came to: "" or its error."""
    from vocab_parallel_ce.parallel.megatron import uninstall

    outcomes = []
    for name, code, wanted in programs:
        known = _given(group)
        names = [n for n in re.split(r",\s*", wanted) if n]
        try:
            space: dict[str, Any] = {n: known[n] for n in names}
            exec(compile(code, name, "exec"), space)
            outcomes.append("")
        except Exception as problem:
            outcomes.append(f"{type(problem).__name__}: {problem}")
        finally:
            uninstall()
    return outcomes


def test_python_blocks_run_as_printed(pool: Pool) -> None:
    assert len(PYTHON) >= 10, "the reader of pages finds no blocks"
    programs = [(b.name, b.code, b.rest if b.word == "given" else "") for b in PYTHON]
    for outcomes in pool.run(_run, world=2, args=(programs,)):
        failed = [f"{b.name}: {text}" for b, text in zip(PYTHON, outcomes, strict=True) if text]
        assert not failed, "\n".join(failed)


@pytest.mark.parametrize("block", [b for b in SHELL if b.runs], ids=lambda b: b.name)
def test_shell_blocks_run_as_printed(block: Block, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{block.name}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.word == "output"], ids=lambda block: block.name
)
def test_what_a_page_shows_is_what_the_command_prints(block: Block, tmp_path: Path) -> None:
    command = block.rest.split()
    assert command.pop(0) == "vocab-parallel-ce"
    done = subprocess.run(
        [sys.executable, "-m", "vocab_parallel_ce.launch", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == block.code.strip()


def test_every_block_says_what_it_is() -> None:
    for block in SHELL:
        assert block.word, f"{block.name}: a shell block runs, or is marked as a fragment"
    for block in BLOCKS:
        if block.word == "fragment":
            assert block.rest, f"{block.name}: a fragment says why it is not run"
    # A fence that the reader does not see would go untested.
    for page in PAGES:
        fences = len(re.findall(r"^ *```", page.read_text(), re.MULTILINE))
        seen = sum(b.page == str(page.relative_to(ROOT)) for b in BLOCKS)
        assert fences == 2 * seen, page


# What is printed but not run: commands are spelled right


def _commands() -> list[tuple[str, str]]:
    """(where, one command) of all shell blocks and of text in `code` that begins like one."""
    found = []
    for block in SHELL:
        if block.word == "output":
            continue
        for line in block.code.splitlines():
            command = line.split("  #")[0].strip()
            if command and not command.startswith("#"):
                found.append((block.name, command))
    for page in PAGES:
        for code in re.findall(
            r"`((?:make|torchrun|python -m|vocab-parallel-ce) [^`]+)`", page.read_text()
        ):
            found.append((str(page.relative_to(ROOT)), code))
    return found


def _options_of(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a job says of itself with --help."""
    if name == "ascend":  # its process becomes a shell
        done = launch("-m", "vocab_parallel_ce.launch", name, "--help")
        assert done.returncode == 0, done.stderr
        return done.stdout
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    ended = invoke(name, "--help")
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


_JOB = re.compile(r"(?:vocab-parallel-ce|-m vocab_parallel_ce\.launch)[ .]([a-z_.-]+)(.*)")


def test_jobs_and_their_options_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[tuple[str, str]]] = {}
    for where, command in _commands():
        match = _JOB.search(command)
        if match and not match[1].startswith("-"):
            name = match[1].replace("bench.call_cost", "call-cost").replace("_", "-")
            name = name.replace("bench.fused-head", "fused-head")
            found = re.findall(r"(?<!\S)--[a-z][\w-]*", match[2])
            used.setdefault(name, set()).update((where, option) for option in found)
    assert {"doctor", "train", "bench", "plan"} <= set(used)
    for name, options in used.items():
        if name in ("pages", "fused-head.record"):  # no jobs: what they make is tested
            continue
        told = _options_of(name, monkeypatch)
        for where, option in sorted(options):
            assert option in told, f"{where}: {name} has no {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE))
    for where, command in _commands():
        match = re.match(r"make ([a-z][\w-]*)", command)
        if match:
            assert match[1] in targets, f"{where}: {command}"


def test_files_exist() -> None:
    """What pages name by its path in the clone is there."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:examples|launch|parallel|docs|tests|vocab_parallel_ce|engines)/[\w./-]+)`",
            page.read_text(),
        ):
            base = ROOT / "vocab_parallel_ce" if name.startswith("engines/") else ROOT
            assert (base / name).exists(), f"{page.name}: {name}"


def test_the_map_of_the_package_is_whole() -> None:
    """CONTRIBUTING.md names every file of the package's own folder, and no other."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("in the order in which a call meets them")[2].partition("| to change")[0]
    named = set(re.findall(r"`(\w+\.py)`", table))
    assert named == {f.name for f in (ROOT / "vocab_parallel_ce").glob("*.py")} - {"__init__.py"}
