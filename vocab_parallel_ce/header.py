"""The header: what each rank tells the others about itself, in every exchange.

A few integers a rank travel with the partials at no extra collective. From them each rank alone
decides (``verdict``) whether the shards fit together and whether all ranks were called alike:

    CPU            -> an error that names the argument, the values and the ranks, on every rank
    accelerators   -> NaN in every row, decided on the device: reading the header would be a sync
                      (with ``check`` on: the same error as on the CPU)

What a rank found wrong with the values of its own arguments travels too, so that all ranks
raise together after the exchange instead of one raising while the others wait for it.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checksums import checksum, float_checksum
from .engines.contract import NOTHING_FOUND, HeaderLayout
from .request import RowRequest

REDUCTIONS = ("none", "sum", "mean")

# int32 slots of a header, in order. Two-slot entries hold an int64 or the bits of a float64.
_STATIC = (
    ("start", 1),
    ("stop", 1),
    ("vocab_size", 1),
    ("flags", 1),
    ("scale", 2),
    ("label_smoothing", 2),
    ("lse_square_scale", 2),
    ("softcap", 2),
    ("ignore_index", 2),
)
# The first is 0 where there are no hidden states to tell of, or nobody would compare them.
_DYNAMIC = (
    "hidden", "target", "content", "weight", "row_scale", "selected", "bad_row", "bad_target",
    "bad_weight", "bad_scale", "bad_selected_row", "bad_selected", "normalizer",
)  # fmt: skip
STATIC_INTS = sum(width for _, width in _STATIC)
HEADER_INTS = STATIC_INTS + 2 * len(_DYNAMIC)
# Of those behind the options, the first of two.
SLOTS = {name: STATIC_INTS + 2 * i for i, name in enumerate(_DYNAMIC)}
ALIKE = ("target", "weight", "row_scale", "selected")  # whose checksums all ranks must share
_COMPARED = (
    *range(2, STATIC_INTS),  # all but start and stop
    *(SLOTS[name] + half for name in ALIKE for half in (0, 1)),
)

_FLAGS = (
    "smooth", "entropy", "squares", "argmax", "ignored_rows", "normalized", "row_scale",
    "implicit_shard", "biased", "sequence_parallel", "drop_ignored",
)  # fmt: skip
NORMALIZER_TOLERANCE = 1e-5  # relative: ranks may have summed a count of tokens in another order


HEADER_LAYOUT = HeaderLayout(
    ints=HEADER_INTS,
    static=STATIC_INTS + 2,
    compared=sum(1 << slot for slot in _COMPARED),
    start=0,
    stop=1,
    vocab_size=2,
    flags=3,
    implicit_bit=_FLAGS.index("implicit_shard"),
    content=SLOTS["content"],
    findings=SLOTS["bad_row"],
    normalizer=SLOTS["normalizer"],
    tolerance=NORMALIZER_TOLERANCE,
)


class ValueProblems(NamedTuple):
    """What is wrong with the values of this rank's own arguments; found on CPU or with check."""

    bad_row: int = -1
    bad_target: int = 0
    bad_weight: int = -1
    bad_scale: int = -1
    """the row"""
    bad_selected_row: int = -1
    bad_selected: int = 0


NO_PROBLEMS = ValueProblems(*NOTHING_FOUND)


@functools.lru_cache(maxsize=256)
def static_header(request: RowRequest, device: torch.device) -> Tensor:
    """[HEADER_LAYOUT.static] int32: what follows from the options alone, and 0 for the hidden
    states."""
    flags = sum(getattr(request, name, False) << bit for bit, name in enumerate(_FLAGS))
    flags |= REDUCTIONS.index(request.reduction) << len(_FLAGS)
    packed = struct.pack(
        "<4i4dq",
        request.start,
        request.stop,
        request.vocab_size,
        flags,
        request.scale + 0.0,  # -0.0 is the same option
        request.label_smoothing + 0.0,
        request.lse_square_scale + 0.0,
        request.softcap + 0.0,
        request.ignore_index,
    )
    ints = struct.unpack(f"<{STATIC_INTS}i", packed)
    return torch.tensor((*ints, 0, 0), dtype=torch.int32, device=device)


