"""The header: what each rank tells the others about itself, in every exchange.

A few integers a rank travel with the partials at no extra collective. From them each rank alone
decides whether the shards fit together and whether all ranks were called alike:

    CPU            -> an error that names the argument, the values and the ranks, on every rank
    accelerators   -> NaN in every row, decided on the device: reading the header would be a sync
                      (with ``check`` on: the same error as on the CPU)

What a rank found wrong with the values of its own arguments travels too, so that all ranks
raise together after the exchange instead of one raising while the others wait for it.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from . import repeated_head
from .engines.contract import CHECKSUM_ROUNDS, CHECKSUM_STEP, HeaderLayout
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
_START, _STOP, _VOCAB, _OPTIONS = 0, 1, 2, slice(3, STATIC_INTS)
_CHECKSUMS = {name: STATIC_INTS + 2 * i for i, name in enumerate(_DYNAMIC)}
# The same in bytes: all but start and stop, which stand first, and the checksum of the content.
_CONTENT = slice(4 * _CHECKSUMS["content"], 4 * _CHECKSUMS["content"] + 8)
_BEFORE_CONTENT, _AFTER_CONTENT = slice(4 * _VOCAB, _CONTENT.start), slice(_CONTENT.stop, None)
_FINDINGS = slice(4 * _CHECKSUMS["bad_row"], 4 * _CHECKSUMS["normalizer"])
_NONE = -1
_ALIKE = ("target", "weight", "row_scale", "selected")  # whose checksums all ranks must share
_COMPARED = (
    _VOCAB,
    *range(STATIC_INTS)[_OPTIONS],
    *(_CHECKSUMS[name] + half for name in _ALIKE for half in (0, 1)),
)

_FLAGS = (
    "smooth", "entropy", "squares", "argmax", "ignored_rows", "normalized", "row_scale",
    "implicit_shard", "biased", "sequence_parallel", "drop_ignored",
)  # fmt: skip
NORMALIZER_TOLERANCE = 1e-5  # relative: ranks may have summed a count of tokens in another order
# Of the norm: bf16 layers that sum in another order stay below, other hidden states are far beyond.
HIDDEN_TOLERANCE = 2e-2


HEADER_LAYOUT = HeaderLayout(
    ints=HEADER_INTS,
    static=STATIC_INTS + 2,
    compared=sum(1 << slot for slot in _COMPARED),
    start=_START,
    stop=_STOP,
    vocab_size=_VOCAB,
    flags=3,
    implicit_bit=_FLAGS.index("implicit_shard"),
    content=_CHECKSUMS["content"],
    normalizer=_CHECKSUMS["normalizer"],
    tolerance=NORMALIZER_TOLERANCE,
)


@dataclass(frozen=True)
class ValueProblems:
    """What is wrong with the values of this rank's own arguments; found on CPU or with check."""

    bad_row: int = _NONE
    bad_target: int = 0
    bad_weight: int = _NONE
    bad_scale: int = _NONE
    """the row"""
    bad_selected_row: int = _NONE
    bad_selected: int = 0


NO_PROBLEMS = ValueProblems()
_NO_PROBLEMS_BYTES = struct.pack("<6q", *astuple(NO_PROBLEMS))


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


def checksum(values: Tensor) -> Tensor:
    """An int64 that depends on every value and its place; computed on the device, no sync.

    The sum of a hash of each (place, value), so that it can be taken in any order. A sum of value x
    place would be linear: [9, 0] and [0, 3] would have the same. The two rounds are those of
    splitmix64 (Steele, Lea and Flood 2014), with arithmetic shifts, which all devices have.
    """
    flat = values.reshape(-1)
    mixed = torch.arange(1, flat.numel() + 1, dtype=torch.int64, device=flat.device)
    mixed.mul_(CHECKSUM_STEP).add_(flat)
    for shift, factor in CHECKSUM_ROUNDS:
        mixed = mixed.bitwise_xor_(mixed >> shift).mul_(factor)
    return mixed.sum()


def float_checksum(values: Tensor) -> Tensor:
    """``checksum`` of the bits of a floating point tensor; narrow ones are widened first."""
    if values.dtype == torch.float64:
        return checksum(values.view(torch.int64))
    return checksum(values.float().view(torch.int32))


