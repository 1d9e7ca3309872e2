"""The stand-in operator: its arithmetic, what it refuses, and torch_npu's own autograd above it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ..npu_sim.operators import OperatorCall

N, C = 37, 53
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _logits(dtype: torch.dtype = torch.float32, rows: int = N, columns: int = C) -> torch.Tensor:
    return (torch.randn(rows, columns) * 4).to(dtype)


def _target(rows: int = N, columns: int = C) -> torch.Tensor:
    return torch.randint(0, columns, (rows,))


def _forward(input: torch.Tensor, target: torch.Tensor, *args: Any, **options: Any) -> Any:
    """On device npu; results on the CPU."""
    operator = torch.ops.npu.npu_cross_entropy_loss.default
    args = tuple(a.to("npu") if isinstance(a, torch.Tensor) else a for a in args)
    results = operator(input.to("npu"), target.to("npu"), *args, **options)
    assert all(result.device.type == "npu" for result in results)
    return [result.cpu() for result in results]


def _backward(
    grad_loss: torch.Tensor,
    log_prob: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    operator = torch.ops.npu.npu_cross_entropy_loss_backward.default
    weight = None if weight is None else weight.to("npu")
    inputs = (grad_loss.to("npu"), log_prob.to("npu"), target.to("npu"), weight)
    gradient: torch.Tensor = operator(*inputs, **options)
    return gradient.cpu()


# ---- arithmetic


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_forward_is_cross_entropy(
    dtype: torch.dtype, reduction: str, ignore_index: int, weighted: bool, smoothing: float
) -> None:
    x, target = _logits(dtype), _target()
    target[5] = ignore_index
    weight = torch.rand(C) + 0.5 if weighted else None
    loss, log_prob, _, _ = _forward(x, target, weight, reduction, ignore_index, smoothing)
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
    x, target = _logits(dtype), _target()
    narrow = _forward(x, target, None, "none")
    wide = _forward(x.float(), target, None, "none")
    for index in (0, 1):
        assert torch.equal(narrow[index], wide[index].to(dtype))


def test_lse_is_rounded_before_it_is_subtracted() -> None:
    """As in the kernel: near 1000 the loss is a multiple of fp32's step there, 2^-14."""
    x = _logits() * 0.1 + 1000
    loss, log_prob, _, _ = _forward(x, _target(), None, "none")
    assert torch.equal((loss * 2**14).round(), loss * 2**14)
    assert (log_prob.double() - x.double().log_softmax(1)).abs().max() > 1e-6


def test_an_ignored_row_still_has_its_log_prob() -> None:
    x, target = _logits(), _target()
    target[3] = -100
    loss, log_prob, _, _ = _forward(x, target, None, "none")
    assert loss[3] == 0
    torch.testing.assert_close(log_prob[3], x[3].log_softmax(0))


def test_a_row_of_minus_infinity_is_nan_and_one_column_of_it_is_not() -> None:
    x, target = _logits(), _target()
    x[2] = -torch.inf
    x[4, 0], target[4] = -torch.inf, 1
    loss, log_prob, _, _ = _forward(x, target, None, "none")
    assert loss[2].isnan()
    assert log_prob[2].isnan().all()
    assert loss[4].isfinite()
    assert log_prob[4, 0] == -torch.inf


def test_mean_over_no_row_is_nan() -> None:
    loss, _, _, _ = _forward(_logits(), torch.full((N,), 7), None, "mean", 7)
    assert loss.isnan().all()


def test_the_other_outputs_are_poison() -> None:
    for reduction, size in (("none", N), ("mean", 1), ("sum", 1)):
        for dtype in ROUNDING:
            _, _, zloss, lse = _forward(_logits(dtype), _target(), None, reduction)
            assert (zloss.shape, lse.shape) == ((size,), (N,))
            assert zloss.isnan().all()
            assert lse.isnan().all()
            assert zloss.dtype == lse.dtype == dtype


def test_any_layout_is_taken() -> None:
    wide, target = _logits(columns=2 * C).to("npu"), _target(2 * N).to("npu")
    operator = torch.ops.npu.npu_cross_entropy_loss.default
    dense = operator(wide[:, ::2].contiguous(), target[::2].contiguous(), None, "none")
    assert torch.equal(operator(wide[:, ::2], target[::2], None, "none")[0], dense[0])
    turned = wide[:, ::2].t().contiguous().t()
    assert torch.equal(operator(turned, target[::2], None, "none")[1], dense[1])


