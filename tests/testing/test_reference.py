"""The oracle itself: torch.nn.functional in fp64 where that has the option, by hand elsewhere."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce.testing import Batch, assert_close, batch, cross_entropy

from ..cases import expected

REDUCTIONS = ("none", "mean", "sum")
VOCAB, ROWS = 11, 9


def _batch(ignore_index: int = -100) -> Batch:
    return batch(ROWS, VOCAB, torch.float64, ignore_index)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("weighted", "ignore_index", "smoothing"),
    list(product((False, True), (-100, 0, 7, -1), (0.0, 0.3, 1.0))),
)
def test_torch_agrees(reduction: str, weighted: bool, ignore_index: int, smoothing: float) -> None:
    data = _batch(ignore_index)
    weight = data.weight.double() if weighted else None
    options: dict[str, Any] = {
        "reduction": reduction, "ignore_index": ignore_index, "label_smoothing": smoothing,
    }  # fmt: skip
    want = expected(data.logits, data.target, weight, **options)
    x = data.logits.clone().requires_grad_()
    loss = F.cross_entropy(x, data.target, weight, **options)
    assert_close(loss, want.exact.loss, want.naive.loss, rows_error=want.rows_error)
    up = data.upstream.double() if reduction == "none" else torch.ones((), dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, x, up)
    assert_close(grad, *want.gradients(lambda r: (r.loss * up.to(r.loss.dtype)).sum()), "gradient")


def test_scale_multiplies_the_logits() -> None:
    data = _batch()
    scaled = cross_entropy(data.logits, data.target, scale=0.25)
    plain = cross_entropy(data.logits * 0.25, data.target)
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zloss_is_part_of_the_loss(reduction: str) -> None:
    data = _batch(7)
    options: dict[str, Any] = {"ignore_index": 7, "reduction": reduction}
    plain = cross_entropy(data.logits, data.target, data.weight, **options)
    both = cross_entropy(data.logits, data.target, data.weight, lse_square_scale=0.5, **options)
    kept = data.target != 7
    rows = 0.5 * data.logits.logsumexp(-1).square() * kept
    zloss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]
    torch.testing.assert_close(both.zloss, zloss, rtol=1e-14, atol=0)
    torch.testing.assert_close(both.loss, plain.loss + zloss, rtol=1e-14, atol=0)
    assert plain.zloss.abs().sum() == 0


@pytest.mark.parametrize("normalizer", [10.0, torch.tensor(10)])
def test_normalizer_replaces_both_denominators(normalizer: float | Tensor) -> None:
    data = _batch()
    options: dict[str, Any] = {"lse_square_scale": 0.1, "label_smoothing": 0.1}
    total = cross_entropy(data.logits, data.target, data.weight, "sum", **options)
    mean = cross_entropy(data.logits, data.target, data.weight, normalizer=normalizer, **options)
    torch.testing.assert_close(mean.loss, total.loss / 10, rtol=1e-14, atol=0)
    torch.testing.assert_close(mean.zloss, total.zloss / 10, rtol=1e-14, atol=0)


def test_entropy_is_that_of_the_probabilities() -> None:
    data = _batch()
    got = cross_entropy(data.logits, data.target, ignore_index=-100)
    p = data.logits.exp() / data.logits.exp().sum(-1, keepdim=True)
    want = (p * p.log().neg()).sum(-1)
    want = want * (data.target != -100)
    torch.testing.assert_close(got.entropy, want, rtol=1e-13, atol=0)


def test_columns_of_minus_infinity_have_no_entropy() -> None:
    x = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    entropy = cross_entropy(x, torch.tensor([0])).entropy
    assert entropy.item() == pytest.approx(math.log(2), 1e-15)
    assert torch.autograd.grad(entropy.sum(), x)[0].tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_ignored_rows_may_hold_anything(poison: float) -> None:
    data = _batch()
    x = data.logits.clone()
    x[1] = poison  # the second row of a batch is ignored
    x.requires_grad_()
    for reduction in REDUCTIONS:
        got = cross_entropy(
            x, data.target, data.weight, reduction, label_smoothing=0.1, lse_square_scale=0.1
        )
        want = cross_entropy(
            data.logits, data.target, data.weight, reduction, label_smoothing=0.1,
            lse_square_scale=0.1,
        )  # fmt: skip
        assert torch.equal(got.loss, want.loss)
        (grad,) = torch.autograd.grad(got.loss.sum() + got.entropy.sum(), x)
        assert bool((grad[1] == 0).all())
        assert bool(grad.isfinite().all())
    assert got.argmax[1] == -1


def test_all_rows_ignored_is_nan_with_zero_gradient_as_in_torch() -> None:
    x = _batch().logits.clone().requires_grad_()
    target = torch.full((ROWS,), -100)
    for loss in (cross_entropy(x, target).loss, F.cross_entropy(x, target)):
        assert loss.isnan()
        (grad,) = torch.autograd.grad(loss, x)
        assert bool((grad == 0).all())


def test_leading_dimensions() -> None:
    data = batch(12, VOCAB, torch.float64)
    flat = cross_entropy(data.logits, data.target, reduction="none")
    deep = cross_entropy(data.logits.view(2, 3, 2, -1), data.target.view(2, 3, 2), reduction="none")
    assert torch.equal(deep.loss.flatten(), flat.loss)
    assert deep.log_prob.shape == (2, 3, 2, VOCAB)
