"""The list of checks: every dtype and option against the fp64 truth, and how the loss behaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from vocab_parallel_ce.collectives import BACKENDS_WITHOUT_FP64
from vocab_parallel_ce.launch.doctor import behaviour
from vocab_parallel_ce.launch.doctor.cases import Case, Found, Place, against_truth
from vocab_parallel_ce.launch.doctor.truth import Question
from vocab_parallel_ce.tensor_checks import DEVICES_WITHOUT_FP64

OPERATOR_LIMIT = 200_000  # rows that the fused operator of Ascend takes at most


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Place, torch.dtype], Found]
    gate: bool = False
    """where it is skipped, the dtype's other checks are as well"""


def for_dtype(place: Place, dtype: torch.dtype) -> list[Check]:
    """The checks of one dtype, in order."""
    if dtype == torch.float64 and _without_fp64(place):
        return [Check("fp64 is refused as documented", behaviour.fp64_is_refused)]
    base = Question(rows=place.rows, vocab=place.vocab)
    everything = replace(
        base, weight=True, ignored=True, label_smoothing=0.1, z=1e-3, scale=0.7, reduction="sum"
    )
    tokens = replace(base, reduction="none")
    wide = replace(base, rows=4, vocab=_whole(8192 if place.quick else 152_064, place.world))
    per_row = replace(base, reduction="none")
    cases = {
        "mean": Case(base),
        "sum": Case(replace(base, reduction="sum")),
        "none": Case(per_row),
        "weight": Case(replace(base, weight=True)),
        "ignore_index": Case(replace(base, ignored=True)),
        "label_smoothing": Case(replace(base, label_smoothing=0.1)),
        "z-loss": Case(replace(base, z=1e-2)),
        "scale": Case(replace(base, scale=1 / 0.7)),
        "scale, one a row": Case(replace(base, scale=1.25), scale_of_rows=True),
        "softcap": Case(replace(base, softcap=5.0, scale=0.75)),
        "normalizer": Case(replace(base, normalizer=37.0, z=1e-3, ignored=True)),
        "every option, mean": Case(replace(everything, reduction="mean")),
        "every option, sum, in place": Case(everything, inplace=True),
        "every option, none": Case(replace(everything, reduction="none")),
        "in place, none": Case(per_row, inplace=True),
        "padding columns": Case(per_row, sharding="padded"),
        "strided logits": Case(per_row, strided=True),
        "logits of three dimensions": Case(per_row, lead=(-1, 2 - place.rows % 2)),
        "a 1-D row": Case(replace(per_row, rows=1), lead=()),
        "extreme logits": Case(replace(per_row, extreme=True)),
        "cross_entropy_loss, none": Case(per_row, "operator"),
        "cross_entropy_loss, mean, z-loss": Case(replace(base, z=1e-3), "operator"),
        "cross_entropy_loss, every option": Case(
            replace(everything, ignored=False), "operator", inplace=True
        ),
        "token_statistics": Case(tokens, "tokens"),
        "token_statistics, in place": Case(replace(tokens, scale=0.7), "tokens", inplace=True),
        "token_statistics, extreme logits": Case(replace(tokens, extreme=True), "tokens"),
        "token_statistics, selected ids": Case(
            replace(tokens, selected=5, scale=1.25), "tokens", scale_of_rows=True
        ),
        "a large vocabulary": Case(replace(wide, reduction="none")),
    }
    if place.world > 1:
        cases |= {
            "all_gather": Case(per_row, collective="all_gather"),
            "all_reduce": Case(per_row, collective="all_reduce"),
            "all_reduce, every option": Case(everything, collective="all_reduce"),
            "uneven shards": Case(replace(everything, reduction="none"), sharding="uneven"),
            "shards out of rank order": Case(per_row, sharding="backwards"),
            "selected ids, all_reduce, uneven shards": Case(
                replace(tokens, selected=5), "tokens", sharding="uneven", collective="all_reduce"
            ),
            "an empty shard": Case(per_row, sharding="empty"),
        }
    if not place.quick and dtype == torch.float32:
        many = replace(per_row, rows=OPERATOR_LIMIT + 1, vocab=2 * place.world)
        cases["more rows than the operator takes"] = Case(many)
    checks = [Check("torch's own arithmetic", behaviour.torch_itself, gate=True)]
    checks += [Check(name, partial(against_truth, case)) for name, case in cases.items()]
    checks += [
        Check("all rows ignored", behaviour.all_ignored),
        Check("no rows", behaviour.no_rows),
        Check("target out of range", behaviour.bad_target),
        Check("the same bits twice", behaviour.repeated),
    ]
    if place.world > 1:
        checks.append(Check("ranks with different targets", behaviour.other_targets))
    if place.world > 1 and dtype == torch.float32:
        checks.append(Check("number of collectives", behaviour.collectives))
    return checks


def _without_fp64(place: Place) -> bool:
    if place.device.type in DEVICES_WITHOUT_FP64:
        return True
    return place.group is not None and dist.get_backend(place.group) in BACKENDS_WITHOUT_FP64


def _whole(vocab: int, world: int) -> int:
    return vocab - vocab % world
