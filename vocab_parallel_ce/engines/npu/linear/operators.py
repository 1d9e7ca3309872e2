"""The two fused operators that this library calls, by whichever name torch_npu has them.

    online_max_sum   statistics of hidden @ weight^T, row by row
    backward         both gradients, from logits that the operator makes again for itself

Between the two lies the exchange over ranks. A third operator makes the loss of merged statistics:
log s - (x_y - m), which is arithmetic on [N] here as everywhere. Logits exist in tiles only, in
fp32. The backward's workspace holds both gradients in fp32, (N + V_r) H numbers.

Sources: the documents of aclnnFusedLinearOnlineMaxSum and aclnnFusedLinearCrossEntropyLossGrad in
CANN 8.5.0 to 9.1.0, and their kernels in ops-nn. Both documents tell the mask of targets with an
end that belongs to the shard; the kernels compare with ``target >= end``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORWARD_NAMES = ("npu_fused_linear_online_max_sum", "fused_linear_online_max_sum")
BACKWARD_NAMES = (
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward",
    "fused_linear_cross_entropy_loss_with_max_sum_grad",
)
WIDEST = 65_534
"""columns of the hidden states"""
LEAST_IDS = 128
"""rows of the weight, in backward"""
MOST_IDS = 2**24
"""they are compared in fp32"""


def found(names: tuple[str, ...]) -> Any:
    """The operator of the first name that torch_npu has; None where it has none."""
    return next((getattr(torch.ops.npu, n) for n in names if hasattr(torch.ops.npu, n)), None)


def online_max_sum(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """m, s, x_y - m [N] in fp32, the packed mask and the masked target.

    ``target`` [N] int32 holds rows of ``weight``, or their number where the target is elsewhere.
    """
    # return_logits=True was seen to corrupt some losses (verl, cann_linear_ce.py)
    out = found(FORWARD_NAMES)(hidden, weight, target, 0, weight.shape[0], False)
    return tuple(out[:5])


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    target: Tensor,
    m: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients [N, H] and [V_r, H] of logits whose own is grad (e^(x - m) / s - [target]).

    ``target`` [N] int32 is a row of ``weight`` even where the packed ``mask`` says that it is
    elsewhere; ``grad``, ``m`` and ``s`` are [N] in fp32.
    """
    of_hidden, of_weight = found(BACKWARD_NAMES)(
        grad, hidden, weight, mask, target, 0.0, logits_max=m, sum_exp_logits=s
    )
    return of_hidden, of_weight


def packed(mask: Tensor) -> Tensor:
    """[N] bool -> [ceil(N / 8)] uint8, the first row in the lowest bit; 1 behind the last row."""
    rows = mask.shape[0]
    bits = torch.full((-(-rows // 8) * 8,), 1, dtype=torch.int32, device=mask.device)
    bits[:rows] = mask
    places = torch.arange(8, dtype=torch.int32, device=mask.device)
    shifted = torch.bitwise_left_shift(bits.view(-1, 8), places)
    return shifted.sum(1, dtype=torch.int32).to(torch.uint8)
