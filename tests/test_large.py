"""More than 2^31 elements: the first, the last and those around every 2^31st, against fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vocab_parallel_ce import cross_entropy, token_statistics
from vocab_parallel_ce.testing import assert_close

from .cases import expected

GIB = 1 << 30
ROWS, CLASSES = 16_400, 131_072  # 2^31 elements are 16,384 rows
NEEDED = 8 * GIB  # 4.3 GB of logits, and room to breathe

pytestmark = pytest.mark.slow


class _Head(torch.autograd.Function):
    """Logits that are no leaf, and whose gradient goes nowhere."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Any) -> tuple[Tensor, None]:
        return torch.zeros(()), None


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no line MemAvailable")


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """bf16, no two rows alike: 61 random rows in turn, each with a peak at a place of its own."""
    free = _available()
    assert free > NEEDED, (
        f"tests/test_large.py needs {NEEDED / GIB:.0f} GiB of free memory and this machine has "
        f"{free / GIB:.1f}: 2^31 elements were NOT tested. To leave them out knowingly: "
        "pytest -m 'not slow'"
    )
    out = torch.empty(ROWS, CLASSES, dtype=torch.bfloat16)
    _fill(out)
    return out


def _fill(out: Tensor) -> None:
    base = (3 * torch.randn(61, CLASSES, generator=torch.Generator().manual_seed(5))).bfloat16()
    for start in range(0, ROWS, len(base)):
        part = out[start : start + len(base)]
        part.copy_(base[: len(part)])
    rows = torch.arange(ROWS)
    out[rows, rows * 7919 % CLASSES] = 12.0


def _target() -> Tensor:
    """Every third row's is its peak; row 16385, beyond the boundary, is ignored."""
    rows = torch.arange(ROWS)
    target = torch.where(rows % 3 == 0, rows * 7919, rows * 104729) % CLASSES
    target[16_385] = -100
    return target


# Rows whose elements lie at the ends, and around 2^30, 2^31 elements and 2^31, 2^32 bytes
SAMPLE = torch.tensor(
    [0, 1, 4095, 8191, 8192, 8193, 12288, 16382, 16383, 16384, 16385, 16386, 16398, 16399]
)


@pytest.mark.full
def test_more_than_2_to_the_31_in_place(memory: Tensor) -> None:
    """The loss and the gradient of every sampled row, written where the logits were."""
    assert memory.numel() > 2**31
    target = _target()
    logits = _Head.apply(torch.zeros((), requires_grad=True), memory)  # type: ignore[no-untyped-call]
    before = memory[SAMPLE].clone()
    loss = cross_entropy(logits, target, reduction="none", inplace_backward=True)
    upstream = torch.linspace(0.5, 2.0, ROWS)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    assert grad.data_ptr() == memory.data_ptr()

    want = expected(before, target[SAMPLE], reduction="none")
    assert_close(loss[SAMPLE], want.exact.loss, want.naive.loss, "loss")
    part = upstream[SAMPLE]
    gradients = want.gradients(lambda o: (o.loss * part.to(o.loss.dtype)).sum())
    assert_close(grad[SAMPLE], *gradients, "gradient")
    # Every row, not only the sampled ones: negative at the target and nowhere else.
    kept = target != -100
    assert bool((grad[torch.arange(ROWS)[kept], target[kept]] < 0).all())
    below = torch.empty(64, CLASSES, dtype=torch.bool)
    parts = [torch.lt(rows, 0, out=below[: len(rows)]).sum(1) for rows in grad.split(64)]
    negative = torch.cat(parts)
    assert torch.equal(negative, kept.long())
    assert not bool(grad[16_385].any())
    _fill(memory)


def test_a_view_across_the_boundary(memory: Tensor) -> None:
    """Rows and columns with strides: byte offsets beyond 2^32 in the general kernels."""
    wide = memory[::2, ::2]
    target = _target()[::2] // 2  # the ignored row has an odd number
    rows = SAMPLE // 2
    stats = token_statistics(wide, target, entropy=True, argmax=True)
    want = expected(wide[rows], target[rows], reduction="none")
    assert stats.entropy is not None
    assert stats.argmax is not None
    assert_close(stats.log_prob[rows], -want.exact.loss, -want.naive.loss, "log_prob")
    assert_close(stats.entropy[rows], want.exact.entropy, want.naive.entropy, "entropy")
    assert torch.equal(stats.argmax[rows], want.exact.argmax)
