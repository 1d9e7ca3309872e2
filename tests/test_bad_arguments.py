"""Bad arguments: every rank raises, the message names argument, value and rank. No rank hangs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.collectives import check_backend_dtype

from .calls import COLUMNS, ROWS, Call, assert_still_works, good_call, outcome_of
from .ranks import Pool

# Static arguments: (what is replaced in a good call, the error, what its message must hold)

_TENSOR = torch.zeros(ROWS, COLUMNS)
STATIC: dict[str, tuple[Call, type[Exception], str]] = {
    "input list": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "input int": ({"input": _TENSOR.long()}, TypeError, "input must be .* got torch.int64"),
    "input 0-d": ({"input": torch.tensor(1.0)}, ValueError, "input must have shape .* 0-d"),
    "input empty": (
        {"input": torch.zeros(ROWS, 0)}, ValueError, "input has no columns.*VocabShard",
    ),
    "target list": ({"target": [0]}, TypeError, "target must be a tensor, got list"),
    "target float": (
        {"target": torch.zeros(ROWS)}, TypeError, "target must hold .* got torch.float32",
    ),
    "target int16": (
        {"target": torch.zeros(ROWS, dtype=torch.int16)}, TypeError, "target .* got torch.int16",
    ),
    "target shape": (
        {"target": torch.zeros(ROWS + 1, dtype=torch.int64)},
        ValueError,
        r"target has shape \(5,\), but input \(4, 6\) needs \(4,\)",
    ),
    "target probabilities": (
        {"target": torch.zeros(ROWS, COLUMNS, dtype=torch.int64)},
        ValueError,
        r"target has shape \(4, 6\)",
    ),
    "weight list": ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    "weight length": (
        {"weight": torch.ones(5)}, ValueError, r"weight has 5 entries but vocab_size is \d+",
    ),
    "weight int": (
        {"weight": torch.ones(COLUMNS, dtype=torch.int64)},
        ValueError,
        "weight must be a floating point vector .* torch.int64",
    ),
    "weight 2-d": (
        {"weight": torch.ones(2, 3)}, ValueError, r"weight must be .* shape \(2, 3\)",
    ),
    "weight grad": (
        {"weight": torch.ones(COLUMNS, requires_grad=True)}, ValueError, "weight gets no gradient",
    ),
    "reduction": (
        {"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, got 'avg'",
    ),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    "ignore_index bool": ({"ignore_index": True}, TypeError, "ignore_index must .* got True"),
    "smoothing -0.1": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing .* got -0.1"),
    "smoothing 1.1": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing .* got 1.1"),
    "smoothing nan": ({"label_smoothing": float("nan")}, ValueError, "label_smoothing .* got nan"),
    "smoothing str": ({"label_smoothing": "0.1"}, ValueError, "label_smoothing .* got '0.1'"),
    "z inf": ({"lse_square_scale": float("inf")}, ValueError, r"lse_square_scale\) .* got inf"),
    "z str": ({"lse_square_scale": "0"}, ValueError, r"lse_square_scale\) .* got '0'"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    "scale None": ({"scale": None}, ValueError, "scale must be a finite number, got None"),
    "engine": ({"engine": "gpu"}, ValueError, "engine must be one of .* got 'gpu'"),
    "collective": ({"collective": "ring"}, ValueError, "collective must be one .* got 'ring'"),
    "check": ({"check": "yes"}, TypeError, "check must be True, False or None, got 'yes'"),
    "inplace_backward": (
        {"inplace_backward": "no"}, TypeError, "inplace_backward must be True or False, got 'no'",
    ),
    "finite_logits": (
        {"finite_logits": 1}, TypeError, "finite_logits must be True or False, got 1",
    ),
    "normalizer sum": (
        {"normalizer": 3.0, "reduction": "sum"}, ValueError, "normalizer .* reduction='sum'",
    ),
    "normalizer shape": (
        {"normalizer": torch.ones(2)}, ValueError, r"normalizer must hold one .* \(2,\)",
    ),
    "normalizer str": ({"normalizer": "3"}, TypeError, "normalizer must be a .* got '3'"),
    "shard tuple": ({"shard": (0, 6)}, TypeError, "shard must be a VocabShard .* got tuple"),
    "shard wide": (
        {"shard": VocabShard(0, 9, 9)}, ValueError, r"6 columns but shard holds the 9 ids \[0, 9\)",
    ),
    "in place leaf": (
        {"input": torch.zeros(ROWS, COLUMNS, requires_grad=True), "inplace_backward": True},
        ValueError,
        "inplace_backward=True would overwrite input, which is a leaf",
    ),
    "in place view of a leaf": (
        {
            "input": torch.zeros(ROWS, 2 * COLUMNS, requires_grad=True)[:, :COLUMNS],
            "inplace_backward": True,
        },
        ValueError,
        "inplace_backward=True would overwrite the leaf that input is a view of",
    ),
    "in place overlap": (
        {
            "input": (torch.zeros(1, COLUMNS, requires_grad=True) * 1).expand(ROWS, COLUMNS),
            "inplace_backward": True,
        },
        ValueError,
        r"inplace_backward=True .* \(4, 6\) with strides \(0, 1\)",
    ),
}  # fmt: skip

# A group that is none cannot carry a preflight.
GROUPS: dict[str, tuple[Call, type[Exception], str]] = {
    "group str": ({"group": "tp"}, TypeError, "group must be a .*ProcessGroup.* got str"),
    "group int": ({"group": -100}, TypeError, "group must be a .*ProcessGroup.* got int"),
}


@pytest.mark.parametrize("name", [*STATIC, *GROUPS])
def test_static_arguments_on_one_rank(name: str) -> None:
    replaced, kind, message = {**STATIC, **GROUPS}[name]
    with pytest.raises(kind, match=message) as caught:
        cross_entropy(**{**good_call(None), **replaced})
    assert not re.search(r"rank \d", str(caught.value))  # there is one only
    assert cross_entropy(**good_call(None)).isfinite()


def _static_everywhere(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = []
    for replaced, _, _ in STATIC.values():
        call = {**good_call(group), **replaced}
        out.append(outcome_of(cross_entropy, **call))
    assert_still_works(group)
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_static_arguments_raise_without_a_check_and_name_the_rank(pool: Pool, world: int) -> None:
    results = pool.run(_static_everywhere, world)
    for rank, outcomes in enumerate(results):
        for (name, (_, kind, message)), got in zip(STATIC.items(), outcomes, strict=True):
            assert got[0] == kind.__name__, (name, got)
            assert re.search(message, got[1], re.DOTALL), (name, got)
            # Any ``check`` that is not False exchanges errors first: the first rank's is raised.
            where = 0 if name == "check" else rank
            assert f"rank {where} of the group" in got[1], (name, got)


def _static_on_one(group: dist.ProcessGroup, bad: int) -> list[tuple[str, str]]:
    out = []
    for replaced, _, _ in STATIC.values():
        call = {**good_call(group), "check": True}
        if dist.get_rank(group) == bad:
            call.update(replaced)
        out.append(outcome_of(cross_entropy, **call))
    assert_still_works(group)
    return out


@pytest.mark.parametrize(("world", "bad"), [(2, 0), (3, 2)])
def test_with_check_all_ranks_raise_what_one_found(pool: Pool, world: int, bad: int) -> None:
    results = pool.run(_static_on_one, world, (bad,))
    for outcomes in results:
        for (name, (_, kind, message)), got in zip(STATIC.items(), outcomes, strict=True):
            assert got[0] == kind.__name__, (name, got)
            assert re.search(message, got[1], re.DOTALL), (name, got)
            assert f"rank {bad} of the group" in got[1], (name, got)


def test_hccl_does_not_carry_fp64() -> None:
    with pytest.raises(ValueError, match=r"input is float64, which the hccl .* \(rank 3\)"):
        check_backend_dtype("hccl", torch.float64, " (rank 3)")
    with pytest.raises(ValueError, match=r"use input\.float"):
        check_backend_dtype("cpu:gloo,npu:hccl", torch.float64)
    check_backend_dtype("hccl", torch.float32)
    check_backend_dtype("gloo", torch.float64)
    check_backend_dtype("nccl", torch.float64)


def _second_backward(group: dist.ProcessGroup) -> tuple[str, str]:
    loss = cross_entropy(**good_call(group), inplace_backward=True)
    loss.backward(retain_graph=True)

    def again() -> Tensor:
        loss.backward()
        return loss

    outcome = outcome_of(again)
    assert_still_works(group)
    return outcome


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_backward_in_place_is_refused(pool: Pool, world: int) -> None:
    for kind, text in pool.run(_second_backward, world):
        assert kind == "RuntimeError"
        assert "a second backward through a loss with inplace_backward=True" in text


def _empty_shard_needs_no_columns(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    x = torch.randn(ROWS, 6 if rank == 0 else 0, requires_grad=True)
    shard = VocabShard(0, 6, 6) if rank == 0 else VocabShard(6, 6, 6)
    loss = cross_entropy(x, torch.tensor([0, 1, 5, -100]), group=group, shard=shard)
    loss.backward()
    assert loss.isfinite()


def test_an_empty_shard_that_is_told_is_fine(pool: Pool) -> None:
    pool.run(_empty_shard_needs_no_columns, 2)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (VocabShard(0, 6, 12), r"shard holds ids \[0, 6\) of vocab_size=12, but there is one rank"),
        (VocabShard(2, 6, 6), r"shard holds ids \[2, 6\) of vocab_size=6, but there is one rank"),
    ],
)
def test_one_rank_must_hold_all(shard: VocabShard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(**good_call(None), shard=shard)
