"""Ranks whose rows of the head are the same, though their shards say otherwise.

It happens when each rank takes the same slice of the whole weight; the loss is then a plausible
wrong number. Without ``shard=`` this is an error. With ``shard=`` it may be meant (a head that was
initialised with the same seed on every rank), so it is a warning, once in a process. Shards that
are merely exchanged between ranks cannot be noticed: they look like another weight.
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
