"""Gradients in forward and by recompute: which products run, what is held, what is refused."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics

from ..allocations import allocations, peak
from .cases import scratch_for

N, H, V = 64, 16, 96
PRODUCT = 2 * N * H * V
WAYS = ("forward", "recompute")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def _flops(run: Callable[[], object]) -> int:
    """Operations of the matrix products that ``run`` makes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
        run()
    total = 0
    for event in events.events() or []:
        if event.name in _PRODUCTS:
            first = 0 if event.name == "aten::mm" else 1
            a, b = event.input_shapes[first : first + 2]
            total += 2 * a[0] * a[1] * b[1]
    return total


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, H, generator=g).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    return hidden, head, torch.randint(V, (N,), generator=g)


def _loss(hidden: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss = linear_cross_entropy(hidden, head, target, **options)
    assert isinstance(loss, Tensor)
    return loss


def _step(hidden: Tensor, head: Tensor, target: Tensor, **options: Any) -> None:
    torch.autograd.backward(_loss(hidden, head, target, **options))


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(("gradient", "products"), [("forward", 3), ("auto", 3), ("recompute", 4)])
def test_products_of_a_step(gradient: str, products: int, rows: int | None) -> None:
    hidden, head, target = _batch()
    scratch = None if rows is None else scratch_for(rows, V, torch.float32)
    run = functools.partial(_step, hidden, head, target, gradient=gradient, scratch_mib=scratch)
    run()
    assert _flops(run) == products * PRODUCT


def test_without_gradients_there_is_one_product() -> None:
    hidden, head, target = _batch()
    with torch.no_grad():
        assert _flops(lambda: _loss(hidden, head, target)) == PRODUCT
    assert _flops(lambda: _loss(hidden.detach(), head.detach(), target)) == PRODUCT


def test_the_first_pass_of_a_reentrant_checkpoint_makes_no_gradient() -> None:
    hidden, head, target = _batch()
    made: list[Tensor] = []

    def forward() -> None:
        made.append(checkpoint(_loss, hidden, head, target, use_reentrant=True))

    assert _flops(forward) == PRODUCT
    assert _flops(lambda: torch.autograd.backward(made[0])) == 3 * PRODUCT
    assert hidden.grad is not None
    want = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), target), hidden)[0]
    torch.testing.assert_close(hidden.grad, want)


@pytest.mark.parametrize("gradient", ["recompute", "auto"])
def test_in_a_checkpoint_that_does_not_reenter(gradient: str) -> None:
    hidden, head, target = _batch()
    loss = checkpoint(
        lambda h: _loss(h, head, target, gradient=gradient), hidden, use_reentrant=False
    )
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), target), hidden)[0]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, want)


@pytest.mark.parametrize("gradient", WAYS)
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_costs_nothing(frozen: str, gradient: str) -> None:
    hidden, head, target = _batch()
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    run = functools.partial(_step, hidden, head, target, gradient=gradient)
    assert _flops(run) == (2 if gradient == "forward" else 3) * PRODUCT
    live = head if frozen == "hidden" else hidden
    want = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), target), live)[0]
    (got,) = torch.autograd.grad(_loss(hidden, head, target, gradient=gradient), live)
    torch.testing.assert_close(got, want)
    sizes = allocations(run)
    absent = (hidden if frozen == "hidden" else head).nbytes
    assert absent not in sizes, "no memory for the gradient of what is frozen"


@pytest.mark.parametrize("gradient", WAYS)
def test_ignored_rows_are_left_out(gradient: str) -> None:
    hidden, head, target = _batch()
    target[16:] = -100
    run = functools.partial(_step, hidden, head, target, gradient=gradient)
    assert _flops(run) == (3 if gradient == "forward" else 4) * PRODUCT // 4


