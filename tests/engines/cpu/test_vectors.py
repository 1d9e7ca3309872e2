"""The compiled arithmetic on [N] vectors against plain torch, for all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.partials import EVERYTHING, ROWS, SIZE, equal_shards, fill_parts, target_of
from vocab_parallel_ce.collectives import Payload
from vocab_parallel_ce.engines.contract import Gathered
from vocab_parallel_ce.engines.cpu import vectors
from vocab_parallel_ce.request import RowRequest
from vocab_parallel_ce.row_steps import Concluded, FusedSteps, RowSteps, TorchSteps
from vocab_parallel_ce.testing import assert_close

MANY_ROWS = 20_000  # more than one thread takes


def _steps(
    fused: bool, target: Tensor, weight: Tensor | None, request: RowRequest, normalizer: Tensor
) -> RowSteps:
    given = normalizer if request.normalized else None
    if fused:
        return FusedSteps(vectors, target, weight, request, given)
    return TorchSteps(target, weight, request, given, True, None)


def _run(
    requests: list[RowRequest],
    targets: list[Tensor],
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    contents: Callable[[Tensor, RowRequest], None] = fill_parts,
    normalizers: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> list[tuple[Concluded | str, Concluded | str]]:
    """Both ways on every rank: headers and local targets the same; what each concludes, or says."""
    k, world, rows = len(requests[0].wanted.rows), len(requests), len(targets[0])
    payloads = [Payload.allocate(k, rows, dtype, torch.device("cpu")) for _ in requests]
    steps = []
    given = [torch.tensor(number, dtype=dtype) for number in normalizers[:world]]
    for request, target, payload, number in zip(requests, targets, payloads, given, strict=True):
        contents(payload.parts, request)
        both = [_steps(fused, target, weight, request, number) for fused in (False, True)]
        assert torch.equal(both[0].local_target, both[1].local_target)
        headers, total = [], float(request.size) if world > 1 else torch.nan  # not told
        for way in both:
            payload.header.fill_(12345)
            way.write_header(payload, total)
            assert world == 1 or float(payload.shard_weight) == request.size
            headers.append(payload.header.clone())
        assert torch.equal(*headers)
        steps.append(both)
    received = torch.cat([p.buffer for p in payloads])
    whole: Tensor | float = float(requests[0].vocab_size) if weight is None else weight.sum()
    outcomes = []
    for both, payload in zip(steps, payloads, strict=True):
        found: list[Concluded | str] = []
        for way in both:
            ranks = Payload(received.clone(), k, rows, dtype, world)
            weights, starts = ranks.shard_weight[:, 0], ranks.header[:, 0]
            headers_ = None if world == 1 else ranks.header
            gathered = Gathered(ranks.parts, weights, starts, headers_)
            try:
                found.append(way.conclude(gathered, payload.parts, whole))
            except ValueError as problem:
                found.append(str(problem))
        outcomes.append((found[0], found[1]))
    return outcomes


def _check_same(plain: Concluded | str, fused: Concluded | str) -> None:
    """Both conclude; torch rounds every operation, the loop here the result."""
    assert isinstance(plain, Concluded), plain
    assert isinstance(fused, Concluded), fused
    assert torch.equal(plain.m, fused.m)
    assert (plain.argmax is None) == (fused.argmax is None)
    if plain.argmax is not None and fused.argmax is not None:
        assert torch.equal(plain.argmax, fused.argmax)
    for name, a, b in (("s", plain.s, fused.s), ("stats", plain.stats, fused.stats)):
        assert a.dtype == b.dtype
        largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
        error = 3 * torch.finfo(a.dtype).eps * largest
        assert_close(b, a.double(), a, name, rows_error=error)
    assert torch.equal(plain.stats == 0, fused.stats == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {"entropy": True, "ignored_rows": True}, {"smooth": True, "ignore_index": 2}],
    ids=["plain", "everything", "entropy of ignored rows", "smoothing"],
)
def test_what_is_concluded(options: dict[str, Any], world: int, dtype: torch.dtype) -> None:
    ignored = options.get("ignore_index", -100)
    target = target_of(world, ignored=ignored)
    for plain, fused in _run(equal_shards(world, **options), [target] * world, dtype=dtype):
        _check_same(plain, fused)
        kept = target != ignored
        assert isinstance(fused, Concluded)
        assert bool(fused.stats[0].isfinite()[kept].float().mean() > 0.5)
        assert bool((fused.stats[0][~kept] == 0).all())


def test_rows_for_several_threads_class_weights_and_a_strided_target() -> None:
    weight = torch.rand(2 * SIZE)
    target = torch.stack([target_of(2, MANY_ROWS), target_of(2, MANY_ROWS)], 1)[:, 0]
    for plain, fused in _run(equal_shards(2, smooth=True), [target] * 2, weight):
        _check_same(plain, fused)


def _both_say(outcomes: list[tuple[Concluded | str, Concluded | str]], words: str) -> None:
    for plain, fused in outcomes:
        assert plain == fused
        assert words in str(fused)


def test_other_targets() -> None:
    target = target_of(3)
    other = target.clone()
    other[200] = (target[200].clamp(min=0) + 1) % 15
    _both_say(_run(equal_shards(3), [target, target, other]), "ranks disagree on target")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ignore_index": -1}, "ignore_index"),
        ({"scale": 0.5}, "scale"),
        ({"start": 4, "implicit_shard": False}, "overlap"),
        ({"start": 6, "implicit_shard": False}, "no rank"),
        ({"vocab_size": 11}, "vocab_size"),
    ],
)
def test_other_options_and_shards_that_do_not_tile(change: dict[str, Any], words: str) -> None:
    target = torch.randint(2 * SIZE, (ROWS,))
    requests = [replace(r, implicit_shard="start" not in change) for r in equal_shards(2)]
    requests[1] = replace(requests[1], **change)
    _both_say(_run(requests, [target] * 2), words)


def test_shards_in_another_order_than_the_ranks() -> None:
    requests = [replace(r, implicit_shard=False) for r in reversed(equal_shards(2))]
    for plain, fused in _run(requests, [target_of(2)] * 2):
        _check_same(plain, fused)


@pytest.mark.parametrize(
    ("normalizers", "alike"),
    [((7.0, 7.00005, 6.99995), True), ((7.0, 7.0, 7.001), False), ((torch.nan,) * 3, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalizers(dtype: torch.dtype, normalizers: tuple[float, ...], alike: bool) -> None:
    requests, targets = equal_shards(3, normalized=True), [target_of(3)] * 3
    outcomes = _run(requests, targets, dtype=dtype, normalizers=normalizers)
    if not alike:
        _both_say(outcomes, "ranks disagree on normalizer")
        return
    for plain, fused in outcomes:
        _check_same(plain, fused)


@pytest.mark.parametrize("constant", [False, True])
def test_gathered_logits(constant: bool) -> None:
    """The same partials on every rank: wrong, unless they are constant."""

    def alike(parts: Tensor, request: RowRequest) -> None:
        parts.copy_(torch.linspace(0.5, 2.0, parts.numel()).view(parts.shape))
        if constant:
            parts[1] = request.size

    target = target_of(2)
    target = torch.where(target < 0, target, target % SIZE)
    outcomes = _run(equal_shards(2), [target] * 2, contents=alike)
    if not constant:
        _both_say(outcomes, "input looks gathered")
        return
    for plain, fused in outcomes:
        _check_same(plain, fused)


def test_a_wrong_target_raises_in_the_same_words() -> None:
    said = []
    for fused in (False, True):
        with pytest.raises(ValueError, match="target is out of range: row 2 holds -1") as raised:
            _steps(fused, torch.tensor([0, -100, -1, 99]), None, equal_shards(1)[0], torch.ones(()))
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_what_is_announced_may_be_more_than_what_is_read() -> None:
    """The targets of a whole batch, of which these are the first: an error names its row."""
    request = equal_shards(1)[0]
    with pytest.raises(ValueError, match="row 3 holds 77"):
        FusedSteps(
            vectors, torch.tensor([0, 1]), None, request, None,
            announced=torch.tensor([0, 1, 2, 77]),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_header_tells_of_the_rows_that_were_read(dtype: torch.dtype) -> None:
    """And of all targets, those of a whole batch: what lies behind the rows is not looked at."""
    request, target, announced = equal_shards(2)[0], target_of(2), target_of(2).repeat(9)
    payload = Payload.allocate(len(request.wanted.rows), ROWS, dtype, torch.device("cpu"))
    fill_parts(payload.parts, request)
    told = []
    for steps in (
        TorchSteps(target, None, request, None, True, None, announced=announced),
        FusedSteps(vectors, target, None, request, None, announced=announced),
    ):
        steps.write_header(payload, float(request.size))
        told.append(payload.header.clone())
    assert torch.equal(*told)


def test_ids_of_32_bits_are_refused_before_an_address_is_read() -> None:
    with pytest.raises(TypeError, match=r"expected torch.int64, got torch.int32"):
        vectors.locate(torch.zeros(3, dtype=torch.int32), 0, 8, 8, -100)
