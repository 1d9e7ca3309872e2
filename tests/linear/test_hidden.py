"""The gradient of the hidden states over ranks: summed, partial, of a split sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard, linear_cross_entropy, linear_token_statistics

from ..ranks import Pool
from .cases import scratch_for

SEQUENCE, BATCH, H, V = 12, 2, 5, 30
WAYS = ("forward", "recompute")


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(SEQUENCE, BATCH, H, generator=g).to(dtype)
    head = torch.randn(V, H, generator=g).to(dtype)
    target = torch.randint(V, (SEQUENCE, BATCH), generator=g)
    target[2:4] = -100
    return hidden, head, target


def _whole(hidden: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = (t.detach().double().requires_grad_() for t in (hidden, head))
    loss = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), target.flatten())
    of_hidden, of_head = torch.autograd.grad(loss, (hidden, head))
    return loss, of_hidden, of_head


def _partial(group: dist.ProcessGroup, gradient: str) -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    hidden, head, target = _batch()
    mine = head.chunk(world)[rank].clone().requires_grad_()
    out = []
    for how in ("partial", "summed"):
        hidden = hidden.detach().requires_grad_()
        loss = linear_cross_entropy(
            hidden, mine, target, group=group, gradient=gradient, hidden_gradient=how
        )
        out.append(torch.autograd.grad(loss, hidden)[0])
    return out[0], out[1]


@pytest.mark.parametrize("gradient", WAYS)
def test_partial_gradients_add_up(pool: Pool, gradient: str) -> None:
    _, want, _ = _whole(*_batch())
    ranks = pool.run(_partial, 2, (gradient,))
    torch.testing.assert_close(ranks[0][0] + ranks[1][0], want)
    for _, summed in ranks:
        torch.testing.assert_close(summed, want)
    assert not torch.equal(ranks[0][0], ranks[1][0])


def _split_sequence(
    group: dist.ProcessGroup, gradient: str, rows: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    hidden, head, target = _batch(dtype)
    hidden[2:4] = torch.nan  # ignored rows
    mine = head.chunk(world)[rank].clone().requires_grad_()
    part = hidden.chunk(world)[rank].clone().requires_grad_()
    scratch = None if rows is None else scratch_for(rows, V // world, dtype)
    loss = linear_cross_entropy(
        part, mine, target, group=group, gradient=gradient, sequence_parallel=True,
        scratch_mib=scratch,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    of_part, of_mine = torch.autograd.grad(loss, (part, mine))
    return loss.detach(), of_part, of_mine


@pytest.mark.parametrize("rows", [None, 2, 7])
@pytest.mark.parametrize("gradient", WAYS)
@pytest.mark.parametrize("world", [2, 3])
def test_split_sequence(pool: Pool, world: int, gradient: str, rows: int | None) -> None:
    hidden, head, target = _batch()
    loss, of_hidden, of_head = _whole(hidden, head, target)
    if rows is not None and rows < world:
        rows = world
    ranks = pool.run(_split_sequence, world, (gradient, rows, torch.float64))
    for rank, (got, part, mine) in enumerate(ranks):
        torch.testing.assert_close(got, loss.detach())
        torch.testing.assert_close(part, of_hidden.chunk(world)[rank])
        torch.testing.assert_close(mine, of_head.chunk(world)[rank])


def test_split_sequence_in_bf16(pool: Pool) -> None:
    hidden, head, target = _batch(torch.bfloat16)
    _, of_hidden, of_head = _whole(hidden, head, target)
    for gradient in WAYS:
        ranks = pool.run(_split_sequence, 2, (gradient, 4, torch.bfloat16))
        got = torch.cat([part for _, part, _ in ranks])
        assert float((got - of_hidden).norm() / of_hidden.norm()) < 2e-2
        got = torch.cat([mine for _, _, mine in ranks])
        assert float((got - of_head).norm() / of_head.norm()) < 2e-2


def _statistics(group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    hidden, head, target = _batch()
    part = hidden.chunk(world)[rank].clone().requires_grad_()
    out = linear_token_statistics(
        part, head.chunk(world)[rank], target, entropy=True, group=group, sequence_parallel=True,
        scratch_mib=scratch_for(4, V // world, torch.float64),
    )  # fmt: skip
    assert out.entropy is not None
    (grad,) = torch.autograd.grad((out.log_prob * target - out.entropy).sum(), part)
    return out.log_prob.detach(), out.entropy.detach(), grad


def test_statistics_of_a_split_sequence(pool: Pool) -> None:
    hidden, head, target = _batch()
    hidden.requires_grad_()
    log_p = F.linear(hidden, head).log_softmax(-1)
    kept = target != -100
    log_prob = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0] * kept
    entropy = -(log_p.exp() * log_p).sum(-1) * kept
    (want,) = torch.autograd.grad((log_prob * target - entropy).sum(), hidden)
    for rank, got in enumerate(pool.run(_statistics, 2)):
        torch.testing.assert_close(got[0], log_prob.detach())
        torch.testing.assert_close(got[1], entropy.detach())
        torch.testing.assert_close(got[2], want.chunk(2)[rank])


def _of_other_length(group: dist.ProcessGroup) -> str:
    rank = dist.get_rank(group)
    hidden, head, target = _batch()
    parts = hidden.split([5, 7])
    try:
        linear_cross_entropy(
            parts[rank], head.chunk(2)[rank], target, group=group, sequence_parallel=True,
            check=True,
        )  # fmt: skip
    except ValueError as problem:
        return str(problem)
    return ""


def test_parts_of_different_length_raise_together(pool: Pool) -> None:
    for text in pool.run(_of_other_length, 2):
        assert "every rank's part has the same length" in text


def _tied(group: dist.ProcessGroup | None, gradient: str) -> Tensor:
    """The head's weight is the embedding's: two uses of one leaf."""
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    _, head, target = _batch()
    weight = head.chunk(world)[rank].clone().requires_grad_()
    shard = VocabShard.even(V, group)
    ids = target.clamp(min=0)
    here = (ids >= shard.start) & (ids < shard.stop)
    vectors = F.embedding((ids - shard.start).masked_fill(~here, 0), weight)
    vectors = vectors.masked_fill(~here[..., None], 0.0)
    if group is not None:
        from vocab_parallel_ce.parallel.layers import reduce_from_group

        vectors = reduce_from_group(vectors, group)
    loss = linear_cross_entropy(torch.tanh(vectors), weight, target, group=group, gradient=gradient)
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("gradient", WAYS)
def test_tied_weights(pool: Pool, gradient: str) -> None:
    want = _tied(None, gradient)
    torch.testing.assert_close(torch.cat(pool.run(_tied, 2, (gradient,))), want)


def _gathers(group: dist.ProcessGroup, options: dict[str, Any]) -> dict[str, int]:
    from ..cases import gloo_events

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    hidden, head, target = _batch(torch.float32)
    mine = head.chunk(world)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    out = {}
    losses: list[Tensor] = []

    def work() -> None:
        loss = linear_cross_entropy(hidden, mine, target, group=group, **options)
        assert isinstance(loss, Tensor)
        losses.append(loss)

    out["forward"] = len(gloo_events(work))
    out["backward"] = len(gloo_events(lambda: torch.autograd.backward(losses[0])))
    return out


def test_collectives(pool: Pool) -> None:
    """Recompute: one and one. In forward: one a chunk, and the sum of its hidden gradient."""
    chunk = {"scratch_mib": scratch_for(10, V // 2, torch.float32)}  # 20 rows kept: 2 chunks
    for options, forward, backward in (
        ({"gradient": "recompute"}, 1, 1),
        ({"gradient": "recompute", **chunk}, 1, 2),  # by rows: the budget has few columns
        ({"gradient": "recompute", "hidden_gradient": "partial"}, 1, 0),
        ({"gradient": "forward", **chunk}, 4, 0),
        ({"gradient": "forward"}, 2, 0),
        ({"gradient": "forward", "hidden_gradient": "partial"}, 1, 0),
    ):
        for counted in pool.run(_gathers, 2, (options,)):
            assert counted == {"forward": forward, "backward": backward}, options


def _one_row_between_others(group: dist.ProcessGroup, gradient: str) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    full, head = torch.randn(world, 2, generator=torch.Generator().manual_seed(1)), torch.ones(4, 1)
    mine = full[rank : rank + 1, ::2].requires_grad_()
    assert mine.stride() == (2, 2)
    loss = linear_cross_entropy(
        mine, head, torch.arange(world), group=group, gradient=gradient, sequence_parallel=True,
        shard=VocabShard(rank * 4, rank * 4 + 4, world * 4),
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    whole = full[:, :1].expand(world, world * 4)
    torch.testing.assert_close(loss, F.cross_entropy(whole, torch.arange(world)))
    loss.backward()


@pytest.mark.parametrize("gradient", WAYS)
def test_a_part_of_one_number_may_lie_anywhere(pool: Pool, gradient: str) -> None:
    pool.run(_one_row_between_others, 2, (gradient,))
