"""The npu engine as its two ways made of torch operators, for checks of the contract."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from vocab_parallel_ce.engines.npu import engine
from vocab_parallel_ce.switches import WAY_VARIABLE
from vocab_parallel_ce.testing.engine import Subject


def _by_the_operator(name: str) -> Callable[..., None]:
    """A function of the engine while the variable asks for that way."""

    def call(*arguments: Any) -> None:
        with patch.dict(os.environ, {WAY_VARIABLE: "operator"}):
            getattr(engine, name)(*arguments)

    return call


_FUNCTIONS = {name: _by_the_operator(name) for name in ("partials", "gradient", "log_prob")}
SUBJECTS = {
    "max_sum": Subject(engine, "npu"),
    "operator": Subject(
        SimpleNamespace(**{**vars(engine), **_FUNCTIONS}), "npu", sums_as_logs=True
    ),
}
