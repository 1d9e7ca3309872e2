"""Shapes and dtypes of all that the public functions return, and what is differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import (
    cross_entropy,
    cross_entropy_loss,
    linear_cross_entropy,
    linear_token_statistics,
    token_statistics,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _batch(*lead: int, classes: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(*lead, classes).to(dtype), torch.randint(classes, lead)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_cross_entropy_result(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = _batch(*lead, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction, shape in (("none", lead), ("sum", ()), ("mean", ())):
        loss = cross_entropy(x, target, reduction=reduction)
        assert loss.shape == shape
        assert loss.dtype == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_operator_result(lead: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    """Everything in the input's dtype; loss [N] or [1]; what is not asked for is empty."""
    x, target = _batch(*lead, dtype=dtype)
    shape = lead if reduction == "none" else (1,)

    plain = cross_entropy_loss(x, target, reduction=reduction)
    assert plain.loss.shape == shape
    assert plain.log_prob.shape == x.shape
    assert plain.zloss.shape == plain.lse_for_zloss.shape == (0,)

    full = cross_entropy_loss(
        x, target, None, reduction, lse_square_scale_for_zloss=1e-3, return_zloss=True
    )
    assert full.zloss.shape == full.loss.shape == shape
    assert full.lse_for_zloss.shape == lead
    for value in (*plain, *full):
        assert value.dtype == dtype

    # The scale alone returns lse; the flag alone returns a z-loss of 0.
    assert cross_entropy_loss(x, target, lse_square_scale_for_zloss=1e-3).zloss.shape == (0,)
    flag = cross_entropy_loss(x, target, None, reduction, return_zloss=True)
    assert flag.zloss.shape == shape
    assert flag.lse_for_zloss.shape == (0,)
    assert torch.equal(flag.zloss, torch.zeros(shape, dtype=dtype))

    assert cross_entropy_loss(x, target, return_log_prob=False).log_prob.shape == (0,)


def test_operator_gradients_flow_where_the_operators_do() -> None:
    x, target = _batch(5)
    out = cross_entropy_loss(
        x.requires_grad_(), target, lse_square_scale_for_zloss=1e-3, return_zloss=True
    )
    assert [value.requires_grad for value in out] == [True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_token_statistics_result(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = _batch(*lead, dtype=dtype)
    x.requires_grad_()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    few = token_statistics(x, target)
    assert few.entropy is None
    assert few.argmax is None
    full = token_statistics(x, target, entropy=True, argmax=True)
    assert full.entropy is not None
    assert full.argmax is not None
    for value in (few.log_prob, few.lse, full.log_prob, full.lse, full.entropy):
        assert value.shape == lead
        assert value.dtype == expected
        assert value.requires_grad
    assert full.argmax.shape == lead
    assert full.argmax.dtype == torch.int64
    assert not full.argmax.requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_target_dtypes(dtype: torch.dtype) -> None:
    x, target = _batch(6)
    assert torch.equal(cross_entropy(x, target.to(dtype)), cross_entropy(x, target))


FLOATS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loss": lambda x, y: cross_entropy(x, y, reduction="none"),
    "loss and z-loss": lambda x, y: cross_entropy(x, y, reduction="none", return_zloss=True)[0],
    "operator's": lambda x, y: cross_entropy_loss(x, y, reduction="none").loss,
    "log_prob": lambda x, y: token_statistics(x, y).log_prob,
    "lse": lambda x, y: token_statistics(x, y).lse,
    "entropy": lambda x, y: token_statistics(x, y, entropy=True).entropy,
    "selected": lambda x, y: token_statistics(x, y, selected=y[..., None]).selected_log_prob,
    "fused head's": lambda x, y: linear_cross_entropy(x, torch.eye(11), y, reduction="none"),
    "fused head's lse": lambda x, y: linear_token_statistics(x, torch.eye(11), y).lse,
}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
def test_a_result_may_be_written_into(lead: tuple[int, ...], name: str) -> None:
    """``loss *= mask``, as with F.cross_entropy; the gradient is that of a product."""
    x, target = _batch(*lead)
    leaf = x.requires_grad_()
    gradients: list[Tensor] = []
    for in_place in (False, True):
        value = FLOATS[name](leaf, target)
        factor = torch.arange(1.0, 1 + value.numel()).reshape(value.shape)
        value = value.mul_(factor) if in_place else value * factor
        gradients += torch.autograd.grad(value.sum(), leaf)
    assert torch.equal(*gradients)
