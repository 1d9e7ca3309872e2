"""VocabShard: which vocabulary ids live on this rank.

A shard is three integers and communicates nothing. Only ``VocabShard.from_group`` does, which a
program calls once, when it builds the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .collectives import all_gather_flat, communication_device, is_dry_run

MAX_VOCAB_SIZE = 2**31 - 1


def group_rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in ``group`` and the group's size; (0, 1) without a group."""
    if group is None:
        return 0, 1
    return group.rank(), group.size()  # at a tenth of what torch.distributed takes to ask them


def rank_suffix(rank: int, world: int) -> str:
    """What an error message says last: which rank raises it, where there are several."""
    return f" (rank {rank} of the group)" if world > 1 else ""


@dataclass(frozen=True)
class VocabShard:
    """The ids [start, stop) of a vocabulary of ``vocab_size`` live on this rank.

    Column j of the logits is id ``start + j``. Columns beyond ``stop - start`` are padding: they
    take no part in the softmax and their gradient is exactly 0. Ids from ``vocab_size`` on are
    padding too: ``start`` and ``stop`` are cut to it, so the shards of a padded vocabulary may be
    given as they are stored. The shards of a group must cover [0, vocab_size) without overlap, in
    any order of ranks; every call of the loss verifies that (an error on CPU, NaN on accelerators).

    Args:
        start: first id of this rank.
        stop: one past the last id; ``start == stop`` is an empty shard, which is legal.
        vocab_size: number of ids over all ranks, without padding.

    Raises:
        TypeError: for a value that is not an int.
        ValueError: unless 0 <= start <= stop and 1 <= vocab_size < 2^31.

    Communication:
        None; only ``from_group`` communicates.

    Example:
        ```python
        bounds = (0, 25_200, 50_257)  # rank 0 holds 25,200 ids, rank 1 the other 25,057
        shard = VocabShard(bounds[rank], bounds[rank + 1], vocab_size=50_257)
        loss = cross_entropy(logits, target, group=tp_group, shard=shard)
        ```
    """

    start: int
    stop: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("start", "stop", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer, torch.SymInt)) or isinstance(value, bool):
                raise TypeError(f"VocabShard: {name} must be an int, got {value!r}")
            object.__setattr__(self, name, int(value))
        if not 0 <= self.start <= self.stop or self.vocab_size < 1:
            raise ValueError(
                "VocabShard: needs 0 <= start <= stop and vocab_size >= 1, got "
                f"start={self.start}, stop={self.stop}, vocab_size={self.vocab_size}"
            )
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"VocabShard: vocab_size={self.vocab_size} is more than {MAX_VOCAB_SIZE}: ids "
                "travel between ranks as 32-bit integers"
            )
        # Assigned past the freeze, once, before anybody has seen the shard.
        object.__setattr__(self, "start", min(self.start, self.vocab_size))
        object.__setattr__(self, "stop", min(self.stop, self.vocab_size))

    @property
    def size(self) -> int:
        """Number of ids that live here."""
        return self.stop - self.start

    @classmethod
    def even(cls, vocab_size: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """Shards of ceil(vocab_size / world) ids in rank order, the last ones shorter or empty.

        This is how ``torch.chunk`` and DTensor's ``Shard`` divide. Nothing is communicated.

        Args:
            vocab_size: number of ids over all ranks.
            group: the tensor-parallel group; None is one rank.

        Returns:
            The shard of this rank.
        """
        rank, world = group_rank_and_size(group)
        size = -(-vocab_size // world)
        start = min(rank * size, vocab_size)
        return cls(start, min(start + size, vocab_size), vocab_size)

    @classmethod
    def from_group(cls, local_size: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """Shards of any sizes in rank order: exchanges ``local_size`` over ``group``.

        Communicates once (an all_gather of one int64 a rank) and must be called by every rank of
        the group; call it when the model is built, not at every step.

        Args:
            local_size: number of ids of this rank, padding not counted.
            group: the tensor-parallel group; None is one rank.

        Returns:
            The shard of this rank; ``vocab_size`` is the sum over the group.

        Raises:
            ValueError: on every rank, for a size of any rank that is not an int >= 0.
        """
        integer = isinstance(local_size, (int, np.integer)) and not isinstance(local_size, bool)
        bad = not integer or not 0 <= local_size <= MAX_VOCAB_SIZE
        rank, world = group_rank_and_size(group)
        counts = [-1 if bad else int(local_size)]
        if group is not None and world > 1:  # also with a bad size: the others wait for it
            if is_dry_run(group):  # nothing is exchanged: equal shards
                counts *= world
            else:
                mine = torch.tensor(counts, dtype=torch.int64, device=communication_device(group))
                sizes = mine.new_empty(world)
                all_gather_flat(sizes, mine, group)
                counts = [int(count) for count in sizes.tolist()]
        if -1 in counts:
            what = repr(local_size) if bad else f"another on rank {counts.index(-1)} of the group"
            raise ValueError(
                "VocabShard.from_group: local_size must be an int from 0 to "
                f"{MAX_VOCAB_SIZE}, got {what}"
            )
        start = sum(counts[:rank])
        return cls(start, start + counts[rank], sum(counts))


class Held(NamedTuple):
    """The words of error messages for the tensor that holds this rank's part of the vocabulary."""

    name: str = "input"
    places: str = "columns"
    part: str = "logits[..., {start}:{stop}]"


def resolve(
    columns: int, shard: VocabShard | None, rank: int, world: int, where: str, held: Held
) -> VocabShard:
    """The shard of a tensor with so many ``columns``: ``shard``, checked; or an equal one."""
    name, places = held.name, held.places
    if shard is None:
        if columns == 0:
            raise ValueError(
                f"{name} has no {places}{where}; an empty shard must be told: "
                "shard=VocabShard(start, start, vocab_size)"
            )
        return VocabShard(rank * columns, (rank + 1) * columns, world * columns)
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}{where}")
    if columns < shard.size:
        raise ValueError(
            f"{name} has {columns} {places} but shard holds the {shard.size} ids "
            f"[{shard.start}, {shard.stop}){where}; the shard must be the one that the head was "
            "split by"
        )
    if world == 1 and shard.size != shard.vocab_size:
        raise ValueError(
            f"shard holds ids [{shard.start}, {shard.stop}) of vocab_size={shard.vocab_size}, but "
            "there is one rank only; pass group= with the ranks that hold the others"
        )
    if columns == shard.vocab_size and shard.size < shard.vocab_size:
        part = held.part.format(start=shard.start, stop=shard.stop)
        raise ValueError(
            f"{name} looks gathered: it has all vocab_size={shard.vocab_size} {places}, but shard "
            f"holds [{shard.start}, {shard.stop}){where}; pass this rank's part, {part}"
        )
    return shard