def fingerprint(hidden: Tensor, first_row: int = 0) -> Tensor:
    """Two numbers [2] that tell hidden states [N, H] from others: those of row blocks add up.

    A product with a fixed pattern of numbers of about 1, and the sum of squares that says how large
    it is by chance. On equal hidden states the two differ by rounding alone.
    """
    rows = torch.arange(first_row, first_row + hidden.shape[0], device=hidden.device)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    values = hidden if hidden.dtype == torch.float64 else hidden.float()
    product = (values @ _pattern(columns).to(values.dtype)) @ _pattern(rows).to(values.dtype)
    return torch.stack([product, torch.linalg.vector_norm(values).square()]).float()


def _pattern(places: Tensor) -> Tensor:
    """Numbers of mean square 1 that look like chance."""
    return ((places % 4096).float() * 2.399963 + 0.5).cos() * 2**0.5  # the golden angle


def fingerprint_bits(fingerprint: Tensor) -> Tensor:
    """The product and the norm as two fp32, which fill one int64."""
    product, squares = fingerprint.unbind()
    return torch.stack([product, squares.sqrt()]).view(torch.int64)[0]


def normalizer_bits(normalizer: Tensor) -> Tensor:
    """A 0-d fp32 or fp64 number as an int64 that begins with its bits."""
    if normalizer.dtype == torch.float64:
        return normalizer.view(torch.int64)
    return normalizer.view(torch.int32).long()


