"""The training job, run for real: alone in this process, on two ranks, and under torchrun.

Curves are compared number by number: bit for bit where the arithmetic is the same, closely where
only the split differs. A vocabulary of 513 cannot be halved, so shards are uneven throughout.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.forks import run_forked
from tests.launch.running import invoke, launch, one_line
from vocab_parallel_ce.launch.refusal import Refusal
from vocab_parallel_ce.launch.train import pages
from vocab_parallel_ce.launch.train import text as text_module
from vocab_parallel_ce.launch.train.command import Resume, prepare, train_and_check
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.launch.train.progress import TrainingLog, read_metrics
from vocab_parallel_ce.launch.train.text import Batches, load_corpus
from vocab_parallel_ce.launch.train.trainer import Trainer, TrainOptions, sum_of_squares
from vocab_parallel_ce.parallel.groups import ParallelGroups

VOCAB_SIZE = 513
STEPS = 12
SHAPE = GPTShape(VOCAB_SIZE, context=32, width=32, layers=1, heads=2)


def _options(out: Path, **changes: Any) -> TrainOptions:
    """What the command line of `_launch` says too."""
    base = TrainOptions(
        SHAPE, steps=STEPS, batch=4, lr=3e-3, warmup=2, out=out, checkpoint_every=STEPS // 2
    )
    return dataclasses.replace(base, **changes)


def _alone(out: Path, cache: Path, check: bool = False, **changes: Any) -> list[float]:
    """One rank, in this process. Returns the losses."""
    with ParallelGroups.open("cpu") as groups:
        trainer = prepare(groups, _options(out, **changes), [cache / "text"], cache, Resume.auto)
        proof = train_and_check(trainer, check)
    assert (proof is not None) == check
    assert proof is None or proof.ok
    return _losses(out)


def _arguments(out: Path, cache: Path, *extra: object) -> list[str]:
    fixed = (
        f"--vocab-size {VOCAB_SIZE} --context 32 --width 32 --layers 1 --heads 2 --batch 4 "
        f"--lr 3e-3 --warmup 2 --device cpu --log-every 1 --timeout 60 --steps {STEPS} "
        f"--checkpoint-every {STEPS // 2} --text {cache / 'text'} --cache {cache} --out {out}"
    )
    return [*fixed.split(), *map(str, extra)]


PROGRAM = ("-m", "vocab_parallel_ce.launch.train")


def _launch(out: Path, cache: Path, *extra: object) -> subprocess.CompletedProcess[str]:
    """Two ranks."""
    return run_forked(*PROGRAM, *_arguments(out, cache, *extra), ranks=2)


def _succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def _losses(out: Path) -> list[float]:
    metrics = read_metrics(out / "metrics.jsonl")
    assert [line.step for line in metrics] == list(range(1, len(metrics) + 1))
    return [line.loss for line in metrics]


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, str]:
    """The run that others are compared with: two ranks, no interruption. Its folder and output."""
    out = tmp_path_factory.mktemp("straight")
    return out, _succeed(_launch(out, cache, "--tp", 2, "--dropout", 0.1))


@pytest.fixture(scope="session")
def cut(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The same run, one rank of which dies two steps after the checkpoint of step 6."""
    out = tmp_path_factory.mktemp("cut")
    process = _launch(out, cache, "--tp", 2, "--dropout", 0.1, "--die-at-step", 9)
    assert process.returncode != 0  # and the other rank did not hang
    assert (out / "checkpoints" / "latest").read_text() == "step-00000006\n"
    return out


def test_two_ranks_train_and_prove_it(straight: tuple[Path, str]) -> None:
    out, said = straight
    losses = _losses(out)
    assert len(losses) == STEPS
    assert abs(losses[0] - np.log(VOCAB_SIZE)) < 0.1
    assert losses[-1] < losses[0] - 0.3
    assert "Check passed." in said
    assert said.index("Comparing the loss of the last batch") < said.index("  gradient  largest")
    assert max(map(len, said.splitlines())) <= 120
    assert "equal on all ranks, bit for bit" in said
    assert "rank 0 owns ids 0 to 256 of 513" in said
    relative = [float(e) for e in re.findall(r"error (\d\.\de-?\d+)", said)]
    assert len(relative) == 2
    assert max(relative) < 2e-6
    found = json.loads((out / "result.json").read_text())
    assert found["ok"]
    assert (found["first_loss"], found["last_loss"]) == (losses[0], losses[-1])
    assert f"relative error {found['errors']['loss_error']:.1e}" in said
    for words in ("tp=2", f"loss of {4 * 32} rows of 513", f"falls from {losses[0]:.2f} to"):
        assert words in pages.text(found)
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000006", "step-00000012"]
    for line in read_metrics(out / "metrics.jsonl"):
        assert 0.0 < line.loss_share < 1.0
        assert line.tokens == 4 * 32