@pytest.mark.parametrize("gradient", WAYS)
def test_to_drop_ignored_rows_changes_nothing_here(gradient: str) -> None:
    hidden, head, target = _batch()
    target[::3] = -100
    losses = [_loss(hidden, head, target, gradient=gradient, drop_ignored=d) for d in (True, False)]
    assert torch.equal(losses[0], losses[1])
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in losses), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored(reduction: str, gradient: str) -> None:
    hidden, head, _ = _batch()
    hidden.data.fill_(torch.nan)
    loss = _loss(hidden, head, torch.full((N,), -100), reduction=reduction, gradient=gradient)
    assert bool(loss.isnan()) == (reduction == "mean")
    for grad in torch.autograd.grad(loss, (hidden, head)):
        assert bool((grad == 0).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_of_columns(dtype: torch.dtype, bias: bool) -> None:
    """The budget holds 150 columns of every row: five blocks, the last one short."""
    rows, classes = 12, 700
    hidden, head = torch.randn(rows, H).to(dtype), torch.randn(classes, H).to(dtype)
    b = torch.randn(classes).to(dtype).requires_grad_() if bias else None
    target = torch.randint(classes, (rows,))
    leaves = [hidden.requires_grad_(), head.requires_grad_(), *([b] if b is not None else [])]
    weight = torch.rand(classes)
    scratch = scratch_for(rows, 150, dtype)
    options: dict[str, Any] = {"label_smoothing": 0.2, "reduction": "none"}
    loss = _loss(hidden, head, target, linear_bias=b, weight=weight, scratch_mib=scratch, **options)
    up = torch.randn(rows).to(loss.dtype)
    got = torch.autograd.grad(loss, leaves, up)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    whole = F.linear(wide[0], wide[1], wide[2] if bias else None)
    want = torch.autograd.grad(
        F.cross_entropy(whole, target, weight.double(), **options), wide, up.double()
    )
    for a, w in zip(got, want, strict=True):
        error = float((a - w).norm() / w.norm())
        assert error < (1e-7 if dtype == torch.float64 else 1e-2)


# A second backward, a second derivative


def test_a_second_backward_is_refused_by_name() -> None:
    hidden, head, target = _batch()
    loss = _loss(hidden, head, target, gradient="forward")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient='recompute'"):
        loss.backward()


def test_recompute_goes_backward_twice() -> None:
    hidden, head, target = _batch()
    loss = _loss(hidden, head, target, gradient="recompute")
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gradient", WAYS)
def test_a_second_derivative_is_refused(gradient: str) -> None:
    hidden, head, target = _batch()
    loss = _loss(hidden, head, target, gradient=gradient)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (grad.square().sum() + hidden.square().sum()).backward()


@pytest.mark.parametrize("gradient", WAYS)
def test_a_second_derivative_by_one_side_is_refused(gradient: str) -> None:
    """Not silently 0, as what lies on no path to the gradient would be."""
    hidden, head, target = _batch()
    for of, by in ((0, 0), (0, 1), (1, 0), (1, 1)):
        loss = _loss(hidden, head, target, gradient=gradient)
        grad = torch.autograd.grad(loss, (hidden, head), create_graph=True)[of]
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(grad.square().sum(), (hidden, head)[by], allow_unused=True)


@pytest.mark.parametrize("gradient", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_derivative_by_the_bias_is_refused(frozen: bool, gradient: str) -> None:
    hidden, head, target = _batch()
    bias = torch.randn(V, requires_grad=True)
    if frozen:
        hidden, head = hidden.detach(), head.detach()
    loss = _loss(hidden, head, target, linear_bias=bias, gradient=gradient)
    (grad,) = torch.autograd.grad(loss, bias if frozen else head, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(grad.square().sum(), bias, allow_unused=True)


def test_the_tape_holds_no_hidden_states() -> None:
    """With gradients in forward: their gradient is kept, and they are not."""
    hidden, head, target = _batch()
    states = hidden * 1
    gone = weakref.ref(states)
    loss = _loss(states, head, target, gradient="forward")
    del states
    assert gone() is None
    loss.backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_zloss": True}])
def test_forward_needs_one_incoming_gradient(options: dict[str, Any]) -> None:
    hidden, head, target = _batch()
    options = {"lse_square_scale": 0.1, **options}
    with pytest.raises(ValueError, match="gradient='forward' needs one incoming gradient"):
        linear_cross_entropy(hidden, head, target, gradient="forward", **options)
    linear_cross_entropy(hidden, head, target, gradient="auto", **options)


def test_the_part_of_z_has_a_gradient_of_its_own() -> None:
    hidden, head, target = _batch(torch.float64)
    loss, zloss = linear_cross_entropy(
        hidden, head, target, lse_square_scale=0.1, return_zloss=True
    )
    lse = F.linear(hidden, head).logsumexp(1)
    plain = F.cross_entropy(F.linear(hidden, head), target)
    want = torch.autograd.grad(2 * plain + 5 * 0.1 * lse.square().mean(), (hidden, head))
    got = torch.autograd.grad(2 * loss + 3 * zloss, (hidden, head))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", WAYS)
def test_the_incoming_gradient_multiplies(gradient: str) -> None:
    hidden, head, target = _batch(torch.float64)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), target) * -2.5, hidden)
    got = torch.autograd.grad(_loss(hidden, head, target, gradient=gradient) * -2.5, hidden)
    torch.testing.assert_close(got[0], plain[0])


# Narrow dtypes


