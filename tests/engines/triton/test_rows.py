"""The fused arithmetic on [N] vectors against plain torch, for all ranks in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE
from tests.engines.partials import EVERYTHING, ROWS, SIZE, equal_shards, fill_parts, target_of
from vocab_parallel_ce.collectives import Payload
from vocab_parallel_ce.engines.contract import Gathered
from vocab_parallel_ce.engines.triton import engine as triton
from vocab_parallel_ce.request import RowRequest
from vocab_parallel_ce.row_steps import Concluded, FusedSteps, RowSteps, TorchSteps
from vocab_parallel_ce.testing import assert_close


def _steps(
    fused: bool, target: Tensor, weight: Tensor | None, request: RowRequest, normalizer: float
) -> RowSteps:
    given = torch.tensor(normalizer) if request.normalized else None
    scale = torch.linspace(0.5, 2.0, len(target)) if request.row_scale else None
    if fused:
        assert triton.ROW_FUNCTIONS is not None
        return FusedSteps(triton.ROW_FUNCTIONS, target, weight, request, given, scale=scale)
    return TorchSteps(target, weight, request, given, False, None, scale=scale)


def _run(
    requests: list[RowRequest],
    targets: list[Tensor],
    weight: Tensor | None = None,
    contents: Any = fill_parts,
    reduced: bool = False,
    normalizers: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> list[Concluded]:
    """Both ways on every rank: headers and local targets the same; what the fused way concludes."""
    concluded = []
    k, world = len(requests[0].wanted.rows), len(requests)
    payloads = [Payload.allocate(k, ROWS, torch.float32, torch.device(DEVICE)) for _ in requests]
    steps = []
    given = normalizers[:world]
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
    for both, payload in zip(steps, payloads, strict=True):
        outcomes = []
        for way in both:
            ranks = Payload(received.clone(), k, ROWS, torch.float32, world)
            parts = ranks.parts[:1] if reduced else ranks.parts
            gathered = Gathered(parts, ranks.shard_weight[:, 0], ranks.header[:, 0], ranks.header)
            if world == 1:
                gathered = gathered._replace(headers=None)
            outcomes.append(way.conclude(gathered, payload.parts, whole))
        _check_same(*outcomes)
        concluded.append(outcomes[1])
    return concluded


def _check_same(plain: Concluded, fused: Concluded) -> None:
    """Every operation is the same but exp and log, which torch's vectors and numpy round apart."""
    assert torch.equal(plain.m, fused.m)
    assert (plain.argmax is None) == (fused.argmax is None)
    if plain.argmax is not None and fused.argmax is not None:
        assert torch.equal(plain.argmax, fused.argmax)
    for name, a, b in (("s", plain.s, fused.s), ("stats", plain.stats, fused.stats)):
        largest = a.nan_to_num(0.0, 0.0, 0.0).abs().max()
        assert_close(b, a.double().cpu(), a.cpu(), name, rows_error=3e-7 * float(largest))
    assert torch.equal(plain.stats == 0, fused.stats == 0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING, {"entropy": True, "ignored_rows": True}, {"smooth": True, "ignore_index": 2}],
    ids=["plain", "everything", "entropy of ignored rows", "smoothing"],
)
def test_what_is_concluded(options: dict[str, Any], world: int) -> None:
    target = target_of(world)
    for outcome in _run(equal_shards(world, **options), [target] * world):
        kept = target != options.get("ignore_index", -100)
        assert bool(outcome.stats[0].isfinite()[kept].float().mean() > 0.5)
        assert bool((outcome.stats[0][~kept] == 0).all())


def test_class_weights_and_a_target_of_32_bits() -> None:
    weight = torch.rand(2 * SIZE)
    _run(equal_shards(2, smooth=True), [target_of(2).int()] * 2, weight)


def test_partials_that_were_summed_already() -> None:
    _run(equal_shards(2, smooth=True, entropy=True), [target_of(2)] * 2, reduced=True)


