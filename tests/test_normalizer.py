"""``normalizer``: what it divides, what it may be, and ranks that pass different ones."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import cross_entropy, passes

from .ranks import Pool

ROWS, VOCAB = 5, 12


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(ROWS, VOCAB, generator=g).to(dtype),
        torch.randint(0, VOCAB, (ROWS,), generator=g),
    )


@pytest.mark.parametrize(
    "normalizer", [True, 1j, torch.tensor(True), torch.tensor(1j), "4", [4.0]], ids=repr
)
def test_what_is_no_number_is_a_type_error(normalizer: Any) -> None:
    with pytest.raises(TypeError, match="normalizer must be"):
        cross_entropy(*_batch(), normalizer=normalizer)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor([0.0])], ids=repr)
@pytest.mark.parametrize("z", [0.0, 0.1])
def test_0_with_no_kept_row_is_a_loss_and_a_gradient_of_0(zero: Any, z: float) -> None:
    """The recipe of the README where one data-parallel rank, or all, has nothing but padding."""
    logits, target = _batch()
    logits.requires_grad_()
    target.fill_(-100)
    loss = cross_entropy(logits, target, normalizer=zero, lse_square_scale=z)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def test_otherwise_it_is_what_the_division_gives() -> None:
    logits, target = _batch()
    total = cross_entropy(logits, target, reduction="sum")
    assert cross_entropy(logits, target, normalizer=0).item() == torch.inf
    assert bool(cross_entropy(logits, target, normalizer=torch.nan).isnan())
    for value in (-3, 7.5, 2**80, torch.tensor(9), torch.tensor([[2.0]], dtype=torch.float16)):
        want = total / float(value)
        torch.testing.assert_close(cross_entropy(logits, target, normalizer=value), want)


def test_no_gradient_flows_into_it() -> None:
    logits, target = _batch()
    normalizer = torch.tensor(3.0, requires_grad=True)
    cross_entropy(logits.requires_grad_(), target, normalizer=normalizer).backward()
    assert normalizer.grad is None


def _losses(
    group: dist.ProcessGroup, values: list[Any], dtype: torch.dtype, on_host: bool, **options: Any
) -> tuple[str, float]:
    """(error, loss) of this rank, which passes its own normalizer."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    logits, target = _batch(dtype)
    part = logits.chunk(world, -1)[rank].clone()
    with patch.object(passes, "_on_host", return_value=on_host):
        try:
            loss = cross_entropy(part, target, group=group, normalizer=values[rank], **options)
            return "", loss.item()
        except ValueError as problem:
            return str(problem), 0.0


ALIKE = [[4.0, 4.0], [4.0, 4.00002], [torch.tensor(4), 4.0]]
APART = [[4.0, 8.0], [4.0, 4.001], [4.0, 0.0], [4.0, torch.nan]]
WAYS: list[dict[str, Any]] = [{}, {"collective": "all_reduce"}, {"check": True}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_rounding_passes_and_rank_0s_is_used_by_all(
    pool: Pool, way: dict[str, Any], dtype: torch.dtype
) -> None:
    want = cross_entropy(*_batch(dtype), normalizer=4.0).item()
    for values in ALIKE:
        (first, a), (second, b) = pool.run(_losses, 2, (values, dtype, True), kwargs=way)
        assert (first, second) == ("", "")
        assert a == b == pytest.approx(want, rel=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_others_are_an_error_on_every_rank(pool: Pool, way: dict[str, Any]) -> None:
    for values in [*APART, [None, 4.0]]:
        outcomes = pool.run(_losses, 2, (values, torch.float32, True), kwargs=way)
        assert len({text for text, _ in outcomes}) == 1
        assert outcomes[0][0].startswith("ranks disagree on normalizer"), outcomes


@pytest.mark.parametrize("way", WAYS[:2], ids=repr)
def test_on_accelerators_they_are_nan(pool: Pool, way: dict[str, Any]) -> None:
    for values in [*APART, [None, 4.0]]:
        outcomes = pool.run(_losses, 2, (values, torch.float32, False), kwargs=way)
        assert [(text, loss != loss) for text, loss in outcomes] == [("", True)] * 2
    for values in ALIKE:
        (_, a), (_, b) = pool.run(_losses, 2, (values, torch.float32, False), kwargs=way)
        assert a == b
