"""What is expected of a batch: the naive side is near the exact one, and says what rows pass on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vocab_parallel_ce.testing import (
    assert_close,
    batch,
    cross_entropy,
    expected,
    inherited_error,
    naive,
    worst,
)

EVERYTHING: dict[str, Any] = {
    "ignore_index": 7, "label_smoothing": 0.1, "lse_square_scale": 0.01, "scale": 0.7,
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("normalizer", [None, 37.0])
@pytest.mark.parametrize("like_reference", [False, True])
def test_the_formulas_agree_in_fp64(
    like_reference: bool, normalizer: float | None, reduction: str
) -> None:
    data = batch(20, 30, torch.float64, 7)
    options = EVERYTHING | {"reduction": reduction, "normalizer": normalizer}
    want = cross_entropy(data.logits, data.target, data.weight, **options)
    for parts in (1, 3):
        order = torch.randperm(30)
        got = naive(
            data.logits, data.target, data.weight.double(), **options,
            like_reference=like_reference, order=order, parts=parts, sums_as_logs=parts == 3,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_naive_errors_are_those_of_fp32() -> None:
    data = batch(64, 500, torch.bfloat16, 7, unreadable=True)
    want = expected(data.logits, data.target, data.weight, reduction="none", **EVERYTHING)
    assert want.x.dtype == torch.float64
    assert want.x_naive.dtype == torch.float32
    error = (want.naive.loss.double() - want.exact.loss).abs().max().item()
    assert 0 < error < 1e-4
    exact, plain = want.gradients(lambda outcome: outcome.loss.sum())
    ignored = data.target == 7
    assert bool((exact[ignored] == 0).all())
    assert 0 < (plain.double() - exact)[~ignored].abs().max().item() < 1e-5


def test_a_reduced_loss_inherits_from_its_rows() -> None:
    data = batch(64, 500, torch.float32)
    rows = expected(data.logits, data.target, reduction="none")
    assert rows.rows_error == 0
    error = (rows.naive.loss.double() - rows.exact.loss).abs().max().item()
    for reduction, normalizer, factor in (("sum", None, 64), ("mean", None, 1), ("mean", 16.0, 4)):
        want = expected(data.logits, data.target, reduction=reduction, normalizer=normalizer)
        assert want.rows_error == pytest.approx(factor * error)
        assert inherited_error(error, 64, reduction, normalizer) == pytest.approx(factor * error)
        assert want.zloss_rows_error == 0  # there is no z-loss
    both = expected(data.logits, data.target, lse_square_scale=1e-4)
    assert 0 < both.zloss_rows_error < both.rows_error


def test_the_worst_of_several() -> None:
    exact = torch.tensor([0.0, 1.0], dtype=torch.float64)
    a, b = torch.tensor([0.5, 1.0]), torch.tensor([-0.25, torch.nan])
    assert worst(exact, [a, b]).tolist() == [0.5, 1.0]


def test_what_is_expected_passes_by_its_own_rule() -> None:
    data = batch(64, 500, torch.float32)
    want = expected(data.logits, data.target)
    assert_close(want.naive.loss, want.exact.loss, want.naive.loss)
    off = (want.exact.loss.detach() * (1 + 1e-5)).float()
    with pytest.raises(AssertionError, match="loss: 1 of 1"):
        assert_close(off, want.exact.loss, want.naive.loss, "loss", rows_error=want.rows_error)
