"""The preflight of ``check=True``: one exchange of fixed size before the one that could hang.

Ranks that disagree on the number of rows or on the dtype would send payloads of different sizes,
and a rank that failed would raise while the others wait. So every rank, once it has its partials
ready, sends what it was called with, or the message of its error; then all raise together or all go
on. It costs one small collective and a host synchronisation.
"""

from __future__ import annotations

import struct
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .collectives import COLLECTIVES, all_gather_flat, communication_device, is_dry_run
from .engines.contract import arithmetic_dtype
from .header import HEADER_INTS, ValueProblems, read_headers, write_header
from .request import RowRequest
from .switches import check_is_on, check_word
from .verdict import raise_on_problems

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
_TEXT_BYTES = 1024
_TOLD = "_vocab_parallel_ce_told"
# has error, kind of error, rows, logits dtype, target dtype, columns, collective, width of the
# hidden states, rows of an exchange, whether their gradient is summed, selected ids a row; header;
# text
_FIELDS = 11
_FORMAT = f"<{_FIELDS}q{HEADER_INTS}i{_TEXT_BYTES}s"


class Plan(NamedTuple):
    """What a rank is about to send and compute; it found no error of its own."""

    request: RowRequest
    logits: Tensor
    target: Tensor
    normalizer: Tensor | None = None
    """0-d, in the arithmetic dtype"""
    width: int = 0
    """of the hidden states that the logits are made of; 0 where they are given"""
    chunk: int = 0
    """rows of an exchange, where a call makes more than one; else 0"""
    scale: Tensor | None = None
    """[N], in the arithmetic dtype, where the request has ``row_scale``"""
    sums_hidden: bool = False
    """whether the gradient of the hidden states will be summed over the ranks"""
    selected: Tensor | None = None
    """[N, K] int64"""


class _Held(threading.local):
    """How many preflights this thread has begun: whether one was, is a difference of two."""

    count = 0


_held = _Held()


def preflight(plan: Plan | Exception, group: dist.ProcessGroup) -> None:
    """Exchange plans over ``group``; raise on every rank if any rank has an error or a conflict."""
    if is_dry_run(group):
        if isinstance(plan, Exception):
            raise plan
        return
    try:
        packed = _pack(plan)
    except Exception as problem:  # a number that no field holds
        plan, packed = problem, _pack(problem)
    # Where a rank failed, its tensors may be anywhere: the group alone decides.
    try:
        device = communication_device(group)
    except Exception:
        if isinstance(plan, Exception):  # a group of devices that are not here tells nobody
            raise plan from None
        raise
    _held.count += 1
    plans = _exchange(packed, group, device)
    for rank, told in enumerate(plans):
        if told[0]:
            if isinstance(plan, Exception) and rank == dist.get_rank(group):
                raise plan
            raise _error(told, f"rank {rank} of the group: ")
    for column, name, show in (
        (2, "the number of rows", str),
        (3, "the dtype of input", lambda code: str(_DTYPES[code])),
        (4, "the dtype of target", lambda code: str(_DTYPES[code])),
        (6, "collective", lambda code: COLLECTIVES[code]),
        (7, "the width of input", str),
        (8, "the rows of an exchange (gradient, scratch_mib, or whether gradients are on)", str),
        (
            9,
            "the sum of the gradient of input (hidden_gradient, input.requires_grad, or whether "
            "gradients are on)",
            lambda sums: "one" if sums else "none",
        ),
        (10, "the number of selected ids a row", str),
    ):
        for rank, other in enumerate(plans):
            if other[column] != plans[0][column]:
                raise ValueError(
                    f"ranks disagree on {name}: rank 0 of the group has "
                    f"{show(plans[0][column])}, rank {rank} has {show(other[column])}; "
                    "every rank of a tensor-parallel group must pass the same batch"
                )
    ints = [p[_FIELDS : _FIELDS + HEADER_INTS] for p in plans]
    headers = torch.tensor(ints, dtype=torch.int32, device="cpu")  # whatever the default device is
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    dtype = arithmetic_dtype(_DTYPES[plans[0][3]])
    raise_on_problems(read_headers(headers, dtype), empty, constant_rows=True)


