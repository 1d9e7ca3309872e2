"""Rows that do not count: 0 each, whatever they hold, and how the mean counts the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from vocab_parallel_ce import cross_entropy, token_statistics
from vocab_parallel_ce.testing import assert_close

from .small_rows import (
    CLASSES,
    REDUCTIONS,
    ROWS,
    check,
    every_dtype,
    every_engine,
    some_logits,
    some_target,
)


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 6e4], ids=str)
def test_ignored_rows_may_hold_anything(
    value: float, reduction: str, dtype: torch.dtype, engine: str
) -> None:
    """B4: loss exactly 0, gradient exactly 0; the others as if those rows were not there."""
    logits, target = some_logits(dtype), some_target(9)
    logits[:9] = value
    weight = torch.rand(CLASSES) + 0.25
    both: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.01}]
    for options in both:
        loss, grad = check(logits, target, weight, engine, reduction, **options)
        if reduction == "none":
            assert bool((loss[:9] == 0).all())
        assert bool((grad[:9] == 0).all())
        assert bool(grad[9:].any(1).all())


@every_engine
def test_token_statistics_of_ignored_rows(engine: str) -> None:
    """0 each, argmax -1, no gradient, whatever they hold."""
    logits, target = some_logits(), some_target(9)
    logits[:9] = torch.nan
    leaf = logits.clone().requires_grad_()
    stats = token_statistics(leaf, target, entropy=True, argmax=True, engine=engine)
    assert stats.entropy is not None
    assert stats.argmax is not None
    for value in (stats.log_prob, stats.lse, stats.entropy):
        assert bool((value[:9] == 0).all())
        (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert bool((grad[:9] == 0).all())
        assert bool(grad[9:].isfinite().all())
    assert bool((stats.argmax[:9] == -1).all())
    assert torch.equal(stats.argmax[9:], logits[9:].argmax(1))


@every_engine
def test_log_prob_keeps_its_sign_of_zero(engine: str) -> None:
    """A certain token and an ignored one: 0.0, not -0.0, in every printed table."""
    logits = torch.tensor([[200.0, 0.0], [1.0, 2.0]])
    stats = token_statistics(logits, torch.tensor([0, -100]), engine=engine)
    assert stats.log_prob.tolist() == [0.0, 0.0]
    assert not bool(stats.log_prob.signbit().any())


@every_engine
@pytest.mark.parametrize("ignore_index", [0, 7, CLASSES - 1, -1, -100, 10**12, -(2**40)])
def test_any_ignore_index(ignore_index: int, engine: str) -> None:
    """Inside the vocabulary that class is never a target but stays in the softmax."""
    target = some_target()
    target[3:6] = ignore_index
    logits = some_logits()
    loss, _ = check(logits, target, engine=engine, ignore_index=ignore_index)
    assert bool((loss[3:6] == 0).all())
    kept = target != ignore_index
    usual = functional.cross_entropy(logits.double()[kept], target[kept])
    mean = cross_entropy(logits.double(), target, ignore_index=ignore_index, engine=engine)
    assert_close(mean, usual, usual, "mean", rows_error=1e-15)


@every_engine
@pytest.mark.parametrize("options", [{}, {"lse_square_scale": 0.01}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("held", [1.0, torch.nan])
def test_all_rows_ignored(held: float, options: dict[str, Any], engine: str) -> None:
    """B6: mean is NaN as in torch, sum and none are 0; the gradient is exactly 0 in each."""
    target = torch.full((ROWS,), -100)
    for reduction in REDUCTIONS:
        leaf = torch.full((ROWS, CLASSES), held).requires_grad_()
        loss = cross_entropy(leaf, target, reduction=reduction, engine=engine, **options)
        usual = functional.cross_entropy(torch.ones(ROWS, CLASSES), target, reduction=reduction)
        assert loss.shape == usual.shape
        assert torch.equal(loss.isnan(), usual.isnan())
        assert bool(loss.isnan().all()) == (reduction == "mean")
        loss.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros(ROWS, CLASSES))


@every_engine
def test_all_rows_ignored_with_a_normalizer(engine: str) -> None:
    """A data-parallel rank without a kept row adds 0, not NaN."""
    leaf = some_logits().requires_grad_()
    loss = cross_entropy(leaf, torch.full((ROWS,), -100), normalizer=12.0, engine=engine)
    loss.backward()
    assert loss == 0
    assert leaf.grad is not None
    assert not bool(leaf.grad.any())


@every_engine
def test_a_token_of_loss_zero_still_counts(engine: str) -> None:
    """B6: the mean divides by the kept rows, not by those whose loss is not 0."""
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = cross_entropy(logits, torch.tensor([0, 1]), engine=engine)
    exact = torch.tensor(3.0, dtype=torch.float64).log() / 2
    assert_close(loss, exact, exact, "mean")
