"""The engine of CPU tensors: Numba kernels over row ranges, run by a pool of threads.

The kernels release the GIL and take rows [begin, end). The calling thread and up to
``torch.get_num_threads() - 1`` others draw row ranges from one list until it is empty. A row is
never split, so results do not depend on the number of threads.

A shard with contiguous columns takes a fast kernel; label smoothing, entropy, squares, argmax, a
softcap or any other stride takes a general one. Each is compiled at the first use of a dtype and
cached on disk.

Numba's own ``parallel=True`` is not used: it changes ``torch.get_num_threads()`` behind the user's
back, and its default scheduler aborts when two threads enter at once.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module, metadata
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

ROW_FUNCTIONS: RowFunctions | None = None
LINEAR_FUNCTIONS: LinearFunctions | None = None
LEAVES_LOG_PROB = False
MINIMUM_NUMBA = (0, 60)
SEQUENTIAL_BELOW = 1 << 16  # elements; a thread takes longer to wake up than to do the work
NARROWED_ELEMENTS = 1 << 18  # of a gradient that is rounded on its way; they stay in cache
RANGES_PER_THREAD = 8  # a thread that is held up leaves its share to the others
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
    return logits.device.type == "cpu" and logits.dtype in _TOKENS


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
    token = _TOKENS[stored]
    scales, factor = _scales(scale, arithmetic)
    rows = _matrix(logits, stored), _vector(local_target, torch.int64)
    place = _vector(out, arithmetic)
    plain = len(wanted.rows) == 3 and softcap == 0
    if plain and _contiguous(logits) and _positive(scale):
        _run(
            _kernels().partials_fast, logits, *rows, wanted.ignored_rows, scales, factor, token,
            place,
        )  # fmt: skip
        return
    weight = weight.contiguous() if wanted.smooth and weight is not None else None
    _run(
        _kernels().partials_general, logits, *rows, _vector(weight, arithmetic)[0],
        wanted.smooth, wanted.entropy, wanted.squares, wanted.argmax, wanted.ignored_rows, scales,
        factor, float(softcap), token, place,
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
    """Gradient of the logits; see contract.Engine.gradient."""
    if out.itemsize < logits.itemsize:
        _narrowed(logits, m, s, local_target, coefficients, weight, scale, softcap, out)
        return
    stored, arithmetic = logits.dtype, arithmetic_dtype(logits.dtype)
    token = _TOKENS[stored]
    scales, factor = _scales(scale, arithmetic)
    softmax, target_part, smooth, entropy = coefficients
    source, place = _matrix(logits, stored), _matrix(out, stored)
    rows = (
        _vector(local_target, torch.int64), _vector(m, arithmetic), _vector(s, arithmetic),
        _vector(softmax, arithmetic), _vector(target_part, arithmetic),
    )  # fmt: skip
    plain = smooth is None and entropy is None and softcap == 0
    if plain and factor == factor and _contiguous(logits) and _contiguous(out):
        _run(_kernels().gradient_fast, logits, source, *rows, scales, factor, token, place)
        return
    weight = weight.contiguous() if smooth is not None and weight is not None else None
    _run(
        _kernels().gradient_general, logits, source, *rows, _vector(smooth, arithmetic),
        _vector(entropy, arithmetic), _vector(weight, arithmetic)[0], scales, factor,
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
        softmax, target_part, smooth, entropy = coefficients
        some = Coefficients(
            softmax[rows],
            target_part[rows],
            None if smooth is None else smooth[rows],
            None if entropy is None else entropy[rows],
        )
        beside = torch.empty_like(logits[rows], memory_format=torch.contiguous_format)
        each = scale[rows] if isinstance(scale, Tensor) else scale
        of_rows = (logits[rows], m[rows], s[rows], local_target[rows], some)
        gradient(*of_rows, weight, each, softcap, beside)
        out[rows] = beside


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """Log-probabilities; see contract.Engine.log_prob."""
    stored, arithmetic = logits.dtype, arithmetic_dtype(logits.dtype)
    token = _TOKENS[stored]
    scales, factor = _scales(scale, arithmetic)
    source, place = _matrix(logits, stored), _matrix(out, stored)
    rows = _vector(m, arithmetic), _vector(s, arithmetic)
    cap = float(softcap)
    _run(_kernels().log_prob, logits, source, *rows, scales, factor, cap, token, place)


# What kernels take: addresses, steps in bytes, scalars whose type tells how elements are stored


@cache
def _kernels() -> Any:
    return import_module("vocab_parallel_ce.engines.cpu.kernels")


def _contiguous(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 or tensor.shape[1] == 1


def _scales(scale: float | Tensor, arithmetic: torch.dtype) -> tuple[tuple[int, int], Any]:
    """(a vector of one a row, a number for all of them): the second counts where there is none."""
    if isinstance(scale, Tensor):
        return _vector(scale, arithmetic), _SCALARS[arithmetic](1.0)
    return (0, 0), _SCALARS[arithmetic](scale)


def _positive(scale: float | Tensor) -> bool:
    return bool((scale > 0).all()) if isinstance(scale, Tensor) else scale > 0


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    if tensor is None:
        return 0, 0
    if tensor.dtype != dtype:  # a wrong type would be read, or written, beyond its end
        raise TypeError(f"expected {dtype}, got {tensor.dtype}")
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


def _matrix(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    if tensor.dtype != dtype:
        raise TypeError(f"expected {dtype}, got {tensor.dtype}")
    row, column = tensor.stride()
    size = tensor.element_size()
    return tensor.data_ptr(), row * size, column * size


# Threads


class _Pool:
    """Threads beside the calling one; made again when their number changes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size = 0
        self.executor: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], None], copies: int, size: int) -> None:
        """Hand up to ``copies`` of ``work`` to a pool of ``size`` threads; fewer if it has none.

        A thread that cannot be started (a limit of the container, an interpreter that shuts down)
        is no error: ``work`` may run in none of them, or later than anybody waits for it.
        """
        with self.lock:
            if self.executor is None or self.size != size:
                if self.executor is not None:
                    self.executor.shutdown(wait=False)
                self.executor, self.size = ThreadPoolExecutor(size, "vocab_parallel_ce"), size
            with suppress(RuntimeError, MemoryError):
                for _ in range(copies):
                    self.executor.submit(work)


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
    threads = torch.get_num_threads()
    least = -(-SEQUENTIAL_BELOW // (2 * columns))
    size = max(least, -(-rows // (threads * RANGES_PER_THREAD)))
    copies = min(threads, -(-rows // size)) - 1
    if copies <= 0 or rows * columns < SEQUENTIAL_BELOW:
        kernel(0, rows, columns, *args)
        return

    def run(begin: int) -> None:
        kernel(begin, min(begin + size, rows), columns, *args)

    job = _Job(range(0, rows, size), run)
    try:
        _pool.submit(job.work_in_pool, copies, threads - 1)
        job.work_here()
    finally:
        job.wait()
    if job.error is not None:
        raise job.error


class _Job:
    """Row ranges that the calling thread and those of the pool take in turn.

    What is counted are the ranges that the pool works on, and not the threads that were asked to: a
    pool may lose one on its way, and yet run it later. Who comes late finds nothing left.
    """

    def __init__(self, begins: Iterable[int], run: Callable[[int], None]) -> None:
        self.begins, self.run = deque(begins), run
        self.busy = 0
        self.error: BaseException | None = None
        self.idle = threading.Condition()

    def work_here(self) -> None:
        """Take ranges until there are none. Not counted: an interrupt could lose the count."""
        while True:
            try:
                begin = self.begins.popleft()
            except IndexError:
                return
            self.run(begin)

    def work_in_pool(self) -> None:
        """The same, for a thread that the calling one must wait for."""
        while True:
            with self.idle:
                if not self.begins:
                    return
                begin = self.begins.popleft()
                self.busy += 1
            try:
                self.run(begin)
            except BaseException as problem:
                self.error = problem
                self.begins.clear()
            finally:
                with self.idle:
                    self.busy -= 1
                    self.idle.notify()

    def wait(self) -> None:
        """Until nobody writes into the caller's memory any more, whatever failed."""
        interrupt: BaseException | None = None
        while True:
            try:
                with self.idle:
                    self.begins.clear()
                    self.idle.wait_for(lambda: self.busy == 0)
                break
            except BaseException as problem:  # Ctrl-C, maybe more than once
                interrupt = problem
        if interrupt is not None:
            raise interrupt
