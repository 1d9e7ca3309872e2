"""The cpu engine's ``RowFunctions``: one compiled loop each."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocab_parallel_ce.engines.contract import Gathered, HeaderLayout, Wanted
from vocab_parallel_ce.engines.cpu import threads
from vocab_parallel_ce.engines.cpu.addresses import vector

ON_HOST = True
ELEMENTS_PER_ROW = 16  # how many logits take as long as what is done to a row here
_TOKENS: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


@cache
def _kernels() -> Any:
    return import_module("vocab_parallel_ce.engines.cpu.vector_kernels")


def locate(
    target: Tensor, start: int, stop: int, vocab_size: int, ignore_index: int
) -> tuple[Tensor, int]:
    """See ``contract.RowFunctions``."""
    out = torch.empty_like(target, memory_format=torch.contiguous_format)
    bad: int = _kernels().locate_rows(
        0, target.shape[0], *vector(target, torch.int64), start, stop, vocab_size, ignore_index,
        out.data_ptr(),
    )  # fmt: skip
    return out, bad


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
) -> None:
    """See ``contract.RowFunctions``."""
    bits = 0
    if normalizer is not None:
        bits = int(normalizer.view(torch.int64 if normalizer.itemsize == 8 else torch.int32))
    _kernels().sign_rows(
        target.shape[0], *vector(target, torch.int64), parts.shape[1], parts.data_ptr(),
        parts.stride(0) * parts.itemsize, with_content, _TOKENS[parts.dtype], static.data_ptr(),
        layout.static, layout.ints, int(weight_checksum), _int(scale_checksum),
        _int(selected_checksum), bits, float(shard_total), buffer.data_ptr(),
    )  # fmt: skip


def _int(checksum: Tensor | None) -> int:
    return 0 if checksum is None else int(checksum)


def agree(headers: Tensor, layout: HeaderLayout) -> bool:
    """See ``contract.RowFunctions``."""
    yes: bool = _kernels().headers_agree(
        headers.shape[0], headers.data_ptr(), headers.stride(0) * 4, layout.ints, layout.start,
        layout.stop, layout.vocab_size, layout.content, layout.findings,
    )  # fmt: skip
    return yes


def weigh(weight: Tensor) -> tuple[int, int]:
    """See ``contract.RowFunctions``."""
    weight = weight.contiguous()
    found: tuple[int, int] = _kernels().weigh_classes(
        weight.shape[0], weight.data_ptr(), _TOKENS[weight.dtype]
    )
    return found


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """See ``contract.RowFunctions``."""
    parts = gathered.parts
    rows, size = target.shape[0], parts.itemsize
    # m and s are apart from stats: they outlive the call.
    stats = parts.new_empty(2 + wanted.smooth + wanted.entropy + wanted.squares, rows)
    m, s, row_weight = parts.new_empty(rows), parts.new_empty(rows), parts.new_empty(rows)
    weight = None if weight is None else weight.to(parts.dtype)
    argmax = torch.empty_like(target) if wanted.argmax else None
    part, row, _ = parts.stride()
    threads.run(
        _kernels().conclude_rows, rows, rows * ELEMENTS_PER_ROW, parts.data_ptr(), part * size,
        row * size, parts.shape[0], *_vector(gathered.shard_weight), *_vector(gathered.starts),
        *vector(target, torch.int64), ignore_index, vocab_size, *_vector(weight),
        float(total_weight), wanted.smooth, wanted.entropy, wanted.squares, wanted.argmax,
        wanted.ignored_rows, _TOKENS[parts.dtype], stats.data_ptr(), rows * size, m.data_ptr(),
        s.data_ptr(), row_weight.data_ptr(), 0 if argmax is None else argmax.data_ptr(),
    )  # fmt: skip
    return stats, m, s, argmax, row_weight


def _vector(values: Tensor | None) -> tuple[int, int]:
    """Address and step in bytes."""
    return (0, 0) if values is None else (values.data_ptr(), values.stride(0) * values.itemsize)
