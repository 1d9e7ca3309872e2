"""The stand-in operator: its arithmetic, and torch_npu's own autograd above it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ..npu_sim.operators import OperatorCall

# arithmetic
from .operator_calls import ROUNDING, C, N, backward, forward, some_logits, some_target


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_forward_is_cross_entropy(
    dtype: torch.dtype, reduction: str, ignore_index: int, weighted: bool, smoothing: float
) -> None:
    x, target = some_logits(dtype), some_target()
    target[5] = ignore_index
    weight = torch.rand(C) + 0.5 if weighted else None
    loss, log_prob, _, _ = forward(x, target, weight, reduction, ignore_index, smoothing)
    expected = F.cross_entropy(
        x.double(),
        target,
        None if weight is None else weight.double(),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )
    assert loss.shape == ((N,) if reduction == "none" else (1,))
    assert log_prob.shape == x.shape
    assert loss.dtype == log_prob.dtype == dtype
    pairs = ((loss, expected.reshape(loss.shape)), (log_prob, x.double().log_softmax(1)))
    for actual, exact in pairs:
        torch.testing.assert_close(actual.double(), exact, rtol=ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_rounded_once(dtype: torch.dtype) -> None:
    x, target = some_logits(dtype), some_target()
    narrow = forward(x, target, None, "none")
    wide = forward(x.float(), target, None, "none")
    for index in (0, 1):
        assert torch.equal(narrow[index], wide[index].to(dtype))


def test_lse_is_rounded_before_it_is_subtracted() -> None:
    """As in the kernel: near 1000 the loss is a multiple of fp32's step there, 2^-14."""
    x = some_logits() * 0.1 + 1000
    loss, log_prob, _, _ = forward(x, some_target(), None, "none")
    assert torch.equal((loss * 2**14).round(), loss * 2**14)
    assert (log_prob.double() - x.double().log_softmax(1)).abs().max() > 1e-6


def test_an_ignored_row_still_has_its_log_prob() -> None:
    x, target = some_logits(), some_target()
    target[3] = -100
    loss, log_prob, _, _ = forward(x, target, None, "none")
    assert loss[3] == 0
    torch.testing.assert_close(log_prob[3], x[3].log_softmax(0))


def test_a_row_of_minus_infinity_is_nan_and_one_column_of_it_is_not() -> None:
    x, target = some_logits(), some_target()
    x[2] = -torch.inf
    x[4, 0], target[4] = -torch.inf, 1
    loss, log_prob, _, _ = forward(x, target, None, "none")
    assert loss[2].isnan()
    assert log_prob[2].isnan().all()
    assert loss[4].isfinite()
    assert log_prob[4, 0] == -torch.inf


def test_mean_over_no_row_is_nan() -> None:
    loss, _, _, _ = forward(some_logits(), torch.full((N,), 7), None, "mean", 7)
    assert loss.isnan().all()


def test_the_other_outputs_are_poison() -> None:
    for reduction, size in (("none", N), ("mean", 1), ("sum", 1)):
        for dtype in ROUNDING:
            _, _, zloss, lse = forward(some_logits(dtype), some_target(), None, reduction)
            assert (zloss.shape, lse.shape) == ((size,), (N,))
            assert zloss.isnan().all()
            assert lse.isnan().all()
            assert zloss.dtype == lse.dtype == dtype


def test_any_layout_is_taken() -> None:
    wide, target = some_logits(columns=2 * C).to("npu"), some_target(2 * N).to("npu")
    operator = torch.ops.npu.npu_cross_entropy_loss.default
    dense = operator(wide[:, ::2].contiguous(), target[::2].contiguous(), None, "none")
    assert torch.equal(operator(wide[:, ::2], target[::2], None, "none")[0], dense[0])
    turned = wide[:, ::2].t().contiguous().t()
    assert torch.equal(operator(turned, target[::2], None, "none")[1], dense[1])


