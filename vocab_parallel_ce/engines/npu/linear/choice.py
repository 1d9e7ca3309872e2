"""Whether the fused operators serve a call: what is asked for, what fits, what the device answers.

auto       where they fit and a probe finds that they are right in this dtype
fused      or an error that says what the probe gave; calls that do not fit still go by chunks
chunks     never: a matrix product for each chunk of logits, and the engine's kernels
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch

from ....switches import LINEAR_VARIABLE, LINEAR_WAYS
from . import operators, probe

DTYPES = (torch.bfloat16, torch.float16)


def asked() -> str:
    """What VOCAB_PARALLEL_CE_NPU_LINEAR says; ValueError for a word that is none of the ways."""
    word = os.environ.get(LINEAR_VARIABLE, "auto")
    if word not in LINEAR_WAYS:
        raise ValueError(f"{LINEAR_VARIABLE}={word!r} is not one of {', '.join(LINEAR_WAYS)}")
    return word


def why_not(dtype: torch.dtype, width: int, ids: int, scale: float) -> str | None:
    """See ``contract.LinearFunctions``.

    RuntimeError where they are asked for by name and are not right here.
    """
    word = asked()
    if word == "chunks":
        return f"{LINEAR_VARIABLE}=chunks"
    if dtype not in DTYPES:
        return f"they take bf16 and fp16, not {dtype}"
    if not 0 < width <= operators.WIDEST:
        return f"they take hidden states of at most {operators.WIDEST} columns, not {width}"
    if not operators.LEAST_IDS <= ids < operators.MOST_IDS:
        return f"they take at least {operators.LEAST_IDS} ids a rank, not {ids}"
    if not _is_exact(scale, dtype):
        return f"scale={scale} times hidden states in {dtype} would be rounded"
    reason = problem(dtype)
    if reason is not None and word == "fused":
        raise RuntimeError(
            f"{LINEAR_VARIABLE}='fused' cannot serve {dtype} hidden states here: {reason}; unset "
            "the variable, or set it to 'chunks'"
        )
    return reason


def _is_exact(scale: float, dtype: torch.dtype) -> bool:
    """Whether hidden states times ``scale`` are the same numbers with another exponent."""
    if scale == 1:
        return True
    return dtype == torch.bfloat16 and scale > 0 and math.frexp(scale)[0] == 0.5


@cache
def problem(dtype: torch.dtype) -> str | None:
    """What is wrong with them on this device in this dtype, or None."""
    return probe.of_fused_head(dtype)


def told(dtype: torch.dtype) -> str:
    """For the doctor: by which way the fused head goes, and why not by the fused operators."""
    word = asked()
    if word != "auto":
        return f"{word}, by {LINEAR_VARIABLE}"
    reason = problem(dtype) if dtype in DTYPES else f"not for {dtype}"
    return "fused operators" if reason is None else f"chunks: {reason}"
