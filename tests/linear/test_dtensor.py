"""The fused head on DTensors: 1-D and 2-D meshes, split sequences, uneven shards, refusals."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.fx.experimental.proxy_tensor import make_fx

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics
from vocab_parallel_ce.engines import eager

from ..cases import Findings
from ..ranks import Pool
from .cases import scratch_for

Placements = tuple[Placement, ...]
S, B, H = 8, 2, 5


@functools.cache
def _grid() -> DeviceMesh:
    """Every rank of the pool, as data parallel 2 x tensor parallel 2."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


@functools.cache
def _line(group: dist.ProcessGroup) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def _mesh(group: dist.ProcessGroup, placements: Placements) -> DeviceMesh:
    return _line(group) if len(placements) == 1 else _grid()


def _batch(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(S, B, H, generator=g, dtype=torch.float64)
    head = torch.randn(classes, H, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (S, B), generator=g)
    target[1] = -100
    return hidden, head, target


def _losses(
    group: dist.ProcessGroup, of_hidden: Placements, of_head: Placements, classes: int
) -> None:
    mesh, findings = _mesh(group, of_hidden), Findings()
    full, weight, target = _batch(classes)
    for reduction, gradient in (
        ("none", "auto"), ("mean", "forward"), ("mean", "recompute"), ("sum", "forward"),
    ):  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in (full, weight)]
        logits = F.linear(leaves[0], leaves[1])
        want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)
        up = torch.arange(want.numel(), dtype=torch.float64).view(want.shape) + 1
        wanted = torch.autograd.grad(want, leaves, up)
        hidden = distribute_tensor(full, mesh, of_hidden).requires_grad_()
        head = distribute_tensor(weight, mesh, of_head).requires_grad_()
        loss = linear_cross_entropy(hidden, head, target, reduction=reduction, gradient=gradient)
        assert isinstance(loss, DTensor)
        whole_up = up.view(target.shape) if reduction == "none" else up
        spread = distribute_tensor(whole_up, mesh, loss.placements)
        got = torch.autograd.grad(loss, (hidden, head), spread)
        values = [loss.full_tensor(), *(g.full_tensor() for g in got if isinstance(g, DTensor))]
        said = f"{reduction}, {gradient}: {{}}".format
        with findings:
            assert tuple(got[0].placements) == of_hidden  # type: ignore[attr-defined]
            for value, exact in zip(values, (want, *wanted), strict=True):
                torch.testing.assert_close(value.view(exact.shape), exact, msg=said)
    findings.report()


CASES = [
    (2, (Replicate(),), (Shard(0),), 10),
    (2, (Replicate(),), (Shard(0),), 11),
    (2, (Shard(0),), (Shard(0),), 11),  # a sequence in parts
    (4, (Replicate(),), (Shard(0),), 5),  # 2, 2, 1 rows and none
    (4, (Shard(1), Replicate()), (Replicate(), Shard(0)), 11),
    (4, (Shard(0), Shard(0)), (Replicate(), Shard(0)), 10),
    (4, (Shard(0), Replicate()), (Replicate(), Replicate()), 7),
]


@pytest.mark.parametrize(("world", "of_hidden", "of_head", "classes"), CASES, ids=str)
def test_losses(
    pool: Pool, world: int, of_hidden: Placements, of_head: Placements, classes: int
) -> None:
    pool.run(_losses, world, (of_hidden, of_head, classes))


def _statistics(group: dist.ProcessGroup) -> None:
    mesh = _line(group)
    full, weight, target = _batch(10)
    head = distribute_tensor(weight, mesh, [Shard(0)])
    out = linear_token_statistics(
        distribute_tensor(full, mesh, [Replicate()]), head, target, entropy=True, argmax=True
    )
    log_p = F.linear(full, weight).log_softmax(-1)
    kept = target != -100
    assert isinstance(out.entropy, DTensor)
    assert isinstance(out.argmax, DTensor)
    entropy = -(log_p.exp() * log_p).sum(-1) * kept
    torch.testing.assert_close(out.entropy.full_tensor(), entropy)
    argmax = torch.where(kept, log_p.argmax(-1), -1)
    assert torch.equal(out.argmax.full_tensor(), argmax)


def test_statistics(pool: Pool) -> None:
    pool.run(_statistics, 2)


