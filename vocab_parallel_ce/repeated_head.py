"""Ranks whose rows of the head are the same, though their shards say otherwise.

Each rank took the same slice of the whole weight, and the loss is a plausible wrong number. Where
shards were not told that is an error; who tells them may mean it (a head that was initialised with
one seed on every rank), so here it is a warning, once in a process. The values of one shard under
another one's name, each once, cannot be told from another weight.
"""

from __future__ import annotations

from .warning import warn

_warned = False


def warn_if_repeated(contents: list[int]) -> None:
    """``contents`` are checksums of each rank's partials; 0 where they were not told."""
    global _warned
    if _warned or len(contents) < 2 or not contents[0] or len(set(contents)) > 1:
        return
    _warned = True
    warn(
        f"vocab_parallel_ce: the rows of linear_weight of all {len(contents)} ranks of the group "
        "give the same logits, but their shards are said to be different ids. Did each rank take "
        "the same slice of the weight, or initialise its own with the same seed? A rank passes "
        "linear_weight[shard.start:shard.stop]"
    )
