"""``token_statistics(selected=)``: K log-probabilities a token, of ids that live on any rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel_ce import passes, token_statistics
from vocab_parallel_ce.testing import (
    ReferenceLoss,
    Sharding,
    assert_close,
    batch,
    even,
    sized,
)

from .cases import Findings, check_gradient, expected
from .device import DEVICE, DTYPES, ENGINES, HAS_FP64, move
from .ranks import Pool

N, V, K = 9, 60, 5
CPU = pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on CPU tensors")


def _ids(target: Tensor, ignore_index: int, seed: int = 3) -> Tensor:
    """[N, K] with the target itself, an id three times, and the first and the last class."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (*target.shape, K), generator=g)
    ids[..., 1] = torch.where(target == ignore_index, -7, target)  # an ignored row may hold any id
    ids[1::2, 2:4] = ids[1::2, :1]
    ids[0, 4], ids[2, 4] = 0, V - 1
    return ids


def _matches(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> None:
    rank, findings = dist.get_rank(group), Findings()
    g = torch.Generator().manual_seed(1)
    up = torch.randn(N, K, generator=g)
    of_rows = torch.rand(N, generator=g) + 0.5
    cases: list[tuple[int, Any, float]] = [(-100, 1.0, 0.0), (7, 0.7, 0.0), (0, of_rows, 4.0)]
    for number, (ignore_index, scale, softcap) in enumerate(cases):
        data = batch(N, V, dtype, ignore_index, seed=5)
        selected, kept = _ids(data.target, ignore_index), data.target != ignore_index
        want = expected(
            data.logits, data.target, ignore_index=ignore_index, reduction="none", scale=scale,
            softcap=softcap, selected=selected,
        )  # fmt: skip
        engine = ENGINES[number % len(ENGINES)]
        x = move(sharding.local(data.logits, rank)).requires_grad_()
        for argmax, in_place in ((False, True), (True, False)):
            what = f"ignore {ignore_index}, softcap {softcap}, {engine}, argmax {argmax}"
            got = token_statistics(
                x * 1, move(data.target), entropy=True, argmax=argmax, sum_p_squared=True,
                selected=move(selected), ignore_index=ignore_index, group=group,
                shard=sharding.shard(rank), softcap=softcap or None, engine=engine,
                scale=move(scale) if isinstance(scale, Tensor) else scale,
                collective="auto" if argmax else "all_reduce", inplace_backward=in_place,
            )  # fmt: skip
            assert got.selected_log_prob is not None
            assert got.entropy is not None
            exact, plain = want.exact, want.naive
            with findings:
                found = got.selected_log_prob
                assert_close(found, exact.selected_log_prob, plain.selected_log_prob, what)
                assert_close(got.log_prob, -exact.loss, -plain.loss, f"log_prob, {what}")
                assert_close(got.entropy, exact.entropy, plain.entropy, f"entropy, {what}")
            total = (found * move(up)).sum() + (got.log_prob + got.lse - got.entropy).sum()

            def same(r: ReferenceLoss, kept: Tensor = kept) -> Tensor:
                lse = torch.where(kept, r.lse, 0.0)
                return (r.selected_log_prob * up).sum() + (lse - r.loss - r.entropy).sum()

            with findings:
                (grad,) = torch.autograd.grad(total, x)
                check_gradient(grad, want.gradients(same), sharding, rank, what)
    findings.report()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        (1, sized("padded", (60,), (7,))),
        (2, even(60, 2)),
        (4, sized("uneven", (3, 0, 42, 15), (1, 2, 0, 3))),
    ],
    ids=["1", "2", "4"],
)
def test_as_plain_torch_on_whole_logits(
    pool: Pool, world: int, sharding: Sharding, dtype: torch.dtype
) -> None:
    pool.run(_matches, world, (sharding, dtype))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_a_touched_column_is_rounded_once(dtype: torch.dtype, engine: str) -> None:
    """Also where the id is the target, or comes three times: the nearest number to the exact sum,
    within what fp32 loses before."""
    data = batch(N, V, dtype, seed=2)
    selected = _ids(data.target, -100)
    g = torch.Generator().manual_seed(4)
    up = torch.randn(N, K, generator=g)
    x = move(data.logits).requires_grad_()
    got = token_statistics(x, move(data.target), selected=move(selected), engine=engine)
    assert got.selected_log_prob is not None
    (grad,) = torch.autograd.grad((got.selected_log_prob * move(up)).sum() + got.log_prob.sum(), x)
    y = data.logits.double().requires_grad_()
    log_p, counts = y.log_softmax(-1), (data.target != -100)[:, None]
    ids = torch.where(counts, selected, 0)
    target = torch.where(counts, data.target[:, None], 0)
    terms = (log_p.gather(1, ids) * up).sum(1) + log_p.gather(1, target)[:, 0]
    (exact,) = torch.autograd.grad((terms * counts[:, 0]).sum(), y)
    nearest = exact.gather(1, ids).to(dtype).double()
    fp32 = 40 * torch.finfo(torch.float32).eps * (1 + up.abs().sum(1, keepdim=True))
    off = (grad.cpu().double().gather(1, ids) - exact.gather(1, ids)).abs()
    assert bool((off <= (nearest - exact.gather(1, ids)).abs() + fp32).all())