def test_one_rank_follows_the_same_curve(
    straight: tuple[Path, str], tmp_path: Path, cache: Path
) -> None:
    alone = _alone(tmp_path, cache, shape=dataclasses.replace(SHAPE, dropout=0.1))
    np.testing.assert_allclose(alone, _losses(straight[0]), rtol=0, atol=2e-5)


@pytest.mark.full
def test_the_fused_head_follows_the_same_curve(
    straight: tuple[Path, str], tmp_path: Path, cache: Path
) -> None:
    """Over 100 steps alone, and on two ranks, where the job also proves it at its end."""
    apart, fused = (
        _alone(tmp_path / str(on), cache, fused_head=on, steps=100) for on in (False, True)
    )
    np.testing.assert_allclose(fused, apart, rtol=0, atol=1e-5)
    out = tmp_path / "ranks"
    said = _succeed(_launch(out, cache, "--tp", 2, "--dropout", 0.1, "--fused-head"))
    assert "fused head, beside head and loss apart: loss off by" in said
    assert "Check passed." in said
    np.testing.assert_allclose(_losses(out), _losses(straight[0]), rtol=0, atol=1e-5)


def test_the_head_is_fused_where_logits_would_not_fit(tmp_path: Path, cache: Path) -> None:
    with ParallelGroups.open("cpu") as groups:
        corpus = load_corpus([cache / "text"], VOCAB_SIZE, cache)
        for batch, fused in ((4, False), (4096, True)):
            options = _options(tmp_path, batch=batch)
            assert Trainer(options, groups, corpus).fused == fused


