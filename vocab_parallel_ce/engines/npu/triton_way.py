"""The way of Triton kernels: one read forward, one read and one write backward, every option.

``kernels`` says how they are shaped. No card has run them, so that ``auto`` never takes this way:
``VOCAB_PARALLEL_CE_NPU_WAY=triton`` asks for it. It needs triton-ascend, which takes the place of
the package triton, and CANN's compiler.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

from ...views import typed
from ..contract import Coefficients, Wanted

_CORES = 40  # of the smallest A2 and A3 cards, where neither Triton nor torch_npu tells
# Columns that a program has on chip at a time: the largest powers of 2 that triton-ascend's own
# plan of buffers finds room for, two of each (192 KiB; `make ascend-triton`).
_BLOCKS = {
    "row_partials": {2: (8192, 2048, 4096, 2048), 4: (8192, 2048, 4096, 2048)},
    "row_gradient": {2: (8192, 4096, 4096, 4096), 4: (4096, 4096, 4096, 4096)},
    "row_log_prob": {2: (8192, 8192, 4096, 4096), 4: (4096, 4096, 4096, 4096)},
}
"""of each kernel, by the bytes of a logit: without options, with them, and both under a softcap"""


@cache
def unavailable(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on this card, or None if they can. Imports Triton."""
    if util.find_spec("triton") is None:
        return "triton-ascend is not installed"
    try:
        backends = import_module("triton.backends").backends
        if "ascend" not in backends:
            return (
                f"triton is here for {', '.join(sorted(backends)) or 'no device'}, not for Ascend"
            )
        import_module("triton.runtime").driver.active.get_current_target()
        _kernels()
    except Exception as problem:  # a broken installation, no CANN, anything
        return f"triton-ascend cannot be used here: {str(problem).strip().partition(chr(10))[0]}"
    return None


def block_of(kernel: str, itemsize: int, options: bool, capped: bool) -> int:
    """Columns of one block of a kernel, for logits of ``itemsize`` bytes."""
    return _BLOCKS[kernel][itemsize][options + 2 * capped]


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
    weight = weight.contiguous() if wanted.smooth and weight is not None else None
    options = wanted.smooth or wanted.entropy or wanted.argmax or wanted.squares
    _launch(
        "row_partials", logits, scale, softcap, options,
        logits, *logits.stride(), local_target.contiguous(), weight, out, typed(out, torch.int32),
        out.stride(0),
        APART=_apart(logits), WEIGHTED=weight is not None, SMOOTH=wanted.smooth,
        ENTROPY=wanted.entropy, SQUARES=wanted.squares, ARGMAX=wanted.argmax,
        IGNORED_ROWS=wanted.ignored_rows,
    )  # fmt: skip
    if log_prob_out is not None:
        log_prob(logits, out[0], out[1], scale, softcap, log_prob_out)


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
    smooth, entropy = coefficients.smooth is not None, coefficients.entropy is not None
    weight = weight.contiguous() if smooth and weight is not None else None
    parts = [None if c is None else c.contiguous() for c in coefficients]
    _launch(
        "row_gradient", logits, scale, softcap, smooth or entropy,
        logits, *logits.stride(), m.contiguous(), s.contiguous(), local_target.contiguous(),
        *parts, weight, out, *out.stride(),
        APART=_apart(logits) or _apart(out), WEIGHTED=weight is not None, SMOOTH=smooth,
        ENTROPY=entropy,
    )  # fmt: skip


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    _launch(
        "row_log_prob", logits, scale, softcap, False,
        logits, *logits.stride(), m.contiguous(), s.contiguous(), out, *out.stride(),
        APART=_apart(logits) or _apart(out),
    )  # fmt: skip


def _launch(
    kernel: str,
    logits: Tensor,
    scale: float | Tensor,
    softcap: float,
    options: bool,
    *arguments: Any,
    **flags: bool,
) -> None:
    """A program for each vector core, or each row where there are fewer."""
    rows, columns = logits.shape
    block = block_of(kernel, logits.itemsize, options, softcap != 0)
    of_rows = isinstance(scale, Tensor)
    numbers = (scale.contiguous(), 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    grid = (min(rows, vector_cores()),)
    getattr(_kernels(), kernel)[grid](
        *arguments, rows, columns, *numbers, float(softcap),
        BLOCK=block, HAS_TAIL=columns % block != 0, ROW_SCALE=of_rows, CAPPED=softcap != 0,
        **flags,
    )  # fmt: skip


@cache
def vector_cores() -> int:
    """How many programs the card runs at once."""
    try:
        driver = import_module("triton.runtime").driver.active
        device = torch.get_device_module("npu").current_device()
        return int(driver.utils.get_device_properties(device)["num_vectorcore"])
    except Exception:  # the interpreter has no driver
        return _CORES


@cache
def _kernels() -> Any:
    return import_module("vocab_parallel_ce.engines.npu.kernels")


def _apart(tensor: Tensor) -> bool:
    """Whether columns are not neighbours in memory."""
    return tensor.stride(1) != 1 and tensor.shape[1] > 1