def _plain(x: Tensor, selected: Tensor) -> Tensor:
    """Three dimensions, gathered by torch."""
    return x.double().log_softmax(-1).gather(-1, selected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_place", [False, True])
def test_dimensions_strides_and_no_target(engine: str, in_place: bool) -> None:
    full = torch.randn(3, 5, V)
    # Rows that cannot be flattened, columns that lie apart, a transposed batch.
    views: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t[:, :-1],
        lambda t: t[..., ::2],
        lambda t: t.transpose(0, 1),
    )
    for view in views:
        x = move(full).requires_grad_()
        logits = view(x * 1)
        selected = torch.randint(logits.shape[-1], (*logits.shape[:-1], 3), dtype=torch.int32)
        out = token_statistics(
            logits, selected=move(selected), engine=engine, inplace_backward=in_place
        )
        assert out.log_prob is None
        assert out.selected_log_prob is not None
        assert out.selected_log_prob.is_contiguous()
        leaf = full.clone().requires_grad_()
        want = _plain(view(leaf), selected.long())
        torch.testing.assert_close(out.selected_log_prob.cpu(), want.float(), rtol=1e-5, atol=1e-5)
        weights = torch.arange(3.0)
        got_grad = torch.autograd.grad((out.selected_log_prob * move(weights)).sum(), x)[0]
        want_grad = torch.autograd.grad((want * weights).sum(), leaf)[0]
        torch.testing.assert_close(got_grad.cpu(), want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rows", "k"), [(4, 0), (0, 3), (0, 0)])
def test_nothing_to_select(engine: str, rows: int, k: int) -> None:
    x = move(torch.randn(rows, V)).requires_grad_()
    selected = move(torch.zeros(rows, k, dtype=torch.int64))
    out = token_statistics(x, selected=selected, engine=engine)
    assert out.selected_log_prob is not None
    assert out.selected_log_prob.shape == (rows, k)
    (grad,) = torch.autograd.grad(out.selected_log_prob.sum(), x)
    assert grad.shape == x.shape
    assert not bool(grad.any())


@CPU
@pytest.mark.skipif(not HAS_FP64, reason="gradcheck takes fp64")
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_gradcheck(engine: str) -> None:
    data = batch(4, 7, torch.float64)
    selected = torch.tensor([[0, 0, 6], [3, 1, 3], [5, 5, 5], [2, 6, 4]])
    selected[:, 2] = torch.where(data.target < 0, 0, data.target)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        out = token_statistics(
            x, data.target, entropy=True, selected=selected, scale=torch.linspace(0.5, 2, 4),
            softcap=4.0, engine=engine,
        )  # fmt: skip
        assert out.selected_log_prob is not None
        assert out.entropy is not None
        return out.selected_log_prob, out.log_prob, out.entropy

    leaf = (data.logits / 3).requires_grad_()
    assert torch.autograd.gradcheck(outputs, leaf)
    # torch.func, and many gradients at once
    (one,) = torch.autograd.grad(outputs(leaf)[0].sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: outputs(x)[0].sum())(leaf), one)
    each = torch.eye(12, dtype=leaf.dtype).view(12, 4, 3)
    (many,) = torch.autograd.grad(outputs(leaf)[0], leaf, each, is_grads_batched=True)
    torch.testing.assert_close(many.sum(0), one)


