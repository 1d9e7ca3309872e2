"""The environment variables that the loss reads. Imports nothing that could be missing."""

from __future__ import annotations

import os

CHECK_VARIABLE = "VOCAB_PARALLEL_CE_CHECK"
SCRATCH_VARIABLE = "VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB"
SCRATCH_MIB = 88
"""what holds while SCRATCH_VARIABLE is unset and the card does not tell its cache: of 192 MiB"""
WAY_VARIABLE = "VOCAB_PARALLEL_CE_NPU_WAY"
WAYS = ("auto", "max_sum", "operator", "triton")
"""words of WAY_VARIABLE; auto while it is unset"""
LINEAR_VARIABLE = "VOCAB_PARALLEL_CE_NPU_LINEAR"
LINEAR_WAYS = ("auto", "fused", "chunks")
"""words of LINEAR_VARIABLE; auto while it is unset"""


def check_word(check: object) -> str:
    """The argument ``check`` as a request holds it; what is no bool is refused elsewhere."""
    if isinstance(check, str) and check in ("environment", "on", "off"):
        return check
    return "environment" if check is None else "off" if check is False else "on"


def check_is_on(check: str) -> bool:
    """Whether ranks compare notes before they start."""
    if check == "environment":
        return os.environ.get(CHECK_VARIABLE, "0").lower() not in ("", "0", "false", "no", "off")
    return check == "on"
