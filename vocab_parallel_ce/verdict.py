"""Decides from the headers of all ranks whether their shards and calls fit together.

raise_on_problems      on the host: raises the same error on every rank, or returns
raise_on_own_values    the part of it that needs no other rank
disagreement           on an accelerator: the same decision as one bool, never read on the host
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import repeated_head
from .header import (
    ALIKE,
    HEADER_LAYOUT,
    NORMALIZER_TOLERANCE,
    SLOTS,
    STATIC_INTS,
    Header,
    ValueProblems,
    read_normalizers,
)
from .request import RowRequest

# Of the norm: bf16 layers that sum in another order stay below, other hidden states are far beyond.
HIDDEN_TOLERANCE = 2e-2


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
        _raise_on_values(f"rank {rank} of the group", header.problems, first)
    _raise_on_coverage(headers)
    for rank, header in enumerate(headers[1:], start=1):
        for slot in ALIKE:
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
        _raise_if_gathered(headers, target, from_hidden)


_ARGUMENT = {
    "normalized": "normalizer (given on one rank only)",
    "ignored_rows": "return_log_prob or lse_square_scale_for_zloss",
    "implicit_shard": "shard (given on one rank only)",
    "row_scale": "scale (one for each row on one rank only)",
    "squares": "sum_p_squared",
    "biased": "linear_bias (given on one rank only)",
}


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


def _raise_on_values(
    who: str, problems: ValueProblems, call: Header | RowRequest, cause: str = ""
) -> None:
    if problems.bad_row >= 0:
        raise ValueError(
            f"target is out of range: row {problems.bad_row} holds "
            f"{problems.bad_target}{f' on {who}' if who else ''}, which is neither a "
            f"class in [0, {call.vocab_size}) nor ignore_index="
            f"{call.ignore_index}; mark rows to leave out with ignore_index"
            f"{cause}"
        )
    if problems.bad_weight >= 0:
        raise ValueError(
            f"weight must be finite, but {who or 'it'} holds NaN or inf for class "
            f"{problems.bad_weight}; use 0 to leave a class out"
        )
    if problems.bad_scale >= 0:
        raise ValueError(
            f"scale must be finite, but {who or 'it'} holds NaN or inf for row "
            f"{problems.bad_scale}; it multiplies the logits (1 / temperature)"
        )
    if problems.bad_selected_row >= 0:
        raise ValueError(
            f"selected is out of range: row {problems.bad_selected_row} holds "
            f"{problems.bad_selected}{f' on {who}' if who else ''}, which is no class "
            f"in [0, {call.vocab_size}); fill unused places with any class, and leave their "
            f"results out{cause}"
        )


def raise_on_own_values(problems: ValueProblems, request: RowRequest, cause: str = "") -> None:
    """One rank alone: what ``raise_on_problems`` says of its values, and ``cause`` after it."""
    _raise_on_values("", problems, request, cause)


def _raise_on_coverage(headers: list[Header]) -> None:
    """Shards must tile [0, vocab_size)."""
    vocab_size = headers[0].vocab_size
    shards = sorted((h.start, h.stop, rank) for rank, h in enumerate(headers) if h.start < h.stop)
    reached, holder = 0, -1
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


def looks_gathered(headers: list[Header]) -> bool:
    """Every rank inferred its shard and holds the same partials in every row."""
    if len(headers) == 1 or not headers[0].options["implicit_shard"]:
        return False
    return len({h.checksums["content"] for h in headers}) == 1


def _raise_if_gathered(headers: list[Header], target: Tensor, from_hidden: bool) -> None:
    """``looks_gathered``, and no target says otherwise."""
    first = headers[0]
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


def disagreement(
    headers: Tensor,
    target: Tensor,
    constant_rows: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The verdict of ``raise_on_problems`` as a 0-d bool tensor, without leaving the device."""
    layout, first = HEADER_LAYOUT, headers[0]
    start, stop, vocab_size = headers[:, layout.start], headers[:, layout.stop], layout.vocab_size
    differs = headers != first
    bad = differs[:, vocab_size:STATIC_INTS].any()
    bad |= ~_alike(read_normalizers(headers, dtype)).all()
    for name in ALIKE:
        bad |= differs[:, SLOTS[name] : SLOTS[name] + 2].any()
    # Sizes that add up to the vocabulary without any pair that overlaps tile it.
    bad |= (stop - start).sum() != first[vocab_size]
    holds = stop > start
    overlap = (start[:, None] < stop[None]) & (start[None] < stop[:, None])
    overlap &= holds[:, None] & holds[None]
    bad |= overlap.sum() != holds.sum()  # each one overlaps itself
    if headers.shape[0] > 1:
        same = ~differs[:, layout.content : layout.content + 2].any()
        implicit = (first[layout.flags] >> layout.implicit_bit & 1).bool()
        ignore = first[STATIC_INTS - 2 : STATIC_INTS].view(torch.int64)
        low = ((target < stop[0] - start[0]) | (target == ignore)).all()
        bad |= same & implicit & ~constant_rows & low
    return bad
