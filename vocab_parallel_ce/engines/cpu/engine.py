"""The engine of CPU tensors: Numba kernels over row ranges, run by a pool of threads.

Kernels take rows [begin, end), and threads draw such ranges from one list (``threads.py``). Few
long rows are cut into pieces (``pieces.py``) by their shape alone: results do not depend on the
number of threads. ``merging.py`` makes one row of its pieces.

A shard with contiguous columns takes a fast kernel (``fast_kernels.py``); label smoothing, entropy,
squares, argmax, a softcap or any other stride takes a general one (``general_kernels.py``). Each is
compiled at the first use of a dtype and cached on disk.

Numba's own ``parallel=True`` is not used: it changes ``torch.get_num_threads()`` behind the user's
back, and its default scheduler aborts when two threads enter at once.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocab_parallel_ce.engines.contract import (
    Coefficients,
    LinearFunctions,
    RowFunctions,
    Wanted,
    arithmetic_dtype,
)
from vocab_parallel_ce.engines.cpu import threads, vectors
from vocab_parallel_ce.engines.cpu.addresses import matrix, vector
from vocab_parallel_ce.engines.cpu.pieces import piece_width

ROW_FUNCTIONS: RowFunctions | None = vectors
LINEAR_FUNCTIONS: LinearFunctions | None = None
LEAVES_LOG_PROB = False
MINIMUM_NUMBA = (0, 60)
NARROWED_ELEMENTS = 1 << 18  # of a gradient that is rounded on its way; they stay in cache
_TOKENS: dict[torch.dtype, Any] = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
}
_SCALARS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


@cache
def unavailable() -> str | None:
    """Why this engine cannot run here, or None if it can. Imports Numba."""
    try:
        version = metadata.version("numba")
    except metadata.PackageNotFoundError:
        return "numba is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MINIMUM_NUMBA:
        return f"numba {version} is older than {'.'.join(map(str, MINIMUM_NUMBA))}"
    try:
        disabled = import_module("numba").config.DISABLE_JIT
        _kernels()
    except Exception as error:  # a broken installation may raise anything
        return f"numba {version} cannot be used here: {error}"
    return "numba is switched off by NUMBA_DISABLE_JIT" if disabled else None


def supports(logits: Tensor) -> bool:
    """Whether this engine can serve such logits."""
    if logits.device.type != "cpu" or logits.dtype not in _TOKENS:
        return False
    return logits.dtype != torch.float16 or bool(_kernels().converts_fp16)


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
    """Row statistics; see contract.Engine.partials."""
    stored, arithmetic = logits.dtype, arithmetic_dtype(logits.dtype)
    token = _token(stored)
    scales, factor = _scales(scale, arithmetic)
    rows = matrix(logits, stored), vector(local_target, torch.int64)
    weight = weight.contiguous() if wanted.smooth and weight is not None else None
    width = piece_width(*logits.shape)
    pieces = -(-logits.shape[1] // width)
    parts = out if pieces == 1 else out.new_empty(out.shape[0], pieces * out.shape[1])
    place = vector(parts, arithmetic)
    plain = len(wanted.rows) == 3 and softcap == 0
    if plain and _contiguous(logits) and _positive(scale, factor):
        _run(
            _kernels().fast.partials, logits, *rows, wanted.ignored_rows, scales, factor, token,
            place,
        )  # fmt: skip
    else:
        _run(
            _kernels().general.partials, logits, *rows, vector(weight, arithmetic)[0],
            wanted.smooth, wanted.entropy, wanted.squares, wanted.argmax, wanted.ignored_rows,
            scales, factor, float(softcap), token, place,
        )  # fmt: skip
    if pieces > 1:
        weights = None if weight is None else _sums_of_pieces(weight, width)
        _kernels().merge(
            0, logits.shape[0], logits.shape[1], width, place, vector(weights, arithmetic)[0],
            wanted.smooth, wanted.entropy, wanted.squares, wanted.argmax,
            _SCALARS[arithmetic](1.0), vector(out, arithmetic),
        )  # fmt: skip


def _sums_of_pieces(weight: Tensor, width: int) -> Tensor:
    """The sum of the class weights of each piece of a row."""
    return torch.stack([piece.sum() for piece in weight.split(width)])


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
    """Gradient of the logits; see contract.Engine.gradient."""
    if out.itemsize < logits.itemsize:
        _narrowed(logits, m, s, local_target, coefficients, weight, scale, softcap, out)
        return
    stored, arithmetic = logits.dtype, arithmetic_dtype(logits.dtype)
    token = _token(stored)
    scales, factor = _scales(scale, arithmetic)
    softmax, target_part, smooth, entropy = coefficients
    source, place = matrix(logits, stored), matrix(out, stored)
    rows = (
        vector(local_target, torch.int64), vector(m, arithmetic), vector(s, arithmetic),
        vector(softmax, arithmetic), vector(target_part, arithmetic),
    )  # fmt: skip
    plain = smooth is None and entropy is None and softcap == 0
    if plain and factor == factor and _contiguous(logits) and _contiguous(out):
        _run(_kernels().fast.gradient, logits, source, *rows, scales, factor, token, place)
        return
    weight = weight.contiguous() if smooth is not None and weight is not None else None
    _run(
        _kernels().general.gradient, logits, source, *rows, vector(smooth, arithmetic),
        vector(entropy, arithmetic), vector(weight, arithmetic)[0], scales, factor,
        float(softcap), token, place,
    )  # fmt: skip


def _narrowed(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    scale: float | Tensor,
    softcap: float,
    out: Tensor,
) -> None:
    """``gradient`` of a few rows at a time beside the logits, and from there into ``out``."""
    step = max(1, NARROWED_ELEMENTS // logits.shape[1])
    for begin in range(0, logits.shape[0], step):
        rows = slice(begin, begin + step)
        beside = torch.empty_like(logits[rows], memory_format=torch.contiguous_format)
        each = scale[rows] if isinstance(scale, Tensor) else scale
        of_rows = (logits[rows], m[rows], s[rows], local_target[rows], coefficients.of(rows))
        gradient(*of_rows, weight, each, softcap, beside)
        out[rows] = beside


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """Log-probabilities; see contract.Engine.log_prob."""
    stored, arithmetic = logits.dtype, arithmetic_dtype(logits.dtype)
    token = _token(stored)
    scales, factor = _scales(scale, arithmetic)
    source, place = matrix(logits, stored), matrix(out, stored)
    rows = vector(m, arithmetic), vector(s, arithmetic)
    cap = float(softcap)
    _run(_kernels().general.log_prob, logits, source, *rows, scales, factor, cap, token, place)


# What kernels take: addresses, steps in bytes, scalars whose type tells how elements are stored


@cache
def _kernels() -> Any:
    """Imported when they are first needed, and Numba with them."""
    return SimpleNamespace(
        fast=import_module("vocab_parallel_ce.engines.cpu.fast_kernels"),
        general=import_module("vocab_parallel_ce.engines.cpu.general_kernels"),
        merge=import_module("vocab_parallel_ce.engines.cpu.merging").merge,
        converts_fp16=import_module("vocab_parallel_ce.engines.cpu.compiling").converts_fp16(),
    )


def _token(stored: torch.dtype) -> Any:
    if stored == torch.float16 and not _kernels().converts_fp16:  # LLVM would end the process
        raise TypeError("torch.float16 needs a processor that converts it; see supports()")
    return _TOKENS[stored]


def _contiguous(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 or tensor.shape[1] == 1


def _scales(scale: float | Tensor, arithmetic: torch.dtype) -> tuple[tuple[int, int], Any]:
    """(a vector of one a row, a number for all of them): the second counts where there is none."""
    if isinstance(scale, Tensor):
        return vector(scale, arithmetic), _SCALARS[arithmetic](1.0)
    return (0, 0), _SCALARS[arithmetic](scale)


def _positive(scale: float | Tensor, factor: Any) -> bool:
    """Whether kernels see a scale above 0 in every row: fp32 makes 0 of 1e-50."""
    return bool((scale > 0).all()) if isinstance(scale, Tensor) else bool(factor > 0)


def _run(kernel: Any, logits: Tensor, *args: Any) -> None:
    """Run ``kernel`` over all pieces of all rows."""
    rows, columns = logits.shape
    width = piece_width(rows, columns)
    threads.run(kernel, rows * -(-columns // width), rows * columns, columns, width, *args)
