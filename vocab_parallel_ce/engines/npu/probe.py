"""Whether the max_sum way is right on this device, tried once in each dtype.

First its kernel alone, on what the way asks of it and no document promises: rows longer than one
tile of the kernel, -inf, a negative sum, a sum of infinity. Then the way's own two functions, which
also try the maximum in the logits' dtype, the mixed additions, and the put of the target's column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import ELSEWHERE, IGNORED, Coefficients, Wanted
from . import max_sum
from .finishing import HIGHEST
from .probing import Problem, first_problem

COLUMNS = 16_001
"""one more than a tile of the kernel"""
_ULPS = 64  # of a device's own exp and 1 / x, in fp32


def of_max_sum(dtype: torch.dtype) -> Problem | None:
    """What is wrong with the way in this dtype, or None."""
    return first_problem(
        dtype, lambda: [max_sum.NAMES] if max_sum.operator() is None else [], _problems
    )


def _problems(dtype: torch.dtype) -> Iterator[Problem]:
    for check in (_kernel, _partials, _gradient):
        for what, found, wanted, ulps in check(dtype):
            problem = _difference(found.cpu().double(), wanted, ulps, dtype)
            if problem:
                yield f"{what}: {problem}"


Found = Iterator[tuple[str, Tensor, Tensor, float]]
"""what it is, what the device gave, what is right in fp64, and how far it may be off: in epsilons
of the dtype"""


def _difference(found: Tensor, wanted: Tensor, ulps: float, dtype: torch.dtype) -> str:
    """The first place where they differ, in words; a 0 must be one."""
    info = torch.finfo(dtype)
    size = torch.where(wanted == 0, 0.0, wanted.abs().clamp(min=info.smallest_normal))
    off = (found - wanted).abs().nan_to_num(torch.inf, torch.inf) > ulps * info.eps * size
    off &= ~((found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(off.any()):
        return ""
    place = tuple(int(i) for i in off.nonzero()[0])
    where = f"element {place[-1]}" if len(place) == 1 else f"row {place[0]}, column {place[1]}"
    return f"{where} is {float(found[place])!r}, not {float(wanted[place])!r}"


def _logits(rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, COLUMNS] between -4 and 4, exact in every dtype; -inf at both ends of a tile."""
    column, row = torch.arange(COLUMNS), torch.arange(rows)[:, None]
    x = ((column * 37 + row * 11) % 65 - 32) / 8
    for place in (3, 15_998, 16_000):
        x[1::2, place] = -torch.inf
    return x.to(dtype)


def _fp32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _kernel(dtype: torch.dtype) -> Found:
    """The kernel by itself: every row another sum."""
    names = ("sum 1", "a sum of 2.5", "a negative sum", "a sum of infinity", "the largest maximum")
    x = _logits(5, dtype)
    top = _fp32(4.0, 4.5, 4.0, 4.0, HIGHEST)
    divisor = _fp32(1.0, 2.5, -0.5, torch.inf, torch.inf)
    exact = (x.double() - top.double()[:, None]).exp() / divisor.double()[:, None]
    found = max_sum.fused(x.to("npu"), top.to("npu"), divisor.to("npu"))
    if found.dtype != torch.float32:
        raise RuntimeError(f"its kernel gives {found.dtype}, not torch.float32")
    for row, name in enumerate(names):
        ulps = _ULPS * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        yield f"the kernel alone with {name}", found[row].cpu(), exact[row], ulps


def _partials(dtype: torch.dtype) -> Found:
    x = _logits(4, dtype)
    x[3] = -torch.inf
    target = torch.tensor([16_000, ELSEWHERE, 7, IGNORED])
    wanted = Wanted(ignored_rows=True)
    out = torch.full((3, 4), 5.0, device="npu")
    max_sum.partials(x.to("npu"), target.to("npu"), None, 1.0, wanted, out)
    exact = x.double()
    s = (exact - exact.amax(1).clamp(min=-1e30)[:, None]).exp().sum(1)
    x_y = torch.stack([exact[0, 16_000], exact[1, 0] * 0, exact[2, 7], exact[3, 0].nan_to_num(0)])
    x_y[3] = 0.0
    ulps = _ULPS * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for name, found, right in zip(("m", "s", "x_y"), out, (exact.amax(1), s, x_y), strict=True):
        yield f"{name} of a forward pass", found.cpu(), right, ulps


def _gradient(dtype: torch.dtype) -> Found:
    """Into a part of wider rows, as padded vocabularies have them."""
    names = ("a target at the end", "g < 0", "g = 0", "a target elsewhere", "NaN in an ignored row")
    x = _logits(5, dtype)
    x[4, 5:7] = torch.tensor([torch.nan, torch.inf])
    target = torch.tensor([16_000, 9, 11, ELSEWHERE, IGNORED])
    g = _fp32(0.25, -0.5, 0.0, 2.0, 1.0)
    m, s = torch.full((5,), 4.5), torch.full((5,), 3.0)
    exact = (x.double() - 4.5).exp() / 3 * g.double()[:, None]
    hot = torch.arange(COLUMNS) == target[:, None]
    exact = torch.where(hot, exact - g.double()[:, None], exact)
    exact[4] = 0.0
    wide = torch.full((5, COLUMNS + 3), 7.0, dtype=dtype, device="npu")
    out = wide[:, :COLUMNS]
    parts = (m.to("npu"), s.to("npu"), target.to("npu"), Coefficients(g.to("npu"), g.to("npu")))
    max_sum.gradient(x.to("npu"), *parts, None, 1.0, out)
    least = 2 * _ULPS * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for row, name in enumerate(names):
        yield f"the gradient of a row with {name}", out[row].cpu(), exact[row], max(1.0, least)
    beside = wide[:, COLUMNS:].cpu()
    yield "memory beside the gradient", beside, torch.full(beside.shape, 7.0).double(), 0.0
