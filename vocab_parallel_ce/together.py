"""The promise of ``check`` for a public function: where one rank raises, all of the group do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.distributed.tensor import DTensor

from .dtensor import row_groups, vocabulary_group
from .preflight import together
from .rounds import told_after, told_before

P = ParamSpec("P")
T = TypeVar("T")


def raises_together(function: Callable[P, T]) -> Callable[P, T]:
    """A public function, of whose errors the other ranks are told; its call's included."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # the custom operator tells, when it runs
            return function(*args, **kwargs)
        input = args[0] if args else kwargs.get("input")
        check = kwargs.get("check")
        if not isinstance(input, DTensor):
            with together(kwargs.get("group"), check):
                return function(*args, **kwargs)
        group, rows = vocabulary_group(input), row_groups(input)
        with (
            told_after(rows, check),
            together(group, check),
            told_before(input.device_mesh, check),
        ):
            return function(*args, **kwargs)

    return call
