"""Decorators for public functions: with ``check``, if one rank raises, all of its group do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.distributed.tensor import DTensor

from .dtensor import row_groups, vocabulary_group
from .kinds import without_numbers
from .preflight import together
from .rounds import told_after, told_before

P = ParamSpec("P")
T = TypeVar("T")


def raises_together(function: Callable[P, T]) -> Callable[P, T]:
    """For a public function on logits; covers errors in how it was called as well."""
    return _telling(function, "input", 0, dim=-1)


def linear_raises_together(function: Callable[P, T]) -> Callable[P, T]:
    """For a public function of the fused head, where the head's weight holds the vocabulary."""
    return _telling(function, "linear_weight", 1, dim=0)


def _telling(function: Callable[P, T], name: str, place: int, dim: int) -> Callable[P, T]:
    """The argument of that ``name`` and ``place`` holds the vocabulary in its dimension ``dim``.

    Where it is a DTensor, the group is taken from it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        holder = args[place] if len(args) > place else kwargs.get(name)
        if without_numbers(holder):  # the custom operator tells, when it runs
            return function(*args, **kwargs)
        check = kwargs.get("check")
        if not isinstance(holder, DTensor) or holder.dim() == 0:
            with together(kwargs.get("group"), check):
                return function(*args, **kwargs)
        group = vocabulary_group(holder, dim)
        input = args[0] if args else kwargs.get("input")
        rows = row_groups(input, group) if isinstance(input, DTensor) else ()
        with (
            told_after(rows, check),
            together(group, check),
            told_before(holder.device_mesh, check),
        ):
            return function(*args, **kwargs)

    return call
