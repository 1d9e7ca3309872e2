"""The way of every CANN: ``torch_npu.npu_cross_entropy_loss`` on the shard.

The operator computes log-softmax and the loss of a row in one kernel, for a whole vocabulary. A
shard is none, so of what it returns only this is used, and this way:

* reduction "none" and no option: ownership of targets, ignore_index, weight, smoothing and z-loss
  are not its business. What it calls zloss and lse_for_zloss is never filled by CANN.
* always fp32. It computes in fp32 but rounds its outputs to the input's dtype, and a bf16 loss
  would cost 4.5e-2 of lse.
* its input is x - m, m the row's maximum, and its target the column of the maximum. It rounds
  lse = max + log s before it subtracts that, which at logits near 1000 would cost three digits
  of s; with a maximum of 0 its loss is log s to the last bit. The column lies inside the shard,
  whatever the caller's target is (for one outside, -100 included, CANN 8.5.0 reads out of bounds
  and later versions give nonsense), and is no -inf column unless the whole row is; such a row is
  answered here. The target's logit is gathered apart.
* its log_prob, which it writes whether asked to or not, is the global one where the shard is the
  whole vocabulary. Elsewhere it is scratch: turning it into the global one takes as
  many passes as computing that from the logits, which are there anyway.
* at most ``MAX_ROWS`` rows a call.

``FORWARD`` and ``BACKWARD`` are its kernels on [n, C_r]; ``traffic`` says what they move. The
operator's backward kernel is not used: it wants the global log_prob, writes a tensor of its own
which must be copied into place, and subtracts a one-hot that most shards do not hold. Nor is its
autograd used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..contract import IGNORED, Coefficients, Wanted, without_unused
from .chunks import Scaling, first_column_of, lowest, minus, numbered, row_ranges, shifted
from .finishing import finish_partials, silenced, subtract_smoothing, write_chunk
from .log_prob import log_prob
from .target_column import TargetColumn
from .traffic import Step

__all__ = ["BACKWARD", "FORWARD", "call", "gradient", "log_prob", "partials"]
MAX_ROWS = 199_999  # the operator keeps a few floats a row on chip, for fewer than 200,000 rows
NEGLIGIBLE = -200.0  # e^-200 is 0 in fp32, so below it a log-probability counts for nothing

FORWARD = (
    Step("max", "logits"),
    Step("add", "logits", "fp32"),
    Step("npu_cross_entropy_loss", "fp32", "fp32"),
)
BACKWARD = (
    Step("add", "logits", "fp32"),
    Step("exp_", "fp32", "fp32"),
    Step("mul_", "fp32", "fp32"),
    Step("copy_", "fp32", "logits", unless_fp32=True),
    Step("masked_fill_", "logits", "logits", unless_finite=True),
)


def partials(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    scale: float,
    wanted: Wanted,
    out: Tensor,
    log_prob_out: Tensor | None = None,
) -> None:
    """See ``contract.Engine``."""
    named = dict(zip(wanted.rows, out.unbind(0), strict=True))
    scaling = Scaling(scale, logits)
    at_target = TargetColumn(logits, scaling, local_target)
    floor = lowest(logits)
    buffers = 2 + scaling.widens + wanted.argmax  # x - m and the operator's log_prob; x; columns
    columns = numbered(logits) if wanted.argmax else None

    def chunk(logits: Tensor, named: dict[str, Tensor], rows: slice) -> None:
        x = scaling.chunk(logits)
        at_target.see(x, rows)
        top, best = x.max(1)
        named["m"].copy_(top)
        if columns is not None:
            named["argmax"].view(torch.int32).copy_(first_column_of(x, top, columns))
        z = torch.add(x, minus(torch.maximum(top, floor)))
        del x
        # What the device calls the maximum of a row of NaN is not told; a column it must be.
        log_s, scratch = call(z, best.clamp_(0, z.shape[1] - 1))
        if log_prob_out is not None:
            log_prob_out[rows].copy_(scratch)
        torch.exp(log_s, out=named["s"])
        if wanted.smooth:
            u = z if weight is None else torch.mul(z, weight, out=scratch)
            torch.sum(u, 1, out=named["u"])
        if wanted.entropy:
            z.clamp_(min=NEGLIGIBLE)
            torch.sum(torch.exp(z, out=scratch).mul_(z), 1, out=named["t"])

    for rows in row_ranges(logits, buffers, MAX_ROWS):
        chunk(logits[rows], {name: row[rows] for name, row in named.items()}, rows)
    named["x_y"].copy_(at_target.x)
    finish_partials(named, local_target, wanted)


def call(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss [n] and the log-probabilities [n, C_r] that the operator gives."""
    torch_npu: Any = import_module("torch_npu")
    loss, log_prob, _, _ = torch_npu.npu_cross_entropy_loss(x, target, None, "none")
    return loss, log_prob


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
    minus_m = minus(m)
    softmax, _, smooth, entropy = coefficients
    factor = (softmax / s if entropy is None else softmax)[:, None]
    log_s = None if entropy is None else s.log()[:, None]

    def chunk(logits: Tensor, out: Tensor, rows: slice) -> None:
        x = scaling.chunk(logits)
        at_target.see(x, rows)
        dx = shifted(x, minus_m[rows], out)
        del x
        if entropy is None or log_s is None:
            dx.exp_().mul_(factor[rows])
        else:
            dx.sub_(log_s[rows]).clamp_(min=NEGLIGIBLE)
            bent = torch.mul(dx, -entropy[rows, None]).add_(factor[rows])
            dx.exp_().mul_(bent)
        subtract_smoothing(dx, None if smooth is None else smooth[rows], weight)
        write_chunk(dx, out, None if ignored is None else ignored[rows])

    for rows in row_ranges(logits, 1 + scaling.widens + (entropy is not None)):
        chunk(logits[rows], out[rows], rows)
    at_target.put_gradient(out, m, s, coefficients, weight)
