"""Checks of all three functions at once: one row, layouts, blocks, softcap, scales of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...engines.contract import ELSEWHERE, IGNORED, Coefficients, Wanted, arithmetic_dtype
from ..tolerance import assert_close
from .formulas import Shard, random_shard
from .subject import EVERYTHING, LEAST_AND_MOST, Subject, same_bits

STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda x: torch.cat([x, x.flip(1)], 1)[:, : x.shape[1]],
    "columns apart": lambda x: torch.stack([x, x.flip(1)], 2)[:, :, 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "backwards in memory": lambda x: x.flip(0).contiguous()[range(len(x))[::-1]],
    "amid words": lambda x: (
        torch.cat([x, x[:, :5]], 1).flatten().roll(3)[3:].as_strided(x.shape, (x.shape[1] + 5, 1))
    ),
    "rows expanded": lambda x: x[:1].expand(len(x), -1),
}


def is_served(subject: Subject, dtype: torch.dtype) -> None:
    """``supports`` says so, for logits on its device."""
    logits = torch.zeros(1, 1, dtype=dtype, device=subject.device)
    assert subject.engine.supports(logits), f"supports() says that it does not serve {dtype}"


def one_row(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    """Every function, where there is a single row."""
    for target in (columns // 2, ELSEWHERE, IGNORED):
        shard = random_shard(1, columns, dtype)
        # Of one row the naive error is luck: logits whose statistics every dtype holds exactly.
        shard.logits.fill_(2.0)
        shard.target[:] = target
        for wanted in LEAST_AND_MOST:
            subject.check_partials(shard, wanted=wanted)
        subject.check_log_prob(shard)
        arithmetic = arithmetic_dtype(dtype)
        m, s = (torch.tensor([value], dtype=arithmetic) for value in (2.0, 4.0))
        ones = torch.ones(1, dtype=arithmetic)
        got = subject.gradient(shard, m, s, Coefficients(ones, ones))
        want = torch.full((1, columns), 0.0 if target == IGNORED else 0.25, dtype=dtype)
        if target >= 0:
            want[0, target] = -0.75
        assert_close(got, want.double(), want, "gradient")


def strided(subject: Subject, dtype: torch.dtype, strides: str) -> None:
    """All three functions on logits that lie in memory like this."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard = shard._replace(logits=STRIDES[strides](shard.logits))
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)
    subject.check_gradient(shard, smooth=True, entropy=True)
    subject.check_gradient(shard)
    subject.check_log_prob(shard)


def many_blocks(subject: Subject, dtype: torch.dtype) -> None:
    """More elements than one block of rows, and more than one of threads."""
    shard = random_shard(300, 3000, dtype)
    subject.check_partials(shard)
    subject.check_gradient(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)
    subject.check_log_prob(shard)


def capped(subject: Subject, dtype: torch.dtype, softcap: float) -> None:
    """x = scale c tanh(z / c): the cap comes first. Padding of vectors and blocks stays outside."""
    for columns, scale in ((17, 0.7), (1100, -1.5), (1100, 1.0)):
        shard = random_shard(subject.rows, columns, dtype, spread=4.0)
        subject.check_partials(shard, scale, softcap=softcap)
        subject.check_gradient(shard, scale, smooth=columns == 17, entropy=True, softcap=softcap)
    subject.check_log_prob(shard, scale, softcap)
    strided_shard = shard._replace(logits=STRIDES["columns apart"](shard.logits))
    subject.check_partials(strided_shard, wanted=Wanted(), softcap=softcap)
    subject.check_gradient(strided_shard, softcap=softcap)


def capped_infinities(subject: Subject, dtype: torch.dtype) -> None:
    """A cap makes -c of -inf and c of inf, whose slope is 0; NaN stays NaN."""
    shard = random_shard(subject.rows, 70, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[:, 1] = torch.inf
    subject.check_partials(shard, softcap=10.0)
    subject.check_gradient(shard, smooth=True, entropy=True, softcap=10.0)
    shard.logits[3, 2] = torch.nan
    for wanted in LEAST_AND_MOST:
        s = subject.partials(shard, wanted=wanted, softcap=10.0)["s"]
        assert bool(s[3].isnan()), f"s of its row is {s[3]}"
        assert bool(s[torch.arange(len(s)) != 3].isfinite().all()), "NaN reached another row"


def one_scale_a_row(subject: Subject, dtype: torch.dtype) -> None:
    """Of either sign, and under a cap; that of an ignored row may be anything."""
    shard = random_shard(subject.rows, 1100, dtype)
    scale = torch.rand(subject.rows, dtype=arithmetic_dtype(dtype)) + 0.25
    ignored = shard.target == IGNORED
    for signs in (torch.ones_like(scale), torch.randn(subject.rows).sign().to(scale.dtype)):
        scale = scale * signs
        for softcap, wanted in ((0.0, Wanted()), (20.0, EVERYTHING)):
            subject.check_partials(shard, scale, wanted, softcap=softcap)
            subject.check_gradient(shard, scale, entropy=softcap > 0, softcap=softcap)
    subject.check_log_prob(shard, scale)
    before = subject.partials(shard, scale)
    after = subject.partials(shard, scale.masked_fill(ignored, torch.nan))
    assert all(torch.equal(after[name], before[name]) for name in before), "an ignored row's counts"


def inputs_are_only_read(subject: Subject, dtype: torch.dtype) -> None:
    shard = random_shard(subject.rows, 1100, dtype)
    before = [value.clone() for value in shard]
    subject.check_partials(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)
    subject.check_log_prob(shard)
    for name, now, then in zip(Shard._fields, shard, before, strict=True):
        assert same_bits(now, then), f"{name} was changed"
