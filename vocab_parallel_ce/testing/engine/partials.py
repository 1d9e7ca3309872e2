"""Checks of ``partials``: options, large logits, infinities, NaN, ignored rows and ties."""

from __future__ import annotations

import torch

from ...engines.contract import IGNORED, Wanted
from .formulas import random_shard
from .subject import LEAST_AND_MOST, Subject


def of_width(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    shard = random_shard(subject.rows, columns, dtype)
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)


def in_its_own_row(subject: Subject, dtype: torch.dtype, wanted: Wanted, weighted: bool) -> None:
    """Each statistic alone and with the others lands in its own row."""
    subject.check_partials(random_shard(subject.rows, 70, dtype), 1.3, wanted, weighted)


def scaled(subject: Subject, dtype: torch.dtype, scale: float) -> None:
    shard = random_shard(subject.rows, 1100, dtype)
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, scale, wanted)


def of_large_logits(subject: Subject, dtype: torch.dtype, spread: float, offset: float) -> None:
    """Three clusters far apart: no e^(x - m) is subnormal, which an engine may take for 0."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits.add_(offset + spread * torch.randint(-1, 2, shard.logits.shape))
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)


def of_minus_infinity(subject: Subject, dtype: torch.dtype) -> None:
    """Columns of -inf have no probability; a row of nothing else has m = -inf and s = 0."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[3] = -torch.inf
    shard.logits[4, :1030] = -torch.inf  # a whole block
    for weighted in (False, True):
        subject.check_partials(shard, weighted=weighted)
    subject.check_partials(shard, wanted=Wanted())
    got = subject.partials(shard)
    assert got["m"][3] == -torch.inf, f"m of a row of -inf is {got['m'][3]}"
    for name in ("s", "t", "argmax"):
        assert got[name][3] == 0, f"{name} of a row of -inf is {got[name][3]}"


def nan_and_infinity_are_not_lost(
    subject: Subject, dtype: torch.dtype, value: float, place: int
) -> None:
    """Wherever it lies in a row, s is NaN, and the other rows know nothing of it."""
    shard = random_shard(subject.rows, 1100, dtype)
    clean = {wanted: subject.partials(shard, wanted=wanted) for wanted in LEAST_AND_MOST}
    shard.logits[3, place] = value
    others = torch.arange(subject.rows) != 3
    for wanted, before in clean.items():
        after = subject.partials(shard, wanted=wanted)
        for name in {"s", "t"} & set(wanted.rows):
            assert bool(after[name][3].isnan()), f"{name} of its row is {after[name][3]}"
        for name in wanted.rows:
            same = torch.equal(after[name][others], before[name][others])
            assert same, f"{name} of other rows changed"


def nan_hides_behind_no_infinity(subject: Subject, dtype: torch.dtype) -> None:
    """A NaN among nothing but -inf, and one before a larger logit."""
    shard = random_shard(2, 1100, dtype)
    shard.logits[0] = -torch.inf
    shard.logits[0, 700] = torch.nan
    shard.logits[1, 3], shard.logits[1, 1099] = torch.nan, 1e4
    for wanted in LEAST_AND_MOST:
        s = subject.partials(shard, wanted=wanted)["s"]
        assert bool(s.isnan().all()), f"s is {s.tolist()}"


def ignored_rows_are_not_read(subject: Subject, dtype: torch.dtype) -> None:
    """NaN in them changes nothing; asked for, they are answered as if they counted."""
    shard = random_shard(subject.rows, 1100, dtype)
    ignored = shard.target == IGNORED
    shard.logits[ignored] = torch.nan
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)
    read_all = Wanted(ignored_rows=True)
    s = subject.partials(shard, wanted=read_all)["s"][ignored]
    assert bool(s.isnan().all()), "asked for, ignored rows that hold NaN have a finite s"
    subject.check_partials(random_shard(subject.rows, 1100, dtype), wanted=read_all)


def first_of_a_tie(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    """The smallest column wins, also where all of them are equal."""
    shard = random_shard(4, columns, dtype)
    shard.target[:] = 0
    places = [0, 5, 15, columns - 2]
    for row, place in enumerate(places):
        shard.logits[row, place::2] = 40.0
    got = subject.partials(shard, wanted=Wanted(argmax=True))["argmax"].tolist()
    assert got == places, f"argmax is {got}, not {places}"
    shard.logits[:] = -3.0
    got = subject.partials(shard)["argmax"].tolist()
    assert got == [0] * 4, f"argmax of equal logits is {got}"
