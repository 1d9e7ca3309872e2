"""A real GPTModel trained on two Gloo ranks, with Megatron's loss and with ours.

Vocabulary of 512 without padding, so that every split starts from the same weights and Megatron's
softmax has the same classes as ours; padding has tests of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.forks import run_forked
from tests.launch.running import Ended, invoke, one_line
from vocab_parallel_ce.launch import refusal
from vocab_parallel_ce.launch.megatron_gpt import pages
from vocab_parallel_ce.launch.megatron_gpt.command import prepare, run
from vocab_parallel_ce.launch.megatron_gpt.compare import Result, compare
from vocab_parallel_ce.launch.megatron_gpt.loss import LossChoice
from vocab_parallel_ce.launch.megatron_gpt.model import megatron, padded_vocab_size
from vocab_parallel_ce.launch.megatron_gpt.trainer import (
    MegatronMetrics,
    MegatronTrainer,
    MegatronTrainOptions,
    MicroBatch,
)
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.launch.train.progress import read_metrics
from vocab_parallel_ce.launch.train.text import IGNORE_INDEX
from vocab_parallel_ce.parallel.groups import ParallelGroups

from ...ranks import Pool, no_group_stays

VOCAB_SIZE = 512
STEPS = 12
ARGUMENTS = (
    f"--vocab-size {VOCAB_SIZE} --divisible-by 1 --context 32 --width 32 --layers 1 --heads 2 "
    f"--batch 4 --lr 3e-3 --warmup 2 --device cpu --log-every 1 --timeout 60 --steps {STEPS}"
)

Train = Callable[..., list[MegatronMetrics]]


def _options(out: Path, shape: dict[str, Any], **changes: Any) -> MegatronTrainOptions:
    """What ARGUMENTS say."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "context": 32, "width": 32, "layers": 1, "heads": 2,
    }  # fmt: skip
    known: dict[str, Any] = {
        "steps": STEPS, "batch": 4, "lr": 3e-3, "warmup": 2, "divisible_by": 1,
    }  # fmt: skip
    return MegatronTrainOptions(GPTShape(**(sizes | shape)), out=out, **(known | changes))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    """Two ranks that keep Megatron imported between runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling the fused loss takes many seconds
        pool = Pool(2).start()
    yield pool
    pool.stop()


@contextmanager
def _trainer(cache: Path, options: MegatronTrainOptions, tp: int) -> Iterator[MegatronTrainer]:
    with (
        no_group_stays(),
        ParallelGroups.open("cpu", tp=tp) as groups,
        megatron(groups, options.seed),
    ):
        yield prepare(groups, options, [cache / "text"], cache)


def _train(
    group: dist.ProcessGroup, cache: Path, out: Path, tp: int, options: dict[str, Any]
) -> list[MegatronMetrics]:
    told = _options(out, **options)
    with _trainer(cache, told, tp) as trainer:
        run(trainer, compare_losses=False)
    return read_metrics(told.metrics, MegatronMetrics)


@pytest.fixture(scope="module")
def train(ranks: Pool, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(loss, tp=..., shape={...}, option=...) -> its metrics; each run is made once."""
    done: dict[str, list[MegatronMetrics]] = {}

    def once(
        loss: str, tp: int = 2, shape: dict[str, Any] | None = None, **options: Any
    ) -> list[MegatronMetrics]:
        key = json.dumps([loss, tp, shape, options])
        if key not in done:
            options |= {"shape": shape or {}, "loss": LossChoice(loss)}
            out = tmp_path_factory.mktemp("megatron")
            done[key] = ranks.run(_train, 2, (cache, out, tp, options))[0]
            assert [line.step for line in done[key]] == list(range(1, len(done[key]) + 1))
        return done[key]

    return once


def _losses(metrics: list[MegatronMetrics]) -> list[float]:
    return [line.loss for line in metrics]


@pytest.mark.parametrize("loss", ["megatron", "megatron-fused", "ours"])
def test_every_loss_trains(train: Train, loss: str) -> None:
    metrics = train(loss)
    assert len(metrics) == STEPS
    assert abs(metrics[0].loss - math.log(VOCAB_SIZE)) < 0.1
    assert metrics[-1].loss < metrics[0].loss - 0.3
    for line in metrics:
        assert 0 < line.loss_milliseconds < line.milliseconds
        assert line.loss_peak_bytes is None or line.loss_peak_bytes >= 0
        assert line.z_loss is None


def _norms(metrics: list[MegatronMetrics]) -> list[float]:
    return [line.grad_norm for line in metrics]


def _assert_same_curve(one: list[MegatronMetrics], other: list[MegatronMetrics]) -> None:
    """To a few units in the last place of the loss: what order of summation explains."""
    np.testing.assert_allclose(_losses(one), _losses(other), rtol=0, atol=1e-5)
    np.testing.assert_allclose(_norms(one), _norms(other), rtol=1e-4)


