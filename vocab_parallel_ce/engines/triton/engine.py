"""The engine of CUDA tensors: Triton kernels, one read forward, one read and one write backward.

That is 6 bytes an element in bf16 for the pair, whatever is asked for, and nothing of size
[N, C_r] beside the gradient. Nothing waits for the device, so CUDA graphs can capture it (after
one call that compiles); nothing is added up by atomics, so results repeat bit for bit. A row's do
not depend on the other rows, only on where it begins in a 16-byte word, which is the same for all
rows where C_r is a multiple of 8. fp64 is left to the eager engine.

How a row is spread over threads follows from its length alone: 16 elements a thread and step,
two words of 128 bits in bf16, which is what hides the latency of memory without spilling
registers. On an H100 the pair took 0.92 to 1.14 of a copy's speed on six shapes; other spreads
over threads were up to 2 % faster there, and spill registers where every option is on.

Under TRITON_INTERPRET=1 the engine serves CPU tensors as well, slowly: how the tests reach it.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...views import typed
from ..contract import Coefficients, LinearFunctions, RowFunctions, Wanted
from . import rows as triton_rows
from .rows import on_device_of

ROW_FUNCTIONS: RowFunctions | None = triton_rows
LINEAR_FUNCTIONS: LinearFunctions | None = None
LEAVES_LOG_PROB = False
MINIMUM_TRITON = (3, 1)
MINIMUM_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WORD_BYTES = 16
_ELEMENTS_PER_THREAD = 16
_WARPS_OF_A_ROW = 8
_WARPS_OF_A_PART = 4  # where nothing is summed up, more and smaller programs take fewer registers
_PART_BLOCKS = 8  # blocks of one such program: long rows are shared by several
_LARGEST_GRID = 2**31 - 1
_ROUNDED = {"enable_fp_fusion": False}
"""x = scale * z is rounded before it is used: in fma(scale, z, -m) it would not be, while the
target's x is, so that even where z is the row's maximum its distance from m were not 0"""


@cache
def unavailable() -> str | None:
    """Why this engine cannot run here, or None if it can. Imports Triton; does not use a card."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MINIMUM_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, MINIMUM_TRITON))}"
    try:
        return None if interpreting() else _card_problem()
    except Exception as error:  # a broken installation, no driver, no C compiler, anything
        first_line = str(error).strip().partition("\n")[0]
        return f"triton {version} cannot be used here: {first_line}"


def _card_problem() -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA cards"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < MINIMUM_CAPABILITY:
            found, least = (".".join(map(str, c)) for c in (capability, MINIMUM_CAPABILITY))
            name = torch.cuda.get_device_name(index)
            return f"cuda:{index} ({name}) has compute capability {found}; {least} is the least"
    _reach_driver()
    return None


def _reach_driver() -> None:
    """Raises where kernels cannot be launched; builds a binding first, which takes a C compiler."""
    import_module("triton.runtime").driver.active.get_current_target()


@cache
def interpreting() -> bool:
    """Whether Triton runs kernels in Python, as TRITON_INTERPRET=1 makes it do."""
    return not isinstance(_kernels().row_partials, import_module("triton").JITFunction)


