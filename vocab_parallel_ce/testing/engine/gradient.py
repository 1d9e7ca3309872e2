"""Checks of ``gradient``: its parts, rows that get zeros or NaN, and how it is rounded."""

from __future__ import annotations

import torch

from ...engines.contract import ELSEWHERE, IGNORED, Coefficients, arithmetic_dtype
from ..tolerance import assert_close
from .formulas import Shard, random_shard
from .subject import Subject


def of_width(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    shard = random_shard(subject.rows, columns, dtype)
    subject.check_gradient(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)


def of_parts(
    subject: Subject,
    dtype: torch.dtype,
    scale: float,
    smooth: bool,
    entropy: bool,
    weighted: bool,
) -> None:
    shard = random_shard(subject.rows, 70, dtype)
    subject.check_gradient(shard, scale, smooth, entropy, weighted)


def where_p_is_zero(subject: Subject, dtype: torch.dtype) -> None:
    """-inf and far-off columns add exactly 0 to the entropy's part, never 0 * -inf."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[:, 1::3] -= 2e4
    shard.target[0] = 3  # a target of probability 0
    shard.logits[4] = -torch.inf  # the whole shard of this row
    subject.check_gradient(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)


def of_ignored_rows(subject: Subject, dtype: torch.dtype) -> None:
    """It is written as zeros, not multiplied into them: NaN there reaches nothing."""
    shard = random_shard(subject.rows, 1100, dtype)
    ignored = shard.target == IGNORED
    shard.logits[ignored, ::2] = torch.nan
    shard.logits[ignored, 1::2] = torch.inf
    arithmetic = arithmetic_dtype(dtype)
    m = torch.where(ignored, torch.nan, 20.0).to(arithmetic)
    s = torch.where(ignored, torch.nan, 1e3).to(arithmetic)
    bad = torch.where(ignored, torch.nan, 1.0).to(arithmetic)
    for c in (Coefficients(bad, bad), Coefficients(bad, bad, bad, bad)):
        out = subject.gradient(shard, m, s, c)
        assert bool((out[ignored] == 0).all()), "the gradient of an ignored row is not 0"
        assert bool(out[~ignored].isfinite().all()), "the gradient of a kept row is not finite"


def of_unused_rows(subject: Subject, dtype: torch.dtype) -> None:
    """Where every coefficient is 0 zeros are written, whatever the logits, m and s are."""
    shard = random_shard(subject.rows, 1100, dtype)
    arithmetic = arithmetic_dtype(dtype)
    unused = torch.arange(subject.rows) % 3 == 0
    shard.target[shard.target == IGNORED] = 5
    shard.logits[unused, ::2] = torch.nan
    m, s = (torch.where(unused, torch.nan, value).to(arithmetic) for value in (9.0, 10.0))
    used = torch.where(unused, 0.0, 1.0).to(arithmetic)
    for c in (Coefficients(used, used), Coefficients(used, used, used, used)):
        out = subject.gradient(shard, m, s, c)
        assert bool((out[unused] == 0).all()), "the gradient of a row without coefficients is not 0"
        assert bool(out[~unused].isfinite().all()), "the gradient of a used row is not finite"
    nothing = torch.zeros_like(used)
    for place in range(4):  # one of them alone is enough
        parts = [nothing] * place + [used] + [nothing] * (3 - place)
        out = subject.gradient(shard, m, s, Coefficients(*parts))
        assert bool((out[unused] == 0).all()), "the gradient of a row without coefficients is not 0"
        here = ~unused & (shard.target >= 0)
        assert bool((out[here] != 0).any(1).all()), "a row with one coefficient has no gradient"


def of_finite_logits(subject: Subject, dtype: torch.dtype) -> None:
    """The promise changes no number: finite logits and -inf give zeros, whatever else is NaN."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits[:, ::5] = -torch.inf
    rows, largest = torch.arange(subject.rows), torch.finfo(dtype).max
    nothing = (shard.target == IGNORED) | (rows % 3 == 0)
    shard.logits[nothing, 1], shard.logits[nothing, 2] = largest, -largest
    arithmetic = arithmetic_dtype(dtype)
    m, s = (torch.where(nothing, torch.nan, value).to(arithmetic) for value in (9.0, 1e3))
    c = torch.where(nothing, 0.0, 0.5).to(arithmetic)
    bad = torch.where(shard.target == IGNORED, torch.nan, c)
    for parts in (Coefficients(bad, bad), Coefficients(bad, bad, bad, bad)):
        for softcap in (0.0, 20.0):
            before = subject.gradient(shard, m, s, parts, shard.weight, 0.5, None, softcap)
            after = subject.gradient(shard, m, s, parts, shard.weight, 0.5, None, softcap, True)
            assert torch.equal(after, before), "finite_logits changes a number"
            assert bool((after[nothing] == 0).all()), "finite_logits: a row's gradient is not 0"


def of_a_poisoned_row(subject: Subject, dtype: torch.dtype) -> None:
    """s = NaN marks a row whose target or rank is wrong: no column of it stays plausible."""
    shard = random_shard(4, 1100, dtype)
    shard.target[:] = torch.tensor([5, ELSEWHERE, 5, ELSEWHERE])
    shard.logits[:, 3] = -torch.inf  # p = 0 hides nothing
    arithmetic = arithmetic_dtype(dtype)
    m = torch.full((4,), 10.0, dtype=arithmetic)
    s = torch.tensor([torch.nan, torch.nan, 3.0, 3.0], dtype=arithmetic)
    ones = torch.ones(4, dtype=arithmetic)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, ones, ones)):
        out = subject.gradient(shard, m, s, c)
        assert bool(out[:2].isnan().all()), "the gradient of a row with s = NaN has numbers"
        assert bool(out[2:].isfinite().all()), "NaN reached the gradient of another row"


def of_the_target_is_rounded_once(subject: Subject, dtype: torch.dtype) -> None:
    """p = 0.9995 gives -5e-4, not the 0 of a p that was rounded to 1 before the 1 went off."""
    shard = Shard(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.int64), torch.ones(2))
    shard.logits[0, 1] = -7.6
    x = shard.logits.double()
    want = x.softmax(1) - torch.tensor([[1.0, 0.0]])
    naive = x.float().softmax(1) - torch.tensor([[1.0, 0.0]])
    s = torch.tensor([float((x - x.max()).exp().sum())])
    ones, m = torch.ones(1), torch.zeros(1)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, 0 * ones, 0 * ones)):
        out = subject.gradient(shard, m, s, c)
        assert -6e-4 < float(out[0, 0]) < -4e-4, f"it is {float(out[0, 0])}, not -5.0e-4"
        assert_close(out, want, naive, "gradient")