def test_inputs_are_left_alone() -> None:
    x, target = _logits().to("npu"), _target().to("npu")
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
    x, target = _logits(), _target()
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
    exact = _backward(grad_loss, log_prob, target, weight, reduction=reduction)
    torch.testing.assert_close(exact.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    narrow = (grad_loss.to(dtype), log_prob.to(dtype))
    rounded = _backward(*narrow, target, weight, reduction=reduction)
    wide = (narrow[0].float(), narrow[1].float())
    once = _backward(*wide, target, weight, reduction=reduction).to(dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, once)


# ---- torch_npu's own autograd


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_autograd_of_torch_npu(
    dtype: torch.dtype, reduction: str, calls: list[OperatorCall]
) -> None:
    import torch_npu

    x, target = _logits(dtype), _target()
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
    leaf = _logits().to("npu").requires_grad_()
    _, _, zloss, _ = torch.ops.npu.npu_cross_entropy_loss.default(leaf, _target().to("npu"))
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
    leaf, target = _logits().to("npu").requires_grad_(), _target().to("npu")
    with pytest.raises(RuntimeError, match=rule):
        operator(leaf, target, **options)
    with torch.no_grad():
        operator(leaf, target, **options)


# ---- what it refuses


def _forward_error(calls: list[OperatorCall], *args: Any, **options: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        _forward(*args, **options)
    assert not calls
    line = str(caught.value)
    assert line.startswith("npu_cross_entropy_loss: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((C,), "input has shape [53], not [N, C]"),
        ((N, 1, C), "input has shape [37, 1, 53], not [N, C]"),
        ((0, C), "input has shape [0, 53]: it is empty"),
        ((N, 0), "input has shape [37, 0]: it is empty"),
        ((200_001, 2), "N is 200001, more than 200000"),
    ],
)
def test_shape_of_input(calls: list[OperatorCall], shape: tuple[int, ...], rule: str) -> None:
    assert rule in _forward_error(calls, torch.zeros(shape), torch.zeros(shape[0]).long())


def test_the_most_rows_are_taken(calls: list[OperatorCall]) -> None:
    _forward(torch.zeros(200_000, 2), torch.zeros(200_000).long(), None, "none")
    assert [call.rows for call in calls] == [200_000]


def test_dtypes(calls: list[OperatorCall]) -> None:
    x, target = _logits(), _target()
    assert "input is torch.int32" in _forward_error(calls, x.int(), target)
    fp64 = torch.zeros(N, C, dtype=torch.float64, device="npu")
    assert "input is torch.float64" in _forward_error(calls, fp64, target)
    assert "target is torch.int32; A2 and A3" in _forward_error(calls, x, target.int())
    half = torch.ones(C, dtype=torch.bfloat16)
    assert "weight is torch.bfloat16, not fp32" in _forward_error(calls, x.bfloat16(), target, half)


def test_other_shapes(calls: list[OperatorCall]) -> None:
    x, target = _logits(), _target()
    assert "target has shape [36]" in _forward_error(calls, x, target[1:])
    assert "target has shape [37, 1]" in _forward_error(calls, x, target[:, None])
    assert "weight has shape [54]" in _forward_error(calls, x, target, torch.ones(C + 1))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"reduction": "batchmean"}, "reduction='batchmean' is not known"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 is not in [0, 1]"),
        ({"label_smoothing": 1.1}, "label_smoothing=1.1 is not in [0, 1]"),
        ({"lse_square_scale_for_zloss": 1e-4}, "no CANN has z-loss enabled"),
        ({"return_zloss": True}, "no CANN has z-loss enabled"),
    ],
)
def test_options(calls: list[OperatorCall], options: dict[str, Any], rule: str) -> None:
    assert rule in _forward_error(calls, _logits(), _target(), **options)


@pytest.mark.parametrize("bad", [-101, -1, C, C + 1, 2**40])
def test_a_target_outside_the_classes(calls: list[OperatorCall], bad: int) -> None:
    target = _target()
    target[11] = bad
    line = f"target[11] is {bad}: it is not in [0, 53)"
    assert line in _forward_error(calls, _logits(), target)
    log_prob = _logits().log_softmax(1)
    with pytest.raises(RuntimeError, match=r"target\[11\] is "):
        _backward(torch.ones(1), log_prob, target)
    assert not calls


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, C, C + 9])
def test_ignore_index_by_version(
    calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch, ignore_index: int
) -> None:
    x, target = _logits(), _target()
    target[target == ignore_index] = 4
    target[11] = ignore_index
    options: dict[str, Any] = {"reduction": "none", "ignore_index": ignore_index}
    monkeypatch.setenv("NPU_SIM_CANN", "9.0.0")
    loss, _, _, _ = _forward(x, target, **options)
    assert (loss == 0).nonzero().tolist() == [[11]]
    gradient = _backward(torch.ones(N), x.log_softmax(1), target, **options)
    assert (gradient == 0).all(1).nonzero().tolist() == [[11]]
    calls.clear()
    monkeypatch.setenv("NPU_SIM_CANN", "8.5.0")
    if ignore_index >= 0:
        assert torch.equal(_forward(x, target, **options)[0], loss)
    else:
        line = f"target[11] is {ignore_index}: CANN 8.5.0 reads out of bounds"
        assert line in _forward_error(calls, x, target, **options)
        with pytest.raises(RuntimeError, match="reads out of bounds"):
            _backward(torch.ones(N), x.log_softmax(1), target, **options)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"grad_loss": torch.ones(N).bfloat16()}, "grad_loss is torch.bfloat16 but log_prob is"),
        ({"grad_loss": torch.ones(1)}, "grad_loss has shape [1], reduction='none' wants [37]"),
        ({"reduction": "sum"}, "grad_loss has shape [37], reduction='sum' wants [1]"),
        ({"grad_loss": torch.ones(N, 1)}, "grad_loss has shape [37, 1]"),
        ({"log_prob": torch.zeros(N)}, "log_prob has shape [37], not [N, C]"),
        ({"target": torch.zeros(N).int()}, "target is torch.int32; A2 and A3"),
        ({"target": torch.zeros(N - 1).long()}, "target has shape [36]"),
        ({"weight": torch.ones(C).bfloat16()}, "weight is torch.bfloat16, not fp32"),
        ({"label_smoothing": 0.1}, "no gradient with label_smoothing=0.1"),
        ({"lse_square_scale_for_zloss": 0.1}, "no CANN has z-loss enabled"),
        ({"grad_zloss": torch.ones(N, device="meta")}, "no CANN has z-loss enabled"),
        ({"reduction": "mean", "grad_loss": torch.ones(1), "ignore_index": 3}, "takes no weight"),
        (
            {"reduction": "mean", "grad_loss": torch.ones(1), "weight": torch.ones(C)},
            "takes no weight",
        ),
    ],
)
def test_backward_refuses(calls: list[OperatorCall], changed: dict[str, Any], rule: str) -> None:
    arguments: dict[str, Any] = {
        "grad_loss": torch.ones(N),
        "log_prob": _logits().log_softmax(1),
        "target": _target(),
        "reduction": "none",
    }
    if "grad_zloss" in changed:
        changed = {"grad_zloss": torch.ones(N, device="npu")}
    with pytest.raises(RuntimeError) as caught:
        _backward(**{**arguments, **changed})
    assert rule in str(caught.value)
    assert not calls


