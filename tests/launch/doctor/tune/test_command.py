"""doctor --tune on a CPU, where its times mean nothing, and the Megatron that it is beside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.launch.doctor.asking import invoke, read
from tests.launch.running import one_line
from vocab_parallel_ce.launch.bench import peers
from vocab_parallel_ce.launch.doctor.tune import blocks, head, megatron, ways
from vocab_parallel_ce.launch.doctor.tune.head import Headed
from vocab_parallel_ce.launch.doctor.tune.ways import MEGATRON, Timed
from vocab_parallel_ce.switches import SCRATCH_VARIABLE, WAY_VARIABLE


def test_on_a_cpu_it_runs_and_says_that_times_mean_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    done = invoke("--device", "cpu", "--tune", "--quick", "--json", file)
    assert done.exit_code == 0, done.output
    assert "this is cpu, not an Ascend card: times mean nothing here" in done.stdout
    assert "No way of the npu engine ran on cpu: there is nothing to export" in done.stdout
    report = read(file)
    assert report["environment"]["device"] == "cpu"
    tune = report["tune"]
    assert tune["times_mean_nothing"]
    assert tune["exports"] == []
    problems = {way["way"]: way["problem"] for way in tune["ways"]}
    assert problems == {
        MEGATRON: "",
        **dict.fromkeys(("max_sum", "operator", "triton"), "needs an NPU; this is cpu"),
    }
    products, *heads = tune["fused_head"]
    assert products["seconds"] > 0
    assert [(one["way"], one["problem"]) for one in heads] == [
        ("chunks", "needs an NPU; this is cpu"),
        ("fused", "needs an NPU; this is cpu"),
    ]
    seen = {kernel["what"]: kernel for kernel in tune["kernels"]}
    for what in ("copy", "amax", "add, fp32 result", "put_", "scatter_", "launch: host"):
        assert seen[what]["seconds"] > 0
    assert seen["index_put_"]["bytes"] is None  # unknown, and it stays unknown
    assert seen["fused max_sum"]["problem"] == "torch_npu has it by neither name"
    assert 0 < seen["largest error of exp"]["value"] < 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tune", "--selftest"], "--tune and --selftest are two runs"),
        (["--dtype", "bf16"], "--dtype needs --tune"),
        (["--tune", "--dtype", "fp8"], "--dtype 'fp8' is not one of fp32, bf16, fp16"),
        (["--tune", "--timed-rows", "0"], "--timed-rows 0 must be at least 1"),
    ],
)
def test_bad_options(options: list[str], words: str) -> None:
    assert words in one_line(invoke("--device", "cpu", "--json", os.devnull, *options), "doctor")


def test_one_card_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = invoke("--device", "cpu", "--tune", "--json", os.devnull)
    assert "start it without torchrun" in one_line(done, "doctor")


def test_the_bytes_of_the_kernels_are_those_of_the_table() -> None:
    """Of [16, 256] bf16: 2 bytes read; 2 and 4; 6 and 8."""
    found = {
        (one.what, one.shape): one.bytes
        for one in blocks._sweeps(torch.device("cpu"), 16, 256, torch.bfloat16, 1)
    }
    n, rows = 16 * 256, 4 * 16
    shape = "[16, 256] bfloat16"
    assert found["amax", shape] == 2 * n + rows
    assert found["add, fp32 result", shape] == 6 * n + rows
    assert found["sub, fp32 result", shape] == 14 * n + rows
    assert found["scatter_", shape] == 4 * n + 2 * rows


# What ours is beside


@pytest.mark.skipif(not peers.installed("megatron.core"), reason="needs megatron-core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_megatrons_calls_are_megatrons(dtype: torch.dtype) -> None:
    """Bit for bit, on one rank: its own functions, without the collectives between them."""
    torch.manual_seed(0)
    logits, target = (4 * torch.randn(12, 40)).to(dtype), torch.randint(40, (12,))
    up = torch.rand(12)
    loss, saved = megatron.forward(logits.clone(), target)
    gradient = megatron.backward(saved, up, dtype)
    theirs, wanted = _megatron(logits, target, up)
    assert torch.equal(loss, theirs)
    assert torch.equal(gradient, wanted)


def _megatron(logits: Tensor, target: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Theirs

    x, top = Theirs.calculate_logits_max(logits.clone())
    mask, column, predicted, total, e = Theirs.calculate_predicted_logits(
        x, target, top, 0, logits.shape[1]
    )
    softmax, loss = Theirs.calculate_cross_entropy_loss(e, predicted, total)
    rows, each, update, dx = Theirs.prepare_gradient_calculation_operands(softmax, mask)
    gradient = Theirs.calculate_gradients(rows, each, column, update, dx, up)
    return loss, gradient.to(logits.dtype)  # as autograd does it


# The choice


def test_the_fastest_of_ours_is_exported() -> None:
    found = [
        Timed(MEGATRON, None, 1e-6, 1e-6),
        Timed("max_sum", 32, 3e-3, 2e-3),
        Timed("max_sum", 96, 2e-3, 2e-3),
        Timed("operator", 96, 1e-3, 9e-3),
        Timed("triton", None, problem="triton is not installed"),
    ]
    best = ways.best(found)
    assert best == found[2]
    assert ways.exports(found[2]) == [
        "export VOCAB_PARALLEL_CE_NPU_WAY=max_sum",
        "export VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB=96",
    ]
    assert ways.best(found[:1]) is None


def test_the_faster_way_of_the_fused_head_is_exported() -> None:
    found = [
        Headed(head.PRODUCTS, "", 1.0),
        Headed("chunks", "mean", 2.0),
        Headed("chunks", "a loss per token", 9.0),
        Headed("fused", "mean", 3.0),
        Headed("fused", "a loss per token", 1.0),
    ]
    assert head.exports(found) == ["export VOCAB_PARALLEL_CE_NPU_LINEAR=chunks"]
    found[3] = Headed("fused", "mean", 1.0)
    assert head.exports(found) == ["export VOCAB_PARALLEL_CE_NPU_LINEAR=auto"]
    assert head.exports(found[:3]) == []


def test_variables_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAY_VARIABLE, "auto")
    monkeypatch.delenv(SCRATCH_VARIABLE, raising=False)
    with ways.variables({WAY_VARIABLE: "operator", SCRATCH_VARIABLE: "64"}):
        assert os.environ[WAY_VARIABLE] == "operator"
        assert os.environ[SCRATCH_VARIABLE] == "64"
    assert os.environ[WAY_VARIABLE] == "auto"
    assert SCRATCH_VARIABLE not in os.environ
