"""Which way serves a dtype: what VOCAB_PARALLEL_CE_NPU_WAY asks for, and what the device answers.

    auto       max_sum where a probe finds that it is right in this dtype, else operator
    max_sum    or an error that says what the probe gave
    operator   whatever the card has
    triton     kernels for Ascend that no card has run yet: only where they are asked for

A probe runs once in a process and dtype, on a few rows.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch

from ...switches import WAY_VARIABLE, WAYS
from . import max_sum, operator, probe, triton_way

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def asked() -> str:
    """What VOCAB_PARALLEL_CE_NPU_WAY says; ValueError for a word that is none of the ways."""
    word = os.environ.get(WAY_VARIABLE, "auto")
    if word not in WAYS:
        raise ValueError(f"{WAY_VARIABLE}={word!r} is not one of {', '.join(WAYS)}")
    return word


def way_for(dtype: torch.dtype) -> ModuleType:
    """The module that serves logits of this dtype.

    ValueError for an unknown way; RuntimeError for one that is asked for by name and cannot serve.
    """
    word = asked()
    if word == "operator":
        return operator
    if word == "auto":
        return operator if why_not("max_sum", dtype) else max_sum
    reason = why_not(word, dtype)
    if reason is not None:
        raise RuntimeError(
            f"{WAY_VARIABLE}={word!r} cannot serve {dtype} logits here: {reason}; unset the "
            "variable, or set it to 'operator'"
        )
    return max_sum if word == "max_sum" else triton_way


@cache
def why_not(word: str, dtype: torch.dtype) -> str | None:
    """Why the way cannot serve logits of this dtype; None if it can."""
    return (probe.of_max_sum if word == "max_sum" else triton_way.unavailable)(dtype)


def told(dtype: torch.dtype) -> str:
    """For the doctor: the way that serves this dtype, and why it is not the lean one."""
    word = asked()
    chosen = way_for(dtype)
    name = chosen.__name__.rpartition(".")[2].removesuffix("_way")
    if word != "auto":
        return f"{name}, by {WAY_VARIABLE}"
    reason = why_not("max_sum", dtype)
    return name if reason is None else f"{name}; not max_sum: {reason}"
