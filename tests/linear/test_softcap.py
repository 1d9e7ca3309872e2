"""``softcap`` in the fused head: what the loss of whole logits makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics

from ..ranks import Pool

N, H, V = 12, 8, 30


def _matches(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(N, H, generator=g, dtype=torch.float64)).requires_grad_()
    head = (2 * torch.randn(V, H, generator=g, dtype=torch.float64)).requires_grad_()
    target = torch.randint(V, (N,), generator=g)
    capped = 0.8 * 6.0 * (F.linear(hidden, head) / 6.0).tanh()
    want = F.cross_entropy(capped, target)
    of_hidden, of_head = torch.autograd.grad(want, (hidden, head))
    mine = head.detach().chunk(world)[rank].clone().requires_grad_()
    states = hidden.detach().clone().requires_grad_()
    for gradient in ("forward", "recompute"):
        got = linear_cross_entropy(
            states, mine, target, scale=0.8, softcap=6.0, gradient=gradient, group=group
        )
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got, (states, mine))
        torch.testing.assert_close(grads, (of_hidden, of_head.chunk(world)[rank]))
    out = linear_token_statistics(states, mine, target, scale=0.8, softcap=6.0, group=group)
    torch.testing.assert_close(out.lse, capped.logsumexp(-1))


@pytest.mark.parametrize("world", [1, 2])
def test_as_with_whole_logits(pool: Pool, world: int) -> None:
    pool.run(_matches, world)
