"""How a probe asks a device: is the operator there, and the first thing that it gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

import torch
from torch.utils._python_dispatch import _disable_current_modes

Problem = str


def first_problem(
    dtype: torch.dtype,
    missing: Callable[[], Iterable[tuple[str, ...]]],
    problems: Callable[[torch.dtype], Iterator[Problem]],
) -> Problem | None:
    """None where all is right.

    Args:
        dtype: of the logits or hidden states.
        missing: the names of each operator that torch_npu has by none of them.
        problems: tries the operators; what is wrong, in words.
    """
    try:
        version = metadata.version("torch_npu")
        for names in missing():
            return (
                f"torch_npu {version} has neither {' nor '.join(names)}; 2.6.0.post5 is the first"
            )
        # A fake or a transformed tensor of the caller's would be no probe.
        with _disable_current_modes(), torch.no_grad():
            found = next(problems(dtype), None)
        return None if found is None else f"{_name(dtype)}, {found}"
    except Exception as problem:  # a CANN before 8.5.0, anything
        first_line = str(problem).strip().partition("\n")[0]
        return f"{_name(dtype)}: {first_line}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
