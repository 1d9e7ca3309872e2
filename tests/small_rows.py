"""Sixty-four rows of 101 classes, and one way to judge a loss over them: for tests of numbers.

Each of these tests runs on the eager engine and on the cpu engine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.testing import ReferenceLoss, assert_close, naive_error

from .cases import expected

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
ROWS, CLASSES = 64, 101

every_engine = pytest.mark.parametrize("engine", ["eager", "cpu"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some_logits(dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(ROWS, CLASSES)).to(dtype)


def some_target(ignored: int = 0) -> Tensor:
    target = torch.randint(CLASSES, (ROWS,))
    target[:ignored] = -100
    return target


def check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    engine: str = "auto",
    reduction: str = "none",
    spread: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient against the oracle; returns both.

    ``spread`` weighs the rows differently instead of by 1.
    """
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, weight, reduction, engine=engine, **options)
    low, high = (0.5, 2) if spread else (1, 1)
    upstream = torch.linspace(low, high, loss.numel(), dtype=torch.float64).view(loss.shape)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    want = expected(logits, target, weight, reduction=reduction, **options)
    close(loss, want.exact.loss, want.naive.loss, "loss", want.rows_error)
    gradients = want.gradients(lambda outcome: _weighted(outcome, upstream))
    close(grad, *gradients, "gradient")
    return loss.detach(), grad


def close(actual: Tensor, exact: Tensor, naive: Tensor, what: str, rows_error: float = 0.0) -> None:
    """``assert_close``; an fp64 oracle of an fp64 result is itself off by up to E."""
    if actual.dtype == torch.float64:
        rows_error = 1.5 * max(rows_error, naive_error(exact, naive, actual.dtype))
    assert_close(actual, exact, naive, what, rows_error=rows_error)


def _weighted(outcome: ReferenceLoss, upstream: Tensor) -> Tensor:
    return (outcome.loss * upstream.to(outcome.loss.dtype)).sum()
