"""What the tests against megatron-core share: its groups, its two losses, and one way to measure.

Everything runs on ranks that are all of the process group (the fixture ``pair``), with Megatron's
own groups over them, kept until another layout is asked for: each set costs a dozen communicators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.parallel import megatron as ours
from vocab_parallel_ce.parallel.megatron.on_cpu import run_megatron_on_cpu
from vocab_parallel_ce.testing import Expected, assert_close

from ...cases import expected
from ...ranks import no_group_stays

Loss = Callable[..., Tensor]
VOCAB = 64
THEIRS = ("unfused", "fused")
LOSSES = (*THEIRS, "ours")
_layout: list[tuple[int, int, int]] = []
_groups_of_layout = ExitStack()


@contextmanager
def megatron(tp: int = 1, pp: int = 1, cp: int = 1) -> Iterator[dist.ProcessGroup]:
    """Megatron on this CPU rank with such groups; hands out the tensor-parallel one."""
    with run_megatron_on_cpu():
        from megatron.core import parallel_state

        if _layout != [(tp, pp, cp)]:
            parallel_state.destroy_model_parallel()  # forgets its groups
            _groups_of_layout.close()
            _groups_of_layout.enter_context(no_group_stays())
            # 0.12.1 leaves these, and takes a rank for a member of a group that it is not in.
            parallel_state._EMBEDDING_GLOBAL_RANKS = None
            parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                context_parallel_size=cp,
            )
            _layout[:] = [(tp, pp, cp)]
        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        yield group


def loss_named(name: str, group: dist.ProcessGroup) -> Loss:
    """(logits, target) -> loss per token: Megatron's unfused, its fused, or ours."""
    if name == "ours":
        return ours.vocab_parallel_cross_entropy
    if name == "unfused":
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        unfused: Loss = vocab_parallel_cross_entropy
        return unfused
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return lambda logits, target: fused_vocab_parallel_cross_entropy(logits, target, group)


def tokens(
    sequence: int = 6, batch: int = 3, vocab_size: int = VOCAB, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits [s, b, V] and labels [s, b], the same wherever they are made."""
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(sequence, batch, vocab_size, generator=g) * spread
    return logits, torch.randint(0, vocab_size, (sequence, batch), generator=g)


def shard(full: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns, a tensor of their own."""
    parts = full.chunk(dist.get_world_size(group), -1)
    return parts[dist.get_rank(group)].contiguous()


@dataclass(frozen=True)
class Outcome:
    """What one call gave on one rank; ``problem`` is the error that it ended in."""

    loss: Tensor | None = None
    grad: Tensor | None = None
    logits: Tensor | None = None
    """the caller's logits after forward and backward"""
    problem: str = ""

    def __getitem__(self, name: str) -> Tensor:
        value = getattr(self, name)
        assert value is not None, f"no {name}: {self.problem}"
        assert isinstance(value, Tensor)
        return value


def outcome(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> Outcome:
    """Forward and backward of the sum of the losses, as of logits that a head made."""
    leaf = logits.detach().clone().requires_grad_()
    x = leaf * 1
    try:
        value = loss(x, target, **options)
        kept = value.detach().clone()
        value.sum().backward()
    except (RuntimeError, ValueError, IndexError, AssertionError) as problem:
        return Outcome(problem=f"{type(problem).__name__}: {problem}")
    assert leaf.grad is not None
    return Outcome(kept, leaf.grad, x.detach().clone())


def whole(ranks: list[dict[str, Outcome]], name: str) -> Tensor:
    """The gradient [.., V] from all shards."""
    return torch.cat([rank[name]["grad"] for rank in ranks], -1)


@dataclass(frozen=True)
class Want:
    """What whole logits must give: fp64, and the naive formulas that say how exact ours must be."""

    expected: Expected
    loss: Tensor
    grad: Tensor
    naive_grad: Tensor

    def check(self, loss: Tensor, grad: Tensor | None = None) -> None:
        """Ours, by the rule of ``testing.tolerance``; ``grad`` is [.., V], of the summed loss."""
        assert_close(loss, self.loss, self.expected.naive.loss, "loss")
        if grad is not None:
            assert_close(grad, self.grad, self.naive_grad, "gradient")


def exact(logits: Tensor, target: Tensor, **options: Any) -> Want:
    """Loss and gradient [.., V] of whole logits; ``options`` are those of the reference."""
    want = expected(logits, target, reduction="none", **options)
    grad, naive_grad = want.gradients(lambda result: result.loss.sum())
    return Want(want, want.exact.loss.detach(), grad, naive_grad)


def error(got: Tensor, want: Tensor) -> float:
    """Largest deviation, relative to the largest number of ``want``; for Megatron's results."""
    assert got.shape == want.shape, f"{tuple(got.shape)} {tuple(want.shape)}"
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