@pytest.mark.parametrize("loss", ["megatron", "ours"])
@pytest.mark.parametrize("tied", [False, True])
def test_tp_2_follows_tp_1(train: Train, loss: str, tied: bool) -> None:
    split, whole = (train(loss, tp=tp, shape={"tied": tied}) for tp in (2, 1))
    _assert_same_curve(split, whole)


@pytest.mark.parametrize("tied", [False, True])
def test_sequence_parallel_keeps_the_curve(train: Train, tied: bool) -> None:
    off, on = (train("ours", shape={"tied": tied}, sequence_parallel=sp) for sp in (False, True))
    _assert_same_curve(on, off)


def test_micro_batches_keep_the_curve(train: Train) -> None:
    """Data-parallel ranks too: with tp=1 the two ranks are two copies of the model."""
    _assert_same_curve(train("ours", tp=1, accumulate=2), train("ours"))


@pytest.mark.parametrize("tp", [1, 2])
def test_ours_follows_megatrons_own_curve(train: Train, tp: int) -> None:
    _assert_same_curve(train("ours", tp=tp), train("megatron", tp=tp))


def test_in_place_or_not_is_the_same_curve_bit_for_bit(train: Train) -> None:
    assert _losses(train("ours", inplace=False)) == _losses(train("ours"))


def test_after_ours_megatrons_own_is_back_bit_for_bit(train: Train) -> None:
    """All these runs share two processes; the last one comes after ours."""
    before, _ = train("megatron", steps=4), train("ours", steps=4)
    assert _losses(train("megatron", steps=5))[:4] == _losses(before)


def test_only_megatrons_fused_gradient_is_rounded_to_bf16(train: Train) -> None:
    exact, fused, ours = (
        np.array(_norms(train(loss))) for loss in ("megatron", "megatron-fused", "ours")
    )
    assert np.abs(ours / exact - 1).max() < 1e-6
    assert np.abs(fused / exact - 1).max() > 1e-5


def test_padding_is_in_megatrons_softmax_and_not_in_ours(train: Train) -> None:
    """768 columns, 512 of them classes: which Megatron's loss does not know."""
    options: dict[str, Any] = {"divisible_by": 384}
    ours, theirs = (train(loss, steps=2, **options) for loss in ("ours", "megatron"))
    assert abs(ours[0].loss - math.log(512)) < 0.1
    assert abs(theirs[0].loss - math.log(768)) < 0.1
    _assert_same_curve(ours, train("ours", tp=1, steps=2, divisible_by=768))


def test_z_loss_is_in_the_total_and_beside_it(train: Train) -> None:
    metrics = train("ours", z_loss=1e-2)
    first = metrics[0]
    assert first.z_loss is not None
    assert first.z_loss == pytest.approx(1e-2 * math.log(VOCAB_SIZE) ** 2, rel=0.02)
    assert first.loss - first.z_loss == pytest.approx(train("ours")[0].loss, abs=1e-5)
    _assert_same_curve(metrics, train("ours", tp=1, accumulate=2, z_loss=1e-2))


def test_bf16_trains(train: Train) -> None:
    ours, theirs = (_losses(train(loss, dtype="bf16")) for loss in ("ours", "megatron"))
    assert ours[-1] < ours[0] - 0.3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3)


def _compare(
    group: dist.ProcessGroup, cache: Path, out: Path
) -> tuple[list[Result], MegatronMetrics, int]:
    """What ``compare`` says, the step that follows it, and the bytes of the logits."""
    shape = {"context": 64}
    options = _options(out, shape, loss=LossChoice.megatron, steps=3, batch=64)
    with _trainer(cache, options, tp=2) as trainer:
        trainer.train(None)
        results = compare(trainer, rounds=2)
        step = trainer._step()
        return results, step, 4 * options.batch * 64 * trainer.columns


def test_the_comparison_is_about_the_next_step(ranks: Pool, cache: Path, tmp_path: Path) -> None:
    results, step, logits = ranks.run(_compare, 2, (cache, tmp_path))[0]
    unfused, fused, out_of_place, in_place = results
    # The weights are those before the step, and nothing of ours stays installed in it.
    assert unfused.loss == step.loss
    for result in results:
        assert result.loss == pytest.approx(step.loss, abs=2e-6)
        assert min(result.milliseconds) > 0
    assert [result.collectives for result in results] == [(3, 0), (2, 0), (1, 0), (1, 0)]
    for exact in (unfused, out_of_place, in_place):
        assert exact.errors.gradient_error < 2e-6
        assert exact.gradient_norm == pytest.approx(step.grad_norm, rel=1e-5)
    assert fused.errors.gradient_error > 1e-4
    if in_place.peak_bytes is not None and out_of_place.peak_bytes is not None:
        assert 0.8 * logits < out_of_place.peak_bytes < 1.5 * logits
        assert in_place.peak_bytes < 0.3 * logits


