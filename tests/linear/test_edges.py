"""The fused head at the edge: no rows, no width, NaN, overflow, torch.func, shapes alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics

from ..ranks import Pool
from .calls import H, N, V, a_call, sharded_call


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("shape", [(0, H), (2, 0, H), (3, 0), (0, 0)], ids=str)
def test_no_rows_and_no_width(shape: tuple[int, ...], gradient: str) -> None:
    call = a_call(
        input=torch.zeros(shape).requires_grad_(),
        linear_weight=torch.zeros(V, shape[-1]).requires_grad_(),
        target=torch.zeros(shape[:-1]).long(),
    )
    loss = linear_cross_entropy(**call, reduction="sum", gradient=gradient)
    assert isinstance(loss, Tensor)
    loss.backward()
    for leaf in (call["input"], call["linear_weight"]):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert bool((leaf.grad == 0).all())
    rows = math.prod(shape[:-1])
    torch.testing.assert_close(loss, torch.tensor(rows * math.log(V)))


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_width_of_one_and_one_row(gradient: str) -> None:
    hidden, head = torch.randn(1, requires_grad=True), torch.randn(V, 1, requires_grad=True)
    target = torch.tensor(3)
    loss = linear_cross_entropy(hidden, head, target, gradient=gradient)
    assert isinstance(loss, Tensor)
    want = F.cross_entropy(F.linear(hidden, head), target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(want, (hidden, head))
    )


def _ids_of_32_bits(group: dist.ProcessGroup, gradient: str) -> None:
    """They mean what those of 64 bits do, and nothing beside them is read or written."""
    losses = []
    for dtype in (torch.int64, torch.int32):
        call = sharded_call(group, gradient=gradient, label_smoothing=0.1)
        call["target"] = call["target"].to(dtype)
        call["target"][::3] = -100
        loss = linear_cross_entropy(**call)
        assert isinstance(loss, Tensor)
        losses.append((loss, *torch.autograd.grad(loss, (call["input"], call["linear_weight"]))))
    for wide, narrow in zip(*losses, strict=True):
        assert torch.equal(wide, narrow)


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("world", [1, 2])
def test_targets_of_32_bits(pool: Pool, world: int, gradient: str) -> None:
    pool.run(_ids_of_32_bits, world, (gradient,))


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_ignored_rows_hold_goes_nowhere(value: float, gradient: str) -> None:
    call = a_call()
    call["target"][::2] = -100
    clean = linear_cross_entropy(**call, gradient=gradient)
    assert isinstance(clean, Tensor)
    call["input"] = call["input"].detach().clone()
    call["input"][::2] = value
    call["input"].requires_grad_()
    loss = linear_cross_entropy(**call, gradient=gradient)
    assert isinstance(loss, Tensor)
    assert torch.equal(loss, clean)
    of_hidden, of_head = torch.autograd.grad(loss, (call["input"], call["linear_weight"]))
    assert bool(of_head.isfinite().all())
    assert bool((of_hidden[::2] == 0).all())


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_fp16_logits_that_overflow_are_not_hidden(gradient: str) -> None:
    hidden = torch.full((2, H), 200.0, dtype=torch.float16, requires_grad=True)
    head = torch.full((V, H), 200.0, dtype=torch.float16)
    loss = linear_cross_entropy(hidden, head, torch.tensor([0, 1]), gradient=gradient)
    assert isinstance(loss, Tensor)
    assert not bool(loss.isfinite())
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not bool(grad.isfinite().any())


def test_torch_func_is_served_on_one_rank() -> None:
    call = a_call()
    hidden, head, target = (call[n] for n in ("input", "linear_weight", "target"))

    def loss(hidden: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, head, target)
        assert isinstance(out, Tensor)
        return out

    got = torch.func.grad(loss)(hidden.detach())
    (want,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), target), hidden)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_a_transform_of_something_else(reduction: str) -> None:
    """Nothing of the call is seen through the transform, but what torch makes of it is."""
    call = a_call(normalizer=3.0) if reduction == "mean" else a_call()

    def value() -> Tensor:
        loss = linear_cross_entropy(**call, reduction=reduction)
        assert isinstance(loss, Tensor)
        return loss.sum()

    want = value()
    leaves = (call["input"], call["linear_weight"])
    gradients = torch.autograd.grad(want, leaves)
    by_factor, got = torch.func.grad_and_value(lambda a: a * value())(torch.ones(()))
    torch.testing.assert_close(by_factor, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), gradients)


def test_torch_func_keeps_ignored_rows_out_of_the_head() -> None:
    call = a_call()
    hidden, head, target = (call[n] for n in ("input", "linear_weight", "target"))
    hidden = hidden.detach().clone()
    target[::2], hidden[::2] = -100, math.nan

    def loss(head: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, head, target)
        assert isinstance(out, Tensor)
        return out

    (want,) = torch.autograd.grad(loss(head), head)
    torch.testing.assert_close(torch.func.grad(loss)(head.detach()), want)


@pytest.mark.parametrize("name", ["scale", "weight", "normalizer"])
def test_vmap_over_an_option_alone(name: str) -> None:
    call: dict[str, Any] = {k: v.detach() for k, v in a_call().items()}
    values = torch.rand(3, *((V,) if name == "weight" else ())) + 0.5

    def loss(value: Tensor) -> Tensor:
        out = linear_cross_entropy(**{**call, name: value})
        assert isinstance(out, Tensor)
        return out

    got = torch.func.vmap(loss)(values)
    torch.testing.assert_close(got, torch.stack([loss(value) for value in values]))


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_any_number_of_mib_may_be_allowed(gradient: str) -> None:
    call = a_call(gradient=gradient)
    want, got = linear_cross_entropy(**call), linear_cross_entropy(**call, scratch_mib=1e308)
    torch.testing.assert_close(got, want)


def test_shapes_alone() -> None:
    """On meta a model's shapes are counted; gradients have theirs."""
    call = a_call(
        input=torch.zeros(N, H, device="meta").requires_grad_(),
        linear_weight=torch.zeros(V, H, device="meta").requires_grad_(),
        target=torch.zeros(N, device="meta").long(),
    )
    loss = linear_cross_entropy(**call)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert call["linear_weight"].grad.shape == (V, H)
    assert linear_token_statistics(**call, entropy=True).entropy is not None


def _nothing_kept(group: dist.ProcessGroup, gradient: str) -> tuple[Tensor, Tensor]:
    call = sharded_call(group, gradient=gradient, target=torch.full((N,), -100))
    loss = linear_cross_entropy(**call)
    assert isinstance(loss, Tensor)
    (grad,) = torch.autograd.grad(loss, call["input"])
    return loss.detach(), grad


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_all_rows_ignored_on_several_ranks(pool: Pool, gradient: str) -> None:
    for loss, grad in pool.run(_nothing_kept, 2, (gradient,)):
        assert bool(loss.isnan())
        assert bool((grad == 0).all())
