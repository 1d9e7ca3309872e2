"""What runs on the stand-in is entered here: every operator, and the bytes that a card would move.

    with ledger.recording() as entries:
        cross_entropy(logits, target)
    ledger.bytes_per_element(entries, logits)

Bytes are those of the table in ``engines/npu/traffic.py``; an operator that is not in it raises
where it is called. Each entry is one call of torch, which on a card is at least one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vocab_parallel_ce.engines.npu.traffic import Moved, Operand, moved

# In place, but what was there before is not read.
ONLY_WRITTEN = ("copy_", "fill_", "zero_")


@dataclass(frozen=True)
class Entry:
    """One call of an operator."""

    operator: str
    """without its overload, with the underscore of an in-place one"""
    moved: Moved
    largest: int
    """elements of its largest operand"""


_open: list[list[Entry]] = []


@contextmanager
def recording() -> Iterator[list[Entry]]:
    """What every thread of this process runs on device npu until the end of the block."""
    entries: list[Entry] = []
    _open.append(entries)
    try:
        yield entries
    finally:
        _open.remove(entries)


def entered(
    name: str, kernel: Callable[..., Any], written: Sequence[tuple[int, str]] = ()
) -> Callable[..., Any]:
    """``kernel`` of npu tensors, which enters its calls.

    ``written``: position and name of the arguments that it writes to.
    """
    operator = name.partition(".")[0]

    def entering(*args: Any, **kwargs: Any) -> Any:
        results = kernel(*args, **kwargs)
        if _open:
            targets = [args[i] if i < len(args) else kwargs[name] for i, name in written]
            inputs = [value for i, value in enumerate(args) if i not in dict(written)]
            inputs += [v for name, v in kwargs.items() if name not in dict(written).values()]
            if operator.endswith("_") and operator not in ONLY_WRITTEN:
                inputs += targets
            _enter(operator, _operands(inputs), _operands(targets or [results]))
        return results

    return entering


def _enter(operator: str, reads: list[Operand], writes: list[Operand]) -> None:
    entry = Entry(
        operator,
        moved(operator, reads, writes),
        max((operand.elements for operand in (*reads, *writes)), default=0),
    )
    for entries in _open:
        entries.append(entry)


def _operands(values: Sequence[Any]) -> list[Operand]:
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _operands(value)
        elif isinstance(value, torch.Tensor) and value.device.type == "npu":
            found.append(Operand(value.numel(), value.itemsize, value.is_contiguous()))
    return found


def bytes_per_element(entries: Sequence[Entry], logits: torch.Tensor) -> float:
    """All bytes of the entries, [N] vectors included, by the elements of the logits."""
    return sum(entry.moved.bytes for entry in entries) / logits.numel()


def sweeps(entries: Sequence[Entry], logits: torch.Tensor) -> list[str]:
    """The operators that touched every logit, in order."""
    return [entry.operator for entry in entries if entry.largest >= logits.numel()]