def read_normalizers(headers: Tensor, dtype: torch.dtype) -> Tensor:
    """[W, HEADER_INTS] int32 -> the normalizer [W] of each rank; ``dtype`` is what was written."""
    slot = _CHECKSUMS["normalizer"]
    ints = headers[:, slot : slot + dtype.itemsize // 4]
    return ints.contiguous().view(dtype)[:, 0]


def write_findings(out: Tensor, problems: ValueProblems, hidden: Tensor | None) -> None:
    """What is known on the host alone, into a header that has everything else."""
    numbers = out[STATIC_INTS:].view(torch.int64)
    if hidden is not None:
        numbers[0] = hidden
    first = _DYNAMIC.index("bad_row")
    numbers[first : first + 6] = torch.tensor(astuple(problems), device=out.device)


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
            zero + problems.bad_row,
            zero + problems.bad_target,
            zero + problems.bad_weight,
            zero + problems.bad_scale,
            zero + problems.bad_selected_row,
            zero + problems.bad_selected,
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
    def hidden(self) -> tuple[float, float]:
        """The product and the norm of ``fingerprint_bits``."""
        product, norm = struct.unpack("<2f", struct.pack("<q", self.checksums.get("hidden", 0)))
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


def agree(headers: Tensor) -> bool:
    """Whether nothing at all is to be said of these headers [W, HEADER_INTS]: sure of a yes.

    The usual case, told apart by a few comparisons of bytes: shards in rank order that tile the
    vocabulary, everything else alike, no problem of values. A no is for ``raise_on_problems`` to
    explain.
    """
    told = headers.cpu().numpy().tobytes()
    first, contents = told[: 4 * HEADER_INTS], set()
    reached = 0
    for begin in range(0, len(told), 4 * HEADER_INTS):
        header = told[begin : begin + 4 * HEADER_INTS]
        start, stop = struct.unpack_from("<2i", header)
        same = header[_BEFORE_CONTENT] == first[_BEFORE_CONTENT]
        if start != reached or not same or header[_AFTER_CONTENT] != first[_AFTER_CONTENT]:
            return False
        reached = stop
        contents.add(header[_CONTENT])
    alike = len(contents) == 1 and any(first[_CONTENT])
    vocab_size = struct.unpack_from("<i", first, 4 * _VOCAB)[0]
    return first[_FINDINGS] == _NO_PROBLEMS_BYTES and reached == vocab_size and not alike


def raise_on_problems(
    headers: list[Header], target: Tensor, constant_rows: bool, from_hidden: bool = False
) -> None:
    """Raise the ValueError that these headers call for, the same on every rank, or return.

    ``constant_rows``: every row of this rank's shard holds one value (a head that is still zero),
    so equal contents mean nothing. ``from_hidden``: the logits are made of hidden states.
    """
    first = headers[0]
    # Values last: a target may be out of range only because ignore_index or vocab_size differs.
    for rank, header in enumerate(headers[1:], start=1):
        for name, value in header.options.items():
            if value != first.options[name]:
                raise ValueError(
                    f"ranks disagree on {_ARGUMENT.get(name, name)}: rank 0 of the group passed "
                    f"{first.options[name]!r}, rank {rank} passed {value!r}; "
                    "pass the same options on every rank"
                )
    _raise_on_normalizers(headers)
    for rank, header in enumerate(headers[1:], start=1):
        if header.vocab_size != first.vocab_size:
            raise ValueError(
                "ranks disagree on vocab_size: rank 0 of the group has "
                f"{first.vocab_size} (its ids are [{first.start}, {first.stop})), rank {rank} has "
                f"{header.vocab_size} (its ids are [{header.start}, {header.stop})); equal shards "
                "must have equal columns, uneven ones need shard=VocabShard(start, stop, "
                "vocab_size) or VocabShard.from_group(local_size, group)"
            )
    for rank, header in enumerate(headers):
        _raise_on_values(f"rank {rank} of the group", header)
    _raise_on_coverage(headers)
    for rank, header in enumerate(headers[1:], start=1):
        for slot in _ALIKE:
            name = "scale" if slot == "row_scale" else slot
            if header.checksums[slot] != first.checksums[slot]:
                raise ValueError(
                    f"ranks disagree on {name}: rank 0 and rank {rank} of the group passed "
                    f"different values; every rank of a tensor-parallel group must pass the same "
                    f"{name} (was the batch split over these ranks, or shuffled with another seed?)"
                )
    if from_hidden:
        _raise_on_hidden(headers)
    if not constant_rows and from_hidden and not first.options["implicit_shard"]:
        repeated_head.warn_if_repeated([header.checksums["content"] for header in headers])
    if looks_gathered(headers) and not constant_rows:
        size = first.stop - first.start
        ignore_index = first.options["ignore_index"]
        kept = target[target != ignore_index]
        if bool((kept < size).all()):
            what, same, part = "input", f"logits of {size} columns", "logits[..., start:stop]"
            if from_hidden:
                what, same, part = "linear_weight", f"{size} rows", "linear_weight[start:stop]"
            raise ValueError(
                f"{what} looks gathered: all {len(headers)} ranks of the group passed the same "
                f"{same} and every target is below {size}; each rank must pass "
                f"its own shard of the vocabulary, e.g. {part} (if these really "
                "are shards, say so with shard=VocabShard.even(vocab_size, group))"
            )


def _raise_on_hidden(headers: list[Header]) -> None:
    (product, norm), *others = (header.hidden for header in headers)
    for rank, (other_product, other_norm) in enumerate(others, start=1):
        values = (product, norm, other_product, other_norm)
        allowed = HIDDEN_TOLERANCE * max(norm, other_norm)
        apart = max(abs(product - other_product), abs(norm - other_norm)) > allowed
        finite = [math.isfinite(value) for value in values]
        if (all(finite) and apart) or finite[:2] != finite[2:]:
            raise ValueError(
                f"ranks disagree on input: the hidden states of rank 0 and rank {rank} of the "
                f"group are not the same (norms {norm:.6g} and {other_norm:.6g}); every rank of a "
                "tensor-parallel group must pass the same ones (is a layer before the head split "
                "over these ranks? sequence_parallel=True takes each rank's part of the sequence)"
            )


def _raise_on_normalizers(headers: list[Header]) -> None:
    given = [header.normalizer for header in headers]
    values = torch.tensor(given, dtype=torch.float64, device="cpu")
    for rank, same in enumerate(_alike(values).tolist()):
        if not same:
            raise ValueError(
                f"ranks disagree on normalizer: rank 0 of the group passed {values[0].item()!r}, "
                f"rank {rank} passed {values[rank].item()!r}; all ranks of a tensor-parallel group "
                "hold the same rows: sum their number over the data-parallel group, not over "
                "this one"
            )


def _alike(normalizers: Tensor) -> Tensor:
    """[W] bool: which agree with rank 0's."""
    first = normalizers[0]
    largest = torch.maximum(normalizers.abs(), first.abs())
    close = (normalizers - first).abs() < NORMALIZER_TOLERANCE * largest  # false for infinities
    return close | (normalizers == first) | (normalizers.isnan() & first.isnan())


_ARGUMENT = {
    "normalized": "normalizer (given on one rank only)",
    "ignored_rows": "return_log_prob or lse_square_scale_for_zloss",
    "implicit_shard": "shard (given on one rank only)",
    "row_scale": "scale (one for each row on one rank only)",
    "squares": "sum_p_squared",
    "biased": "linear_bias (given on one rank only)",
}


def raise_on_own_values(problems: ValueProblems, request: RowRequest, cause: str = "") -> None:
    """One rank alone: what ``raise_on_problems`` says of its values, and ``cause`` after it."""
    checksums = {
        "bad_row": problems.bad_row,
        "bad_target": problems.bad_target,
        "bad_weight": problems.bad_weight,
        "bad_scale": problems.bad_scale,
        "bad_selected_row": problems.bad_selected_row,
        "bad_selected": problems.bad_selected,
    }
    options: dict[str, object] = {"ignore_index": request.ignore_index}
    header = Header(request.start, request.stop, request.vocab_size, options, checksums)
    _raise_on_values("", header, cause)


def _raise_on_values(who: str, header: Header, cause: str = "") -> None:
    if header.checksums["bad_row"] != _NONE:
        raise ValueError(
            f"target is out of range: row {header.checksums['bad_row']} holds "
            f"{header.checksums['bad_target']}{f' on {who}' if who else ''}, which is neither a "
            f"class in [0, {header.vocab_size}) nor ignore_index="
            f"{header.options['ignore_index']}; mark rows to leave out with ignore_index"
            f"{cause}"
        )
    if header.checksums["bad_weight"] != _NONE:
        raise ValueError(
            f"weight must be finite, but {who or 'it'} holds NaN or inf for class "
            f"{header.checksums['bad_weight']}; use 0 to leave a class out"
        )
    if header.checksums["bad_scale"] != _NONE:
        raise ValueError(
            f"scale must be finite, but {who or 'it'} holds NaN or inf for row "
            f"{header.checksums['bad_scale']}; it multiplies the logits (1 / temperature)"
        )
    if header.checksums["bad_selected_row"] != _NONE:
        raise ValueError(
            f"selected is out of range: row {header.checksums['bad_selected_row']} holds "
            f"{header.checksums['bad_selected']}{f' on {who}' if who else ''}, which is no class "
            f"in [0, {header.vocab_size}); fill unused places with any class, and leave their "
            f"results out{cause}"
        )


def _raise_on_coverage(headers: list[Header]) -> None:
    """Shards must tile [0, vocab_size)."""
    vocab_size = headers[0].vocab_size
    shards = sorted((h.start, h.stop, rank) for rank, h in enumerate(headers) if h.start < h.stop)
    reached, holder = 0, _NONE
    for start, stop, rank in shards:
        if start < reached:
            raise ValueError(
                f"vocabulary shards overlap: rank {holder} of the group holds ids up to {reached}, "
                f"rank {rank} holds [{start}, {stop}); give each id to one rank"
            )
        if start > reached:
            raise ValueError(_missing(reached, start, vocab_size, headers))
        reached, holder = stop, rank
    if reached < vocab_size:
        raise ValueError(_missing(reached, vocab_size, vocab_size, headers))


def _missing(start: int, stop: int, vocab_size: int, headers: list[Header]) -> str:
    held = ", ".join(f"rank {r}: [{h.start}, {h.stop})" for r, h in enumerate(headers))
    return (
        f"vocabulary ids [{start}, {stop}) of vocab_size={vocab_size} are on no rank of the group "
        f"({held}); pass shards that cover the vocabulary, and the group that holds them all"
    )


def looks_gathered(headers: list[Header]) -> bool:
    """Every rank inferred its shard and holds the same partials in every row."""
    if len(headers) == 1 or not headers[0].options["implicit_shard"]:
        return False
    return len({h.checksums["content"] for h in headers}) == 1


def disagreement(
    headers: Tensor,
    target: Tensor,
    constant_rows: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The verdict of ``raise_on_problems`` as a 0-d bool tensor, without leaving the device."""
    world = headers.shape[0]
    first = headers[:1]
    start, stop = headers[:, _START], headers[:, _STOP]
    bad = (headers[:, _VOCAB] != first[:, _VOCAB]).any()
    bad |= (headers[:, _OPTIONS] != first[:, _OPTIONS]).any()
    bad |= ~_alike(read_normalizers(headers, dtype)).all()
    for name in _ALIKE:
        slot = _CHECKSUMS[name]
        bad |= (headers[:, slot : slot + 2] != first[:, slot : slot + 2]).any()
    # Sizes that add up to the vocabulary without any pair that overlaps tile it.
    bad |= (stop - start).sum() != headers[0, _VOCAB]
    holds = stop > start
    overlap = (start[:, None] < stop[None]) & (start[None] < stop[:, None])
    overlap &= holds[:, None] & holds[None]
    bad |= overlap.sum() != holds.sum()  # each one overlaps itself
    if world > 1:
        slot = _CHECKSUMS["content"]
        same = (headers[:, slot : slot + 2] == first[:, slot : slot + 2]).all()
        implicit = (headers[0, 3] >> _FLAGS.index("implicit_shard") & 1).bool()
        ignore = headers[0, STATIC_INTS - 2 : STATIC_INTS].view(torch.int64)
        low = ((target < stop[0] - start[0]) | (target == ignore)).all()
        bad |= same & implicit & ~constant_rows & low
    return bad
