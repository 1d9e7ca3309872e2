"""check=True with DTensor logits: an error reaches every rank that would wait for this one.

A call on a mesh communicates up to three times: a target or a normalizer is redistributed, ranks
that share rows exchange partials, losses of different rows are added up. The preflight belongs to
the second, and knows the ranks of one group alone. Two rounds stand around it:

    before   over every mesh dimension in turn, before anything is redistributed
    after    over the dimensions that shard rows, when this rank has the statistics of its own; and
             once more before that, where they need sums over other rows

A rank that raises plays the rounds that it has not come to, so that nobody waits for it. Ranks
along a mesh dimension that replicates the rows hear of the first round alone: once things are
redistributed, this call exchanges nothing with them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from .preflight import is_told, tell
from .switches import check_is_on, check_word


class _Played(threading.local):
    """How many rounds this thread has played: whether one was, is a difference of two."""

    before = 0
    after = 0


_played = _Played()


def play_before(mesh: Any, problem: Exception | None = None) -> None:
    """Raise on every rank of ``mesh`` if any of them has a problem."""
    _played.before += 1
    _play([mesh.get_group(dim) for dim in range(mesh.ndim)], problem)


def play_after(
    groups: Sequence[dist.ProcessGroup], problem: Exception | None = None, *, more: bool = False
) -> None:
    """Raise on every rank of these groups if any of them has a problem.

    ``more``: the round will be played once more.
    """
    _played.after += not more
    _play(groups, problem)


def _play(groups: Sequence[dist.ProcessGroup], problem: Exception | None) -> None:
    for group in groups:  # what one dimension has told is passed on along the next
        problem = tell(problem, group)
    if problem is not None:
        raise problem


@contextmanager
def told_before(mesh: Any, check: object) -> Iterator[None]:
    """What is raised inside, and before that round, is told there."""
    played = _played.before
    try:
        yield
    except Exception as problem:
        if _played.before == played and check_is_on(check_word(check)):
            play_before(mesh, problem)
        raise


@contextmanager
def told_after(groups: Sequence[dist.ProcessGroup], check: object) -> Iterator[None]:
    """What is raised inside, after the round before and before the one after, is told there."""
    before, after = _played.before, _played.after
    try:
        yield
    except Exception as problem:
        between = _played.before != before and _played.after == after
        if between and not is_told(problem) and check_is_on(check_word(check)):
            play_after(groups, problem)
        raise