def tell(problem: Exception | None, group: dist.ProcessGroup) -> Exception | None:
    """Exchange errors alone over ``group``; this rank's own, or the first of another, or None.

    What is returned ``is_told``, and names the global rank that it comes from.
    """
    if dist.get_world_size(group) == 1 or is_dry_run(group):
        return problem
    origin = "" if problem is None or is_told(problem) else f"rank {dist.get_rank()}: "
    packed = _pack_error(problem, origin)
    plans = _exchange(packed, group, communication_device(group))
    if problem is None:
        problem = next((_error(told, "") for told in plans if told[0]), None)
    if problem is not None:
        with suppress(AttributeError):
            setattr(problem, _TOLD, True)
    return problem


def is_told(problem: Exception) -> bool:
    """Whether a round has told it already, so that no other must."""
    return getattr(problem, _TOLD, False)


class together:  # noqa: N801 (a context manager, read as a word)
    """With ``check``: if the block raises on this rank, the other ranks of ``group`` raise as well.

    That holds for any exception (a wrong argument, no memory, an engine that is not available), but
    only until the preflight of the block has run: after that the other ranks no longer wait for
    one. ``check`` is the argument of the public functions, or the word that a request has for it.
    """

    def __init__(self, group: object, check: object) -> None:
        self._group, self._check, self._held = group, check, _held.count

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, problem: BaseException | None, _trace: object) -> None:
        group = self._group
        if not isinstance(problem, Exception) or _held.count != self._held or is_told(problem):
            return
        if not check_is_on(check_word(self._check)) or not isinstance(group, dist.ProcessGroup):
            return
        if dist.get_world_size(group) > 1:
            preflight(problem, group)


def _exchange(
    packed: bytes, group: dist.ProcessGroup, device: torch.device
) -> list[tuple[Any, ...]]:
    """What every rank has packed, in rank order."""
    # These are bytes to send, whatever torch.func or a mode makes of the tensors of the call.
    with _disable_current_modes(), torch._C._DisableFuncTorch():
        return _exchanged(packed, group, device)


def _exchanged(
    packed: bytes, group: dist.ProcessGroup, device: torch.device
) -> list[tuple[Any, ...]]:
    mine = torch.frombuffer(bytearray(packed), dtype=torch.int32).to(device)
    world = dist.get_world_size(group)
    received = mine.new_empty(world * mine.numel())
    all_gather_flat(received, mine, group)
    raw = received.cpu().view(world, -1)
    return [struct.unpack(_FORMAT, row.numpy().tobytes()) for row in raw]


def _error(told: tuple[Any, ...], who: str) -> Exception:
    text: str = told[-1].rstrip(b"\0").decode("utf-8", "replace")
    kind: type[Exception] = _ERRORS[told[1]]
    return kind(who + text)


def _pack_error(problem: Exception | None, origin: str = "") -> bytes:
    """None: there is none, and nothing else to be told either."""
    kind, text = 0, b""
    if problem is not None:
        kind = next((i for i, e in enumerate(_ERRORS) if isinstance(problem, e)), len(_ERRORS) - 1)
        name = "" if type(problem) in _ERRORS else f"{type(problem).__name__}: "
        text = f"{origin}{name}{problem}".encode("utf-8", "replace")[:_TEXT_BYTES]
    nothing = [0] * (_FIELDS - 2 + HEADER_INTS)
    return struct.pack(_FORMAT, problem is not None, kind, *nothing, text)


def _pack(plan: Plan | Exception) -> bytes:
    if isinstance(plan, Exception):
        return _pack_error(plan)
    header = torch.empty(HEADER_INTS, dtype=torch.int32, device="cpu")
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    normalizer = None if plan.normalizer is None else plan.normalizer.cpu()
    write_header(header, plan.request, none, None, None, ValueProblems(), normalizer)
    columns = plan.logits.shape[-1]
    return struct.pack(
        _FORMAT,
        0,
        0,
        plan.target.numel(),
        _DTYPES.index(plan.logits.dtype),
        _DTYPES.index(plan.target.dtype),
        columns,
        COLLECTIVES.index(plan.request.collective),
        plan.width,
        plan.chunk,
        plan.sums_hidden,
        0 if plan.selected is None else plan.selected.shape[1],
        *header.tolist(),
        b"",
    )