def test_inputs_are_left_alone() -> None:
    x, target = some_logits().to("npu"), some_target().to("npu")
    loss, log_prob, _, _ = torch.ops.npu.npu_cross_entropy_loss.default(x, target, None, "none")
    tensors = (x, target, loss, log_prob)
    before = [tensor.clone() for tensor in tensors]
    torch.ops.npu.npu_cross_entropy_loss.default(x, target, None, "none")
    torch.ops.npu.npu_cross_entropy_loss_backward.default(loss, log_prob, target, reduction="none")
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("reduction", "weighted"),  # mean with a weight is refused: see below
    [("none", False), ("none", True), ("mean", False), ("sum", False), ("sum", True)],
)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_backward_is_the_gradient(dtype: torch.dtype, reduction: str, weighted: bool) -> None:
    x, target = some_logits(), some_target()
    target[5] = -100
    weight = torch.rand(C) + 0.5 if weighted else None
    leaf = x.double().requires_grad_()
    loss = F.cross_entropy(
        leaf, target, None if weight is None else weight.double(), reduction=reduction
    )
    grad_loss = torch.randn(N if reduction == "none" else 1)
    loss.backward(grad_loss.double().reshape(loss.shape))
    assert leaf.grad is not None
    log_prob = x.log_softmax(1)
    exact = backward(grad_loss, log_prob, target, weight, reduction=reduction)
    torch.testing.assert_close(exact.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    narrow = (grad_loss.to(dtype), log_prob.to(dtype))
    rounded = backward(*narrow, target, weight, reduction=reduction)
    wide = (narrow[0].float(), narrow[1].float())
    once = backward(*wide, target, weight, reduction=reduction).to(dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, once)


# torch_npu's own autograd


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_autograd_of_torch_npu(
    dtype: torch.dtype, reduction: str, calls: list[OperatorCall]
) -> None:
    import torch_npu

    x, target = some_logits(dtype), some_target()
    leaf = x.to("npu").requires_grad_()
    loss, log_prob, _, _ = torch_npu.npu_cross_entropy_loss(
        leaf, target.to("npu"), reduction=reduction
    )
    assert not log_prob.requires_grad
    assert type(loss.grad_fn).__name__ == "NpuCrossEntropyLossBackward0"
    loss.sum().backward()
    reference = x.double().requires_grad_()
    F.cross_entropy(reference, target, reduction=reduction).sum().backward()
    assert leaf.grad is not None
    assert reference.grad is not None
    assert leaf.grad.device == leaf.device
    # Saved as log_prob in the input's dtype: twice the rounding.
    error = (leaf.grad.cpu().double() - reference.grad).abs().max()
    assert error < 8 * ROUNDING[dtype]
    names = ["npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"]
    assert [(call.name, call.rows, call.columns, call.dtype) for call in calls] == [
        (name, N, C, dtype) for name in names
    ]
    assert {call.reduction for call in calls} == {reduction}


def test_a_gradient_through_zloss_is_refused() -> None:
    leaf = some_logits().to("npu").requires_grad_()
    _, _, zloss, _ = torch.ops.npu.npu_cross_entropy_loss.default(leaf, some_target().to("npu"))
    with pytest.raises(RuntimeError, match="grad_zloss must be None"):
        zloss.sum().backward()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"label_smoothing": 0.1, "reduction": "none"}, "no gradient with label_smoothing=0.1"),
        ({"ignore_index": 100}, "with a gradient, reduction='mean' takes no weight and no other"),
    ],
)
def test_a_gradient_with_these_options_is_refused(options: dict[str, Any], rule: str) -> None:
    operator = torch.ops.npu.npu_cross_entropy_loss.default
    leaf, target = some_logits().to("npu").requires_grad_(), some_target().to("npu")
    with pytest.raises(RuntimeError, match=rule):
        operator(leaf, target, **options)
    with torch.no_grad():
        operator(leaf, target, **options)
