"""The engine of Ascend NPUs: logits go to the way that ``choice`` finds for their dtype.

    operator.py     npu_cross_entropy_loss, the fused operator of every CANN
    max_sum.py      CANN 8.5.0's kernel for sharded vocabularies, a third of the traffic
    triton_way.py   Triton kernels for Ascend, for who asks for them
    extra.py        passes around the first two: softcap, a scale for each row, sums of squares

Every way works on chunks of rows and on [N] vectors around them; none writes a whole row to change
one element of it (``target_column``), and none looks at a value on the host. None was ever run on a
card: they are tested over a stand-in for CANN, with the real torch_npu.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata, util

import torch
from torch import Tensor

from ..contract import Coefficients, LinearFunctions, RowFunctions, Wanted
from . import choice, extra, operator, triton_way
from .chunks import scratch_bytes
from .linear import functions as npu_linear

ROW_FUNCTIONS: RowFunctions | None = None
LINEAR_FUNCTIONS: LinearFunctions | None = npu_linear
LEAVES_LOG_PROB = True
"""by the operator, which then serves in place of max_sum"""


@cache
def unavailable() -> str | None:
    """Why this engine cannot run here, or None if it can. Runs the operator once."""
    if util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    version = metadata.version("torch_npu")
    try:
        function = getattr(import_module("torch_npu"), "npu_cross_entropy_loss", None)
        if function is None:
            return f"torch_npu {version} has no npu_cross_entropy_loss; 2.5.1.post1 is the first"
        x = torch.zeros(1, 8, device="npu")
        loss = function(x, torch.zeros(1, dtype=torch.int64, device="npu"), None, "none")[0]
        found, wanted = float(loss), 3 * 0.6931472
    except Exception as problem:  # no CANN, no card, a CANN without the operator, anything
        first_line = str(problem).strip().partition("\n")[0]
        return f"torch_npu {version} cannot run npu_cross_entropy_loss here: {first_line}"
    if not abs(found - wanted) < 1e-5:
        return f"npu_cross_entropy_loss of torch_npu {version} gives {found} for log 8"
    return None


def supports(logits: Tensor) -> bool:
    """Whether this engine can serve such logits.

    A bad setting is an error here, before this rank has others wait for it.
    """
    scratch_bytes()
    choice.asked()
    if logits.device.type != "npu" or logits.dtype not in choice.DTYPES:
        return False
    choice.way_for(logits.dtype)
    return True


def partials(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    scale: float | Tensor,
    softcap: float,
    wanted: Wanted,
    out: Tensor,
    log_prob_out: Tensor | None = None,
) -> None:
    """See ``contract.Engine``."""
    way = choice.way_for(logits.dtype)
    if way is triton_way:
        way.partials(logits, local_target, weight, scale, softcap, wanted, out, log_prob_out)
        return
    more = extra.Extra(scale, softcap, logits)
    if more.on or wanted.squares:
        way = choice.way_for(torch.float32 if more.widens else logits.dtype)
        extra.partials(way, logits, local_target, weight, more, wanted, out)
        if log_prob_out is not None:
            extra.log_prob(way, logits, out[0], out[1], more, log_prob_out)
        return
    way = way if log_prob_out is None else operator
    way.partials(logits, local_target, weight, float(scale), wanted, out, log_prob_out)


def gradient(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    scale: float | Tensor,
    softcap: float,
    out: Tensor,
    finite_logits: bool = False,
) -> None:
    """See ``contract.Engine``."""
    way = choice.way_for(logits.dtype)
    if way is triton_way:
        way.gradient(logits, m, s, local_target, coefficients, weight, scale, softcap, out)
        return
    more = extra.Extra(scale, softcap, logits)
    if more.on:
        way = choice.way_for(torch.float32)
        parts = (coefficients, weight, more, out, finite_logits)
        extra.gradient(way, logits, m, s, local_target, *parts)
        return
    way = choice.way_for(logits.dtype)
    way.gradient(logits, m, s, local_target, coefficients, weight, float(scale), out, finite_logits)


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    way = choice.way_for(logits.dtype)
    if way is triton_way:
        way.log_prob(logits, m, s, scale, softcap, out)
        return
    more = extra.Extra(scale, softcap, logits)
    if more.on:
        extra.log_prob(choice.way_for(torch.float32), logits, m, s, more, out)
        return
    way.log_prob(logits, m, s, scale, out)
