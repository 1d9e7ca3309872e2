"""The engine of CPU tensors: Numba kernels over row ranges, run by a pool of threads.

The kernels (cpu_kernels) release the GIL and take rows [begin, end). The calling thread and up to
``torch.get_num_threads() - 1`` others draw row ranges from one list until it is empty. A row is
never split, so results do not depend on the number of threads.

A shard with contiguous columns takes a fast kernel; label smoothing, entropy, argmax or any other
stride takes a general one. Each is compiled at the first use of a dtype and cached on disk.

Numba's own ``parallel=True`` is not used: it changes ``torch.get_num_threads()`` behind the user's
back, and its default scheduler aborts when two threads enter at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocab_parallel_ce.engines.contract import Coefficients, Wanted

MINIMUM_NUMBA = (0, 60)
SEQUENTIAL_BELOW = 1 << 16  # elements; a thread takes longer to wake up than to do the work
RANGES_PER_THREAD = 8  # a thread that is held up leaves its share to the others
_TOKENS = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
}


@cache
def unavailable() -> str | None:
    """Why this engine cannot run here, or None if it can. Imports Numba."""
    try:
        version = metadata.version("numba")
    except metadata.PackageNotFoundError:
        return "numba is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_NUMBA:
        return f"numba {version} is older than {'.'.join(map(str, MINIMUM_NUMBA))}"
    try:
        disabled = import_module("numba").config.DISABLE_JIT
        _kernels()
    except Exception as error:  # a broken installation may raise anything
        return f"numba {version} cannot be used here: {error}"
    return "numba is switched off by NUMBA_DISABLE_JIT" if disabled else None


def supports(logits: Tensor) -> bool:
    """Whether this engine can serve such logits."""
    return logits.device.type == "cpu" and logits.dtype in _TOKENS


def partials(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    scale: float,
    wanted: Wanted,
    out: Tensor,
    log_prob_out: Tensor | None = None,
) -> None:
    """Row statistics; see contract.Engine.partials."""
    factor, token = _scalars(logits, scale)
    statistics = (out.data_ptr(), out.stride(0) * out.element_size())
    if _contiguous(logits) and factor > 0 and len(wanted.rows) == 3:
        _run(
            _kernels().partials_fast, logits, logits.data_ptr(), _step(logits, 0),
            *_vector(local_target), wanted.ignored_rows, factor, token, *statistics,
        )  # fmt: skip
        return
    weight = weight.contiguous() if wanted.smooth and weight is not None else None
    _run(
        _kernels().partials_general, logits, *_matrix(logits), *_vector(local_target),
        _vector(weight)[0], wanted.smooth, wanted.entropy, wanted.argmax, wanted.ignored_rows,
        factor, token, *statistics,
    )  # fmt: skip


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
    """Gradient of the logits; see contract.Engine.gradient."""
    factor, token = _scalars(logits, scale)
    rows = (
        *_vector(local_target), *_vector(m), *_vector(s),
        *_vector(coefficients.softmax), *_vector(coefficients.target),
    )  # fmt: skip
    plain = coefficients.smooth is None and coefficients.entropy is None
    if _contiguous(logits) and _contiguous(out) and factor > 0 and plain:
        _run(
            _kernels().gradient_fast, logits, logits.data_ptr(), _step(logits, 0), *rows,
            factor, token, out.data_ptr(), _step(out, 0),
        )  # fmt: skip
        return
    weight = weight.contiguous() if weight is not None else None
    _run(
        _kernels().gradient_general, logits, *_matrix(logits), *rows,
        *_vector(coefficients.smooth), *_vector(coefficients.entropy), _vector(weight)[0],
        factor, token, *_matrix(out),
    )  # fmt: skip


def log_prob(logits: Tensor, m: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    """Log-probabilities; see contract.Engine.log_prob."""
    factor, token = _scalars(logits, scale)
    _run(
        _kernels().log_prob, logits, *_matrix(logits), *_vector(m), *_vector(s),
        factor, token, *_matrix(out),
    )  # fmt: skip


# What kernels take: addresses, steps in bytes, scalars whose type tells how elements are stored


def _kernels() -> Any:
    return import_module("vocab_parallel_ce.engines.cpu_kernels")


def _scalars(logits: Tensor, scale: float) -> tuple[Any, Any]:
    arithmetic = np.float64 if logits.dtype == torch.float64 else np.float32
    return arithmetic(scale), _TOKENS[logits.dtype]


def _step(tensor: Tensor, dimension: int) -> int:
    return tensor.stride(dimension) * tensor.element_size()


def _contiguous(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 or tensor.shape[1] == 1


def _vector(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), _step(tensor, 0))


def _matrix(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), _step(tensor, 0), _step(tensor, 1)


# Threads


class _Pool:
    """Torch's number of threads, the calling one included; made again when that number changes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.helpers = 0
        self.executor: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[], None], threads: int) -> None:
        """Call ``work`` on up to ``threads`` threads, the calling one among them."""
        futures = []
        with self.lock:
            if self.executor is None or self.helpers != threads - 1:
                if self.executor is not None:
                    self.executor.shutdown(wait=False)
                self.helpers = threads - 1
                self.executor = ThreadPoolExecutor(self.helpers, "vocab_parallel_ce")
            try:
                futures = [self.executor.submit(work) for _ in range(self.helpers)]
            except RuntimeError:
                pass  # the interpreter is shutting down: the calling thread does it all
        try:
            work()
        finally:
            # Helpers that have not begun would find nothing to do; the others must be awaited
            # whatever happened here, for they write into the caller's memory.
            started = [future for future in futures if not future.cancel()]
            errors = [future.exception() for future in started]
        for error in errors:
            if error is not None:
                raise error


_pool = _Pool()


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _run(kernel: Callable[..., None], logits: Tensor, *args: Any) -> None:
    """Run ``kernel`` over all rows."""
    rows, columns = logits.shape
    threads = min(torch.get_num_threads(), rows)
    if threads == 1 or rows * columns < SEQUENTIAL_BELOW:
        kernel(0, rows, columns, *args)
        return
    least = -(-SEQUENTIAL_BELOW // (2 * columns))
    size = max(least, -(-rows // (threads * RANGES_PER_THREAD)))
    ranges: Iterator[int] = iter(range(0, rows, size))

    def work() -> None:
        for begin in ranges:
            kernel(begin, min(begin + size, rows), columns, *args)

    _pool.run(work, threads)
