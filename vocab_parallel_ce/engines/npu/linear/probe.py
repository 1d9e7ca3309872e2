"""Whether the fused operators are right on this device, tried once in each dtype.

First the forward alone: the end of a shard, rows that are no multiple of 8, the packed mask. Then
the two passes made of them, on what they ask of them and no document promises: negative and zero
coefficients, targets elsewhere, NaN in an ignored row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...contract import ELSEWHERE, IGNORED, Coefficients, Wanted
from ..probing import Problem, first_problem
from . import operators, passes

IDS, WIDTH, ROWS = 200, 32, 21
_SUMS = 64  # epsilons of fp32 that sums over a row may be off


def of_fused_head(dtype: torch.dtype) -> Problem | None:
    """What is wrong with them in this dtype, or None."""
    every = (operators.FORWARD_NAMES, operators.BACKWARD_NAMES)
    return first_problem(
        dtype, lambda: (names for names in every if operators.found(names) is None), _problems
    )


Found = Iterator[tuple[str, Tensor, Tensor, float]]
"""what it is, what the device gave, what is right in fp64, and how far the norm may be off"""


def _problems(dtype: torch.dtype) -> Iterator[Problem]:
    for check in (_forward, _partials, _gradients):
        for what, found, wanted, allowed in check(dtype):
            found = found.cpu().double()
            size = max(float(wanted.norm()), 1.0)
            apart = float((found - wanted).norm()) / size
            if not apart <= allowed:  # NaN is no match
                yield f"{what}: off by {apart:.2g} of its norm"


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and columns of targets: the first, the last, elsewhere, ignored."""
    n, h = torch.arange(ROWS)[:, None], torch.arange(WIDTH)
    hidden = ((n * 7 + h * 5) % 17 - 8) / 8
    weight = ((torch.arange(IDS)[:, None] * 11 + h * 3) % 13 - 6) / 16
    target = torch.arange(ROWS) * 37 % IDS
    target[:4] = torch.tensor([0, IDS - 1, ELSEWHERE, IGNORED])
    return hidden.to(dtype), weight.to(dtype), target


def _forward(dtype: torch.dtype) -> Found:
    hidden, weight, target = _operands(dtype)
    masked = target < 0
    given = target.masked_fill(masked, IDS).int()
    x = hidden.double() @ weight.double().t()
    m = x.amax(1)
    column = target.clamp(min=0)
    difference = (x - m[:, None]).gather(1, column[:, None])[:, 0].masked_fill(masked, 0.0)
    sums = _SUMS * torch.finfo(torch.float32).eps
    found = operators.online_max_sum(hidden.to("npu"), weight.to("npu"), given.to("npu"))
    wanted = (m, (x - m[:, None]).exp().sum(1), difference)
    for name, got, right in zip(("m", "s", "x_y - m"), found, wanted, strict=False):
        yield f"{name} of the forward operator", got, right, sums
    rows = found[3].cpu()[:, None] >> torch.arange(8) & 1
    yield "its mask", rows.flatten()[:ROWS], masked.double(), 0.0
    yield "our mask", operators.packed(masked.to("npu"))[:2], found[3].cpu()[:2].double(), 0.0
    yield "its targets", found[4], column.double(), 0.0


def _partials(dtype: torch.dtype) -> Found:
    hidden, weight, target = _operands(dtype)
    hidden[3] = torch.nan
    wanted = Wanted(smooth=True)
    out = torch.full((4, ROWS), 5.0, device="npu")
    passes.partials(hidden.to("npu"), weight.to("npu"), target.to("npu"), None, 1.0, wanted, out)
    x = hidden.double() @ weight.double().t()
    m = x.amax(1)
    d = x - m[:, None]
    x_y = x.gather(1, target.clamp(min=0)[:, None])[:, 0].masked_fill(target < 0, 0.0)
    for name, found, right in zip(
        wanted.rows, out, (m, d.exp().sum(1), x_y, d.sum(1)), strict=True
    ):
        right[3] = 0.0
        yield f"{name} of a forward pass", found, right, _SUMS * torch.finfo(torch.float32).eps


def _gradients(dtype: torch.dtype) -> Found:
    hidden, weight, target = _operands(dtype)
    hidden[3] = torch.nan
    n = torch.arange(ROWS)
    g = ((n * 5 + 2) % 7 - 3) / 4  # some are negative, some 0
    b = g + (n % 3 - 1) / 8
    smooth = (n % 5).float() / 512
    for name, one, scale, c in (
        ("plain loss", True, 1.0, Coefficients(g, g)),
        ("scaled loss", True, 0.5, Coefficients(g, g)),
        ("loss with z and smoothing", False, 1.0, Coefficients(g, b, smooth)),
    ):
        clean = torch.where((target == IGNORED)[:, None], 0.0, hidden).double()
        x = clean @ weight.double().t() * scale
        m, s = x.amax(1), (x - x.amax(1, keepdim=True)).exp().sum(1)
        dx = (x - m[:, None]).exp() / s[:, None] * c.softmax.double()[:, None]
        dx -= (torch.arange(IDS) == target[:, None]) * c.target.double()[:, None]
        if c.smooth is not None:
            dx -= c.smooth.double()[:, None]
        dx[target == IGNORED] = 0.0
        on_card = Coefficients(*(None if part is None else part.to("npu") for part in c))  # type: ignore[arg-type]
        of_hidden, of_weight = passes.gradients(
            hidden.to("npu"), weight.to("npu"), m.float().to("npu"), s.float().to("npu"),
            target.to("npu"), on_card, None, scale, one,
        )  # fmt: skip
        allowed = 4 * torch.finfo(dtype).eps
        yield f"gradient of hidden states, {name}", of_hidden, dx @ weight.double(), allowed
        yield f"gradient of the weight, {name}", of_weight, dx.t() @ clean, allowed
