"""The engine of Ascend NPUs: ``torch_npu.npu_cross_entropy_loss`` on the shard, in row chunks.

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
* at most ``MAX_ROWS`` rows a call, and no more than ``scratch_bytes()`` of memory.

Passes over memory, in units of the shard, r a read and w a write (fp32 logits, scale 1; what a
chunk touches again is in the device's cache as far as that reaches):

    partials    r to find the maximum, r + w to subtract it, 3 r + w in the operator; r more for
                smoothing (2 r + w with class weights), 5 r + 3 w for entropy, 3 r + 2 w for argmax
    gradient    4 r + 4 w in place of the result: subtract m, exp, scale, zero the ignored rows;
                r + w more for smoothing, 3 r + 3 w for entropy
    log_prob    2 r + 2 w; on one rank r + w, copied from what the operator wrote

bf16 and fp16 add one conversion to fp32 per function (r + w), and one back for gradient and
log_prob; scale != 1 adds r + w.

The operator's backward kernel is not used. It wants the global log_prob (2 r + 2 w to
make), reads it, writes a tensor of its own (r + w) which must be copied into place (r + w), and
subtracts a one-hot that most shards do not hold: no pass is saved. Nor is its autograd used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module, metadata, util
from typing import Any

import torch
from torch import Tensor

from ...switches import SCRATCH_MIB, SCRATCH_VARIABLE
from ..contract import IGNORED, Coefficients, RowFunctions, Wanted

ROW_FUNCTIONS: RowFunctions | None = None
LEAVES_LOG_PROB = True
MAX_ROWS = 199_999  # the operator keeps a few floats a row on chip, for fewer than 200,000 rows
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NEGLIGIBLE = -200.0  # e^-200 is 0 in fp32, so below it a log-probability counts for nothing


@cache
def unavailable() -> str | None:
    """Why this engine cannot run here, or None if it can. Runs the operator once."""
    if util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    version = metadata.version("torch_npu")
    try:
        operator = getattr(import_module("torch_npu"), "npu_cross_entropy_loss", None)
        if operator is None:
            return f"torch_npu {version} has no npu_cross_entropy_loss; 2.5.1.post1 is the first"
        x = torch.zeros(1, 8, device="npu")
        loss = operator(x, torch.zeros(1, dtype=torch.int64, device="npu"), None, "none")[0]
        found, wanted = float(loss), 3 * 0.6931472
    except Exception as problem:  # no CANN, no card, a CANN without the operator, anything
        first_line = str(problem).strip().partition("\n")[0]
        return f"torch_npu {version} cannot run npu_cross_entropy_loss here: {first_line}"
    if not abs(found - wanted) < 1e-5:
        return f"npu_cross_entropy_loss of torch_npu {version} gives {found} for log 8"
    return None


def supports(logits: Tensor) -> bool:
    """Whether this engine can serve such logits."""
    scratch_bytes()  # a bad setting is an error here, before this rank has others wait for it
    return logits.device.type == "npu" and logits.dtype in _DTYPES


def scratch_bytes() -> int:
    """Memory that a call may take beyond its results: VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB."""
    text = os.environ.get(SCRATCH_VARIABLE, str(SCRATCH_MIB))
    try:
        mib = int(text)
    except ValueError:
        mib = 0
    if mib < 1:
        raise ValueError(f"{SCRATCH_VARIABLE}={text!r} must be a whole number of MiB, at least 1")
    return mib << 20


def _chunks(logits: Tensor, buffers: int) -> Iterator[slice]:
    """Ranges of rows such that ``buffers`` fp32 tensors of one range fit into the scratch."""
    rows, columns = logits.shape
    step = min(MAX_ROWS, max(1, scratch_bytes() // (4 * columns * buffers)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _dense(block: Tensor, scale: float) -> tuple[Tensor, bool]:
    """x = block * scale, fp32 and dense, and whether that is fresh memory or the caller's own."""
    x = block.float().contiguous()
    fresh = x.data_ptr() != block.data_ptr()
    if scale == 1.0:
        return x, fresh
    return (x.mul_(scale) if fresh else x * scale), True


