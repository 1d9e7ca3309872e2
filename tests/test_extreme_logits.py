"""Logits far from 0 and far apart, and columns and rows that hold infinities or NaN."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vocab_parallel_ce import cross_entropy, token_statistics
from vocab_parallel_ce.testing import assert_close

from .cases import expected
from .small_rows import (
    CLASSES,
    REDUCTIONS,
    ROWS,
    check,
    close,
    every_dtype,
    every_engine,
    some_logits,
    some_target,
)


@every_engine
@every_dtype
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e4, -1e4])
def test_an_offset_changes_nothing(offset: float, dtype: torch.dtype, engine: str) -> None:
    """lse alone, kept for backward, would cost a gradient at 1e4 three to four digits."""
    check(some_logits(dtype) + offset, some_target(), engine=engine)
    check(
        some_logits(dtype) + offset,
        some_target(5),
        engine=engine,
        reduction="mean",
        label_smoothing=0.1,
    )


@every_engine
@every_dtype
def test_an_offset_that_is_exact_keeps_every_bit(dtype: torch.dtype, engine: str) -> None:
    """Logits on a grid that survives the offset: loss and gradient do, too, in every bit."""
    logits = torch.randint(-8, 9, (ROWS, CLASSES)).to(dtype)
    offset = 128.0 if dtype == torch.bfloat16 else 1024.0
    target = some_target(3)
    results = []
    for shift in (0.0, offset, -offset):
        leaf = (logits + shift).requires_grad_()
        loss = cross_entropy(leaf, target, reduction="none", engine=engine)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@every_engine
@every_dtype
@pytest.mark.parametrize("spread", [1e3, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_far_apart(smoothing: float, spread: float, dtype: torch.dtype, engine: str) -> None:
    """B2, B3: log(softmax) of an underflown softmax would be infinite."""
    logits = some_logits(dtype) + spread * torch.randint(-1, 2, (ROWS, CLASSES)).to(dtype)
    loss, _ = check(logits, some_target(), engine=engine, label_smoothing=smoothing)
    assert bool(loss.isfinite().all())
    assert float(loss.max()) > spread / 2


@every_engine
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale(scale: float, dtype: torch.dtype, engine: str) -> None:
    check(some_logits(dtype), some_target(3), engine=engine, scale=scale)
    check(some_logits(dtype), some_target(3), engine=engine, scale=scale, lse_square_scale=0.01)


@every_engine
@every_dtype
def test_equal_logits(dtype: torch.dtype, engine: str) -> None:
    check(torch.full((ROWS, CLASSES), 7.0, dtype=dtype), some_target(), engine=engine)


@every_engine
def test_the_largest_finite_logits(engine: str) -> None:
    """x - m reaches the lowest fp32 number without becoming infinite times 0."""
    logits = torch.zeros(ROWS, CLASSES)
    logits[:, 0], logits[:, 1] = 1.7e38, -1.7e38
    target = torch.arange(ROWS) % 2  # of probability 1 and 0
    loss, grad = check(logits, target, engine=engine)
    assert bool(loss.isfinite().all())
    assert bool(grad.isfinite().all())


# -inf columns


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_columns_of_minus_infinity(reduction: str, dtype: torch.dtype, engine: str) -> None:
    """A masked vocabulary: probability 0, gradient exactly 0, entropy without NaN."""
    logits = some_logits(dtype)
    logits[:, ::2] = -torch.inf
    target = torch.randint(CLASSES // 2, (ROWS,)) * 2 + 1
    _, grad = check(logits, target, engine=engine, reduction=reduction)
    assert bool((grad[:, ::2] == 0).all())
    leaf = logits.clone().requires_grad_()
    stats = token_statistics(leaf, target, entropy=True, engine=engine)
    want = expected(logits, target)
    assert stats.entropy is not None
    assert_close(stats.entropy, want.exact.entropy, want.naive.entropy, "entropy")
    (grad,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    assert bool((grad[:, ::2] == 0).all())
    assert bool(grad.isfinite().all())


@every_engine
@every_dtype
def test_a_target_of_minus_infinity(dtype: torch.dtype, engine: str) -> None:
    """Loss inf, as torch says, and torch's gradient: p - 1 with p = 0."""
    logits, target = some_logits(dtype), some_target()
    logits[5, target[5]] = -torch.inf
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", engine=engine)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    twin = logits.double().requires_grad_()
    exact = functional.cross_entropy(twin, target, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), twin)
    assert exact[5] == torch.inf
    assert loss[5] == torch.inf
    naive = logits.float().requires_grad_()
    plain = functional.cross_entropy(naive, target, reduction="none")
    (plain_grad,) = torch.autograd.grad(plain.sum(), naive)
    close(loss, exact, plain, "loss")
    close(grad, exact_grad, plain_grad, "gradient")
    assert grad[5, target[5]] == -1
    for reduction in ("mean", "sum"):
        assert cross_entropy(leaf, target, reduction=reduction, engine=engine) == torch.inf


@every_engine
@every_dtype
def test_smoothing_over_minus_infinity_is_infinite(dtype: torch.dtype, engine: str) -> None:
    """As in torch: label smoothing asks for probability where there is none."""
    logits, target = some_logits(dtype), some_target()
    logits[:, 50], target[target == 50] = -torch.inf, 51
    loss = cross_entropy(logits, target, label_smoothing=0.1, reduction="none", engine=engine)
    usual = functional.cross_entropy(logits.double(), target, label_smoothing=0.1, reduction="none")
    assert bool((usual == torch.inf).all())
    assert bool((loss == torch.inf).all())


@every_engine
@every_dtype
def test_a_row_of_minus_infinity_is_nan(dtype: torch.dtype, engine: str) -> None:
    """As in torch: a distribution over nothing. Other rows are untouched by it."""
    logits, target = some_logits(dtype), some_target()
    logits[5] = -torch.inf
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", engine=engine)
    assert bool(functional.cross_entropy(logits.double()[5:6], target[5:6]).isnan())
    assert loss.isnan().nonzero().tolist() == [[5]]
    (grad,) = torch.autograd.grad(loss[torch.arange(ROWS) != 5].sum(), leaf)
    others = torch.arange(ROWS) != 5
    assert bool(grad[others].isfinite().all())


@every_engine
@every_dtype
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_infinity_and_nan_in_a_row_that_counts(
    value: float, dtype: torch.dtype, engine: str
) -> None:
    """They are never hidden: that row's loss and gradient are NaN, and only that row's."""
    logits, target = some_logits(dtype), some_target()
    logits[5, 77] = value
    target[5] = 3
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", engine=engine)
    usual = functional.cross_entropy(logits.double(), target, reduction="none")
    assert torch.equal(loss.isnan(), usual.isnan())
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert bool(grad[5].isnan().all())
    others = torch.arange(ROWS) != 5
    assert bool(grad[others].isfinite().all())


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_a_row_without_a_maximum_has_no_argmax(engine: str) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = torch.nan
    target = torch.zeros(3, dtype=torch.int64)
    best = token_statistics(logits, target, argmax=True, engine=engine).argmax
    assert best is not None
    assert best.tolist() == [int(logits[0].argmax()), -1, int(logits[2].argmax())]
