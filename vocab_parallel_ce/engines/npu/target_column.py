"""One element of each row: the column of its target, read and written without the rest of it.

``scatter_`` on [N, C_r] would read and write whole rows (see ``traffic``), so the gradient's
element is formed on [N] vectors and put into a flat view of the result. A row whose target lives
elsewhere gets the value of its column 0 in the same way, since no index says "none".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...views import typed
from ..contract import IGNORED, Coefficients
from .chunks import Scaling

_LONGEST_VIEW = 2**31 - 1  # elements of a flat view: more may overflow a kernel's own offsets


class TargetColumn:
    """The column of each row's target, or 0, and x there."""

    def __init__(self, logits: Tensor, scaling: Scaling, local_target: Tensor) -> None:
        self._local_target = local_target
        self._column = local_target.clamp(min=0)
        self._dense = logits.is_contiguous()
        if self._dense:
            self.x = scaling.elements(_read(logits, self._column))
        else:  # a gather would copy all of the logits first: chunks, which are dense, are seen
            self.x = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        """[N] fp32, once every chunk was seen"""

    def see(self, x: Tensor, rows: slice) -> None:
        """A chunk's x [n, C_r], before anything is written in its place."""
        if not self._dense:
            self.x[rows] = _read(x, self._column[rows])

    def put_gradient(
        self, out: Tensor, m: Tensor, s: Tensor, coefficients: Coefficients, weight: Tensor | None
    ) -> None:
        """Write dx of these columns into ``out`` [N, C_r]; formed in fp32 and rounded once."""
        _write(out, self._column, self._gradient(m, s, coefficients, weight))

    def _gradient(
        self, m: Tensor, s: Tensor, coefficients: Coefficients, weight: Tensor | None
    ) -> Tensor:
        softmax, target_part, smooth, entropy = coefficients
        d = self.x - m
        e = d.exp()
        p = e / s
        dx = p * softmax
        if entropy is not None:
            dx = dx - (p * entropy * (d - s.log())).masked_fill_(e == 0, 0.0)
        if smooth is not None:
            dx = dx - (smooth if weight is None else smooth * weight[self._column])
        dx = dx - target_part.masked_fill(self._local_target < 0, 0.0)
        return dx.masked_fill_(self._local_target == IGNORED, 0.0)


def _read(matrix: Tensor, column: Tensor) -> Tensor:
    """The element of each row, [n], in the matrix's dtype."""
    return matrix.gather(1, column[:, None]).squeeze(1)


def _write(out: Tensor, column: Tensor, values: Tensor) -> None:
    """Put ``values`` [N] into one column of each row of ``out`` [N, C_r], whatever its strides."""
    rows, columns = out.shape
    row_stride, column_stride = out.stride()
    values = values.to(out.dtype)
    if out.dtype == torch.bfloat16:  # older kernels of put_ know fp16 only; these are just bits
        out, values = typed(out, torch.float16), typed(values, torch.float16)
    width = (columns - 1) * column_stride + 1
    step = max(1, (_LONGEST_VIEW - width) // max(row_stride, 1) + 1)
    begin = torch.arange(min(rows, step), device=out.device) * row_stride
    for start in range(0, rows, step):
        part, at = out[start : start + step], slice(start, start + step)
        span = (len(part) - 1) * row_stride + width
        flat = part.as_strided((span,), (1,), part.storage_offset())
        with _in_any_order():
            flat.put_(begin[: len(part)] + column[at] * column_stride, values[at])


@contextmanager
def _in_any_order() -> Iterator[None]:
    """Without deterministic algorithms, which torch refuses for put_: no place is written twice."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