def test_a_wrong_target_is_nan_in_its_row() -> None:
    target, wrong = target_of(2), torch.tensor([3, 4])
    outcomes = []
    for values in (target[wrong], torch.tensor([2 * SIZE, -1])):
        torch.manual_seed(0)
        outcomes.append(_run(equal_shards(2), [target.index_copy(0, wrong, values)] * 2))
    for before, after in zip(*outcomes, strict=True):
        assert bool(before.stats[:, wrong].isfinite().all())
        assert bool(after.stats[:, wrong].isnan().all())
        assert bool(after.s[wrong].isnan().all())
        assert torch.equal(before.stats.isnan().sum() + 4, after.stats.isnan().sum())


# Ranks that disagree


def _check_all_nan(outcomes: list[Concluded], target: Tensor) -> None:
    for outcome in outcomes:
        assert bool(outcome.stats[0][target != -100].isnan().all())


def test_other_targets() -> None:
    target = target_of(3)
    other = target.clone()
    other[200] = (target[200].clamp(min=0) + 1) % 15
    _check_all_nan(_run(equal_shards(3), [target, target, other]), target)


@pytest.mark.parametrize(
    "change",
    [
        {"ignore_index": -1},
        {"scale": 0.5},
        {"start": 4, "implicit_shard": False},
        {"start": 4, "stop": 9, "implicit_shard": False},
        {"start": 6, "implicit_shard": False},
        {"vocab_size": 11},
    ],
    ids=["ignore_index", "scale", "overlap", "overlap of the right total", "gap", "vocab_size"],
)
def test_other_options_and_shards_that_do_not_tile(change: dict[str, Any]) -> None:
    target = target_of(2)
    requests = [replace(r, implicit_shard="start" not in change) for r in equal_shards(2)]
    requests[1] = replace(requests[1], **change)
    _check_all_nan(_run(requests, [target] * 2), target.masked_fill(target == -1, -100))


@pytest.mark.parametrize(
    ("normalizers", "alike"),
    [
        ((7.0, 7.0, 7.0), True),
        ((7.0, 7.00005, 6.99995), True),
        ((7.0, 7.0, 7.001), False),
        ((0.0, 0.0, 0.0), True),
        ((0.0, 1e-30, 0.0), False),
        ((torch.nan, torch.nan, torch.nan), True),
        ((7.0, torch.nan, 7.0), False),
        ((torch.inf, torch.inf, torch.inf), True),
    ],
)
def test_normalizers(normalizers: tuple[float, ...], alike: bool) -> None:
    target = target_of(3)
    outcomes = _run(
        equal_shards(3, normalized=True, row_scale=True), [target] * 3, normalizers=normalizers
    )
    if alike:
        assert all(bool(o.stats[0].isfinite().any()) for o in outcomes)
    else:
        _check_all_nan(outcomes, target)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("beyond", [False, True])
def test_gathered_logits(constant: bool, beyond: bool) -> None:
    """The same partials on every rank: wrong, unless they are constant or a target is beyond."""

    def alike(parts: Tensor, request: RowRequest) -> None:
        parts.copy_(torch.linspace(0.5, 2.0, parts.numel()).view(parts.shape))
        if constant:
            parts[1] = request.size

    target = target_of(2) % SIZE
    target[::7] = -100
    if beyond:
        target[4] = SIZE + 1
    outcomes = _run(equal_shards(2), [target] * 2, contents=alike)
    if constant or beyond:
        assert all(bool(o.stats.isfinite().all()) for o in outcomes)
    else:
        _check_all_nan(outcomes, target)


def test_a_header_tells_of_the_rows_that_were_read() -> None:
    """And of all targets, those of a whole batch: what lies behind the rows is not looked at."""
    request, target, announced = equal_shards(2)[0], target_of(2), target_of(2).repeat(9)
    functions, k = triton.ROW_FUNCTIONS, len(request.wanted.rows)
    assert functions is not None
    payload = Payload.allocate(k, ROWS, torch.float32, torch.device(DEVICE))
    fill_parts(payload.parts, request)
    told = []
    for steps in (
        TorchSteps(target, None, request, None, False, None, announced=announced),
        FusedSteps(functions, target, None, request, None, announced=announced),
    ):
        steps.write_header(payload, float(request.size))
        told.append(payload.header.clone())
    assert torch.equal(*told)
