"""The lean way: CANN's kernel for sharded vocabularies, ``..._cross_entropy_loss_with_max_sum``.

    softmax[i, c] = exp(x[i, c] - logits_max[i]) / sum_exp_logits[i]

One read of fp16, bf16 or fp32 logits and one write in fp32, for any number of rows and columns.
Nothing asks for true statistics, so that one kernel serves both passes:

    forward    sum = 1      gives e^(x - m), of which s is the sum
    backward   sum = s / g  gives g p at once; g may be negative, and g = 0 gives 0

It wants CANN 8.5.0, and a torch_npu that has it by either name: the wheels of 2.6.0.post5 to
2.10.0 without ``npu_``, newer ones with it. It has no autograd and no shapes for fake tensors,
which is no matter here. Its loss, log(sum) - predicted, is not read.

``FORWARD`` and ``BACKWARD`` are its kernels on [n, C_r] for plain cross-entropy; ``traffic`` says
what they move. Label smoothing adds x - m and its sum forward, one sweep backward; entropy adds
four kernels forward and four backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import IGNORED, Coefficients, Wanted, without_unused
from .chunks import Scaling, first_column_of, lowest, minus, numbered, row_ranges
from .finishing import finish_partials, silenced, subtract_smoothing, write_chunk
from .log_prob import log_prob
from .target_column import TargetColumn
from .traffic import Step

__all__ = ["BACKWARD", "FORWARD", "NAMES", "fused", "gradient", "log_prob", "operator", "partials"]
NAMES = (
    "npu_fused_cross_entropy_loss_with_max_sum",
    "fused_cross_entropy_loss_with_max_sum",
)
_FINITE = -1e30  # stands for -inf where a probability of 0 is multiplied by x

FORWARD = (
    Step("amax", "logits"),
    Step("npu_fused_cross_entropy_loss_with_max_sum", "logits", "fp32"),
    Step("sum", "fp32"),
)
BACKWARD = (
    Step("npu_fused_cross_entropy_loss_with_max_sum", "logits", "fp32"),
    Step("copy_", "fp32", "logits"),
    Step("masked_fill_", "logits", "logits", unless_finite=True),
)


def operator() -> Any:
    """CANN's kernel, or None where torch_npu has it by neither name."""
    for name in NAMES:
        if hasattr(torch.ops.npu, name):
            return getattr(torch.ops.npu, name)
    return None


def fused(x: Tensor, top: Tensor, divisor: Tensor) -> Tensor:
    """e^(x - top) / divisor [n, C_r] in fp32; ``top`` and ``divisor`` [n] in fp32."""
    predicted = divisor  # any vector will do
    _, softmax = operator()(top, divisor, predicted, vocab_parallel_logits=x)
    return softmax  # type: ignore[no-any-return]


def partials(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    scale: float,
    wanted: Wanted,
    out: Tensor,
    log_prob_out: Tensor | None = None,
) -> None:
    """See ``contract.Engine``; nothing is left in ``log_prob_out``."""
    named = dict(zip(wanted.rows, out.unbind(0), strict=True))
    scaling = Scaling(scale, logits)
    at_target = TargetColumn(logits, scaling, local_target)
    wide = logits.dtype == torch.float32 or scaling.widens
    tops = named["m"] if wide else torch.empty_like(named["m"], dtype=logits.dtype)
    ones, floor = torch.ones_like(named["s"]), lowest(logits)
    columns = numbered(logits) if wanted.argmax else None

    def chunk(logits: Tensor, named: dict[str, Tensor], rows: slice) -> None:
        x = scaling.chunk(logits)
        at_target.see(x, rows)
        top = torch.amax(x, 1, out=tops[rows])
        shift = torch.maximum(top, floor)
        e = fused(x, shift, ones[rows])
        torch.sum(e, 1, out=named["s"])
        if wanted.smooth:
            z = torch.add(x, minus(shift))
            torch.sum(z if weight is None else z.mul_(weight), 1, out=named["u"])
            del z
        if wanted.entropy:
            z = torch.add(x.clamp(min=_finite(x)), minus(shift))
            torch.sum(e.mul_(z), 1, out=named["t"])
            del z
        del e
        if columns is not None:
            named["argmax"].view(torch.int32).copy_(first_column_of(x, top, columns))

    more = wanted.entropy or wanted.smooth or wanted.argmax
    for rows in row_ranges(logits, 1 + scaling.widens + more):
        chunk(logits[rows], {name: row[rows] for name, row in named.items()}, rows)
    if tops is not named["m"]:
        named["m"].copy_(tops)
    named["x_y"].copy_(at_target.x)
    finish_partials(named, local_target, wanted)


def _finite(x: Tensor) -> float:
    """A number of x's dtype that stands for -inf."""
    return max(_FINITE, torch.finfo(x.dtype).min)


def gradient(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    scale: float,
    out: Tensor,
    finite_logits: bool = False,
) -> None:
    """See ``contract.Engine``."""
    local_target = without_unused(local_target, coefficients)
    scaling = Scaling(scale, logits)
    at_target = TargetColumn(logits, scaling, local_target)
    ignored = None if finite_logits else local_target == IGNORED
    if finite_logits:
        m, s, coefficients = silenced(local_target, m, s, coefficients)
    softmax, _, smooth, entropy = coefficients
    divisor = s if entropy is not None else s / softmax
    if entropy is not None:
        # softmax - entropy (x - m - log s), formed as one sum of a row's value and x - m
        constant, minus_entropy = (softmax + entropy * s.log())[:, None], entropy.neg()[:, None]
        minus_m = minus(m)

    def chunk(logits: Tensor, out: Tensor, rows: slice) -> None:
        x = scaling.chunk(logits)
        at_target.see(x, rows)
        dx = fused(x, m[rows], divisor[rows])
        if entropy is not None:
            z = torch.add(x.clamp(min=_finite(x)), minus_m[rows])
            dx.mul_(torch.addcmul(constant[rows], z, minus_entropy[rows], out=z))
            del z
        del x
        subtract_smoothing(dx, None if smooth is None else smooth[rows], weight)
        write_chunk(dx, out, None if ignored is None else ignored[rows])

    for rows in row_ranges(logits, 1 + scaling.widens + (entropy is not None)):
        chunk(logits[rows], out[rows], rows)
    at_target.put_gradient(out, m, s, coefficients, weight)
