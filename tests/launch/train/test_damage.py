"""Damaged checkpoints and folders that are not shared: one line, and no run goes on from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import run_forked
from tests.launch.running import invoke, one_line
from vocab_parallel_ce.launch.train.progress import read_metrics
from vocab_parallel_ce.launch.train.whole import NAME, digests_of, problem_in, write_digests

OLDER, NEWER = "step-00000002", "step-00000004"


def _arguments(out: Path | str, cache: Path, *extra: object) -> list[str]:
    fixed = (
        "--vocab 300 --context 16 --width 16 --layers 1 --heads 2 --batch 4 --device cpu "
        f"--timeout 60 --steps 5 --checkpoint-every 2 --no-check --text {cache / 'text'} "
        f"--cache {cache} --out {out}"
    )
    return [*fixed.split(), *map(str, extra)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Four steps, two checkpoints."""
    out = tmp_path_factory.mktemp("straight")
    ended = invoke("train", *_arguments(out, cache, "--steps", 4))
    assert ended.exit_code == 0, ended.output
    return out


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _break(path: Path) -> None:
    path.write_bytes(b"\x93{ not what it was")


def _write(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a bit of a shard": ("__0_0.distcp", _flip, "is not what was written: its digest differs"),
    "a shard cut short": ("__0_0.distcp", _cut, "bytes where "),
    "no shard": ("__0_0.distcp", Path.unlink, "is not there"),
    "a bit of the metadata": (".metadata", _flip, "is not what was written"),
    "broken metadata": (".metadata", _break, "bytes where "),
    "broken run.json": ("run.json", _break, "bytes where "),
    "no run.json": ("run.json", Path.unlink, "is not there"),
    "broken digests": (NAME, _break, "cannot be read"),
    "digests of another kind": (NAME, _write(b"[1]"), "cannot be read"),
    "digests of no file": (NAME, _write(b'{"a\\u0000b": [1, "0"]}'), "cannot be read"),
    "an endless size": (NAME, _write(b'{"run.json": [1e999, "0"]}'), "cannot be read"),
    "no digests": (NAME, Path.unlink, "is not there"),
}
POINTERS = {
    "empty": (b"", "holds b'', which names no checkpoint"),
    "binary": (b"\xff\x00\x80", r"holds b'\xff\x00\x80', which names no checkpoint"),
    "escaping": (b"../../step-00000004\n", "which names no checkpoint"),
    "gone": (b"step-00000099\n", "names step-00000099, which is not there"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(
    name: str, straight: Path, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    file, damage, message = DAMAGE[name]
    path = out / "checkpoints" / NEWER / file
    damage(path)
    line = one_line(invoke("train", *_arguments(out, cache)), "train")
    assert line.startswith(str(path))
    assert message in line
    latest = out / "checkpoints" / "latest"
    assert line.endswith(f"{OLDER} is whole: to continue from it write its name into {latest}")
    assert len(read_metrics(out / "metrics.jsonl")) == 4


@pytest.mark.parametrize("name", POINTERS)
def test_a_bad_pointer_is_one_line(name: str, straight: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    latest = out / "checkpoints" / "latest"
    content, message = POINTERS[name]
    latest.write_bytes(content)
    line = one_line(invoke("train", *_arguments(out, cache)), "train")
    assert line.startswith(f"{latest} ")
    assert message in line
    assert f"{NEWER} is whole: to continue from it write its name into {latest}" in line


def test_the_way_out_leads_on(straight: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    _flip(tmp_path / "checkpoints" / NEWER / "__0_0.distcp")
    (tmp_path / "checkpoints" / "latest").write_text(OLDER)
    ended = invoke("train", *_arguments(tmp_path, cache))
    assert ended.exit_code == 0, ended.output
    assert "after step 2" in ended.stdout
    losses = [line.loss for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[:4] == [line.loss for line in read_metrics(straight / "metrics.jsonl")]
    for step in ("step-00000004", "step-00000005"):
        assert problem_in(tmp_path / "checkpoints" / step) == ""


def test_nothing_is_whole(straight: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    for step in (OLDER, NEWER):
        _flip(tmp_path / "checkpoints" / step / "__0_0.distcp")
    line = one_line(invoke("train", *_arguments(tmp_path, cache)), "train")
    assert line.endswith("no other checkpoint there is whole: start over with --resume never")


def test_a_run_cut_off_before_the_pointer_continues(
    straight: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "latest").unlink()
    ended = invoke("train", *_arguments(tmp_path, cache))
    assert ended.exit_code == 0, ended.output
    assert "after step 4" in ended.stdout


def test_each_rank_reads_a_share(tmp_path: Path) -> None:
    """Any change of any file is found by one of them, and a size by all."""
    names = [f"{number}.bin" for number in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    write_digests(tmp_path, digests_of(tmp_path, names))
    assert json.loads((tmp_path / NAME).read_text()).keys() == set(names)
    for of in (1, 2, 3, 7):
        assert [problem_in(tmp_path, share, of) for share in range(of)] == [""] * of
        for name in names:
            _flip(tmp_path / name)
            said = [problem_in(tmp_path, share, of) for share in range(of)]
            assert [bool(text) for text in said].count(True) == 1
            assert str(tmp_path / name) in "".join(said)
            _flip(tmp_path / name)
    _cut(tmp_path / names[2])
    assert all("2.bin has" in problem_in(tmp_path, share, 3) for share in range(3))


PROGRAM = """
import os, sys
from vocab_parallel_ce.launch import jobs, refusal
from vocab_parallel_ce.launch.train import command, shared
refusal.PATIENCE = shared.PATIENCE = 0.0
rank = os.environ["RANK"]
for attempt in ("probe", "checkpoint"):
    try:
        jobs.run("train", [*sys.argv[1:], "--out", f"{attempt}-{rank}"])
    except SystemExit as end:
        assert end.code == 1, end.code
    command.require_shared = lambda *_: None
"""


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, cache: Path) -> None:
    """Before the first step, and, where it only was shared then, at the checkpoint."""
    (tmp_path / "program.py").write_text(PROGRAM)
    options = _arguments("nowhere", cache, "--tp", 2)
    done = run_forked(str(tmp_path / "program.py"), *options, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("vocab-parallel-ce train")]
    assert len(said) == 4
    for line in said:
        assert "is not the same folder on every rank: what rank 0 wrote is not on ranks" in line
    assert "step 2" not in done.stdout
    assert not (tmp_path / "probe-0" / "metrics.jsonl").exists()
    for rank in (0, 1):
        assert not list(tmp_path.glob(f"*-{rank}/checkpoints/latest"))
        assert not list(tmp_path.glob(f"*-{rank}/.seen-by-all-*"))