def test_a_resumed_run_is_the_same_bit_for_bit(
    straight: tuple[Path, str], cut: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    assert len(_losses(tmp_path)) == 8  # two steps beyond the checkpoint, to be done again
    said = _succeed(_launch(tmp_path, cache, "--tp", 2, "--dropout", 0.1, "--no-check"))
    assert "after step 6" in said
    assert _losses(tmp_path) == _losses(straight[0])
    stored = [_checkpoint_bytes(out) for out in (tmp_path, straight[0])]
    assert stored[0] == stored[1]


def _checkpoint_bytes(out: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, read back without a process group."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = out / "checkpoints" / f"step-{STEPS:08d}"
    dcp_to_torch_save(path, out / "whole.pt")
    tensors: dict[str, Tensor] = torch.load(out / "whole.pt")
    assert tensors["model.head.weight"].shape == (VOCAB_SIZE, 32)
    return {k: v.reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in tensors.items()}


def test_a_checkpoint_of_two_ranks_loads_on_one(
    straight: tuple[Path, str], cut: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    losses = _alone(tmp_path, cache, shape=dataclasses.replace(SHAPE, dropout=0.1))
    expected = _losses(straight[0])
    assert losses[:6] == expected[:6]
    np.testing.assert_allclose(losses[6:], expected[6:], rtol=0, atol=2e-5)


def test_a_run_survives_the_loss_of_a_rank(
    straight: tuple[Path, str], tmp_path: Path, cache: Path
) -> None:
    """Under torchrun, which starts both again."""
    options = _arguments(tmp_path, cache, "--tp", 2, "--dropout", 0.1, "--die-at-step", 9)
    said = _succeed(launch(*PROGRAM, *options, ranks=2, restarts=1))
    assert said.count("step  8/12") == 2  # once before the death, once after
    assert _losses(tmp_path) == _losses(straight[0])


@pytest.mark.full
def test_data_parallel_and_accumulation_keep_the_curve(tmp_path: Path, cache: Path) -> None:
    whole = _alone(tmp_path / "whole", cache)
    micro = _alone(tmp_path / "micro", cache, accumulate=4)
    _succeed(_launch(tmp_path / "dp", cache, "--dp", 2, "--accumulate", 2, "--no-check"))
    np.testing.assert_allclose(micro, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(_losses(tmp_path / "dp"), whole, rtol=0, atol=1e-5)


def test_the_means_differ_where_ignored_targets_are_uneven(cache: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not tell a global mean from a mean of means."""
    with ParallelGroups.open("cpu") as groups:
        trainer = prepare(groups, _options(tmp_path), [cache / "text"], cache, Resume.auto)
        _, target = trainer.batches.read(0, 4 * STEPS)
    kept = (target != text_module.IGNORE_INDEX).sum(dim=1)
    assert len(set(kept.tolist())) > 1


@pytest.mark.full
def test_bf16_with_every_option_of_the_loss(tmp_path: Path, cache: Path) -> None:
    options = "--dtype bfloat16 --label-smoothing 0.1 --z-loss 1e-3 --tied --no-inplace"
    said = _succeed(_launch(tmp_path, cache, *options.split()))
    assert "Check passed." in said
    losses = _losses(tmp_path)
    # Smoothing leaves the loss of uniform logits alone; the z-loss adds 1e-3 log(C)^2.
    assert abs(losses[0] - (np.log(VOCAB_SIZE) + 1e-3 * np.log(VOCAB_SIZE) ** 2)) < 0.1
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch", 3, "--accumulate", 2], r"--batch 3 .* dp=1 .*--accumulate 2; .*multiple of 2"),
        (["--tp", 2], r"tp=2 times dp=1 is 2, but the number of processes is 1"),
        (["--lr", 0], r"--lr 0 must be positive"),
        (["--steps", 0], r"--steps 0 must be at least 1"),
        (["--label-smoothing", 1.5], r"--label-smoothing 1.5 must be in \[0, 1\]"),
        (["--z-loss", -1], r"--z-loss -1 must be at least 0"),
        (["--dtype", "int8"], r"--dtype 'int8' is not one of fp32, bf16"),
        (["--heads", 5], r"--width 32 is not a multiple of --heads 5"),
        (["--dropout", 1], r"--dropout 1.0 must be in \[0, 1\)"),
        (["--vocab-size", 100], r"--vocab 100 is smaller than 257"),
        (["--context", 100000], r"fewer than --context 100000 \+ 1"),
        (["--text", "/not/there"], r"--text /not/there does not exist"),
        (["--device", "tpu"], r"--device 'tpu' is not one of npu, cuda, cpu"),
        (["--resume", "must"], r"--resume must, but .* has no checkpoint"),
    ],
)
def test_bad_options_are_explained(
    extra: list[object], message: str, tmp_path: Path, cache: Path
) -> None:
    line = one_line(invoke("train", *_arguments(tmp_path, cache, *extra)), "train")
    assert re.search(message, line)


def test_another_run_is_not_continued(tmp_path: Path, cache: Path) -> None:
    _alone(tmp_path, cache, steps=2)
    before = _losses(tmp_path)
    result = invoke("train", *_arguments(tmp_path, cache, "--lr", 1e-3, "--steps", 3))
    assert "lr=0.003 (now 0.001); continue it with its own options" in one_line(result, "train")
    assert _losses(tmp_path) == before
    fresh = ["--lr", 1e-3, "--steps", 3, "--resume", "never", "--no-check"]
    result = invoke("train", *_arguments(tmp_path, cache, *fresh))
    assert result.exit_code == 0, result.output
    assert len(_losses(tmp_path)) == 3
    assert [line.lr for line in read_metrics(tmp_path / "metrics.jsonl")] == [5e-4, 1e-3, 1e-3]


def test_a_checkpoint_cut_short_is_not_used(tmp_path: Path, cache: Path) -> None:
    whole = _alone(tmp_path / "whole", cache)
    _alone(tmp_path / "cut", cache, steps=6)
    partial = tmp_path / "cut" / "checkpoints" / "partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half a file")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert _alone(tmp_path / "cut", cache) == whole
    assert not partial.exists()


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(Refusal, match=r"the loss is nan at step 1; .*lower --lr"):
        _alone_with_broken_weights(tmp_path, cache)
    assert not (tmp_path / "checkpoints" / "latest").exists()


def _alone_with_broken_weights(out: Path, cache: Path) -> None:
    with ParallelGroups.open("cpu") as groups:
        trainer = prepare(groups, _options(out), [cache / "text"], cache, Resume.auto)
        with torch.no_grad():
            trainer.model.positions[0, 0] = float("nan")
        train_and_check(trainer, check=False)


def test_each_step_reads_the_next_windows(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    read = Batches.read

    def recorded(batches: Batches, position: int, count: int) -> tuple[Tensor, Tensor]:
        seen.append((position, count))
        return read(batches, position, count)

    monkeypatch.setattr(Batches, "read", recorded)
    _alone(tmp_path, cache, steps=2, checkpoint_every=2)
    _alone(tmp_path, cache, steps=4)
    assert seen == [(0, 4), (4, 4), (8, 4), (12, 4)]


def test_the_log_starts_again_after_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line: dict[str, Any] = {
        "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 1, "tokens_per_second": 1.0,
        "loss_share": 0.5,
    }  # fmt: skip
    path.write_text("".join(json.dumps({"step": step} | line) + "\n" for step in (1, 2, 3)))
    with TrainingLog(path, done=2, steps=5, line_every=1):
        pass
    assert [metrics.step for metrics in read_metrics(path)] == [1, 2]


def test_the_gradient_norm_is_accurate_over_millions_of_values() -> None:
    values = torch.randn(32768, 128) * 1e-3
    exact = values.double().square().sum()
    assert abs(float(sum_of_squares(values)) / float(exact) - 1) < 2e-6


def test_clipping_bounds_the_whole_gradient(tmp_path: Path, cache: Path) -> None:
    with ParallelGroups.open("cpu") as groups:
        corpus = load_corpus([cache / "text"], VOCAB_SIZE, cache)
        trainer = Trainer(_options(tmp_path, clip=0.25), groups, corpus)
        metrics = trainer._step()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    clipped = float(sum(g.double().square().sum() for g in gradients)) ** 0.5
    assert metrics.grad_norm > 0.3
    assert clipped == pytest.approx(0.25, rel=1e-4)