def _refusals(group: dist.ProcessGroup) -> list[str]:
    mesh = _line(group)
    full, weight, target = _batch(10)
    hidden = distribute_tensor(full, mesh, [Replicate()])
    head = distribute_tensor(weight, mesh, [Shard(0)])
    partial = DTensor.from_local(full, mesh, [Partial()], run_check=False)
    calls: tuple[tuple[Tensor, Tensor, dict[str, Any]], ...] = (
        (full, head, {}),
        (hidden, weight, {}),
        (hidden, head, {"group": group}),
        (partial, head, {}),
        (hidden, distribute_tensor(weight, mesh, [Shard(1)]), {}),
        (hidden, head, {"sequence_parallel": True}),
        (distribute_tensor(full[:7], mesh, [Shard(0)]), head, {}),
        (distribute_tensor(full, mesh, [Shard(1)]), head, {}),
        (
            distribute_tensor(full, mesh, [Shard(0)]),
            distribute_tensor(weight, mesh, [Replicate()]),
            {"linear_bias": torch.zeros(10, dtype=torch.float64, requires_grad=True)},
        ),
    )
    out = []
    for hidden_, head_, options in calls:
        try:
            linear_cross_entropy(hidden_, head_, target, check=True, **options)
            out.append("")
        except ValueError as problem:
            out.append(str(problem))
    return out


def test_refusals(pool: Pool) -> None:
    wanted = (
        "linear_weight is a DTensor, but not both",
        "input is a DTensor, but not both",
        "group and shard must be left out",
        "input has placement P",
        "it must be Shard(0) on one mesh dimension",
        "DTensors tell it",
        "cannot share evenly",
        "dimension 0 only",
        "linear_bias is a plain tensor that needs a gradient",
    )
    for texts in pool.run(_refusals, 2):
        for text, part in zip(texts, wanted, strict=True):
            assert part in text, (text, part)


def _raised(group: dist.ProcessGroup, gradient: str, failing: str) -> str:
    """With check, on two rows of a grid: what goes wrong where the first half of the rows lies."""
    full, weight, target = _batch(10)
    hidden = distribute_tensor(full, _grid(), [Shard(0), Replicate()]).requires_grad_()
    head = distribute_tensor(weight, _grid(), [Replicate(), Shard(0)]).requires_grad_()
    options: dict[str, Any] = {"gradient": gradient, "check": True, "engine": "eager"}
    options["scratch_mib"] = scratch_for(3, 5, torch.float64)
    usual = eager.gradient

    def fails(*arguments: Any) -> None:
        raise MemoryError("no room")

    bad = target.clone()
    if failing == "target":
        bad[0, 0] = 99
    engine_fails = failing == "engine" and dist.get_rank() == 1
    said = ""
    with mock.patch.object(eager, "gradient", fails if engine_fails else usual):
        try:
            linear_cross_entropy(hidden, head, bad, **options)
        except (ValueError, RuntimeError, MemoryError) as problem:
            said = str(problem)
    good = linear_cross_entropy(hidden, head, target, **options)
    assert isinstance(good, DTensor)
    want = F.cross_entropy(F.linear(full, weight).flatten(0, 1), target.flatten())
    torch.testing.assert_close(good.full_tensor(), want)
    return said


@pytest.mark.parametrize(
    ("gradient", "failing"),
    [("forward", "target"), ("recompute", "target"), ("forward", "engine")],
)
def test_with_check_ranks_that_hold_other_rows_raise_as_well(
    pool: Pool, gradient: str, failing: str
) -> None:
    for said in pool.run(_raised, 4, (gradient, failing)):
        assert {"target": "row 0 holds 99", "engine": "no room"}[failing] in said


def _traced(group: dist.ProcessGroup) -> tuple[float, float]:
    """Rows over the ranks: eagerly, and as a graph that make_fx has traced."""
    full, weight, target = _batch(6)
    mesh = _line(group)
    hidden = distribute_tensor(full.requires_grad_(), mesh, [Shard(0)])
    head = distribute_tensor(weight.requires_grad_(), mesh, [Replicate()])

    def loss(hidden: DTensor, head: DTensor) -> DTensor:
        out = linear_cross_entropy(hidden, head, target)
        assert isinstance(out, DTensor)
        return out

    graph = make_fx(loss)(hidden, head)
    untraced, traced = (float(call(hidden, head).full_tensor()) for call in (loss, graph))
    return untraced, traced


def test_a_traced_mean_is_that_of_all_rows(pool: Pool) -> None:
    for untraced, traced in pool.run(_traced, 2):
        assert traced == pytest.approx(untraced, rel=1e-12)
