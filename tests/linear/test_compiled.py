"""torch.compile(fullgraph=True) of the fused head: the same numbers, one graph for many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics

from ..ranks import Pool

N, H, V = 10, 6, 24
BACKEND = "aot_eager"


def _batch(
    rows: int = N, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=g).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    target = torch.randint(V, (rows,), generator=g)
    target[::4] = -100
    return hidden, head, bias, target


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none", "scale": 0.5},
    "recompute": {"gradient": "recompute", "lse_square_scale": 0.01},
    "normalizer": {"normalizer": 7.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    options = dict(OPTIONS[name])
    if dtype == torch.float16 and "gradient" not in options and name != "none":
        options["gradient"] = "forward"

    def step(hidden: Tensor, head: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden, head, target, linear_bias=bias, **options)
        assert isinstance(loss, Tensor)
        return loss.sum() * 3

    hidden, head, bias, target = _batch(dtype=dtype)
    leaves = (hidden, head, bias)
    want = step(*leaves, target)
    wanted = torch.autograd.grad(want, leaves)
    got = torch.compile(step, fullgraph=True, backend=BACKEND)(*leaves, target)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_operators_promise_where_gradients_lie(gradient: str) -> None:
    """A compiler reads them as an operator of shapes alone has said, whatever the strides."""
    hidden, head, _, target = _batch()
    hidden = hidden.detach().t().contiguous().t().requires_grad_()

    def strides(hidden: Tensor, head: Tensor, target: Tensor) -> tuple[tuple[int, ...], ...]:
        loss = linear_cross_entropy(hidden * 1, head, target, gradient=gradient)
        assert isinstance(loss, Tensor)
        return tuple(g.stride() for g in torch.autograd.grad(loss, (hidden, head)))

    with FakeTensorMode() as fake:
        told = strides(*(fake.from_tensor(x) for x in (hidden, head, target)))
    assert strides(hidden, head, target) == told


def test_rows_may_change() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)

    def step(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden, head, target)
        assert isinstance(loss, Tensor)
        return loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compiled(*_batch(8)[:2], _batch(8)[3])
    frames = counter.frame_count
    for rows in (8, 13, 21):
        hidden, head, _, target = _batch(rows)
        got, want = compiled(hidden, head, target), step(hidden, head, target)
        assert torch.equal(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, head), torch.autograd.grad(want, head))
    assert counter.frame_count == frames, "compiled once for any number of rows"


def test_without_gradients() -> None:
    torch._dynamo.reset()
    hidden, head, _, target = _batch()

    @torch.compile(fullgraph=True, backend=BACKEND)
    def evaluate(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            loss = linear_cross_entropy(hidden, head, target)
            assert isinstance(loss, Tensor)
            return loss

    assert torch.equal(evaluate(hidden), linear_cross_entropy(hidden, head, target))  # type: ignore[arg-type]


def test_frozen_head() -> None:
    torch._dynamo.reset()
    hidden, head, _, target = _batch()
    head.requires_grad_(False)

    def step(hidden: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden, head, target)
        assert isinstance(loss, Tensor)
        return loss

    got = torch.compile(step, fullgraph=True, backend=BACKEND)(hidden)
    (want,) = torch.autograd.grad(step(hidden), hidden)
    torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], want)


def _on_ranks(group: dist.ProcessGroup) -> None:
    torch._dynamo.reset()
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    hidden, head, _, target = _batch()
    mine = head.detach().chunk(world)[rank].clone().requires_grad_()

    def statistics(hidden: Tensor, mine: Tensor) -> Tensor:
        out = linear_token_statistics(hidden, mine, target, entropy=True, argmax=True, group=group)
        assert out.entropy is not None
        assert out.argmax is not None
        return (out.log_prob - out.entropy + out.argmax).sum()

    def loss(hidden: Tensor, mine: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, mine, target, group=group)
        assert isinstance(out, Tensor)
        return out

    for function in (statistics, loss):
        want = function(hidden, mine)
        wanted = torch.autograd.grad(want, (hidden, mine))
        got = torch.compile(function, fullgraph=True, backend=BACKEND)(hidden, mine)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, (hidden, mine)), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_on_ranks(pool: Pool) -> None:
    pool.run(_on_ranks, 2)


def _as_dtensors(group: dist.ProcessGroup, split: bool) -> None:
    """Hidden states and head as DTensors; the mesh is taken apart in the compiled function."""
    torch._dynamo.reset()
    mesh = DeviceMesh.from_group(group, "cpu")
    hidden, head, _, target = _batch()
    leaves = (
        distribute_tensor(hidden.detach(), mesh, [Shard(0) if split else Replicate()]),
        distribute_tensor(head.detach(), mesh, [Shard(0)]),
    )
    for leaf in leaves:
        leaf.requires_grad_()

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, head, target, label_smoothing=0.1)
        assert isinstance(out, Tensor)
        return out

    want = loss(*leaves)
    wanted = torch.autograd.grad(want, leaves)
    got = torch.compile(loss, fullgraph=True, backend=BACKEND)(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), wanted, strict=True):
        assert isinstance(a, DTensor)
        assert isinstance(b, DTensor)
        assert a.placements == b.placements
        torch.testing.assert_close(a.to_local(), b.to_local())


@pytest.mark.parametrize("split", [False, True])
def test_dtensors(pool: Pool, split: bool) -> None:
    pool.run(_as_dtensors, 2, (split,))
