"""No rows, one class, one row: what is left of a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import assert_close

from .cases import expected
from .small_rows import CLASSES, check, every_dtype, every_engine


@every_engine
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_no_rows(shape: tuple[int, ...], engine: str) -> None:
    """mean NaN, sum 0, none empty, as in torch; an empty gradient; every function."""
    leaf = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    mean = cross_entropy(leaf, target, label_smoothing=0.1, engine=engine)
    total = cross_entropy(leaf, target, reduction="sum", lse_square_scale=0.1, engine=engine)
    rows = cross_entropy(leaf, target, reduction="none", engine=engine)
    assert bool(mean.isnan())
    assert total == 0
    assert rows.shape == target.shape
    for in_place in (False, True):
        out = cross_entropy(
            leaf * 1, target, reduction="sum", inplace_backward=in_place, engine=engine
        )
        (grad,) = torch.autograd.grad(out, leaf)
        assert grad.shape == shape
    asked: dict[str, Any] = {"entropy": True, "argmax": True, "sum_p_squared": True}
    selected = target[..., None].expand(*target.shape, 2)
    *stats, found = token_statistics(leaf, target, **asked, selected=selected, engine=engine)
    assert all(value is not None and value.shape == target.shape for value in stats)
    assert found is not None
    assert found.shape == selected.shape
    assert cross_entropy_loss(leaf, target, engine=engine).log_prob.shape == shape


@every_engine
@every_dtype
def test_one_class(dtype: torch.dtype, engine: str) -> None:
    """Loss 0, gradient 0, entropy 0, whatever the logit."""
    logits = (100 * torch.randn(6, 1)).to(dtype)
    target = torch.tensor([0, 0, -100, 0, 0, 0])
    loss, grad = check(logits, target, engine=engine)
    assert not bool(loss.any())
    assert not bool(grad.any())
    # Every product of these is exact, so what cancels in theory cancels in fp32.
    check(logits, target, torch.tensor([0.5]), engine, spread=False, label_smoothing=0.25)
    stats = token_statistics(logits, target, entropy=True, argmax=True, engine=engine)
    assert stats.entropy is not None
    assert not bool(stats.entropy.any())
    assert stats.argmax is not None
    assert stats.argmax.tolist() == [0, 0, -1, 0, 0, 0]


@every_engine
def test_one_row_of_one_dimension(engine: str) -> None:
    logits, target = torch.randn(CLASSES), torch.tensor(3)
    want = expected(logits, target)
    assert_close(
        cross_entropy(logits, target, engine=engine), want.exact.loss, want.naive.loss, "loss"
    )
