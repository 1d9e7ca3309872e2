"""Ways to lay a vocabulary on ranks: even, uneven, padded, out of order, with nothing on a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shard import VocabShard

KINDS = ("even", "uneven", "padded", "empty", "all padding", "backwards")


@dataclass(frozen=True)
class Sharding:
    """How a vocabulary lies on the ranks: [start, stop) and padding columns of each.

    Example:
        >>> plan = sized("padded", (3, 1), padding=(0, 2))
        >>> plan.shard(1)
        VocabShard(start=3, stop=4, vocab_size=4)
        >>> plan.local(torch.zeros(1, 4), rank=1)
        tensor([[0., inf, nan]])
    """

    name: str
    vocab_size: int
    bounds: tuple[tuple[int, int], ...]
    """[start, stop) of every rank"""
    padding: tuple[int, ...]
    """columns of every rank behind its shard"""
    explicit: bool = True
    """Whether the call is told its VocabShard; equal shards in rank order need not be."""

    def shard(self, rank: int) -> VocabShard | None:
        """The ``shard`` argument of this rank; None where the library is to infer it."""
        return VocabShard(*self.bounds[rank], self.vocab_size) if self.explicit else None

    def local(self, logits: Tensor, rank: int) -> Tensor:
        """This rank's columns of whole logits, and padding full of what nobody may read.

        Args:
            logits: [..., vocab_size], any floating dtype.
            rank: Whose columns.

        Returns:
            Tensor: [..., C_r + padding], a copy; the padding holds NaN and infinity in turn.
        """
        start, stop = self.bounds[rank]
        padding = logits.new_full((*logits.shape[:-1], self.padding[rank]), torch.nan)
        padding[..., ::2] = torch.inf
        return torch.cat([logits[..., start:stop], padding], -1)

    def columns(self, full: Tensor, rank: int) -> Tensor:
        """This rank's columns of a result [..., vocab_size], without padding: a view."""
        start, stop = self.bounds[rank]
        return full[..., start:stop]


def even(vocab_size: int, world: int) -> Sharding:
    """Equal shards in rank order, left for the library to infer.

    Args:
        vocab_size: A multiple of ``world``.
        world: The number of ranks.

    Raises:
        ValueError: ``vocab_size`` cannot be split evenly.
    """
    if vocab_size % world:
        raise ValueError(f"vocab_size={vocab_size} is no multiple of world={world}; use sized()")
    size = vocab_size // world
    bounds = tuple((r * size, (r + 1) * size) for r in range(world))
    return Sharding("even", vocab_size, bounds, (0,) * world, explicit=False)


def sized(name: str, sizes: tuple[int, ...], padding: tuple[int, ...] | None = None) -> Sharding:
    """Shards of these sizes in rank order.

    Args:
        name: For messages and the names of tests.
        sizes: The columns of every rank, 0 included; together they are the vocabulary.
        padding: Columns behind each shard; none if left out.
    """
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    bounds = tuple((a, a + n) for a, n in zip(starts, sizes, strict=True))
    return Sharding(name, sum(sizes), bounds, padding or (0,) * len(sizes))


def sharding(kind: str, vocab_size: int, world: int) -> Sharding:
    """One kind of sharding of a vocabulary of this size.

    Args:
        kind: One of ``KINDS``. "even" is ``even``. In the others each rank but the last lacks some
            columns of an even share. "padded": with padding behind every shard; "empty": the last
            rank has no column at all; "all padding": rank 0 has nothing but padding; "backwards":
            ids fall with the rank.
        vocab_size: At least 3 a rank.
        world: The number of ranks. One rank has no neighbour to differ from: then "padded" has
            padding, "all padding" is the same, and the other kinds hold the whole vocabulary.

    Returns:
        Sharding: whose shards tile the vocabulary.

    Raises:
        ValueError: The kind is unknown, or the vocabulary too small for it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {KINDS}")
    if kind == "even":
        return even(vocab_size, world)
    if vocab_size < 3 * world:
        raise ValueError(f"vocab_size={vocab_size} gives {world} ranks less than 3 columns each")
    sizes = [vocab_size // world - 1 - r % 3 for r in range(world - 1)]
    if kind == "all padding" and world > 1:
        sizes[0] = 0
    sizes.append(vocab_size - sum(sizes))
    if kind == "empty" and world > 1:
        sizes[-2:] = [sizes[-2] + sizes[-1], 0]
    padding: tuple[int, ...] | None = None
    if kind == "padded":
        padding = (7,) if world == 1 else tuple(3 * r + 1 for r in range(world))
    elif kind == "all padding":
        padding = (5, *[1] * (world - 1))
    plan = sized(kind, tuple(sizes), padding)
    if kind == "backwards":
        plan = Sharding(kind, vocab_size, plan.bounds[::-1], plan.padding)
    return plan


def shardings(world: int, vocab_size: int = 60) -> list[Sharding]:
    """Every kind that makes a difference on so many ranks.

    Args:
        world: The number of ranks.
        vocab_size: A multiple of ``world``, at least 3 a rank.
    """
    kinds = KINDS if world > 1 else ("even", "padded")
    return [sharding(kind, vocab_size, world) for kind in kinds]
