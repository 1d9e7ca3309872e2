"""The header: what raises on the host is NaN on a device, kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocab_parallel_ce.checksums import checksum, float_checksum
from vocab_parallel_ce.header import (
    HEADER_INTS,
    ValueProblems,
    read_headers,
    read_normalizers,
    write_header,
)
from vocab_parallel_ce.request import RowRequest
from vocab_parallel_ce.verdict import (
    disagreement,
    looks_gathered,
    raise_on_own_values,
    raise_on_problems,
)

TARGET = torch.tensor([0, 1, 9, -100])
WEIGHT = torch.linspace(0, 1, 12)
CONTENT = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Rank:
    """What one rank puts into its header."""

    def __init__(self, start: int, stop: int, vocab_size: int = 12, **options: Any) -> None:
        told = {"implicit_shard": False, **options}
        self.request = RowRequest(start, stop, vocab_size, **told)
        self.target = TARGET
        self.weight: Tensor | None = WEIGHT
        self.content = CONTENT + start
        self.problems = ValueProblems()
        self.normalizer: Tensor | None = None

    def header(self) -> Tensor:
        out = torch.zeros(HEADER_INTS, dtype=torch.int32)
        content = self.content if self.request.implicit_shard else None
        write_header(
            out, self.request, self.target, content, self.weight, self.problems, self.normalizer
        )
        return out


def test_what_changes_no_number_is_not_in_it() -> None:
    """One rank may promise finite logits, and another one not."""
    assert torch.equal(Rank(0, 6, finite_logits=True).header(), Rank(0, 6).header())


def _headers(ranks: list[Rank]) -> Tensor:
    return torch.stack([rank.header() for rank in ranks])


def _raises(
    headers: Tensor, target: Tensor, constant: bool, dtype: torch.dtype = torch.float32
) -> str:
    try:
        raise_on_problems(read_headers(headers, dtype), target, constant)
    except ValueError as problem:
        return str(problem)
    return ""


def _on_device(
    headers: Tensor, target: Tensor, constant: bool, dtype: torch.dtype = torch.float32
) -> bool:
    verdict = disagreement(headers, target, torch.tensor(constant), dtype)
    assert verdict.shape == ()
    assert verdict.dtype == torch.bool
    return bool(verdict)


def _three() -> list[Rank]:
    return [Rank(0, 4), Rank(4, 9), Rank(9, 12)]


def _with(**change: Any) -> Callable[[], list[Rank]]:
    def build() -> list[Rank]:
        ranks = _three()
        ranks[2].request = replace(ranks[2].request, **change)
        return ranks

    return build


def _other(name: str, value: Tensor) -> Callable[[], list[Rank]]:
    def build() -> list[Rank]:
        ranks = _three()
        setattr(ranks[1], name, value)
        return ranks

    return build


def _gathered() -> list[Rank]:
    ranks = [Rank(12 * r, 12 * r + 12, 36, implicit_shard=True) for r in range(3)]
    for rank in ranks:
        rank.content = CONTENT
    return ranks


CONFLICTS: dict[str, tuple[Callable[[], list[Rank]], str]] = {
    "reduction": (_with(reduction="sum"), "reduction"),
    "smooth": (_with(smooth=True, label_smoothing=0.1), "label_smoothing"),
    "label_smoothing": (_with(label_smoothing=1e-300), "label_smoothing"),
    "entropy": (_with(entropy=True), "entropy"),
    "argmax": (_with(argmax=True), "argmax"),
    "normalized": (_with(normalized=True), "normalizer .given on one rank only."),
    "ignored_rows": (_with(ignored_rows=True), "return_log_prob or lse_square_scale_for_zloss"),
    "implicit_shard": (_with(implicit_shard=True), "shard .given on one rank only."),
    "scale": (_with(scale=1.0 + 2.0**-52), "scale"),
    "z": (_with(lse_square_scale=-0.1), "lse_square_scale"),
    "ignore_index": (_with(ignore_index=-(2**62)), "ignore_index"),
    "vocab_size": (_with(vocab_size=13), "vocab_size"),
    "overlap": (_with(start=8), r"overlap: rank 1 .* up to 9, rank 2 holds \[8, 12\)"),
    "inside another": (_with(start=5, stop=7), "overlap"),
    "gap": (_with(start=10), r"ids \[9, 10\) of vocab_size=12 are on no rank"),
    "end missing": (_with(stop=11), r"ids \[11, 12\)"),
    "overlap and gap of one size": (_with(start=8, stop=11), "overlap"),
    "target": (_other("target", TARGET.flip(0)), "disagree on target: rank 0 and rank 1"),
    "one target": (_other("target", torch.tensor([0, 1, 8, -100])), "disagree on target"),
    "weight": (_other("weight", WEIGHT.flip(0)), "disagree on weight: rank 0 and rank 1"),
    "weight bits": (_other("weight", torch.nextafter(WEIGHT, -WEIGHT)), "disagree on weight"),
    "gathered": (_gathered, "input looks gathered: all 3 ranks"),
}


@pytest.mark.parametrize("name", list(CONFLICTS))
def test_a_conflict_raises_on_the_host_and_is_nan_on_a_device(name: str) -> None:
    build, message = CONFLICTS[name]
    headers = _headers(build())
    with pytest.raises(ValueError, match=message):
        raise_on_problems(read_headers(headers), TARGET, False)
    assert _on_device(headers, TARGET, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (5.0, True), (5.00004, True), (5.0001, False), (-5.0, False), (0.0, False),
        (torch.nan, False), (torch.inf, False), (1e-40, False),
    ],
)  # fmt: skip
def test_normalizers_may_differ_by_rounding(other: float, alike: bool, dtype: torch.dtype) -> None:
    ranks = _three()
    for rank in ranks:
        rank.request = replace(rank.request, normalized=True)
        rank.normalizer = torch.tensor(5.0, dtype=dtype)
    ranks[2].normalizer = torch.tensor(other, dtype=dtype)
    headers = _headers(ranks)
    message = _raises(headers, TARGET, False, dtype)
    assert (message == "") == alike
    assert _on_device(headers, TARGET, False, dtype) != alike
    assert alike or message.startswith(
        "ranks disagree on normalizer: rank 0 of the group passed 5.0"
    )
    assert read_normalizers(headers, dtype).tolist()[0] == 5.0


def _empty() -> list[Rank]:
    return [Rank(0, 0), Rank(0, 7), Rank(7, 7), Rank(7, 12), Rank(12, 12)]


def _backwards() -> list[Rank]:
    return [Rank(9, 12), Rank(4, 9), Rank(0, 4)]


def _no_weight() -> list[Rank]:
    ranks = _three()
    for rank in ranks:
        rank.weight = None
    return ranks


def _gathered_but_told() -> list[Rank]:
    ranks = _three()
    for rank in ranks:
        rank.content = CONTENT
    return ranks


@pytest.mark.parametrize("build", [_three, _empty, _backwards, _no_weight, _gathered_but_told])
def test_ranks_that_fit_together_are_left_alone(build: Callable[[], list[Rank]]) -> None:
    headers = _headers(build())
    assert _raises(headers, TARGET, False) == ""
    assert not _on_device(headers, TARGET, False)


def test_equal_contents_mean_nothing_for_constant_rows_or_high_targets() -> None:
    headers = _headers(_gathered())
    assert looks_gathered(read_headers(headers))
    high = torch.tensor([0, 1, 12, -100])
    for target, constant in ((TARGET, True), (high, False)):
        assert _raises(headers, target, constant) == ""
        assert not _on_device(headers, target, constant)


def test_ignored_rows_say_nothing_about_gathered_logits() -> None:
    """An ignore_index beyond the shard is no sign of a target on another rank."""
    ranks = _gathered()
    for rank in ranks:
        rank.request = replace(rank.request, ignore_index=99)
    headers, target = _headers(ranks), torch.tensor([0, 1, 9, 99])
    assert "looks gathered" in _raises(headers, target, False)
    assert _on_device(headers, target, False)


def test_one_rank_never_looks_gathered() -> None:
    headers = _headers(_gathered()[:1])
    headers[:, 2] = 12
    assert not looks_gathered(read_headers(headers))
    assert not _on_device(headers, TARGET, False)


@given(data=st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_host_and_the_device_give_the_same_verdict(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 8))
    ranks = []
    cuts = sorted(data.draw(st.lists(st.integers(0, vocab), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, vocab], strict=True))
    for start, stop in data.draw(st.permutations(bounds)):
        if data.draw(st.integers(0, 5)) == 0:
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, vocab)] * 2)))
        rank = Rank(start, stop, vocab, implicit_shard=len(bounds) == 2)
        rank.content = data.draw(st.sampled_from([CONTENT, CONTENT + 1]))
        if data.draw(st.integers(0, 9)) == 0:
            rank.target = TARGET + 1
        ranks.append(rank)
    headers = _headers(ranks)
    target = torch.tensor(data.draw(st.lists(st.integers(0, 7), min_size=4, max_size=4)))
    constant = data.draw(st.booleans())
    assert bool(_raises(headers, target, constant)) == _on_device(headers, target, constant)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (ValueProblems(bad_row=7, bad_target=2**40), rf"row 7 holds {2**40} on rank 1"),
        (ValueProblems(bad_row=0, bad_target=-1), r"row 0 holds -1 on rank 1"),
        (ValueProblems(bad_weight=11), "weight must be finite, but rank 1 .* class 11;"),
    ],
)
def test_what_a_rank_finds_in_its_own_values_reaches_all(
    problems: ValueProblems, message: str
) -> None:
    ranks = _three()
    ranks[1].problems = problems
    with pytest.raises(ValueError, match=message):
        raise_on_problems(read_headers(_headers(ranks)), TARGET, False)
    alone = message.replace(" on rank 1", ",").replace("rank 1 .*", "it holds NaN or inf for")
    with pytest.raises(ValueError, match=alone):
        raise_on_own_values(problems, ranks[0].request)


def test_a_header_says_what_it_was_told() -> None:
    options: dict[str, Any] = {
        "smooth": True, "entropy": True, "reduction": "mean", "ignore_index": -(2**40),
        "scale": 0.1, "label_smoothing": 1 / 3, "lse_square_scale": -1e-300,
    }  # fmt: skip
    rank = Rank(3, 2_000_000_000, 2_000_000_001, **options)
    (read,) = read_headers(_headers([rank]))
    assert (read.start, read.stop, read.vocab_size) == (3, 2_000_000_000, 2_000_000_001)
    assert {name: read.options[name] for name in options} == options
    assert read.options["argmax"] is False
    assert read.checksums["target"] == int(checksum(TARGET))
    assert read.checksums["bad_row"] == -1


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_one_changed_value_changes_the_checksum(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 50))
    values = torch.randint(-100, 50000, (n,), generator=torch.Generator().manual_seed(n))
    other = values.clone()
    other[data.draw(st.integers(0, n - 1))] += data.draw(st.integers(1, 1000))
    assert checksum(values) != checksum(other)
    assert checksum(values.int()) == checksum(values)


def test_no_two_short_targets_have_the_same_checksum() -> None:
    """A sum of value x place would be linear: [9, 0, 5, 2] and [0, 3, 5, 2] would collide."""
    digits = torch.arange(10)
    every = torch.cartesian_prod(digits, digits, digits, digits)
    assert len({int(checksum(target)) for target in every}) == 10**4


def test_the_order_of_values_counts() -> None:
    assert checksum(torch.tensor([1, 2, 3])) != checksum(torch.tensor([2, 1, 3]))
    assert checksum(torch.tensor([1, 2])) != checksum(torch.tensor([1, 2, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bits_of_floats_count(dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    other = values.clone()
    other[1] = torch.nextafter(other[1], other[2])
    assert float_checksum(values) != float_checksum(other)
    assert float_checksum(values) == float_checksum(values.clone())


def test_minus_zero_is_the_same_option() -> None:
    """Whichever of the two came first."""
    off: dict[str, Any] = {name: -0.0 for name in ("label_smoothing", "lse_square_scale", "scale")}
    for first, second in ((off, dict.fromkeys(off, 0.0)), (dict.fromkeys(off, 0.0), off)):
        headers = _headers([Rank(0, 6, **first), Rank(6, 12, **second)])
        assert not _on_device(headers, TARGET, False)
