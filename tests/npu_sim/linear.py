"""The fused operators of a head and its loss, as the CANN kernels compute them, and strict.

The third of the family, which makes a loss of statistics, is ``operators.fused_max_sum``. Rules are
those of the aclnn functions' own checks, and of their kernels where the documents are wrong: ids
are compared in fp32, and the end of a shard does not belong to it.
"""

from __future__ import annotations

import torch

from .strict import OperatorCall, calls, require, require_sharded_operators

FORWARD_NAMES = ("npu_fused_linear_online_max_sum", "fused_linear_online_max_sum")
BACKWARD_NAMES = (
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward",
    "fused_linear_cross_entropy_loss_with_max_sum_grad",
)
FORWARD_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor target, int vocab_start_index, int vocab_end_index, "
    "bool return_logits=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor input, Tensor weight, Tensor target_mask, Tensor masked_target, "
    "float label_smoothing=0., Tensor? logits_max=None, Tensor? sum_exp_logits=None, "
    "Tensor? softmax=None) -> (Tensor, Tensor)"
)
WIDEST = 65_534
LEAST_IDS = 128
BITS = 2 ** torch.arange(8)


def online_max_sum(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    return_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(m, s, x_y - m [N] in fp32, mask [N / 8], masked target [N], nothing), on the CPU."""
    name = FORWARD_NAMES[0]
    require_sharded_operators("aclnnFusedLinearOnlineMaxSum", name)
    _check_matrices(input, weight, name)
    rows, ids = input.shape[0], weight.shape[0]
    require(ids > 0, "weight.size(0) is 0", name)
    require(
        input.shape[1] <= WIDEST, f"input.size(1) is {input.shape[1]}, more than {WIDEST}", name
    )
    _check_ids("target", target, rows, name)
    start, end = vocab_start_index, vocab_end_index
    require(0 <= start <= end, f"the shard is [{start}, {end})", name)
    require(
        end - start <= ids,
        f"the shard [{start}, {end}) has more ids than weight has rows, {ids}: the kernel would "
        "read beyond a row of logits",
        name,
    )
    require(
        not return_logits, "return_logits=True was seen to corrupt losses, and is not made", name
    )
    calls.append(OperatorCall(name, rows, ids, input.dtype))
    if rows == 0:  # the aclnn function returns before it starts a kernel
        nothing = torch.empty(0)
        return nothing, nothing, nothing, nothing.to(torch.uint8), target.clone(), nothing
    wide = target.float()
    masked = (wide < float(start)) | (wide >= float(end))
    column = (target - start).masked_fill(masked, 0)
    x = input.float() @ weight.float().t()
    m = x.amax(1)
    x -= m[:, None]
    difference = x.gather(1, column.long()[:, None])[:, 0].masked_fill(masked, 0.0)
    s = x.exp_().sum(1)
    bits = torch.ones(-(-rows // 8) * 8, dtype=torch.int64)
    bits[:rows] = masked
    mask = (bits.view(-1, 8) * BITS).sum(1).to(torch.uint8)
    return m, s, difference, mask, column.to(target.dtype), torch.empty(0)


def backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    target_mask: torch.Tensor,
    masked_target: torch.Tensor,
    label_smoothing: float = 0.0,
    logits_max: torch.Tensor | None = None,
    sum_exp_logits: torch.Tensor | None = None,
    softmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight, on the CPU: the branch that makes the logits itself.

    The gradient of the logits is rounded to the input's dtype before its two products, whose sums
    are carried in fp32.
    """
    name = BACKWARD_NAMES[0]
    require_sharded_operators("aclnnFusedLinearCrossEntropyLossGrad", name)
    _check_matrices(input, weight, name)
    rows, ids = input.shape[0], weight.shape[0]
    require(ids >= LEAST_IDS, f"weight.size(0) is {ids}, less than {LEAST_IDS}", name)
    require(label_smoothing == 0, f"label_smoothing is {label_smoothing}: only 0 is served", name)
    require(softmax is None, "the branch that takes a softmax is not made", name)
    for what, vector in (
        ("grad", grad),
        ("logits_max", logits_max),
        ("sum_exp_logits", sum_exp_logits),
    ):
        require(vector is not None, f"{what} is missing, and so is softmax", name)
        assert vector is not None
        require(vector.dtype == torch.float32, f"{what} is {vector.dtype}, not fp32", name)
        require(vector.shape == (rows,), f"{what} is {list(vector.shape)}, not [{rows}]", name)
    assert logits_max is not None
    assert sum_exp_logits is not None
    require(target_mask.dtype == torch.uint8, f"target_mask is {target_mask.dtype}", name)
    require(
        target_mask.dim() == 1 and target_mask.numel() * 8 >= rows,
        f"target_mask has shape {list(target_mask.shape)}, too few bits for {rows} rows",
        name,
    )
    _check_ids("masked_target", masked_target, rows, name)
    outside = (masked_target < 0) | (masked_target >= ids)
    require(
        not bool(outside.any()),
        f"masked_target holds ids outside [0, {ids}): the kernel faults, whatever the mask says",
        name,
    )
    calls.append(OperatorCall(name, rows, ids, input.dtype))
    if rows == 0:  # the aclnn function returns before it starts a kernel: memory as it was
        poison = torch.full(weight.shape, torch.nan, dtype=weight.dtype)
        return torch.empty_like(input), poison
    owned = (target_mask.long()[:, None] & BITS == 0).flatten()[:rows]
    x = input.float() @ weight.float().t()
    p = (x - logits_max[:, None]).exp_() / sum_exp_logits[:, None]
    row = torch.arange(rows)
    p[row, masked_target.long()] -= owned.float()
    dx = (p * grad[:, None]).to(input.dtype).float()
    of_input, of_weight = dx @ weight.float(), dx.t() @ input.float()
    return of_input.to(input.dtype), of_weight.to(weight.dtype)


def _check_matrices(input: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    for what, matrix in (("input", input), ("weight", weight)):
        require(matrix.dim() == 2, f"{what} has shape {list(matrix.shape)}, not 2-D", name)
        require(
            matrix.dtype in (torch.float16, torch.bfloat16),
            f"{what} is {matrix.dtype}, not fp16 or bf16",
            name,
        )
    require(input.dtype == weight.dtype, f"input is {input.dtype}, weight {weight.dtype}", name)
    require(
        input.shape[1] == weight.shape[1],
        f"input has {input.shape[1]} columns, weight {weight.shape[1]}",
        name,
    )


def _check_ids(what: str, ids: torch.Tensor, rows: int, name: str) -> None:
    require(ids.dtype in (torch.int32, torch.int64), f"{what} is {ids.dtype}", name)
    require(ids.shape == (rows,), f"{what} has shape {list(ids.shape)}, not [{rows}]", name)