@pytest.mark.parametrize("gradient", WAYS)
def test_small_coefficients_in_fp16_do_not_become_zero(gradient: str) -> None:
    """1 / N is 1e-4 and p is 1e-4: their product is no number of fp16, before the loss scale."""
    rows, classes, loss_scale = 8192, 512, 2.0**16
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(rows, H, generator=g) * 0.1).half().requires_grad_()
    head = (torch.randn(classes, H, generator=g) * 0.1).half().requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)  # every other class has small coefficients only
    loss = _loss(hidden, head, target, gradient=gradient)
    (got,) = torch.autograd.grad(loss * loss_scale, head)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    whole = F.cross_entropy(F.linear(wide[0], wide[1]), target) * loss_scale
    (want,) = torch.autograd.grad(whole, wide[1])
    error = (got.double() - want)[1:].norm() / want[1:].norm()
    assert bool((got[1:] != 0).any(1).all())
    assert float(error) < 4e-3


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("gradient", WAYS)
def test_many_chunks_lose_nothing_in_bf16(gradient: str, rows: int) -> None:
    """The weight's gradient is added up in fp32: no worse than one product in bf16."""
    hidden, head, target = _batch(torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    whole = F.cross_entropy(F.linear(wide[0], wide[1]), target)
    (want,) = torch.autograd.grad(whole, wide[1])
    plain = F.cross_entropy(F.linear(hidden, head).float(), target)
    (torchs,) = torch.autograd.grad(plain, head)
    scratch = scratch_for(rows, V, torch.bfloat16)
    (got,) = torch.autograd.grad(
        _loss(hidden, head, target, gradient=gradient, scratch_mib=scratch), head
    )
    assert float((got - want).norm()) <= 1.5 * float((torchs - want).norm())


@pytest.mark.parametrize("gradient", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_converts_as_linear_does(dtype: torch.dtype, gradient: str) -> None:
    """A bias too; hidden states that a layer before left in bf16 meet a head in fp32."""
    hidden, head, target = _batch()
    hidden = hidden.detach().to(dtype).requires_grad_()
    bias = torch.randn(V, requires_grad=True)
    leaves = (hidden, head, bias)
    with torch.autocast("cpu", torch.bfloat16):
        got = _loss(hidden, head, target, linear_bias=bias, gradient=gradient)
        want = F.cross_entropy(F.linear(*leaves).float(), target)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for leaf, a, b in zip(
        leaves, torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        assert a.dtype == leaf.dtype
        assert float((a - b).norm() / b.norm()) < 2e-2


def test_autocast_leaves_fp64_alone() -> None:
    hidden, head, target = _batch(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = linear_token_statistics(hidden, head, target)
    assert statistics.lse is not None
    assert statistics.lse.dtype == torch.float64


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", WAYS)
def test_memory_is_gradients_and_a_chunk(gradient: str, dtype: torch.dtype) -> None:
    rows, width, classes, chunk = 2048, 64, 8192, 256
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    head = torch.randn(classes, width).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    scratch = scratch_for(chunk, classes, dtype)
    run = functools.partial(_step, hidden, head, target, gradient=gradient, scratch_mib=scratch)
    run()
    hidden.grad = head.grad = None
    sizes = allocations(run)
    logits = rows * classes * dtype.itemsize
    # fp32 sums of narrow gradients lie beside the gradients they become.
    wide = 1 if dtype == torch.float32 else 3
    allowed = (hidden.nbytes + head.nbytes) * wide + chunk * classes * dtype.itemsize + (2 << 20)
    assert peak(sizes) <= allowed < logits
    assert max(sizes) <= max(head.nbytes * (wide + 1) // 2, chunk * classes * dtype.itemsize + 64)


@pytest.mark.parametrize("gradient", WAYS)
def test_the_gradient_of_a_bias_widens_no_chunk(gradient: str) -> None:
    rows, classes, chunk = 2048, 8192, 256
    hidden = torch.randn(rows, H).bfloat16().requires_grad_()
    head = torch.randn(classes, H).bfloat16().requires_grad_()
    bias, target = torch.zeros(classes).bfloat16().requires_grad_(), torch.randint(classes, (rows,))
    scratch = scratch_for(chunk, classes, torch.bfloat16)
    run = functools.partial(
        _step, hidden, head, target, linear_bias=bias, gradient=gradient, scratch_mib=scratch
    )
    run()
    assert max(allocations(run)) <= chunk * classes * 2 + 64


def test_recomputed_there_is_one_gradient_of_the_hidden_states() -> None:
    rows, width, classes = 256, 4096, 512
    hidden = torch.randn(rows, width, requires_grad=True)
    head, target = torch.randn(classes, width), torch.randint(classes, (rows,))
    run = functools.partial(_step, hidden, head, target, gradient="recompute")
    run()
    hidden.grad = None
    assert peak(allocations(run)) <= hidden.nbytes + rows * classes * 4 + (1 << 20)


@pytest.mark.parametrize("gradient", WAYS)
def test_by_default_at_most_half_of_the_logits_exist(gradient: str) -> None:
    rows, width, classes = 1024, 64, 4096  # 16 MiB of logits, far below the budget
    hidden = torch.randn(rows, width, requires_grad=True)
    head = torch.randn(classes, width, requires_grad=True)
    run = functools.partial(_step, hidden, head, torch.randint(classes, (rows,)), gradient=gradient)
    run()
    hidden.grad = head.grad = None
    half = rows * classes * 4 // 2
    assert peak(allocations(run)) <= hidden.nbytes + head.nbytes + half + (1 << 20)


def test_statistics_hold_no_logits() -> None:
    rows, width, classes = 2048, 64, 8192
    hidden, head = torch.randn(rows, width), torch.randn(classes, width)
    target = torch.randint(classes, (rows,))
    run = functools.partial(
        linear_token_statistics, hidden, head, target, entropy=True, argmax=True, scratch_mib=4
    )
    run()
    assert peak(allocations(run)) <= (4 << 20) + 200 * rows + (1 << 20)