def _column(local_target: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the row's target lives here, [n], and a column that is legal in any case, [n, 1]."""
    owned = local_target >= 0
    return owned, torch.where(owned, local_target, 0)[:, None]


def _operator(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss [n] and the log-probabilities [n, C_r] that the operator gives."""
    torch_npu: Any = import_module("torch_npu")
    loss, log_prob, _, _ = torch_npu.npu_cross_entropy_loss(x, target, None, "none")
    return loss, log_prob


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
    # x - m and the operator's log_prob; an argmax takes a comparison and its result besides.
    for rows in _chunks(logits, 3 if wanted.argmax else 2):
        _chunk_partials(
            logits[rows],
            local_target[rows],
            weight,
            scale,
            wanted,
            dict(zip(wanted.rows, out[:, rows].unbind(0), strict=True)),
            None if log_prob_out is None else log_prob_out[rows],
        )


def _chunk_partials(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: float,
    wanted: Wanted,
    named: dict[str, Tensor],
    log_prob_out: Tensor | None,
) -> None:
    """Fill ``named``, [n] each. A function, so that a chunk's scratch is gone before the next."""
    x, fresh = _dense(logits, scale)
    m, best = x.max(1)
    empty = m == -torch.inf
    owned, column = _column(target)
    named["m"].copy_(m)
    named["x_y"].copy_(torch.where(owned, x.gather(1, column).squeeze(1), 0.0))
    # An all -inf row is taken relative to 0: -inf - -inf would be NaN.
    shift = m.masked_fill(empty, 0.0)[:, None]
    z = x.sub_(shift) if fresh else x - shift
    del x
    if wanted.argmax:
        named["argmax"].view(torch.int32).copy_(_first_column_of_zero(z, empty))
    # What the device calls the maximum of a row of NaN is not told; a column it must be.
    log_s, scratch = _operator(z, best.clamp_(0, z.shape[1] - 1))
    if log_prob_out is not None:
        log_prob_out.copy_(scratch)
    named["s"].copy_(log_s.exp_().masked_fill_(empty, 0.0))
    if wanted.smooth:
        u = z if weight is None else torch.mul(z, weight, out=scratch)
        named["u"].copy_(u.sum(1))
    if wanted.entropy:
        z.clamp_(min=_NEGLIGIBLE)
        named["t"].copy_(torch.exp(z, out=scratch).mul_(z).sum(1))
    if not wanted.ignored_rows:
        ignored = target == IGNORED
        for statistic in named.values():
            statistic.masked_fill_(ignored, 0.0)


def _first_column_of_zero(z: Tensor, empty: Tensor) -> Tensor:
    """The first column that attains the maximum, [n] fp32, which holds every column below 2^24.

    No order among ties is promised for the device's own argmax.
    """
    columns = torch.arange(z.shape[1], dtype=torch.float32, device=z.device)
    first = torch.where(z == 0, columns, float(z.shape[1])).amin(1)
    return first.masked_fill_(empty, 0.0)


def _in_place_of(block: Tensor) -> Tensor:
    """Where a chunk's result is computed: in its own memory if that is dense fp32, else scratch."""
    if block.dtype == torch.float32 and block.is_contiguous():
        return block
    return torch.empty(block.shape, dtype=torch.float32, device=block.device)


def _shifted(block: Tensor, scale: float, m: Tensor, out: Tensor) -> Tensor:
    """``out`` = block * scale - m[:, None]."""
    if block.dtype != out.dtype:
        block = out.copy_(block)
    if scale != 1.0:
        block = torch.mul(block, scale, out=out)
    return torch.sub(block, m[:, None], out=out)


def gradient(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """See ``contract.Engine``."""
    # The result and, where the logits are strided, a dense copy that a kernel may make of them.
    for rows in _chunks(logits, 2 if coefficients.entropy is None else 3):
        _chunk_gradient(
            logits[rows],
            m[rows],
            s[rows],
            local_target[rows],
            Coefficients(*(None if c is None else c[rows] for c in coefficients)),  # type: ignore[arg-type]
            weight,
            scale,
            out[rows],
        )


def _chunk_gradient(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    softmax, target_part, smooth, entropy = coefficients
    dx = _shifted(logits, scale, m, out=_in_place_of(out))
    if entropy is None:
        dx.exp_().mul_((softmax / s)[:, None])
    else:
        dx.sub_(s.log()[:, None]).clamp_(min=_NEGLIGIBLE)
        bent = (dx * -entropy[:, None]).add_(softmax[:, None])
        dx.exp_().mul_(bent)
    if smooth is not None:
        g = smooth[:, None]
        dx.sub_(g) if weight is None else dx.addcmul_(g, weight[None], value=-1)
    owned, column = _column(target)
    one_hot = torch.where(owned, target_part, 0.0)[:, None]
    dx.scatter_(1, column, dx.gather(1, column) - one_hot)
    # Written as zeros, never multiplied into them: 0 * NaN is NaN.
    dx.masked_fill_((target == IGNORED)[:, None], 0.0)
    if dx is not out:
        out.copy_(dx)


def log_prob(logits: Tensor, m: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    """See ``contract.Engine``."""
    for rows in _chunks(logits, 2):
        _chunk_log_prob(logits[rows], m[rows], s[rows], scale, out[rows])


def _chunk_log_prob(logits: Tensor, m: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    result = _shifted(logits, scale, m, out=_in_place_of(out))
    result.sub_(s.log()[:, None])
    if result is not out:
        out.copy_(result)
