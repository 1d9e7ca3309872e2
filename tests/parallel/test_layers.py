"""Vocabulary-parallel embedding and head against the same layers on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.parallel.layers import (
    VocabParallelEmbedding,
    VocabParallelHead,
    copy_to_group,
    reduce_from_group,
    vocab_parallel_parameters,
)

from ..ranks import Pool

WIDTH = 6
# Rows of each rank: even, DTensor's uneven, any, with an empty rank.
SPLITS = [(5, 5), (4, 4, 2), (7, 1, 2), (2, 2, 1, 0), (0, 3, 4, 2)]


class _Net(nn.Module):
    """ids -> embedding -> a nonlinearity -> head."""

    def __init__(self, shard: VocabShard, group: dist.ProcessGroup | None, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = VocabParallelEmbedding(shard, WIDTH, group, generator=generator, std=1.0)
        self.head = VocabParallelHead(
            shard,
            WIDTH,
            group,
            generator=generator,
            std=1.0,
            weight=self.embedding.weight if tied else None,
        )

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embedding(ids)
        return hidden, self.head(torch.tanh(hidden))


def _forward_backward(
    shard: VocabShard, group: dist.ProcessGroup | None, tied: bool
) -> dict[str, Tensor]:
    """Everything in fp64, so that 1e-12 tells right from wrong."""
    net = _Net(shard, group, tied)
    initial = net.embedding.weight.detach().clone()
    net.double()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(shard.vocab_size, (2, 9), generator=generator)
    incoming = torch.randn(2, 9, shard.vocab_size, generator=generator, dtype=torch.float64)
    hidden, logits = net(ids)
    hidden.retain_grad()
    logits.backward(incoming[..., shard.start : shard.stop])
    assert hidden.grad is not None
    assert net.embedding.weight.grad is not None
    assert net.head.weight.grad is not None
    return {
        "initial": initial,
        "hidden": hidden.detach(),
        "hidden_gradient": hidden.grad,
        "logits": logits.detach(),
        "embedding_gradient": net.embedding.weight.grad,
        "head_gradient": net.head.weight.grad,
    }


def _case(group: dist.ProcessGroup, split: tuple[int, ...], tied: bool) -> dict[str, Tensor]:
    rank = dist.get_rank(group)
    start = sum(split[:rank])
    return _forward_backward(VocabShard(start, start + split[rank], sum(split)), group, tied)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_split_layers_equal_whole_ones(pool: Pool, split: tuple[int, ...], tied: bool) -> None:
    vocab_size = sum(split)
    whole = _forward_backward(VocabShard(0, vocab_size, vocab_size), None, tied)
    ranks = pool.run(_case, len(split), args=(split, tied))

    def together(name: str, dim: int) -> Tensor:
        return torch.cat([rank[name] for rank in ranks], dim=dim)

    assert torch.equal(together("initial", 0), whole["initial"])
    for rank in ranks:  # every vector comes from one rank, the others add zeros
        assert torch.equal(rank["hidden"], whole["hidden"])
        torch.testing.assert_close(
            rank["hidden_gradient"], whole["hidden_gradient"], rtol=1e-12, atol=1e-12
        )
        assert torch.equal(rank["hidden_gradient"], ranks[0]["hidden_gradient"])
    for name, dim in (("logits", -1), ("embedding_gradient", 0), ("head_gradient", 0)):
        torch.testing.assert_close(together(name, dim), whole[name], rtol=1e-12, atol=1e-12)


def _fused(
    shard: VocabShard, group: dist.ProcessGroup | None, tied: bool
) -> dict[str, tuple[Tensor, ...]]:
    """Loss and gradients of every way: head and loss apart, and the head's own loss."""
    net = _Net(shard, group, tied).double()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(shard.vocab_size, (2, 9), generator=generator)
    leaves = [net.embedding.weight] if tied else [net.embedding.weight, net.head.weight]
    out = {}
    for way in ("apart", "forward", "recompute"):
        hidden = torch.tanh(net.embedding(ids))
        if way == "apart":
            loss = cross_entropy(net.head(hidden), ids, group=group, shard=shard)
        else:
            loss = net.head.loss(hidden, ids, gradient=way)
        out[way] = (loss.detach(), *torch.autograd.grad(loss, leaves))
    return out


def _fused_case(
    group: dist.ProcessGroup, split: tuple[int, ...], tied: bool
) -> dict[str, tuple[Tensor, ...]]:
    rank = dist.get_rank(group)
    start = sum(split[:rank])
    return _fused(VocabShard(start, start + split[rank], sum(split)), group, tied)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", SPLITS[1::2])
def test_the_heads_own_loss(pool: Pool, split: tuple[int, ...], tied: bool) -> None:
    for rank in pool.run(_fused_case, len(split), args=(split, tied)):
        for way in ("forward", "recompute"):
            torch.testing.assert_close(rank[way], rank["apart"], rtol=1e-12, atol=1e-12)


def _mirror(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rank = dist.get_rank(group)
    reduced, copied = torch.tensor([rank + 1.0], dtype=dtype), torch.tensor([5.0], dtype=dtype)
    reduced.requires_grad_()
    copied.requires_grad_()
    total = reduce_from_group(reduced, group)
    total.backward(torch.tensor([2.0], dtype=dtype))
    same = copy_to_group(copied, group)
    incoming = torch.tensor([10.0**rank], dtype=dtype)
    same.backward(incoming)
    assert reduced.grad is not None
    assert copied.grad is not None
    return total.detach(), reduced.grad, same.detach(), copied.grad, incoming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_functions_mirror_each_other(pool: Pool, dtype: torch.dtype) -> None:
    for rank, (total, reduced_grad, same, copied_grad, incoming) in enumerate(
        pool.run(_mirror, 3, args=(dtype,))
    ):
        assert (total.item(), reduced_grad.item()) == (6.0, 2.0)
        assert (same.item(), copied_grad.item()) == (5.0, 111.0)
        assert incoming.item() == 10.0**rank  # the caller's gradient is not summed into
        assert total.dtype == copied_grad.dtype == dtype


def test_one_rank_communicates_nothing() -> None:
    values = torch.ones(3)
    assert reduce_from_group(values, None) is values
    assert copy_to_group(values, None) is values


@pytest.mark.parametrize("wrong", [-1, 10])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    net = _Net(VocabShard(0, 10, 10), None, tied=False)
    with pytest.raises(ValueError, match=rf"ids contain {wrong}, which is not in .*\[0, 10\)"):
        net(torch.tensor([[1, wrong, 2]]))


def test_a_tied_weight_must_fit_the_shard() -> None:
    shard = VocabShard(0, 5, 10)
    with pytest.raises(ValueError, match=r"weight of shape \(4, 6\) does not fit .*\[5, 6\]"):
        VocabParallelHead(
            shard,
            WIDTH,
            None,
            generator=torch.Generator(),
            weight=nn.Parameter(torch.zeros(4, WIDTH)),
        )


def test_split_parameters_are_found_by_name() -> None:
    shard = VocabShard(0, 10, 10)
    found = vocab_parallel_parameters(_Net(shard, None, tied=False))
    assert found == {"embedding.weight": shard, "head.weight": shard}