def test_a_row_whose_columns_are_masked() -> None:
    """A selected column of probability 0 has log-probability -inf; a NaN row is NaN, an ignored one
    of NaN is not."""
    x = torch.randn(4, V)
    x[0, 3] = -torch.inf
    x[1, 5] = torch.nan
    x[2] = torch.nan
    target = torch.tensor([1, 1, -100, 1])
    leaf = move(x).requires_grad_()
    out = token_statistics(leaf, move(target), selected=move(torch.full((4, 2), 3)))
    got = out.selected_log_prob
    assert got is not None
    assert bool((got[0] == -torch.inf).all())
    assert bool(got[1].isnan().all())
    assert bool((got[2] == 0).all())
    (grad,) = torch.autograd.grad(got[2:].sum(), leaf)
    assert not bool(grad[:3].any())
    assert bool((grad[3] != 0).any())


def test_top_1_accuracy() -> None:
    """The lines of the documentation."""
    logits, tokens = torch.eye(5)[[0, 1, 2, 3, 4]], torch.tensor([0, 1, 2, 0, -100])
    best = token_statistics(move(logits), move(tokens), argmax=True).argmax
    kept = move(tokens) != -100
    accuracy = ((best == move(tokens)) & kept).sum() / kept.sum()
    assert float(accuracy) == 0.75


@CPU
def test_compiled() -> None:
    def loss(x: Tensor, target: Tensor, selected: Tensor, in_place: bool) -> Tensor:
        out = token_statistics(
            x * 1, target, entropy=True, selected=selected, scale=0.7, inplace_backward=in_place
        )
        alone = token_statistics(x * 1, selected=selected).selected_log_prob
        assert out.selected_log_prob is not None
        assert out.entropy is not None
        assert alone is not None
        return (out.selected_log_prob.square().sum(-1) - out.log_prob + out.entropy).sum() + (
            alone.sum()
        )

    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    data = batch(N, V, torch.float32, seed=5)
    for in_place in (False, True):
        results = []
        for f in (loss, fast):
            leaf = data.logits.clone().requires_grad_()
            value = f(leaf, data.target, _ids(data.target, -100).clamp(min=0), in_place)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def _on_a_mesh(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    full = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))  # 7 columns: 4 + 3
    selected = torch.tensor([[0, 6], [3, 3], [4, 1], [5, 2]])
    want = _plain(full, selected).float()
    whole: Any = DTensor.from_local(selected, mesh, [Replicate()])
    for dim in (0, 1):
        part = full.chunk(world, dim)[rank]
        x: Any = DTensor.from_local(
            part, mesh, [Shard(dim)], shape=full.shape, stride=full.stride()
        ).requires_grad_()
        mine = selected if dim == 1 else selected.chunk(world)[rank]
        for ids in (mine, selected, whole):
            out: Any = token_statistics(x, selected=ids, check=True).selected_log_prob
            assert out.placements == ((Shard(0),) if dim == 0 else (Replicate(),))
            torch.testing.assert_close(out.full_tensor(), want)
            (grad,) = torch.autograd.grad(out.sum(), x)
            dense = full.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(_plain(dense, selected).sum(), dense)
            torch.testing.assert_close(grad.full_tensor(), wanted)
    with pytest.raises(ValueError, match="selected has shape"):
        token_statistics(x, selected=selected[:, 0], check=True)
    with pytest.raises(TypeError, match="selected must hold class ids"):
        token_statistics(x, selected=selected.double(), check=True)


