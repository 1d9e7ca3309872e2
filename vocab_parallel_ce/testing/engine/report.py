"""``check_engine``: what somebody runs who ports an engine to a new device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...engines.contract import Engine
from .checks import engine_checks
from .subject import Subject

SHOWN = 30


@dataclass(frozen=True)
class EngineReport:
    """What ``check_engine`` found; ``str`` of it is fit to be read."""

    engine: str
    device: str
    checks: int
    """how many were run"""
    failures: dict[str, str]
    """what is wrong, in one line, by the name of the check"""

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.failures

    def __str__(self) -> str:
        """One line a failure, at most 30 of them, and the count."""
        lines = [
            f"{self.engine} on {self.device}: {len(self.failures)} of {self.checks} checks failed",
            *(f"  {name}: {why}" for name, why in list(self.failures.items())[:SHOWN]),
        ]
        more = len(self.failures) - SHOWN
        return "\n".join(lines + ([f"  ... and {more} more"] if more > 0 else []))


def check_engine(
    engine: Engine,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    *,
    rows: int = 64,
    many_rows: bool = True,
    only: str = "",
    exponential: Literal["e", "2"] = "e",
    sums_as_logs: bool = False,
    raises: bool = True,
) -> EngineReport:
    """Run an engine's three functions against the contract's formulas in fp64.

    partials, gradient and log_prob are called with every option and with rows that hold NaN,
    infinities, +-10,000 and ties, on shards of 1 to 3000 columns that lie in memory in seven ways;
    the gradient is written to dense memory, into a part of a wider buffer and over the logits.
    ``engines.contract`` says what is asked; ``tolerance`` says how exact it must be. An engine
    never sees N = 0 or a shard without columns: the library answers for those. Nothing is
    communicated.

    Args:
        engine: A module or an object with the names of ``engines.contract.Engine``.
        device: Where its tensors live, such as "cuda" or "npu:0". Right answers are computed on
            the CPU.
        dtypes: Of the logits: those that the engine is meant to serve.
        rows: Of most shards. At least 8; fewer than 64 where kernels run in an interpreter.
        many_rows: Also shards of [300, 3000]; False where kernels run in an interpreter.
        only: Run the checks alone whose name begins with this, such as "gradient".
        exponential: "2" where the device computes e^x as 2^(x log2 e), as GPUs do.
        sums_as_logs: True where the device's kernel hands out log s instead of s.
        raises: Raise if anything is wrong; otherwise the report alone tells.

    Returns:
        EngineReport: the number of checks and every failure.

    Raises:
        AssertionError: Something is wrong; the text is the report.
        ValueError: ``rows`` is less than 8, or no check has the name of ``only``.

    Example:
        >>> from vocab_parallel_ce.engines import eager
        >>> report = check_engine(eager, "cpu", [torch.float32], only="gradient, 1")
        >>> report.passed
        True
    """
    if rows < 8:
        raise ValueError(f"rows={rows}: at least 8 are needed for the special rows of the checks")
    subject = Subject(engine, device, rows, exponential, sums_as_logs)
    every = engine_checks(dtypes, many_rows=many_rows)
    checks = [check for check in every if check.name.startswith(only)]
    if not checks:
        raise ValueError(f"only={only!r}: no check has a name that begins so")
    failures = {}
    for check in checks:
        try:
            check.run(subject)
        except Exception as error:  # an engine under construction raises anything
            failures[check.name] = _one_line(error)
    name = getattr(engine, "__name__", type(engine).__name__)
    report = EngineReport(name, device, len(checks), failures)
    if raises and not report.passed:
        raise AssertionError(str(report))
    return report


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"
