"""The npu engine in one process: which calls reach CANN's operators, within which limits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.engines import select
from vocab_parallel_ce.engines.npu import engine as npu
from vocab_parallel_ce.testing import assert_close
from vocab_parallel_ce.testing import cross_entropy as reference

from ..npu_sim.operators import OperatorCall

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
NPU: Any = torch.get_device_module("npu")


def _batch(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.randint(columns, (rows,))
    target[1::7] = -100
    return (3 * torch.randn(rows, columns)).to(dtype), target


def _check_loss(logits: Tensor, target: Tensor, **options: Any) -> None:
    """Loss and gradient on the device against the fp64 reference."""
    x = logits.double().requires_grad_()
    exact = reference(x, target, **options).loss
    (exact_gradient,) = torch.autograd.grad(exact, x)
    plain = logits.float().requires_grad_()
    naive = torch.nn.functional.cross_entropy(plain, target, **options)
    (naive_gradient,) = torch.autograd.grad(naive, plain)
    there = logits.to("npu").requires_grad_()
    loss = cross_entropy(there, target.to("npu"), **options)
    (gradient,) = torch.autograd.grad(loss, there)
    rows = torch.nn.functional.cross_entropy(plain, target, reduction="none").detach()
    rows_exact = reference(x, target, reduction="none").loss.detach()
    error = float((rows.double() - rows_exact).abs().max())
    assert_close(loss, exact, naive, "loss", rows_error=error)
    assert_close(gradient, exact_gradient, naive_gradient, "gradient")


# Which engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_npu_tensors_take_the_npu_engine(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3).to(dtype).to("npu")
    assert select("auto", x) is npu
    assert select("npu", x) is npu


@pytest.mark.parametrize("engine", ["auto", "npu", "eager"])
def test_fp64_is_refused(engine: str) -> None:
    """torch_npu gives fp32 where fp64 is asked for: nothing here could keep what fp64 promises."""
    assert torch.ones(2, device="npu").to(torch.float64).dtype == torch.float32
    x = torch.empty(2, 3, dtype=torch.float64, device="npu")
    with pytest.raises(ValueError, match=r"float64, which npu devices .* use input.float\(\)"):
        cross_entropy(x, torch.zeros(2, dtype=torch.int64, device="npu"), engine=engine)


def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine='npu' does not serve .* on cpu"):
        cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), engine="npu")


# What reaches the operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_fp32_call_without_options(
    dtype: torch.dtype, calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for: one forward call of the operator, its backward and options never."""
    monkeypatch.setenv("VOCAB_PARALLEL_CE_NPU_WAY", "operator")
    logits, target = _batch(50, 70, dtype)
    x, y, w = logits.to("npu").requires_grad_(), target.to("npu"), torch.rand(70).to("npu")
    select("auto", x)  # which tries the operator once
    calls.clear()
    cross_entropy_loss(x, y, w, "none", -100, 0.1, 0.01, True).loss.sum().backward()
    want = OperatorCall("npu_cross_entropy_loss", 50, 70, torch.float32, "none", -100, 0.0, False)
    assert calls == [want]
    calls.clear()
    token_statistics(x, y, entropy=True, argmax=True).entropy.sum().backward()  # type: ignore[union-attr]
    assert calls == [want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_kernel_serves_both_passes(dtype: torch.dtype, calls: list[OperatorCall]) -> None:
    """On the logits as they are; where log_prob is wanted on one rank, the operator leaves it."""
    logits, target = _batch(50, 70, dtype)
    x, y = logits.to("npu").requires_grad_(), target.to("npu")
    select("auto", x)  # which tries both operators once
    calls.clear()
    cross_entropy(x, y, label_smoothing=0.1, lse_square_scale=0.01).backward()
    fused = OperatorCall("npu_fused_cross_entropy_loss_with_max_sum", 50, 70, dtype)
    assert calls == [fused, fused]
    calls.clear()
    cross_entropy_loss(x, y).loss.sum().backward()
    assert calls == [OperatorCall("npu_cross_entropy_loss", 50, 70, torch.float32), fused]


def test_rows_stay_under_the_limit_of_the_operator(
    calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And CANN's other kernel takes any number of them."""
    logits, target = _batch(450_001, 3)
    _check_loss(logits, target)
    assert [call.rows for call in calls][-2:] == [450_001] * 2
    calls.clear()
    monkeypatch.setenv("VOCAB_PARALLEL_CE_NPU_WAY", "operator")
    _check_loss(logits, target)
    assert [call.rows for call in calls] == [199_999, 199_999, 50_003]


@pytest.mark.parametrize("way", ["operator", "max_sum"])
def test_chunks_do_not_show(
    way: str, monkeypatch: pytest.MonkeyPatch, calls: list[OperatorCall]
) -> None:
    monkeypatch.setenv("VOCAB_PARALLEL_CE_NPU_WAY", way)
    logits, target = _batch(300, 3001)
    x, y = logits.to("npu").requires_grad_(), target.to("npu")
    results = []
    for mib in ("1", "64"):
        monkeypatch.setenv("VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB", mib)
        select("auto", x)
        calls.clear()
        loss = cross_entropy(x, y, label_smoothing=0.1, lse_square_scale=0.01)
        chunks = len(calls)
        (gradient,) = torch.autograd.grad(loss, x)
        log_prob = cross_entropy_loss(x, y).log_prob
        results.append((chunks, loss, log_prob, gradient))
    assert results[0][0] == math.ceil(300 / (MIB // (2 * 4 * 3001)))
    assert results[1][0] == 1
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "much", "", "nan", "1e3"])
def test_a_bad_setting_is_explained(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB", text)
    with pytest.raises(ValueError, match=rf"SCRATCH_MIB='{text}' must be a whole number of MiB"):
        cross_entropy(torch.randn(2, 3).to("npu"), torch.zeros(2, dtype=torch.int64).to("npu"))


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "out of place"])
def test_extra_memory_is_bounded(dtype: torch.dtype, inplace: bool) -> None:
    """Under 128 MiB by default beside the gradient: the card does not tell its cache."""
    rows, columns = 3000, 32_000  # 366 MiB in fp32
    logits = torch.randn(rows, columns).to(dtype).to("npu").requires_grad_()
    target = torch.randint(columns, (rows,)).to("npu")
    for smoothing in (0.0, 0.1):
        work = logits * 1
        NPU.synchronize()
        NPU.reset_peak_memory_stats()
        before = NPU.memory_allocated()
        loss = cross_entropy(work, target, label_smoothing=smoothing, inplace_backward=inplace)
        forward = NPU.max_memory_allocated() - before
        assert 32 * MIB < forward < 128 * MIB
        NPU.reset_peak_memory_stats()
        (gradient,) = torch.autograd.grad(loss, work)
        backward = NPU.max_memory_allocated() - before
        owed = 0 if inplace else gradient.numel() * gradient.element_size()
        assert backward - owed < 128 * MIB
        del work, loss, gradient


def test_nothing_is_left_behind() -> None:
    """After the call the loss keeps a few floats a row, and no chunk."""
    logits, target = _batch(2000, 4000)
    x, y = logits.to("npu").requires_grad_(), target.to("npu")
    before = NPU.memory_allocated()
    loss = cross_entropy(x, y)
    assert NPU.memory_allocated() - before < 2000 * 64
    assert loss.isfinite()


# Numbers


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3, 1e4])
def test_large_logits_cost_no_digits(offset: float) -> None:
    """The operator alone rounds lse to 6e-5 near 1000; p and the gradient must not inherit it."""
    torch.manual_seed(0)
    logits = torch.randint(-40, 41, (64, 500)) / 8 + offset  # exact in fp32
    target = torch.randint(500, (64,))
    x = logits.to("npu").requires_grad_()
    cross_entropy(x, target.to("npu")).backward()
    exact = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, target).backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert float((x.grad.cpu() - exact.grad).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_prob_on_one_rank_is_what_the_operator_left(dtype: torch.dtype) -> None:
    logits, target = _batch(60, 500, dtype)
    logits[3] = -torch.inf
    logits[5, 7] = torch.nan
    out = cross_entropy_loss(logits.to("npu"), target.to("npu"), reduction="none")
    plain = logits.float()
    shifted = plain - plain.amax(1, keepdim=True)
    naive = shifted - shifted.exp().sum(1, keepdim=True).log()
    assert_close(out.log_prob, logits.double().log_softmax(1), naive, "log_prob")


def test_the_gradient_takes_the_callers_strides() -> None:
    """A view of more columns, and rows that cannot be flattened."""
    whole, target = _batch(24, 130)
    x = whole.to("npu").requires_grad_()
    y = target.view(4, 6).to("npu")
    view = x.view(6, 4, 130).transpose(0, 1)[..., :100]
    kept = torch.where(y >= 100, 5, y)
    loss = cross_entropy(view, kept, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    plain = whole.double().requires_grad_()
    same = plain.view(6, 4, 130).transpose(0, 1)[..., :100].reshape(-1, 100)
    want = torch.nn.functional.cross_entropy(same, kept.cpu().reshape(-1), reduction="sum")
    (wanted,) = torch.autograd.grad(want, plain)
    assert abs(loss.item() - want.item()) < 1e-4
    assert float((gradient.cpu() - wanted).abs().max()) < 1e-6


# An accelerator raises nothing of its own accord: it would have to wait for the device


def test_a_target_out_of_range_is_nan_and_nothing_else(calls: list[OperatorCall]) -> None:
    logits, target = _batch(20, 30)
    x, y = logits.to("npu").requires_grad_(), target.to("npu")
    y[4], y[5], y[8] = 30, -7, 2**40
    loss = cross_entropy(x, y, reduction="none")
    bad = torch.tensor([row in (4, 5, 8) for row in range(20)])
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(loss.detach().cpu().isnan(), bad)
    assert torch.equal(gradient.cpu().isnan().all(1), bad)
    assert torch.equal(gradient.cpu().isnan().any(1), bad)
    assert calls  # the operator saw no such target, or it would have raised
    with pytest.raises(ValueError, match="target is out of range: row 4 holds 30"):
        cross_entropy(x, y, check=True)


# torch.compile


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_without_graph_breaks(inplace: bool) -> None:
    logits, target = _batch(20, 30)
    y = target.to("npu")

    def step(x: Tensor) -> Tensor:
        return cross_entropy(x * 1, y, label_smoothing=0.1, inplace_backward=inplace)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = logits.to("npu").requires_grad_()
        loss = function(x)
        loss.backward()
        assert x.grad is not None
        results.append((loss.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Where the operator is missing, the eager engine serves, and one warning says why

_FALLBACK = """
import sys, warnings
import torch, torch_npu
from importlib import metadata
from vocab_parallel_ce import cross_entropy
real = torch_npu.npu_cross_entropy_loss

def absent():
    del torch_npu.npu_cross_entropy_loss

def failing():
    def fail(*args, **kwargs):
        raise RuntimeError("aclnnCrossEntropyLoss is not in libopapi.so\\nmore")
    torch_npu.npu_cross_entropy_loss = fail

def wrong():
    torch_npu.npu_cross_entropy_loss = lambda *args: [2 * output for output in real(*args)]

{how}()
x = torch.randn(6, 40).npu().requires_grad_()
y = torch.tensor([0, 1, 2, 39, -100, 5]).npu()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        loss = cross_entropy(x, y)
        loss.backward()
ours = [str(w.message) for w in caught if "vocab_parallel_ce" in str(w.message)]
assert len(ours) == 1, ours
print(ours[0])
assert abs(float(loss) - float(torch.nn.functional.cross_entropy(x.cpu(), y.cpu()))) < 1e-5
try:
    cross_entropy(x, y, engine="npu")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("absent", "has no npu_cross_entropy_loss; 2.5.1.post1 is the first"),
        (
            "failing",
            "cannot run npu_cross_entropy_loss here: aclnnCrossEntropyLoss is not in libopapi.so",
        ),
        ("wrong", "gives 4.158"),
    ],
)
def test_a_missing_operator_falls_back_with_one_warning(how: str, reason: str) -> None:
    # The way is one of the npu engine's: where the engine is not available, no way is.
    asked = {"VOCAB_PARALLEL_CE_NPU_WAY": "max_sum"} if how == "failing" else {}
    done = subprocess.run(
        [sys.executable, "-c", _FALLBACK.format(how=how)],
        cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning, refusal = done.stdout.splitlines()[-2:]
    assert "the npu engine is not available" in warning
    assert "the slower eager engine serves NPU tensors" in warning
    assert reason in warning
    assert "more" not in done.stdout
    assert refusal.startswith("engine='npu' is not available: ")
    assert reason in refusal


def test_nothing_is_said_where_the_operator_works() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(torch.randn(2, 3).to("npu"), torch.zeros(2, dtype=torch.int64).to("npu"))
