"""A head of one's own, split over the vocabulary: the same model before and after.

    torchrun --standalone --nproc-per-node 2 examples/own_head.py

Before: every rank gathers the logits of all ranks and calls F.cross_entropy on [N, V].
After:  every rank keeps its shard [N, V / tp] and calls cross_entropy with the group.
Both print the same loss and the same gradients.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.parallel.layers import copy_to_group

TOKENS, WIDTH, VOCAB = 64, 32, 1000


class Head(nn.Module):
    """hidden [N, WIDTH] -> this rank's logits [N, shard.size]."""

    def __init__(self, shard: VocabShard, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        full = torch.randn(shard.vocab_size, WIDTH) / WIDTH**0.5  # the same seed on every rank
        self.weight = nn.Parameter(full[shard.start : shard.stop].clone())

    def forward(self, hidden: Tensor) -> Tensor:
        # Each rank uses the same hidden states for other classes: in backward their gradients are
        # summed over the group. Without this line every layer below would learn from one shard.
        hidden = copy_to_group(hidden, self.group)
        return F.linear(hidden, self.weight)


def loss_before(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers [N, V] on every rank; only the own shard carries a gradient."""
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.detach(), group=group)
    parts[dist.get_rank(group)] = logits
    return F.cross_entropy(torch.cat(parts, -1), target)


def loss_after(
    logits: Tensor, target: Tensor, group: dist.ProcessGroup, shard: VocabShard
) -> Tensor:
    """No logits leave their rank; the gradient overwrites them."""
    return cross_entropy(logits, target, group=group, shard=shard, inplace_backward=True)


def main() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    shard = VocabShard.even(VOCAB, group)
    head = Head(shard, group)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    target = torch.randint(0, VOCAB, (TOKENS,))
    for name in ("before", "after"):
        hidden.grad = head.weight.grad = None
        logits = head(hidden)
        if name == "before":
            loss = loss_before(logits, target, group)
        else:
            loss = loss_after(logits, target, group, shard)
        loss.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        norms = f"hidden {hidden.grad.norm():.6f}, own weight rows {head.weight.grad.norm():.6f}"
        print(f"rank {dist.get_rank()}, {name:6}: loss {loss.item():.6f}, gradients: {norms}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
