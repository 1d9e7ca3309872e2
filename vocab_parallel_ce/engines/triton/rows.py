"""The triton engine's ``RowFunctions``: one launch each, see ``contract``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..contract import Gathered, HeaderLayout, Wanted

ON_HOST = False
_BLOCK = 256
_WARPS = 4
_SIGN_BLOCK = 4096  # one program reads all rows: the more at once, the fewer rounds trips
_SIGN_WARPS = 16


@cache
def _kernels() -> Any:
    return import_module("vocab_parallel_ce.engines.triton.row_kernels")


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def locate(
    target: Tensor, start: int, stop: int, vocab_size: int, ignore_index: int
) -> tuple[Tensor, int]:
    """See ``contract.RowFunctions``."""
    target = target.contiguous()
    rows = target.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=target.device)
    with on_device_of(target):
        _kernels().locate_rows[(-(-rows // _BLOCK),)](
            target, out, rows, start, stop, ignore_index, BLOCK=_BLOCK, num_warps=_WARPS
        )
    return out, -1


def sign(
    buffer: Tensor,
    static: Tensor,
    layout: HeaderLayout,
    target: Tensor,
    parts: Tensor,
    with_content: bool,
    shard_total: Tensor | float,
    weight_checksum: Tensor | int,
    normalizer: Tensor | None,
    scale_checksum: Tensor | None,
    selected_checksum: Tensor | None,
    size: int,
    ignore_index: int,
) -> Tensor:
    """See ``contract.RowFunctions``."""
    target = target.contiguous()
    buffer[: layout.static] = static
    buffer[layout.ints : layout.ints + 1].view(parts.dtype).fill_(shard_total)
    slots = buffer[layout.static : layout.ints].view(torch.int64)
    excuse = torch.empty((), dtype=torch.int32, device=target.device)
    content = parts[:2] if with_content else None
    weighted = isinstance(weight_checksum, Tensor)
    with on_device_of(target):
        _kernels().sign_rows[(1,)](
            slots, excuse, target, content, None if content is None else content.view(torch.int32),
            weight_checksum if weighted else None,
            None if normalizer is None else normalizer.view(torch.int32), scale_checksum,
            selected_checksum, target.shape[0], parts.shape[1], size, ignore_index,
            BLOCK=_SIGN_BLOCK, CONTENT=content is not None, WEIGHTED=weighted,
            NORMALIZED=normalizer is not None, ROW_SCALE=scale_checksum is not None,
            SELECTED=selected_checksum is not None, num_warps=_SIGN_WARPS,
        )  # fmt: skip
    return excuse


def conclude(
    gathered: Gathered,
    wanted: Wanted,
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    weight: Tensor | None,
    total_weight: Tensor | float,
    layout: HeaderLayout,
    excuse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    """See ``contract.RowFunctions``."""
    target, parts, headers = target.contiguous(), gathered.parts, gathered.headers
    rows, judge = target.shape[0], headers is not None
    # m and s are apart from stats: they outlive the call.
    stats = parts.new_empty(2 + wanted.smooth + wanted.entropy + wanted.squares, rows)
    m, s = parts.new_empty(rows), parts.new_empty(rows)
    argmax = torch.empty_like(target, dtype=torch.int64) if wanted.argmax else None
    weighted = isinstance(total_weight, Tensor)
    ranks = headers.shape[0] if headers is not None else 1
    # Not read where they are not: a kernel that never had a pointer there would be one more.
    weights = parts if gathered.shard_weight is None else gathered.shard_weight
    starts = target if gathered.starts is None else gathered.starts
    with on_device_of(target):
        _kernels().conclude_rows[(-(-rows // _BLOCK),)](
            parts, parts.view(torch.int32), parts.stride(0), parts.stride(1), parts.shape[0],
            weights, weights.stride(0), starts, starts.stride(0), headers,
            0 if headers is None else headers.stride(0), ranks, excuse, target,
            total_weight if weighted else None, 0.0 if weighted else float(total_weight), stats,
            stats.stride(0), m, s, argmax, rows,
            vocab_size, ignore_index, BLOCK=_BLOCK, WEIGHTED=weighted, SMOOTH=wanted.smooth,
            ENTROPY=wanted.entropy, SQUARES=wanted.squares, ARGMAX=wanted.argmax,
            IGNORED_ROWS=wanted.ignored_rows, JUDGE=judge, RANKS=1 << (ranks - 1).bit_length(),
            INTS=layout.ints, COMPARED=layout.compared, START=layout.start, STOP=layout.stop,
            VOCAB=layout.vocab_size, FLAGS=layout.flags, IMPLICIT_BIT=layout.implicit_bit,
            CONTENT=layout.content, NORMALIZER=layout.normalizer, TOLERANCE=layout.tolerance,
            num_warps=_WARPS,
        )  # fmt: skip
    return stats, m, s, argmax, None
