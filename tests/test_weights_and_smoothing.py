"""Class weights of 0 and below, and label smoothing up to 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from vocab_parallel_ce import cross_entropy

from .small_rows import (
    CLASSES,
    REDUCTIONS,
    check,
    every_dtype,
    every_engine,
    some_logits,
    some_target,
)


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_of_zero(smoothing: float, reduction: str, dtype: torch.dtype, engine: str) -> None:
    """A class that weighs nothing: its rows cost nothing by themselves but are kept rows."""
    weight = torch.rand(CLASSES) + 0.25
    weight[::3] = 0.0
    target = some_target(5)
    target[5:9] = 3
    loss, _ = check(
        some_logits(dtype), target, weight, engine, reduction, label_smoothing=smoothing
    )
    if reduction == "none" and smoothing == 0:
        assert bool((loss[5:9] == 0).all())


@every_engine
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_all_weights_zero(options: dict[str, Any], engine: str) -> None:
    """The mean over nothing is NaN, as in torch; the others are 0."""
    weight, target = torch.zeros(CLASSES), some_target()
    for reduction in REDUCTIONS:
        loss = cross_entropy(some_logits(), target, weight, reduction, engine=engine, **options)
        usual = functional.cross_entropy(
            some_logits(), target, weight, reduction=reduction, **options
        )
        assert torch.equal(loss.isnan(), usual.isnan())
        assert torch.equal(loss.nan_to_num(), usual.nan_to_num())


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_label_smoothing_of_one(reduction: str, dtype: torch.dtype, engine: str) -> None:
    """The target only tells which rows count."""
    logits = some_logits(dtype)
    losses = [
        check(logits, target, engine=engine, reduction=reduction, label_smoothing=1.0)[0]
        for target in (some_target(5), some_target(5))
    ]
    assert torch.equal(*losses)


@every_engine
@every_dtype
def test_smoothing_of_a_vanishing_probability(dtype: torch.dtype, engine: str) -> None:
    """p = e^-20000 is 0 in every dtype; its log is -20000 and finite."""
    logits = some_logits(dtype)
    logits[:, 7] = -20000.0
    target = some_target()
    target[:4] = 7
    loss, _ = check(logits, target, engine=engine, label_smoothing=0.1)
    assert bool(loss.isfinite().all())
    assert float(loss[:4].min()) > 17000


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_negative_class_weights_are_pytorchs_to_allow(reduction: str, smoothing: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=g, dtype=torch.float64)
    target = torch.tensor([0, 3, 8, -100, 3, 1])
    weight = torch.linspace(-2, 3, 9, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    loss = cross_entropy(ours, target, weight, **options)
    want = functional.cross_entropy(theirs, target, weight, **options)
    torch.testing.assert_close(loss, want)
    loss.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
