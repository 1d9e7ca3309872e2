"""The cross-entropy operators of torch_npu, as the CANN kernels compute them, and strict.

Whatever the documents forbid, and whatever the real kernel would answer with memory that is not
its own, raises RuntimeError here with the rule. The arithmetic is the kernel's: fp32 inside, in
its order, each output rounded once to the input's dtype.

NPU_SIM_CANN chooses the version: 8.5.0 reads out of bounds at any negative target, ignore_index
included; 9.0.0 ignores a row whose target equals ignore_index, whatever its sign. Before 8.5.0 the
fused operators for sharded vocabularies, ``fused_max_sum`` and those of ``linear``, are not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import linear
from .device import on_cpu
from .strict import OperatorCall, calls, require_sharded_operators
from .strict import number as _number
from .strict import require as _require

__all__ = ["FUSED_NAMES", "FUSED_SCHEMA", "KERNELS", "OperatorCall", "backward", "calls", "forward"]
MOST_ROWS = 200_000  # per-row buffers of the kernel
LOWEST = -3.4e38  # where the kernel's maximum starts
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def forward(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
    *,
    wants_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log_prob, poison, poison) for npu_cross_entropy_loss, on the CPU."""
    _check_arguments(input, target, weight, reduction, "input")
    _require(0 <= label_smoothing <= 1, f"label_smoothing={label_smoothing} is not in [0, 1]")
    _require(
        lse_square_scale_for_zloss == 0 and not return_zloss,
        "no CANN has z-loss enabled: lse_square_scale_for_zloss must be 0, return_zloss False",
    )
    if wants_gradient:
        _check_gradient(reduction, weight, ignore_index, label_smoothing)
    rows, columns = input.shape
    kept = _kept_rows(target, columns, ignore_index)

    # lse is rounded to fp32 before it is subtracted: near 1000 this costs three digits, there too.
    x = input.float().contiguous()
    largest = x.amax(1).clamp_min(LOWEST)
    lse = (x - largest[:, None]).exp_().sum(1).log() + largest
    log_prob = x - lse[:, None]

    column = target.where(kept, 0)[:, None]
    row_weight = torch.ones(rows) if weight is None else weight[column[:, 0]]
    row_weight = row_weight.where(kept, 0)
    loss = -(log_prob.gather(1, column)[:, 0].where(kept, 0) * row_weight)
    if label_smoothing:
        weighted = log_prob if weight is None else log_prob * weight
        smooth = -weighted.sum(1).where(kept, 0)
        loss = (1 - label_smoothing) * loss + label_smoothing / columns * smooth
    if reduction != "none":
        loss = loss.sum().reshape(1)
    if reduction == "mean":
        loss = loss / row_weight.sum()

    _record("npu_cross_entropy_loss", input, weight, reduction, ignore_index, label_smoothing)
    # Outputs 2 and 3 have no meaning while z-loss is not enabled: whoever reads them sees NaN.
    poison = torch.full((rows,), float("nan"), dtype=input.dtype)
    loss = loss.to(input.dtype)
    return loss, log_prob.to(input.dtype), poison[: loss.numel()].clone(), poison


def backward(
    grad_loss: torch.Tensor,
    log_prob: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    grad_zloss: torch.Tensor | None = None,
    lse_for_zloss: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
) -> torch.Tensor:
    """The gradient of the input, for npu_cross_entropy_loss_backward, on the CPU.

    lse_for_zloss is not looked at: torch_npu's own formula always passes output 3 on.
    """
    _check_arguments(log_prob, target, weight, reduction, "log_prob")
    rows, columns = log_prob.shape
    size = rows if reduction == "none" else 1
    _require(
        grad_zloss is None and lse_square_scale_for_zloss == 0,
        "no CANN has z-loss enabled: grad_zloss must be None, lse_square_scale_for_zloss 0",
    )
    _require(
        grad_loss.dtype == log_prob.dtype,
        f"grad_loss is {grad_loss.dtype} but log_prob is {log_prob.dtype}",
    )
    _require(
        grad_loss.numel() == size and grad_loss.dim() <= 1,
        f"grad_loss has shape {list(grad_loss.shape)}, reduction={reduction!r} wants [{size}]",
    )
    _check_gradient(reduction, weight, ignore_index, label_smoothing)
    kept = _kept_rows(target, columns, ignore_index)

    column = target.where(kept, 0)[:, None]
    row_weight = torch.ones(rows) if weight is None else weight[column[:, 0]]
    row_weight = row_weight.where(kept, 0)
    if reduction == "mean":
        row_weight = row_weight / row_weight.sum()
    scale = (grad_loss.float() * row_weight)[:, None]
    gradient = log_prob.float().contiguous().exp() * scale
    gradient.scatter_add_(1, column, -scale)

    _record(
        "npu_cross_entropy_loss_backward",
        log_prob,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
    )
    return gradient.to(log_prob.dtype)


FUSED_NAMES = (
    "npu_fused_cross_entropy_loss_with_max_sum",
    "fused_cross_entropy_loss_with_max_sum",
)
FUSED_SCHEMA = (
    "(Tensor logits_max, Tensor sum_exp_logits, Tensor predicted_logits, *, "
    "float? label_smoothing=0., Tensor? input=None, Tensor? weight=None, "
    "Tensor? vocab_parallel_logits=None) -> (Tensor, Tensor)"
)


