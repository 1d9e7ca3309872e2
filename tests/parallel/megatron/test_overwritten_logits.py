"""What comes of overwriting fp32 logits, one test each: with the losses of Megatron, with ours."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vocab_parallel_ce.testing import assert_close

from ...ranks import Pool
from .cases import (
    LOSSES,
    THEIRS,
    Outcome,
    exact,
    loss_named,
    megatron,
    outcome,
    shard,
    tokens,
    whole,
)


def _changed(rank: dist.ProcessGroup) -> dict[str, tuple[bool, bool, bool]]:
    """Logits changed by a call; by a call under no_grad; and another loss at the second call."""
    with megatron(tp=2) as group:
        logits, target = tokens()
        out = {}
        for name in LOSSES:
            loss, x = loss_named(name, group), shard(logits, group)
            changed = not torch.equal(outcome(loss, x, target)["logits"], x)
            with torch.no_grad():
                y = x.clone()
                first = loss(y, target)
                silently = not torch.equal(y, x)
                another = not torch.equal(loss(y, target), first)
            out[name] = (changed, silently, another)
        return out


def test_fp32_logits_are_overwritten_also_without_a_gradient(pair: Pool) -> None:
    for rank in pair.run(_changed, 2):
        for name in THEIRS:
            assert rank[name] == (True, True, True)
        assert rank["ours"] == (False, False, False)


def _twice(rank: dist.ProcessGroup) -> dict[str, str]:
    with megatron(tp=2) as group:
        logits, target = tokens()
        out = {}
        for name in LOSSES:
            leaf = shard(logits, group).requires_grad_()
            loss = loss_named(name, group)(leaf * 1, target).sum()
            (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            once = once.clone()
            try:
                (again,) = torch.autograd.grad(loss, leaf)
            except RuntimeError as problem:
                out[name] = str(problem)
            else:
                out[name] = "same" if torch.equal(once, again) else "another"
        return out


def test_backward_twice_raises(pair: Pool) -> None:
    for rank in pair.run(_twice, 2):
        for name in THEIRS:
            assert "modified by an inplace operation" in rank[name]
        assert rank["ours"] == "same"


def _transposed(rank: dist.ProcessGroup) -> dict[str, Outcome]:
    with megatron(tp=2) as group:
        logits, target = tokens()
        x = shard(logits, group).transpose(0, 1)
        out = {}
        for name in LOSSES:
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            assert not leaf.is_contiguous()
            try:
                loss = loss_named(name, group)(leaf + 0, target.t())
                loss.sum().backward()
                out[name] = Outcome(loss.detach(), leaf.grad)
            except RuntimeError as problem:
                out[name] = Outcome(problem=str(problem))
        return out


def test_transposed_logits_raise(pair: Pool) -> None:
    ranks = pair.run(_transposed, 2)
    logits, target = tokens()
    want = exact(logits.transpose(0, 1), target.t())
    for name in THEIRS:
        assert "view size is not compatible" in ranks[0][name].problem
    want.check(ranks[0]["ours"]["loss"], whole(ranks, "ours"))


def _views(rank: dist.ProcessGroup, maker: str) -> dict[str, Outcome]:
    """Logits that autograd still needs: a chunk of a bigger tensor, or the output of tanh."""
    with megatron(tp=2) as group:
        logits, target = tokens()
        out = {}
        for name in LOSSES:
            leaf = shard(logits, group).requires_grad_()
            x = torch.cat([leaf, leaf]).chunk(2)[0] if maker == "chunk" else leaf.tanh()
            try:
                loss = loss_named(name, group)(x, target)
                loss.sum().backward()
                out[name] = Outcome(loss.detach(), leaf.grad)
            except RuntimeError as problem:
                out[name] = Outcome(problem=str(problem))
        return out


@pytest.mark.parametrize(
    ("maker", "complaint"),
    [("chunk", "has been modified inplace"), ("tanh", "modified by an inplace operation")],
)
def test_logits_that_something_else_needs_raise(pair: Pool, maker: str, complaint: str) -> None:
    ranks = pair.run(_views, 2, (maker,))
    logits, target = tokens()
    plain = []
    for dtype in (torch.float64, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        x = (leaf.tanh() if maker == "tanh" else leaf).flatten(0, 1)
        F.cross_entropy(x, target.flatten(), reduction="sum").backward()
        assert leaf.grad is not None
        plain.append(leaf.grad)
    for name in THEIRS:
        assert complaint in ranks[0][name].problem
    assert_close(whole(ranks, "ours"), plain[0], plain[1], "gradient")


def _own_z_loss(rank: dist.ProcessGroup, order: str) -> dict[str, float | str]:
    """A z-loss that the user adds by hand, on tp=1: the mean of lse^2."""
    with megatron(tp=1) as group:
        logits, target = tokens()
        out: dict[str, float | str] = {}
        for name in LOSSES:
            leaf = logits.clone().requires_grad_()
            x = leaf * 1
            if order == "before":
                z = x.logsumexp(-1).square().mean()
                loss = loss_named(name, group)(x, target)
            else:
                loss = loss_named(name, group)(x, target)
                z = x.logsumexp(-1).square().mean()
            try:
                (loss.mean() + z).backward()
                out[name] = z.item()
            except RuntimeError as problem:
                out[name] = str(problem)
        return out


def test_a_z_loss_after_the_loss_is_silently_wrong(pair: Pool) -> None:
    want = tokens()[0].logsumexp(-1).square().mean().item()
    for rank in pair.run(_own_z_loss, 2, ("after",)):
        assert rank["ours"] == pytest.approx(want, rel=1e-6)
        for name in THEIRS:
            assert isinstance(rank[name], float)
            assert rank[name] != pytest.approx(want, rel=1e-2)


def test_a_z_loss_before_the_loss_cannot_go_backward(pair: Pool) -> None:
    want = tokens()[0].logsumexp(-1).square().mean().item()
    for rank in pair.run(_own_z_loss, 2, ("before",)):
        assert rank["ours"] == pytest.approx(want, rel=1e-6)
        for name in THEIRS:
            assert "modified by an inplace operation" in str(rank[name])