def _invoked(group: dist.ProcessGroup, arguments: list[list[str]]) -> list[Ended]:
    os.environ["RANK"] = str(dist.get_rank())  # as torchrun sets it
    with no_group_stays():
        refusal.PATIENCE = 0.0  # of the rank that would only repeat it
        ended = [invoke("megatron-gpt", *extra) for extra in arguments]
    del os.environ["RANK"]
    return ended


def test_bad_options_end_on_every_rank_with_one_line(
    ranks: Pool, cache: Path, tmp_path: Path
) -> None:
    cases = [
        ("--heads 3 --width 33", "--heads 3 cannot be divided among --tp 2 ranks"),
        ("--context 33 --sequence-parallel", "--context 33 cannot be divided among --tp 2"),
        (
            "--tp 1 --sequence-parallel",
            "--sequence-parallel needs tensor-parallel ranks: --tp 2 or",
        ),
        ("--divisible-by 512", "--divisible-by 512 makes nothing but padding of the last of --tp"),
        ("--divisible-by 0", "--divisible-by 0 must be at least 1"),
        ("--loss megatron --z-loss 1e-4", "--z-loss 0.0001: Megatron's own loss has none; use"),
        ("--tp 3", "tp=3 times dp=1 is 3, but the number of processes is 2"),
        ("--vocab-size 100", "--vocab 100 is smaller than 257"),
        ("--text /not/there", "--text /not/there does not exist"),
        ("--batch 3 --tp 1", "--batch 3 cannot be divided among dp=2 ranks"),
        ("--context 100000", "fewer than --context 100000"),
        ("--device npu", "(mindspeed|MindSpeed|torch_npu)"),
    ]
    fixed = f"{ARGUMENTS} --tp 2 --text {cache / 'text'} --cache {cache} --out {tmp_path}"
    answers = ranks.run(_invoked, 2, ([[*fixed.split(), *extra.split()] for extra, _ in cases],))
    for rank, found in enumerate(answers):
        for (extra, message), ended in zip(cases, found, strict=True):
            said = ended.stderr
            assert ended.exit_code == 2, (extra, said)
            assert len(said.splitlines()) == 1, said
            who = f"rank {rank}: " if rank else ""
            line = f"^vocab-parallel-ce megatron-gpt: {who}.*{message}"
            assert re.search(line, said), (extra, said)


def test_without_megatron_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    line = one_line(invoke("megatron-gpt", *ARGUMENTS.split()), "megatron-gpt")
    assert line.startswith("megatron-core is not installed; pip install ")


def test_the_command_on_two_ranks(cache: Path, tmp_path: Path) -> None:
    command = (
        f"-m vocab_parallel_ce.launch.megatron_gpt {ARGUMENTS} --tp 2 --sequence-parallel "
        f"--text {cache / 'text'} --cache {cache} --out {tmp_path} --steps 3 --compare "
        "--z-loss 1e-4"
    )
    process = run_forked(*command.split(), ranks=2, environ={"TORCHDYNAMO_DISABLE": "1"})
    assert process.returncode == 0, process.stdout + process.stderr
    said = process.stdout
    assert "vocabulary of 512 and 0 of padding; loss: ours" in said
    assert re.search(
        r"step 3/3  loss 6\.\d+ \(z-loss 0\.0039\)  gradient norm \d.*; the loss: .* ms, ", said
    )
    for label in ("Megatron-core, unfused", "Megatron-core, fused", "ours, in place"):
        assert label in said
    assert "…" not in said
    assert max(len(line) for line in said.splitlines() if line[:1] in "┃│") <= 80
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert len(read_metrics(tmp_path / "metrics.jsonl", MegatronMetrics)) == 3
    found = json.loads((tmp_path / "result.json").read_text())
    text = pages.text(found)
    assert " 128 tokens, 256 columns on each of 2 ranks; " in text
    for loss in found["losses"]:
        assert f"| {loss['name']} | {loss['loss']:.6f} | {loss['gradient_norm']:.6f} |" in text
        assert f"{loss['gradient_error']:.1e}" in said


def test_what_nothing_could_predict_is_masked() -> None:
    """And has a label that Megatron's loss can look up."""
    target = torch.tensor([[5, IGNORE_INDEX, 7]])
    batch = MicroBatch.of(torch.tensor([[1, 2, 3]]), target, torch.device("cpu"))
    assert batch.mask.tolist() == [[1.0, 0.0, 1.0]]
    assert batch.labels.tolist() == [[5, 0, 7]]


def test_padded_sizes_are_megatrons() -> None:
    """What `_vocab_size_with_padding` of Megatron-LM gives for GPT-2's vocabulary."""
    assert [padded_vocab_size(50257, 128, tp) for tp in (1, 2, 8)] == [50304, 50432, 51200]