def fused_max_sum(
    logits_max: torch.Tensor,
    sum_exp_logits: torch.Tensor,
    predicted_logits: torch.Tensor,
    *,
    label_smoothing: float | None = 0.0,
    input: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    vocab_parallel_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [N], softmax [N, V] in fp32) of FusedCrossEntropyLossWithMaxSum, on the CPU.

    Nothing asks whether the row vectors are true statistics of the logits: nor does the kernel.
    """
    name = FUSED_NAMES[0]

    def require(holds: bool, rule: str) -> None:
        _require(holds, rule, name)

    require_sharded_operators("aclnnFusedCrossEntropyLossWithMaxSum", name)
    rows = logits_max.numel()
    vectors = {
        "logits_max": logits_max,
        "sum_exp_logits": sum_exp_logits,
        "predicted_logits": predicted_logits,
    }
    for what, vector in vectors.items():
        require(vector.dtype == torch.float32, f"{what} is {vector.dtype}, not fp32")
        require(vector.shape == (rows,), f"{what} has shape {list(vector.shape)}, not [{rows}]")
    require(not label_smoothing, f"label_smoothing is {label_smoothing}: only 0 is served")
    require(input is None and weight is None, "input and weight are reserved: they must be None")
    loss = sum_exp_logits.log() - predicted_logits
    x = vocab_parallel_logits
    if x is None:
        return loss, torch.empty(0)
    require(x.dim() == 2, f"vocab_parallel_logits has shape {list(x.shape)}, not [N, V]")
    require(x.dtype in DTYPES, f"vocab_parallel_logits is {x.dtype}, not fp16, bf16 or fp32")
    require(
        x.shape[0] == rows and x.numel() > 0,
        f"vocab_parallel_logits has shape {list(x.shape)}, the row vectors have [{rows}]",
    )
    softmax = (x.float().contiguous() - logits_max[:, None]).exp_()
    softmax *= sum_exp_logits.reciprocal()[:, None]
    calls.append(OperatorCall(name, rows, x.shape[1], x.dtype))
    return loss, softmax


def cast(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """npu_dtype_cast, which torch_npu puts under ``Tensor.to``."""
    result: torch.Tensor = torch.ops.aten._to_copy.default(input, dtype=dtype)
    return result


def _forward_kernel(input: torch.Tensor, *args: Any, **options: Any) -> Any:
    # Known here only: the CPU tensor on the same memory is not part of anybody's graph.
    wants_gradient = input.requires_grad and torch.is_grad_enabled()
    return on_cpu(forward)(input, *args, wants_gradient=wants_gradient, **options)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_cross_entropy_loss": _forward_kernel,
    "npu_cross_entropy_loss_backward": on_cpu(backward),
    **dict.fromkeys(FUSED_NAMES, on_cpu(fused_max_sum)),
    **dict.fromkeys(linear.FORWARD_NAMES, on_cpu(linear.online_max_sum)),
    **dict.fromkeys(linear.BACKWARD_NAMES, on_cpu(linear.backward)),
    "npu_dtype_cast": on_cpu(cast),
    "_npu_dtype_cast": on_cpu(cast),
}


def _check_arguments(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    name: str,
) -> None:
    _require(input.dim() == 2, f"{name} has shape {list(input.shape)}, not [N, C]")
    _require(input.dtype in DTYPES, f"{name} is {input.dtype}, not fp16, bf16 or fp32")
    rows, columns = input.shape
    _require(rows > 0 and columns > 0, f"{name} has shape {list(input.shape)}: it is empty")
    _require(rows <= MOST_ROWS, f"N is {rows}, more than {MOST_ROWS}")
    _require(target.dtype == torch.int64, f"target is {target.dtype}; A2 and A3 take int64 only")
    _require(
        target.shape == (rows,), f"target has shape {list(target.shape)}, {name} wants [{rows}]"
    )
    if weight is not None:
        _require(weight.dtype == torch.float32, f"weight is {weight.dtype}, not fp32")
        _require(
            weight.shape == (columns,),
            f"weight has shape {list(weight.shape)}, {name} wants [{columns}]",
        )
    _require(reduction in ("none", "mean", "sum"), f"reduction={reduction!r} is not known")


def _check_gradient(
    reduction: str, weight: torch.Tensor | None, ignore_index: int, label_smoothing: float
) -> None:
    _require(label_smoothing == 0, f"no gradient with label_smoothing={label_smoothing}")
    _require(
        reduction != "mean" or (weight is None and ignore_index == -100),
        "with a gradient, reduction='mean' takes no weight and no other ignore_index",
    )


def _kept_rows(target: torch.Tensor, columns: int, ignore_index: int) -> torch.Tensor:
    """Which rows are not ignored; raises where the kernel would read another row's memory."""
    version = os.environ.get("NPU_SIM_CANN", "9.0.0")
    if _number(version) < (9, 0):
        bad = target < 0
        _require(
            not bool(bad.any()), _bad_target(target, bad, f"CANN {version} reads out of bounds")
        )
    kept = target != ignore_index
    bad = kept & ((target < 0) | (target >= columns))
    _require(not bool(bad.any()), _bad_target(target, bad, f"it is not in [0, {columns})"))
    return kept


def _bad_target(target: torch.Tensor, bad: torch.Tensor, why: str) -> str:
    if not bool(bad.any()):
        return ""
    row = int(bad.nonzero()[0])
    return f"target[{row}] is {int(target[row])}: {why}"


def _record(
    name: str,
    matrix: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    calls.append(
        OperatorCall(
            name,
            matrix.shape[0],
            matrix.shape[1],
            matrix.dtype,
            reduction,
            ignore_index,
            label_smoothing,
            weight is not None,
        )
    )
