"""DTensor logits: 1-D and 2-D meshes, uneven and empty shards, rows sharded, clear refusals."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
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

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import ReferenceLoss, assert_close, batch

from .cases import Findings, expected
from .ranks import Pool

Placements = tuple[Placement, ...]
OPTIONS: dict[str, Any] = {
    "ignore_index": 1, "label_smoothing": 0.1, "lse_square_scale": 0.01, "scale": 1.5,
}  # fmt: skip


@functools.cache
def _grid() -> DeviceMesh:
    """Every rank of the pool, as data parallel 2 x tensor parallel 2."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


@functools.cache
def _line(group: dist.ProcessGroup) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


def _mesh(group: dist.ProcessGroup, placements: Placements) -> DeviceMesh:
    return _line(group) if len(placements) == 1 else _grid()


def _rows_of(placements: Placements, last: int) -> Placements:
    return tuple(Replicate() if p in (Shard(last), Shard(-1)) else p for p in placements)


def _as_dtensor(result: Tensor | None) -> DTensor:
    assert isinstance(result, DTensor)
    return result


def _losses(
    group: dist.ProcessGroup, placements: Placements, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    mesh, last = _mesh(group, placements), len(shape) - 1
    rows = _rows_of(placements, last)
    count = torch.Size(shape[:-1]).numel()
    data = batch(count, shape[-1], dtype, ignore_index=1, seed=count)
    full, target = data.logits.view(shape), data.target.view(shape[:-1])
    spread_target = distribute_tensor(target, mesh, rows)
    targets = {
        "plain": target,
        "local": spread_target.to_local(),
        "sharded": spread_target,
        "replicated": distribute_tensor(target, mesh, [Replicate()] * len(rows)),
    }
    weights = {"plain": data.weight, "DTensor": distribute_tensor(
        data.weight, mesh, [Replicate()] * len(rows))}  # fmt: skip
    findings = Findings()
    for number, (name, given) in enumerate(targets.items()):
        for reduction in ("none", "sum", "mean"):
            weight = [None, *weights.values()][(number + len(reduction)) % 3]
            plain_weight = None if weight is None else data.weight
            want = expected(full, target, plain_weight, reduction=reduction, **OPTIONS)
            logits = distribute_tensor(full, mesh, placements)
            leaf_placements = logits.placements
            logits.requires_grad_()
            loss = _as_dtensor(cross_entropy(logits, given, weight, reduction, **OPTIONS))
            whole = loss.full_tensor()
            up = torch.ones_like(whole)
            if reduction == "none":
                up = data.upstream.view(shape[:-1]).to(whole.dtype)
            spread = distribute_tensor(up, mesh, loss.placements)
            (grad,) = torch.autograd.grad(loss, logits, spread)
            grad = _as_dtensor(grad)
            whole_grad = grad.full_tensor()
            what = f"{name}, {reduction}"
            with findings:
                by_row = rows if reduction == "none" else (Replicate(),) * len(rows)
                assert loss.placements == by_row, (what, loss.placements)
                assert grad.placements == leaf_placements, (what, grad.placements)
                assert grad.dtype == dtype
                assert_close(
                    whole, want.exact.loss, want.naive.loss, what, rows_error=want.rows_error
                )
                gradients = want.gradients(lambda r, up=up: (r.loss * up.to(r.loss.dtype)).sum())
                assert_close(whole_grad, *gradients, f"gradient of {what}")
    findings.report()


ONE_D = [
    (2, (Shard(1),), (7, 10)),
    (2, (Shard(-1),), (4, 11)),
    (4, (Shard(1),), (7, 10)),  # 3, 3, 3, 1 columns
    (4, (Shard(1),), (7, 5)),  # 2, 2, 1, 0
    (4, (Shard(2),), (4, 9, 2)),  # 1, 1, 0, 0
    (2, (Replicate(),), (5, 6)),
    (2, (Shard(0),), (5, 6)),  # rows only
    (2, (Shard(0),), (1, 6)),  # a rank without rows
]
TWO_D = [
    (4, (Replicate(), Shard(1)), (7, 10)),
    (4, (Shard(0), Shard(1)), (7, 11)),
    (4, (Shard(1), Replicate()), (7, 11)),
    (4, (Shard(1), Shard(0)), (7, 11)),
    (4, (Shard(0), Shard(1)), (1, 3)),  # dp 1 has no rows
    (4, (Shard(0), Replicate()), (6, 5)),
    (4, (Shard(1), Shard(2)), (2, 5, 7)),
    (4, (Shard(0), Shard(1)), (6, 4)),  # rows: neither side sees whether a target is local
]


def _id(value: object) -> str:
    return str(value).replace("Replicate", "R").replace("Shard(dim=", "S(")


@pytest.mark.parametrize(("world", "placements", "shape"), [*ONE_D, *TWO_D], ids=_id)
def test_losses_and_gradients(
    pool: Pool, world: int, placements: Placements, shape: tuple[int, ...]
) -> None:
    # The naive fp32 error of a handful of elements is luck: those are computed in fp64.
    tiny = torch.Size(shape).numel() < 20
    pool.run(_losses, world, (placements, shape, torch.float64 if tiny else torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(pool: Pool, dtype: torch.dtype) -> None:
    pool.run(_losses, 4, ((Shard(0), Shard(1)), (7, 11), dtype))


def _operator(group: dist.ProcessGroup, placements: Placements, shape: tuple[int, ...]) -> None:
    mesh, last = _mesh(group, placements), len(shape) - 1
    rows = _rows_of(placements, last)
    data = batch(shape[0], shape[1], torch.bfloat16)
    findings = Findings()
    for reduction in ("none", "mean"):
        want = expected(data.logits, data.target, reduction=reduction, lse_square_scale=0.01)
        logits = distribute_tensor(data.logits, mesh, placements).requires_grad_()
        out = cross_entropy_loss(
            logits, data.target, None, reduction,
            lse_square_scale_for_zloss=0.01, return_zloss=True,
        )  # fmt: skip
        parts = {name: _as_dtensor(part) for name, part in out._asdict().items()}
        whole = {name: part.full_tensor() for name, part in parts.items()}
        (grad,) = torch.autograd.grad(parts["loss"].sum(), logits)
        whole_grad = _as_dtensor(grad).full_tensor()
        loss_shape = (shape[0],) if reduction == "none" else (1,)
        with findings:
            assert parts["log_prob"].placements == placements
            assert parts["lse_for_zloss"].placements == rows
            for name, exact, plain in (
                ("loss", want.exact.loss.reshape(loss_shape), want.naive.loss.reshape(loss_shape)),
                (
                    "zloss",
                    want.exact.zloss.reshape(loss_shape),
                    want.naive.zloss.reshape(loss_shape),
                ),
                ("log_prob", want.exact.log_prob, want.naive.log_prob),
                ("lse_for_zloss", want.exact.lse, want.naive.lse),
            ):
                assert whole[name].dtype == torch.bfloat16
                assert_close(whole[name], exact, plain, name, rows_error=want.rows_error)
            gradients = want.gradients(lambda r: r.loss.sum())
            assert_close(whole_grad, *gradients, "gradient")
    findings.report()


@pytest.mark.parametrize(
    ("world", "placements", "shape"),
    [(2, (Shard(1),), (7, 11)), (4, (Shard(0), Shard(1)), (7, 11)), (4, (Shard(1),), (6, 5))],
    ids=_id,
)
def test_cross_entropy_loss(
    pool: Pool, world: int, placements: Placements, shape: tuple[int, ...]
) -> None:
    pool.run(_operator, world, (placements, shape))


def _statistics(group: dist.ProcessGroup, placements: Placements) -> None:
    mesh = _mesh(group, placements)
    data = batch(9, 11, torch.float32, ignore_index=1)
    selected = torch.stack([data.target, data.target.flip(0), torch.arange(9)], -1)
    want = expected(data.logits, data.target, ignore_index=1, reduction="none", selected=selected)
    logits = distribute_tensor(data.logits, mesh, placements).requires_grad_()
    got = token_statistics(
        logits, data.target, entropy=True, argmax=True, sum_p_squared=True, selected=selected,
        ignore_index=1,
    )  # fmt: skip
    parts = {name: _as_dtensor(part) for name, part in got._asdict().items()}
    whole = {name: part.full_tensor() for name, part in parts.items()}
    total = parts["log_prob"] + parts["lse"] + parts["entropy"]
    total = total + parts["selected_log_prob"].sum(-1)
    (grad,) = torch.autograd.grad(total.sum(), logits)
    whole_grad = _as_dtensor(grad).full_tensor()
    kept = data.target != 1
    assert {part.placements for part in parts.values()} == {_rows_of(placements, 1)}
    assert_close(whole["log_prob"], -want.exact.loss, -want.naive.loss)
    assert_close(
        whole["lse"], torch.where(kept, want.exact.lse, 0.0), torch.where(kept, want.naive.lse, 0.0)
    )
    for name in ("entropy", "selected_log_prob"):
        assert_close(whole[name], getattr(want.exact, name), getattr(want.naive, name), name)
    assert torch.equal(whole["argmax"], want.exact.argmax)

    def total_of(r: ReferenceLoss) -> Tensor:
        lse = torch.where(kept, r.lse, 0.0)
        return (lse - r.loss + r.entropy).sum() + r.selected_log_prob.sum()

    gradients = want.gradients(total_of)
    assert_close(whole_grad, *gradients, "gradient")


@pytest.mark.parametrize(
    ("world", "placements"),
    [(2, (Shard(1),)), (4, (Shard(0), Shard(1))), (4, (Shard(1), Replicate()))],
    ids=_id,
)
def test_token_statistics(pool: Pool, world: int, placements: Placements) -> None:
    pool.run(_statistics, world, (placements,))


def _in_place(group: dist.ProcessGroup) -> None:
    placements = (Shard(0), Shard(1))
    data = batch(8, 10, torch.float32)
    leaf = distribute_tensor(data.logits, _grid(), placements).requires_grad_()
    logits = leaf * 1.0
    cross_entropy(logits, data.target, inplace_backward=True).backward()
    grad = _as_dtensor(leaf.grad)
    overwritten = _as_dtensor(logits).to_local()
    assert torch.equal(overwritten, grad.to_local())
    gradients = expected(data.logits, data.target).gradients(lambda r: r.loss)
    whole = grad.full_tensor()
    assert_close(whole, *gradients, "gradient")


def test_in_place(pool: Pool) -> None:
    pool.run(_in_place, 4)


def _normalizer(group: dist.ProcessGroup) -> None:
    mesh, placements = _grid(), (Shard(0), Shard(1))
    data = batch(8, 10, torch.float32)
    logits = distribute_tensor(data.logits, mesh, placements)
    summed = _as_dtensor(cross_entropy(logits, data.target, reduction="sum")).full_tensor()
    number = torch.tensor(10.0)
    for normalizer in (10, number, distribute_tensor(number, mesh, [Replicate()] * 2)):
        mean = _as_dtensor(cross_entropy(logits, data.target, normalizer=normalizer))
        torch.testing.assert_close(mean.full_tensor(), summed / 10, rtol=2**-22, atol=0)


def test_normalizer(pool: Pool) -> None:
    pool.run(_normalizer, 4)


def _target_elsewhere(group: dist.ProcessGroup) -> None:
    """A target that is split over another mesh dimension than the rows is moved."""
    mesh = _grid()
    data = batch(8, 10, torch.float32)
    logits = distribute_tensor(data.logits, mesh, (Shard(0), Shard(1)))
    want = _as_dtensor(cross_entropy(logits, data.target, reduction="none")).full_tensor()
    for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Replicate())):
        target = distribute_tensor(data.target, mesh, placements)
        loss = _as_dtensor(cross_entropy(logits, target, reduction="none"))
        assert torch.equal(loss.full_tensor(), want), placements


def test_a_target_that_lies_otherwise_is_redistributed(pool: Pool) -> None:
    pool.run(_target_elsewhere, 4)


def _refusals(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    mesh, line = _grid(), _line(group)
    data = batch(8, 12, torch.float32)
    target = data.target
    rows = [Shard(0), Replicate()]
    good = distribute_tensor(data.logits, mesh, [Shard(0), Shard(1)])
    partial = DTensor.from_local(torch.zeros(8, 12), mesh, [Partial(), Shard(1)], run_check=False)
    twice = distribute_tensor(data.logits, mesh, [Shard(1), Shard(1)])
    calls: dict[str, dict[str, Any]] = {
        "Partial": {"input": partial, "target": target},
        "twice": {"input": twice, "target": target},
        "group": {"input": good, "target": target, "group": group},
        "shard": {"input": good, "target": target, "shard": VocabShard(0, 12, 12)},
        "shape": {"input": good, "target": target[:3]},
        "target placement": {
            "input": good,
            "target": DTensor.from_local(target, mesh, [Replicate(), Partial()], run_check=False),
        },
        "target mesh": {"input": good, "target": distribute_tensor(target, line, [Replicate()])},
        "weight": {
            "input": good, "target": target,
            "weight": distribute_tensor(data.weight, mesh, [Replicate(), Shard(0)]),
        },
        "plain input": {
            "input": data.logits, "target": distribute_tensor(target, mesh, rows),
        },
        "leaf": {
            "input": good.clone().requires_grad_(), "target": target, "inplace_backward": True,
        },
    }  # fmt: skip
    out = []
    for call in calls.values():
        try:
            out.append(("", str(cross_entropy(**call))))
        except ValueError as problem:
            out.append(("ValueError", str(problem)))
    # All refusals were local: the mesh works on.
    loss = _as_dtensor(cross_entropy(good, target)).full_tensor()
    assert loss.isfinite()
    return out


def test_refusals(pool: Pool) -> None:
    wanted = [
        "input is Partial on mesh dimension 0",
        "input shards its vocabulary over mesh dimensions [0, 1]",
        "group and shard must be left out for DTensor input",
        "group and shard must be left out for DTensor input",
        "target has shape (3,), but DTensor input (8, 12) needs (8,)",
        "target has placements",
        "target is a DTensor on another mesh than input",
        "weight has placements",
        "target is a DTensor but input is not",
        "inplace_backward=True would overwrite input, which is a leaf",
    ]
    for outcomes in pool.run(_refusals, 4):
        for want, (kind, text) in zip(wanted, outcomes, strict=True):
            assert kind == "ValueError", (want, text)
            assert want in text
