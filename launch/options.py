"""What the value of an option may be, once for all jobs: from the text that was typed.

Each function raises ValueError with a message that continues "--option": the value, what is wrong
with it, and the way out. Standard library alone: the doctor reads its options where nothing else
can be imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from vocab_parallel_ce.launch.refusal import Refusal

DEVICES = ("npu", "cuda", "cpu")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""torch's names, which are accepted too"""
TRAINABLE = ("fp32", "bf16")


def one_of(text: str, names: Sequence[str]) -> str:
    if text not in names:
        raise ValueError(f"{text!r} is not one of {', '.join(names)}")
    return text


def device(text: str) -> str:
    """The kind of device; which of them are here is another question."""
    return one_of(text, DEVICES)


def dtype(text: str) -> str:
    """fp32, bf16 or fp16."""
    return one_of(DTYPES.get(text, text), tuple(DTYPES.values()))


def training_dtype(text: str) -> str:
    """fp32 or bf16."""
    if DTYPES.get(text, text) == "fp16":
        raise ValueError("fp16 needs a loss scale, which this job does not have; use bf16 or fp32")
    return one_of(DTYPES.get(text, text), TRAINABLE)


LARGEST_SEED = 2**32 - 1
"""of either sign; what is made of a seed then fits a generator of torch"""


def seed(text: str) -> int:
    value = whole(text)
    if abs(value) > LARGEST_SEED:
        raise ValueError(f"{value} must lie within {-LARGEST_SEED} and {LARGEST_SEED}")
    return value


def whole(text: str, least: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None
    if least is not None and value < least:
        raise ValueError(f"{value} must be at least {least}")
    return value


def number(text: str, least: float | None = None) -> float:
    """A finite one."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    if least is not None and value < least:
        raise ValueError(f"{text} must be at least {least:g}")
    return value


def positive(text: str) -> float:
    if not number(text) > 0:
        raise ValueError(f"{text} must be positive")
    return number(text)


def make_folder(option: str, path: Path) -> None:
    """Refusal where the folder of results cannot be there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(
            f"{option} {path} cannot be made: {error.strerror}; name a folder that can be written"
        ) from None


def make_writable(option: str, path: Path) -> None:
    """Refusal where the file cannot be written; before the work that fills it, not after."""
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        path.open("a").close()
    except OSError as error:
        raise Refusal(
            f"{option} {path} cannot be written: {error.strerror}; name another file"
        ) from None
