"""Where each row's target lives, and which rows count.

Whether a target is valid follows from the target and vocab_size alone, never from "no rank has it".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .engines.contract import ELSEWHERE, IGNORED
from .header import ValueProblems
from .request import RowRequest
from .selected import is_allowed


@dataclass(frozen=True)
class Located:
    """[N] each."""

    local_target: Tensor
    """int64 column of this shard, ELSEWHERE or IGNORED"""
    ignored: Tensor
    allowed: Tensor
    """the target is a class or ignore_index"""


def locate(target: Tensor, request: RowRequest) -> Located:
    """Locate ``target`` [N] int64 in the shard of ``request``; no host synchronisation."""
    ignored = target == request.ignore_index
    here = (target >= request.start) & (target < request.stop)
    local_target = torch.where(here, target - request.start, ELSEWHERE)
    local_target.masked_fill_(ignored, IGNORED)
    if request.stop - request.start < request.vocab_size:
        here = (target >= 0) & (target < request.vocab_size)
    return Located(local_target, ignored, here | ignored)


def find_problems(
    target: Tensor,
    located: Located,
    weight: Tensor | None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
    vocab_size: int = 0,
) -> ValueProblems:
    """On the host: the first row and the first class whose value is not allowed.

    What ``scale`` [N] and ``selected`` [N, K] hold of an ignored row does not matter.
    """
    allowed = located.allowed
    bad_row, bad_target, bad_weight, bad_scale = -1, 0, -1, -1
    bad_selected_row, bad_selected = -1, 0
    if not bool(allowed.all()):
        bad_row = int((~allowed).to(torch.uint8).argmax())
        bad_target = int(target[bad_row])
    if weight is not None:
        fine = weight.isfinite()
        if not bool(fine.all()):
            bad_weight = int((~fine).to(torch.uint8).argmax())
    if scale is not None:
        fine = scale.isfinite() | located.ignored
        if not bool(fine.all()):
            bad_scale = int((~fine).to(torch.uint8).argmax())
    if selected is not None and selected.numel() > 0:
        fine = is_allowed(selected, located.ignored, vocab_size).flatten()
        if not bool(fine.all()):
            place = int((~fine).to(torch.uint8).argmax())
            bad_selected_row = place // selected.shape[1]
            bad_selected = int(selected.flatten()[place])
    return ValueProblems(bad_row, bad_target, bad_weight, bad_scale, bad_selected_row, bad_selected)