def normalizer_bits(normalizer: Tensor) -> Tensor:
    """A 0-d fp32 or fp64 number as an int64 that begins with its bits."""
    if normalizer.dtype == torch.float64:
        return normalizer.view(torch.int64)
    return normalizer.view(torch.int32).long()


def read_normalizers(headers: Tensor, dtype: torch.dtype) -> Tensor:
    """[W, HEADER_INTS] int32 -> the normalizer [W] of each rank; ``dtype`` is what was written."""
    slot = SLOTS["normalizer"]
    ints = headers[:, slot : slot + dtype.itemsize // 4]
    return ints.contiguous().view(dtype)[:, 0]


def write_findings(out: Tensor, problems: ValueProblems, hidden: Tensor | None) -> None:
    """What is known on the host alone, into a header that has everything else."""
    numbers = out[STATIC_INTS:].view(torch.int64)
    if hidden is not None:
        numbers[0] = hidden
    first = _DYNAMIC.index("bad_row")
    numbers[first : first + 6] = torch.tensor(problems, device=out.device)


def write_header(
    out: Tensor,
    request: RowRequest,
    target: Tensor,
    content: Tensor | None,
    weight: Tensor | None,
    problems: ValueProblems,
    normalizer: Tensor | None = None,
    hidden: Tensor | None = None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> None:
    """Fill ``out`` [HEADER_INTS] int32.

    ``content`` are this rank's (m, s) partials: ranks that hold the same ones in every row were
    handed the same logits. It is left out where shards were told explicitly. ``normalizer`` is
    0-d, in the arithmetic dtype; ``hidden`` are ``fingerprint_bits``; ``scale`` has one a row;
    ``selected`` are ids [N, K].
    """
    out[: HEADER_LAYOUT.static] = static_header(request, out.device)
    zero = torch.zeros((), dtype=torch.int64, device=out.device)
    dynamic = torch.stack(
        [
            zero if hidden is None else hidden,
            checksum(target),
            zero if content is None else float_checksum(content),
            zero if weight is None else float_checksum(weight),
            zero if scale is None else float_checksum(scale),
            zero if selected is None else checksum(selected),
            *(zero + number for number in problems),
            zero if normalizer is None else normalizer_bits(normalizer),
        ]
    )
    out[STATIC_INTS:] = dynamic.view(torch.int32)


@dataclass(frozen=True)
class Header:
    """One rank's header, read on the host."""

    start: int
    stop: int
    vocab_size: int
    options: dict[str, object]
    checksums: dict[str, int]
    normalizer: float = 0.0

    @property
    def ignore_index(self) -> object:
        return self.options["ignore_index"]

    @property
    def problems(self) -> ValueProblems:
        return ValueProblems(*(self.checksums[name] for name in ValueProblems._fields))

    @property
    def hidden(self) -> tuple[float, float]:
        """The product and the norm of ``fingerprint_bits``."""
        product, norm = struct.unpack("<2f", struct.pack("<q", self.checksums["hidden"]))
        return product, norm


def read_headers(headers: Tensor, dtype: torch.dtype = torch.float32) -> list[Header]:
    """[W, HEADER_INTS] int32 -> one Header a rank; ``dtype`` is that of the arithmetic."""
    out = []
    headers = headers.cpu()
    normalizers = read_normalizers(headers, dtype).tolist()
    for ints, normalizer in zip(headers.tolist(), normalizers, strict=True):
        raw = struct.pack(f"<{HEADER_INTS}i", *ints)
        start, stop, vocab_size, flags, *numbers = struct.unpack_from("<4i4dq", raw)
        names = ("scale", "label_smoothing", "lse_square_scale", "softcap", "ignore_index")
        options: dict[str, object] = dict(zip(names, numbers, strict=True))
        options["reduction"] = REDUCTIONS[(flags >> len(_FLAGS)) % len(REDUCTIONS)]
        # After the numbers they follow from: an error shall name what the user typed.
        options.update({name: bool(flags >> bit & 1) for bit, name in enumerate(_FLAGS)})
        dynamic = struct.unpack_from(f"<{len(_DYNAMIC)}q", raw, 4 * STATIC_INTS)
        checksums = dict(zip(_DYNAMIC, dynamic, strict=True))
        out.append(Header(start, stop, vocab_size, options, checksums, normalizer))
    return out
