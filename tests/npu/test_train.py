"""The training job on npu, two ranks, as one types it: through launch/ascend/run.sh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from vocab_parallel_ce.launch.train.command import Resume, prepare, train_and_check
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.launch.train.progress import read_metrics
from vocab_parallel_ce.launch.train.trainer import TrainOptions
from vocab_parallel_ce.parallel.groups import ParallelGroups

from ..forks import run_forked

REPOSITORY = Path(__file__).resolve().parents[2]
CARDS = int(os.environ.get("NPU_SIM_DEVICES", "8"))


def _train(folder: Path, out: str, *extra: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text(Path(textwrap.__file__).read_text())
    fixed = (
        "--vocab-size 513 --context 32 --width 32 --layers 1 --heads 2 --batch 4 --lr 3e-3 "
        "--warmup 2 --log-every 1 --timeout 60 --steps 6 --checkpoint-every 3 "
        f"--text text --cache cache --out {out}"
    )
    return subprocess.run(
        [str(REPOSITORY / "launch" / "ascend" / "run.sh"), *fixed.split(), *extra],
        env=os.environ | {"PYTHON": sys.executable, "NPROC": str(ranks)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def _losses(folder: Path, out: str) -> list[float]:
    return [line.loss for line in read_metrics(folder / out / "metrics.jsonl")]


def _on_one_cpu(folder: Path) -> list[float]:
    """The same run in this process."""
    shape = GPTShape(513, context=32, width=32, layers=1, heads=2)
    options = TrainOptions(shape, steps=6, batch=4, lr=3e-3, warmup=2, out=folder / "cpu")
    with ParallelGroups.open("cpu") as groups:
        trainer = prepare(groups, options, [folder / "text"], folder / "cache", Resume.never)
        train_and_check(trainer, check=False)
    return _losses(folder, "cpu")


def test_two_npu_ranks_follow_the_curve_of_the_cpu(tmp_path: Path) -> None:
    process = _train(tmp_path, "npu")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "on each of 2 npu ranks (tp 2, dp 1)" in process.stdout
    assert "equal on all ranks, bit for bit" in process.stdout
    assert "Check passed." in process.stdout
    errors = [float(e) for e in re.findall(r"error (\d\.\de-?\d+)", process.stdout)]
    assert len(errors) == 2
    assert max(errors) < 2e-6
    assert "falls back" not in process.stderr  # the operator served, not the eager engine

    curve = _losses(tmp_path, "npu")
    assert len(curve) == 6
    np.testing.assert_allclose(curve, _on_one_cpu(tmp_path), rtol=0, atol=2e-5)


@pytest.mark.full
def test_a_run_on_npu_continues(tmp_path: Path) -> None:
    process = _train(tmp_path, "npu", "--no-check")
    assert process.returncode == 0, process.stdout + process.stderr
    curve = _losses(tmp_path, "npu")
    process = _train(tmp_path, "npu", "--steps", "8", "--no-check")
    assert process.returncode == 0, process.stderr
    assert "Continuing npu after step 6." in process.stdout
    assert _losses(tmp_path, "npu")[:6] == curve


@pytest.mark.full
def test_data_parallel_in_bf16_with_every_option_of_the_loss(tmp_path: Path) -> None:
    options = "--dp 2 --dtype bfloat16 --label-smoothing 0.1 --z-loss 1e-3 --tied --no-inplace"
    process = _train(tmp_path, "dp", *options.split())
    assert process.returncode == 0, process.stdout + process.stderr
    assert "(tp 1, dp 2)" in process.stdout
    assert "Check passed." in process.stdout


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(CARDS + 1, f"NPROC={CARDS + 1}, but this machine shows {CARDS} npu devices")],
)
def test_more_ranks_than_cards_is_one_line(tmp_path: Path, ranks: int, message: str) -> None:
    process = _train(tmp_path, "many", ranks=ranks)
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert message in process.stderr


def test_without_a_card_the_run_says_so_once(tmp_path: Path) -> None:
    program = ("-m", "vocab_parallel_ce.launch.train", "--device", "npu")
    process = run_forked(*program, ranks=2, environ={"NPU_SIM_DEVICES": "0"}, cwd=tmp_path)
    assert process.returncode != 0
    said = re.findall(r"^vocab-parallel-ce train: .*sees no card", process.stderr, re.M)
    assert len(said) == 1
    assert "Traceback" not in process.stderr
