"""The fused head's gradients against finite differences in fp64, and batches that nobody chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from vocab_parallel_ce import VocabShard, linear_cross_entropy, linear_token_statistics

from .cases import scratch_for

N, H, V = 5, 3, 11
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"label_smoothing": 0.1, "lse_square_scale": 0.05, "scale": 1.3},
}


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, bias, a target with an ignored row, and weights with a zero."""
    leaves = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((N, H), (V, H), (V,))]
    target = torch.randint(V, (N,))
    target[1] = -100
    weight = torch.rand(V, dtype=torch.float64) + 0.25
    weight[int(target[2])] = 0.0
    return leaves[0], leaves[1], leaves[2], target, weight


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses(name: str, reduction: str) -> None:
    """By recompute; gradients in forward are the same, and go backward once only."""
    hidden, head, bias, target, weight = _batch()

    def loss(hidden: Tensor, head: Tensor, bias: Tensor, gradient: str = "recompute") -> Tensor:
        out = linear_cross_entropy(
            hidden, head, target, linear_bias=bias, weight=weight, reduction=reduction,
            gradient=gradient, scratch_mib=scratch_for(2, V, torch.float64), **OPTIONS[name],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    leaves = (hidden, head, bias)
    assert gradcheck(loss, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)
    if reduction != "none":
        want = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(loss(*leaves, gradient="forward"), leaves)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_token_statistics() -> None:
    hidden, head, bias, target, _ = _batch()

    def outputs(hidden: Tensor, head: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = linear_token_statistics(hidden, head, target, linear_bias=bias, entropy=True)
        assert out.entropy is not None
        return out.log_prob, out.lse, out.entropy

    assert gradcheck(outputs, (hidden, head, bias), eps=1e-6, atol=1e-7, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 5), classes=st.integers(1, 300),
    padding=st.integers(0, 3), chunk=st.integers(1, 9), ignored=st.floats(0, 1),
    smoothing=st.sampled_from((0.0, 0.2)), gradient=st.sampled_from(("forward", "recompute")),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_batch(
    rows: int, width: int, classes: int, padding: int, chunk: int, ignored: float,
    smoothing: float, gradient: str, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).requires_grad_()
    head = torch.randn(classes + padding, width, generator=g, dtype=torch.float64)
    head.requires_grad_()
    target = torch.randint(classes, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < ignored] = -100
    want = F.cross_entropy(
        F.linear(hidden, head[:classes]), target, reduction="sum", label_smoothing=smoothing
    )
    got = linear_cross_entropy(
        hidden, head, target, reduction="sum", label_smoothing=smoothing, gradient=gradient,
        shard=VocabShard(0, classes, classes), scratch_mib=scratch_for(chunk, classes, head.dtype),
    )  # fmt: skip
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (hidden, head)), torch.autograd.grad(want, (hidden, head))
    )