@CPU
def test_over_dtensors(pool: Pool) -> None:
    pool.run(_on_a_mesh, 2)


# What is refused

BAD: list[tuple[Any, type[Exception], str]] = [
    ([[1]], TypeError, "selected must be a tensor or None, got list"),
    (torch.zeros(3, 1), TypeError, "selected must hold class ids in int64 or int32"),
    (torch.zeros(3, dtype=torch.int64), ValueError, r"has shape \(3,\), but target \(3,\)"),
    (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"selected has shape \(2, 3\)"),
    (torch.zeros(3, 1, dtype=torch.int64, device="meta"), ValueError, "selected on meta|on meta"),
    (torch.tensor([[1], [V], [2]]), ValueError, f"row 1 holds {V}, which is no class in"),
    (torch.tensor([[1, 1], [1, 1], [2, -1]]), ValueError, "row 2 holds -1, which is no class in"),
    (torch.tensor([[1], [-100], [2]]), ValueError, "row 1 holds -100"),
]


@CPU
@pytest.mark.parametrize(("selected", "kind", "words"), BAD)
def test_wrong_ids_are_refused(selected: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        token_statistics(torch.randn(3, V), selected=selected)


@pytest.mark.parametrize("engine", ENGINES)
def test_unseen_they_make_their_row_nan(engine: str) -> None:
    """As on an accelerator, where nothing is read."""
    selected = torch.tensor([[1, 2], [2, V], [3, 3], [-1, V]])
    target = torch.tensor([0, 1, 2, -100])
    x = move(torch.randn(4, V)).requires_grad_()
    with patch.object(passes, "_on_host", return_value=False):
        out = token_statistics(
            x, move(target), argmax=True, entropy=True, selected=move(selected), engine=engine
        )
        assert out.selected_log_prob is not None
        assert out.argmax is not None
        assert out.entropy is not None
        for value in (out.selected_log_prob[1], out.log_prob[1], out.lse[1], out.entropy[1]):
            assert bool(value.isnan().all())
        assert out.argmax[[1, 3]].tolist() == [-1, -1]
        (grad,) = torch.autograd.grad(out.selected_log_prob.sum(), x)
    assert bool(grad[1].isnan().all())
    assert bool(grad[[0, 2, 3]].isfinite().all())
    assert not bool(grad[3].any())


def _disagree(group: dist.ProcessGroup, check: bool) -> list[str]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shard = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).chunk(world, -1)[rank]
    ids = torch.tensor([[1, 40], [2, 3], [3, 59]])
    calls: list[Tensor] = [ids + rank % 2 * torch.tensor([0, -1]), ids.flip(1), ids]
    calls[1] = ids if rank else ids.flip(1)
    calls[2] = torch.where(ids == 2, 60 + rank, ids)
    if check:  # without it payloads of different sizes are undefined
        calls.append(ids[:, : 2 - rank])
    out = []
    for collective in ("all_gather", "all_reduce"):
        for selected in calls:
            try:
                token_statistics(
                    shard, selected=selected, group=group, check=check, collective=collective
                )
                out.append("")
            except ValueError as problem:
                out.append(str(problem))
    if not check:
        with patch.object(passes, "_on_host", return_value=False):
            got = token_statistics(shard, selected=calls[0], group=group)
            assert bool(got.lse.isnan().all())
            assert got.selected_log_prob is not None
            assert bool(got.selected_log_prob.isnan().all())
    return out


@CPU
@pytest.mark.parametrize("check", [False, True])
def test_ranks_that_disagree_are_told(pool: Pool, check: bool) -> None:
    words = [
        "ranks disagree on selected",
        "ranks disagree on selected",
        "selected is out of range: row 1 holds 60 on rank 0 of the group",
        "ranks disagree on the number of selected ids a row",
    ]
    words = words if check else words[:3]
    for texts in pool.run(_disagree, 2, (check,)):
        assert len(texts) == 2 * len(words)
        for text, part in zip(texts, words * 2, strict=True):
            assert part in text
