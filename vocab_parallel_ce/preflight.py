"""The preflight of ``check=True``: one exchange of fixed size before anything that could hang.

Ranks that disagree on the number of rows or on the dtype would send payloads of different sizes,
and a rank that finds an argument wrong would raise while the others wait. So every rank first
sends what it was called with, and the message of its own error if it has one; then all raise
together or all go on. It costs one small collective and a host synchronisation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import COLLECTIVES, all_gather_flat, is_dry_run
from .engines.contract import arithmetic_dtype
from .header import HEADER_INTS, ValueProblems, raise_on_problems, read_headers, write_header
from .request import RowRequest

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
_TEXT_BYTES = 1024
# has error, kind of error, rows, logits dtype, target dtype, columns, collective; header; text
_FIELDS = 7
_FORMAT = f"<{_FIELDS}q{HEADER_INTS}i{_TEXT_BYTES}s"


@dataclass(frozen=True)
class Plan:
    """What a rank that found nothing wrong is about to do."""

    request: RowRequest
    logits: Tensor
    target: Tensor
    normalizer: Tensor | None = None
    """0-d, in the arithmetic dtype"""


def preflight(plan: Plan | Exception, device: torch.device, group: dist.ProcessGroup) -> None:
    """Exchange plans over ``group``; raise on every rank if any rank has an error or a conflict."""
    if is_dry_run(group):
        if isinstance(plan, Exception):
            raise plan
        return
    mine = torch.frombuffer(bytearray(_pack(plan)), dtype=torch.int32).to(device)
    world = dist.get_world_size(group)
    received = mine.new_empty(world * mine.numel())
    all_gather_flat(received, mine, group)
    raw = received.cpu().view(world, -1)
    plans = [struct.unpack(_FORMAT, row.numpy().tobytes()) for row in raw]

    for rank, (failed, kind, *rest) in enumerate(plans):
        if failed:
            text = rest[-1].rstrip(b"\0").decode("utf-8", "replace")
            if isinstance(plan, Exception) and rank == dist.get_rank(group):
                raise plan
            raise _ERRORS[kind](f"rank {rank} of the group: {text}")
    for column, name, show in (
        (2, "the number of rows", str),
        (3, "the dtype of input", lambda code: str(_DTYPES[code])),
        (4, "the dtype of target", lambda code: str(_DTYPES[code])),
        (6, "collective", lambda code: COLLECTIVES[code]),
    ):
        for rank, other in enumerate(plans):
            if other[column] != plans[0][column]:
                raise ValueError(
                    f"ranks disagree on {name}: rank 0 of the group has "
                    f"{show(plans[0][column])}, rank {rank} has {show(other[column])}; "
                    "every rank of a tensor-parallel group must pass the same batch"
                )
    headers = torch.tensor([p[_FIELDS : _FIELDS + HEADER_INTS] for p in plans], dtype=torch.int32)
    empty = torch.empty(0, dtype=torch.int64)
    dtype = arithmetic_dtype(_DTYPES[plans[0][3]])
    raise_on_problems(read_headers(headers, dtype), empty, constant_rows=True)


def _pack(plan: Plan | Exception) -> bytes:
    if isinstance(plan, Exception):
        kind = next((i for i, e in enumerate(_ERRORS) if isinstance(plan, e)), len(_ERRORS) - 1)
        text = str(plan).encode("utf-8")[:_TEXT_BYTES]
        return struct.pack(_FORMAT, 1, kind, *[0] * (_FIELDS - 2), *[0] * HEADER_INTS, text)
    header = torch.empty(HEADER_INTS, dtype=torch.int32)
    none = torch.empty(0, dtype=torch.int64)
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
        *header.tolist(),
        b"",
    )
