"""Checks of ``log_prob``, and of what ``partials`` may leave of it."""

from __future__ import annotations

import torch

from ...engines.contract import Wanted
from ..tolerance import assert_close
from . import formulas
from .formulas import random_shard
from .subject import UNWRITTEN, Subject


def of_width(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    """Of every row, ignored ones included."""
    shard = random_shard(subject.rows, columns, dtype)
    subject.check_log_prob(shard)
    subject.check_log_prob(shard, -0.6)
    shard.logits[:, 0] = -torch.inf
    shard.logits[3] = torch.nan
    if columns > 1:
        subject.check_log_prob(shard)


def left_by_partials(subject: Subject, dtype: torch.dtype) -> None:
    """An engine with LEAVES_LOG_PROB fills ``log_prob_out``; any other leaves it alone."""
    shard = random_shard(subject.rows, 100, dtype)
    out = torch.full_like(shard.logits, UNWRITTEN)
    subject.partials(shard, wanted=Wanted(ignored_rows=True), log_prob_out=out)
    if not subject.engine.LEAVES_LOG_PROB:
        assert bool((out == UNWRITTEN).all()), "partials wrote log_prob without LEAVES_LOG_PROB"
        return
    exact = formulas.statistics(shard, 1.0, torch.float64)
    naive = formulas.statistics(shard, 1.0, torch.float32)
    want = formulas.log_prob(shard, exact["m"], exact["s"], 1.0, torch.float64)
    plain = formulas.log_prob(shard, naive["m"], naive["s"], 1.0, torch.float32)
    assert_close(out, want, plain, "log_prob left by partials")
