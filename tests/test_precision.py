"""Digits that a usual formula would lose, and how closely the two engines agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import Expected, ReferenceLoss, assert_close, naive_error

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
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_entropy_of_a_large_vocabulary(offset: float, engine: str) -> None:
    """B17: lse - sum(p x) is off by 8e-5 at 131072 classes and by 2e-2 with 1000 added to them."""
    logits = torch.randn(4, 131072) * 2 + offset
    target = torch.zeros(4, dtype=torch.int64)
    stats = token_statistics(logits, target, entropy=True, engine=engine)
    assert stats.entropy is not None
    p = logits.double().softmax(1)
    exact = -(p * p.log()).sum(1)
    assert float((stats.entropy - exact).abs().max()) < 2e-6
    want = expected(logits, target)
    assert_close(stats.entropy, exact, want.naive.entropy, "entropy")
    lse = logits.logsumexp(1)
    fields = lse - ((logits - lse[:, None]).exp() * logits).sum(1)
    if offset == 1000:
        assert float((fields - exact).abs().max()) > 1e-3, "this batch shows nothing"


@every_engine
@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_gradient_at_large_logits(offset: float, engine: str) -> None:
    """e^(x - lse) with one rounded lse near 1000 loses two to three digits; (m, s) loses none."""
    logits, target = some_logits(spread=0.5) + offset, some_target()
    _, grad = check(logits, target, engine=engine)
    upstream = torch.linspace(0.5, 2, ROWS)[:, None]
    hot = functional.one_hot(target, CLASSES)
    exact = (logits.double().softmax(1) - hot) * upstream
    through_lse = ((logits - logits.logsumexp(1)[:, None]).exp() - hot) * upstream
    others = hot == 0
    ours = float((grad - exact)[others].abs().max())
    theirs = float((through_lse - exact)[others].abs().max())
    assert theirs > 20 * ours, "this batch shows nothing"


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_target_gradient_of_a_near_certain_token(dtype: torch.dtype, engine: str) -> None:
    """B11: p - 1 is formed before it is rounded; the rounded p would be 1 and the gradient 0."""
    logits = torch.zeros(ROWS, 2, dtype=dtype)
    logits[:, 1] = -torch.linspace(6, 9, ROWS).to(dtype)
    _, grad = check(logits, torch.zeros(ROWS, dtype=torch.int64), engine=engine)
    assert bool((grad[:, 0] < 0).all())


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_outputs_of_the_operator(dtype: torch.dtype, engine: str) -> None:
    """fp32 all the way, rounded once: right in the last place of bf16 and fp16."""
    logits, target = some_logits(dtype), some_target(5)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"lse_square_scale": 0.01, "label_smoothing": 0.1}
        out = cross_entropy_loss(
            logits,
            target,
            reduction=reduction,
            label_smoothing=0.1,
            lse_square_scale_for_zloss=0.01,
            return_zloss=True,
            engine=engine,
        )
        want = expected(logits, target, reduction=reduction, **options)
        names: dict[str, Callable[[ReferenceLoss], Tensor]] = {
            "loss": lambda o: o.loss.reshape(-1),
            "zloss": lambda o: o.zloss.reshape(-1),
            "log_prob": lambda o: o.log_prob,
        }
        for name, read in names.items():
            assert_close(
                getattr(out, name),
                read(want.exact),
                read(want.naive),
                name,
                rows_error=want.rows_error,
            )
        assert_close(out.lse_for_zloss, want.exact.lse, want.naive.lse, "lse")


@every_engine
@every_dtype
def test_token_statistics_values(dtype: torch.dtype, engine: str) -> None:
    """Every field and its gradient, at a temperature."""
    logits, target = some_logits(dtype), some_target()
    leaf = logits.clone().requires_grad_()
    stats = token_statistics(leaf, target, entropy=True, argmax=True, scale=0.7, engine=engine)
    want = expected(logits, target, reduction="none", scale=0.7)
    assert stats.entropy is not None
    assert stats.argmax is not None
    close(stats.log_prob, -want.exact.loss, -want.naive.loss, "log_prob")
    close(stats.lse, want.exact.lse, want.naive.lse, "lse")
    close(stats.entropy, want.exact.entropy, want.naive.entropy, "entropy")
    assert torch.equal(stats.argmax, logits.argmax(1))
    _check_stat_gradient(stats.log_prob, leaf, want, lambda o: -o.loss.sum())
    _check_stat_gradient(stats.lse, leaf, want, lambda o: o.lse.sum())
    _check_stat_gradient(stats.entropy, leaf, want, lambda o: o.entropy.sum())


def _check_stat_gradient(
    value: Tensor, leaf: Tensor, want: Expected, scalar: Callable[[ReferenceLoss], Tensor]
) -> None:
    (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    close(grad, *want.gradients(scalar), "gradient")


# The two engines


@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_engines_agree(reduction: str, dtype: torch.dtype) -> None:
    """Each to the other as exact as to the oracle."""
    logits, target = some_logits(dtype), some_target(5)
    weight = torch.rand(CLASSES) + 0.25
    options: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 0.01}
    want = expected(logits, target, weight, reduction=reduction, **options)
    both = []
    for engine in ("eager", "cpu"):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, target, weight, reduction, engine=engine, **options)
        both.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    error = max(naive_error(want.exact.loss, want.naive.loss, torch.float32), want.rows_error)
    assert_close(both[0][0], both[1][0].double(), both[1][0], "loss", rows_error=error)
    exact, plain = want.gradients(lambda outcome: outcome.loss.sum())
    error = naive_error(exact, plain, torch.float32)
    assert_close(both[0][1], both[1][1].double(), both[1][1], "gradient", rows_error=error)