def supports(logits: Tensor) -> bool:
    """Whether this engine can serve such logits."""
    devices = ("cuda", "cpu") if interpreting() else ("cuda",)
    return logits.device.type in devices and logits.dtype in _DTYPES


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
    rows, columns = logits.shape
    shape = _shape(columns, logits.dtype, _WARPS_OF_A_ROW)
    weight = weight.contiguous() if wanted.smooth and weight is not None else None
    with on_device_of(logits):
        _kernels().row_partials[(min(rows, _LARGEST_GRID),)](
            logits, _phase(logits), *logits.stride(), _vector(local_target, torch.int64), weight,
            out, typed(out, torch.int32), out.stride(0), rows, columns, *_numbers(scale, softcap),
            LANES=shape.block // shape.word, VEC=shape.word, APART=_apart(logits),
            WEIGHTED=weight is not None, SMOOTH=wanted.smooth, ENTROPY=wanted.entropy,
            SQUARES=wanted.squares, ARGMAX=wanted.argmax, IGNORED_ROWS=wanted.ignored_rows,
            ROW_SCALE=isinstance(scale, Tensor), CAPPED=softcap != 0, num_warps=shape.warps,
            **_ROUNDED,
        )  # fmt: skip


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
    parts = [None if c is None else _vector(c, torch.float32) for c in coefficients]
    smooth, entropy = coefficients.smooth is not None, coefficients.entropy is not None
    weight = weight.contiguous() if smooth and weight is not None else None
    _elementwise(
        _kernels().row_gradient, logits, m, s, out, scale, softcap,
        _vector(local_target, torch.int64), *parts, weight,
        SMOOTH=smooth, ENTROPY=entropy, WEIGHTED=weight is not None,
    )  # fmt: skip


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    _elementwise(_kernels().row_log_prob, logits, m, s, out, scale, softcap)


def _elementwise(
    kernel: Any, logits: Tensor, m: Tensor, s: Tensor, out: Tensor, scale: float | Tensor,
    softcap: float, *row_values: Any, **flags: bool,
) -> None:  # fmt: skip
    """Run a kernel that writes ``out`` column by column; long rows are shared by programs."""
    rows, columns = logits.shape
    shape = _shape(columns, logits.dtype, _WARPS_OF_A_PART)
    part = min(columns, shape.block * _PART_BLOCKS)
    apart = _apart(logits) or _apart(out)
    same = out.dtype == logits.dtype  # else their words do not hold as many elements
    aligned = same and not apart and _words_begin_together(logits, out, shape.word)
    with on_device_of(logits):
        kernel[(min(rows, _LARGEST_GRID), -(-columns // part))](
            logits, _phase(logits), *logits.stride(), _vector(m, torch.float32),
            _vector(s, torch.float32), *row_values, out, *out.stride(), rows, columns, part,
            *_numbers(scale, softcap), BLOCK=shape.block, VEC=shape.word, APART=apart,
            OUT_ALIGNED=aligned, ROW_SCALE=isinstance(scale, Tensor), CAPPED=softcap != 0,
            num_warps=shape.warps, **_ROUNDED, **flags,
        )  # fmt: skip


# What kernels take


class _Shape(NamedTuple):
    """How the elements of a row are spread over threads."""

    word: int
    """elements of 16 bytes, what one thread loads at once"""
    block: int
    """elements that a program has in registers at a time"""
    warps: int


def _shape(columns: int, dtype: torch.dtype, most_warps: int) -> _Shape:
    warps = min(most_warps, 2 if columns <= 1024 else 4 if columns <= 8192 else 8)
    return _Shape(_WORD_BYTES // dtype.itemsize, 32 * warps * _ELEMENTS_PER_THREAD, warps)


@cache
def _kernels() -> Any:
    return import_module("vocab_parallel_ce.engines.triton.kernels")


def _numbers(scale: float | Tensor, softcap: float) -> tuple[Tensor | None, float, float]:
    """(one scale a row, or the scale of all of them, the cap)"""
    if isinstance(scale, Tensor):
        return _vector(scale, torch.float32), 1.0, float(softcap)
    return None, float(scale), float(softcap)


def _vector(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype != dtype:  # a wrong type would be read beyond its end
        raise TypeError(f"expected {dtype}, got {values.dtype}")
    return values.contiguous()


def _phase(tensor: Tensor) -> int:
    """Elements between the last 16-byte boundary before the tensor and its beginning."""
    return tensor.data_ptr() % _WORD_BYTES // tensor.itemsize


def _apart(tensor: Tensor) -> bool:
    """Whether columns are not neighbours in memory."""
    return tensor.stride(1) != 1 and tensor.shape[1] > 1


def _words_begin_together(a: Tensor, b: Tensor, word: int) -> bool:
    """Whether 16-byte words begin at the same columns of both, in every row."""
    return _phase(a) == _phase(b) and (a.stride(0) - b.stride(0)) % word == 0
