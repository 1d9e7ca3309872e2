"""A forgotten ``group=``: the call of one rank, in a process that is one of several.

``group=None`` means one rank, so a shard of the vocabulary is taken for the whole of it, and the
loss is a plausible wrong number. The tensors look the same under data parallelism, where every rank
holds the whole vocabulary. So it is a warning, once, and errors that follow from it mention it. A
caller who passes ``group=`` or ``shard=`` sees nothing of this.
"""

from __future__ import annotations

import torch.distributed as dist

from .request import RowRequest
from .warning import called_by_own_part, warn

_warned = False


def _other_ranks(group: dist.ProcessGroup | None, shard_told: bool) -> bool:
    """Whether ranks exist that hold, for all that this call was told, the rest of the ids."""
    if group is not None or shard_told:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def warn_if_forgotten(group: dist.ProcessGroup | None, request: RowRequest) -> None:
    """Once in a process; silent where ``parallel`` or ``launch`` make the call."""
    global _warned
    if _warned or not _other_ranks(group, not request.implicit_shard) or called_by_own_part():
        return
    _warned = True
    size = request.vocab_size
    warn(
        f"vocab_parallel_ce: group= was not passed, so each of the {dist.get_world_size()} ranks "
        f"takes its {size} columns for the whole vocabulary. If they are shards of one, pass "
        "group= with the ranks that hold it; if every rank holds all of it, say so with "
        f"shard=VocabShard(0, {size}, {size})"
    )


def cause(group: dist.ProcessGroup | None, shard_told: bool, columns: int) -> str:
    """What an error adds that a forgotten group may be behind; empty where it cannot be."""
    if not _other_ranks(group, shard_told):
        return ""
    return (
        f"; group= was not passed, so the {columns} columns of this rank "
        f"({dist.get_rank()} of {dist.get_world_size()}) are the whole vocabulary: if they are a "
        "shard of it, pass group= with the ranks that hold it"
    )
