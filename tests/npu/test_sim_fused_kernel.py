"""The stand-in of the kernel for sharded vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..npu_sim.operators import OperatorCall
from .operator_calls import ROUNDING, C, N, some_logits


def _fused(*args: Any, **options: Any) -> list[torch.Tensor]:
    """On device npu; results on the CPU."""
    operator = torch.ops.npu.npu_fused_cross_entropy_loss_with_max_sum.default
    there = [a.to("npu") for a in args]
    options = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return [result.cpu() for result in operator(*there, **options)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("cann", ["8.5.0", "9.0.0"])
def test_the_fused_kernel(
    cann: str, dtype: torch.dtype, calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax in fp32 from logits of any dtype; sums need not be sums."""
    monkeypatch.setenv("NPU_SIM_CANN", cann)
    x = some_logits(dtype)
    x[4, 9] = -torch.inf
    m, predicted = x.float().amax(1), torch.randn(N)
    s = (x.double() - m[:, None]).exp().sum(1).float()
    s[3], s[5] = -2.0, torch.inf
    loss, softmax = _fused(m, s, predicted, vocab_parallel_logits=x)
    exact = (x.double() - m.double()[:, None]).exp() / s.double()[:, None]
    assert softmax.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(softmax.double(), exact, rtol=1e-6, atol=1e-7)
    assert bool((softmax[5] == 0).all())
    assert loss[3].isnan()
    torch.testing.assert_close(loss[0], s[0].log() - predicted[0])
    name = "npu_fused_cross_entropy_loss_with_max_sum"
    assert calls == [OperatorCall(name, N, C, dtype)]


def test_the_fused_kernel_gives_its_loss_alone(calls: list[OperatorCall]) -> None:
    row = torch.ones(N)
    loss, softmax = _fused(row, row, row)
    assert (loss.shape, softmax.numel()) == ((N,), 0)
    assert not calls


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"top": torch.ones(N, dtype=torch.bfloat16)}, "logits_max is torch.bfloat16, not fp32"),
        ({"total": torch.ones(N + 1)}, r"sum_exp_logits has shape \[38\], not \[37\]"),
        ({"predicted": torch.ones(N, 1)}, r"predicted_logits has shape \[37, 1\], not \[37\]"),
        ({"x": torch.ones(N, 2, 3)}, r"vocab_parallel_logits has shape \[37, 2, 3\], not \[N, V\]"),
        ({"x": torch.ones(N, 3).int()}, "vocab_parallel_logits is torch.int32, not fp16"),
        ({"x": torch.ones(N + 1, 3)}, r"has shape \[38, 3\], the row vectors have \[37\]"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1: only 0 is served"),
        ({"input": torch.ones(N, 4)}, "input and weight are reserved"),
        ({"cann": "8.3.0"}, "aclnnFusedCrossEntropyLossWithMaxSum is not in libopapi.so of CANN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_fused_kernel_refuses(
    change: dict[str, Any], rule: str, calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "top": torch.ones(N),
        "total": torch.ones(N),
        "predicted": torch.ones(N),
    }
    given |= {"x": torch.ones(N, C), **change}
    monkeypatch.setenv("NPU_SIM_CANN", given.pop("cann", "9.0.0"))
    args = [given.pop(name) for name in ("top", "total", "predicted")]
    name = "npu_fused_cross_entropy_loss_with_max_sum"
    with pytest.raises(RuntimeError, match=f"{name}: .*{rule}"):
        _fused(*args, vocab_parallel_logits=given.pop("x"), **given)
    assert not calls