def test_the_cpu_has_no_such_operator() -> None:
    with pytest.raises(NotImplementedError):
        torch.ops.npu.npu_cross_entropy_loss.default(_logits(), _target())


# ---- the kernel for sharded vocabularies


def _fused(*args: Any, **options: Any) -> list[torch.Tensor]:
    """On device npu; results on the CPU."""
    operator = torch.ops.npu.npu_fused_cross_entropy_loss_with_max_sum.default
    there = [a.to("npu") for a in args]
    options = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return [result.cpu() for result in operator(*there, **options)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("cann", ["8.5.0", "9.0.0"])
def test_the_fused_kernel(
    cann: str, dtype: torch.dtype, calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax in fp32 from logits of any dtype; sums need not be sums."""
    monkeypatch.setenv("NPU_SIM_CANN", cann)
    x = _logits(dtype)
    x[4, 9] = -torch.inf
    m, predicted = x.float().amax(1), torch.randn(N)
    s = (x.double() - m[:, None]).exp().sum(1).float()
    s[3], s[5] = -2.0, torch.inf
    loss, softmax = _fused(m, s, predicted, vocab_parallel_logits=x)
    exact = (x.double() - m.double()[:, None]).exp() / s.double()[:, None]
    assert softmax.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(softmax.double(), exact, rtol=1e-6, atol=1e-7)
    assert bool((softmax[5] == 0).all())
    assert loss[3].isnan()
    torch.testing.assert_close(loss[0], s[0].log() - predicted[0])
    name = "npu_fused_cross_entropy_loss_with_max_sum"
    assert calls == [OperatorCall(name, N, C, dtype)]


def test_the_fused_kernel_gives_its_loss_alone(calls: list[OperatorCall]) -> None:
    row = torch.ones(N)
    loss, softmax = _fused(row, row, row)
    assert (loss.shape, softmax.numel()) == ((N,), 0)
    assert not calls


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"top": torch.ones(N, dtype=torch.bfloat16)}, "logits_max is torch.bfloat16, not fp32"),
        ({"total": torch.ones(N + 1)}, r"sum_exp_logits has shape \[38\], not \[37\]"),
        ({"predicted": torch.ones(N, 1)}, r"predicted_logits has shape \[37, 1\], not \[37\]"),
        ({"x": torch.ones(N, 2, 3)}, r"vocab_parallel_logits has shape \[37, 2, 3\], not \[N, V\]"),
        ({"x": torch.ones(N, 3).int()}, "vocab_parallel_logits is torch.int32, not fp16"),
        ({"x": torch.ones(N + 1, 3)}, r"has shape \[38, 3\], the row vectors have \[37\]"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1: only 0 is served"),
        ({"input": torch.ones(N, 4)}, "input and weight are reserved"),
        ({"cann": "8.3.0"}, "aclnnFusedCrossEntropyLossWithMaxSum is not in libopapi.so of CANN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_fused_kernel_refuses(
    change: dict[str, Any], rule: str, calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "top": torch.ones(N),
        "total": torch.ones(N),
        "predicted": torch.ones(N),
    }
    given |= {"x": torch.ones(N, C), **change}
    monkeypatch.setenv("NPU_SIM_CANN", given.pop("cann", "9.0.0"))
    args = [given.pop(name) for name in ("top", "total", "predicted")]
    name = "npu_fused_cross_entropy_loss_with_max_sum"
    with pytest.raises(RuntimeError, match=f"{name}: .*{rule}"):
        _fused(*args, vocab_parallel_logits=given.pop("x"), **given)
    assert not calls
