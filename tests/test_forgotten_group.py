"""A forgotten group= in a process of several ranks: one warning, and the cause in its errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel_ce import (
    VocabParallelCrossEntropyLoss,
    VocabShard,
    cross_entropy,
    cross_entropy_loss,
    forgotten_group,
    token_statistics,
)
from vocab_parallel_ce.parallel.megatron import vocab_parallel_cross_entropy

from .device import DEVICE, move
from .ranks import Pool

C = 8


def _batch() -> tuple[Tensor, Tensor]:
    return move(torch.zeros(3, C)), move(torch.zeros(3, dtype=torch.int64))


Call = Callable[[dist.ProcessGroup], object]
FORGETFUL: dict[str, Call] = {
    "loss": lambda group: cross_entropy(*_batch()),
    "operator": lambda group: cross_entropy_loss(*_batch()),
    "statistics": lambda group: token_statistics(*_batch()),
    "module": lambda group: VocabParallelCrossEntropyLoss()(*_batch()),
}


def _replicated(group: dist.ProcessGroup) -> DTensor:
    mesh = DeviceMesh.from_group(group, DEVICE)
    return DTensor.from_local(_batch()[0], mesh, [Replicate()], run_check=False)


def _sharded(group: dist.ProcessGroup) -> DTensor:
    mesh = DeviceMesh.from_group(group, DEVICE)
    return DTensor.from_local(_batch()[0], mesh, [Shard(-1)], run_check=False)


def _compiled(group: dist.ProcessGroup) -> Tensor:
    out: Tensor = torch.compile(cross_entropy, fullgraph=True, backend="eager")(*_batch())
    return out


def _from_launch(group: dist.ProcessGroup) -> object:
    """A call as a module of the launch folder makes it."""
    scope: dict[str, Any] = {"__name__": "vocab_parallel_ce.launch.made_up", "call": cross_entropy}
    exec("def job(*batch): return call(*batch)", scope)
    return scope["job"](*_batch())


SILENT: dict[str, Call] = {
    "full shard": lambda group: cross_entropy(*_batch(), shard=VocabShard(0, C, C)),
    "group": lambda group: cross_entropy(_batch()[0] + dist.get_rank(), _batch()[1], group=group),
    "replicated": lambda group: cross_entropy(_replicated(group), _batch()[1]),
    "sharded": lambda group: cross_entropy(_sharded(group), _batch()[1], collective="all_gather"),
    "megatron": lambda group: vocab_parallel_cross_entropy(*_batch()),
    "launch": _from_launch,
    "compiled": _compiled,
}


def _warned(group: dist.ProcessGroup, name: str) -> list[tuple[str, str]]:
    """(file, message) of every warning of two calls."""
    forgotten_group._warned = False
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # the others leave it to the first of the host
        warnings.simplefilter("always")
        for _ in range(2):
            (FORGETFUL | SILENT)[name](group)
    forgotten_group._warned = False
    return [(w.filename, str(w.message)) for w in caught if "group=" in str(w.message)]


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_forgotten_group_is_told_once(pool: Pool, name: str) -> None:
    for said in pool.run(_warned, 2, (name,)):
        ((file, message),) = said
        assert file == __file__
        assert "each of the 4 ranks takes its 8 columns for the whole vocabulary" in message
        assert "shard=VocabShard(0, 8, 8)" in message


@pytest.mark.parametrize("name", SILENT)
def test_who_says_how_it_is_hears_nothing(pool: Pool, name: str) -> None:
    assert pool.run(_warned, 2, (name,)) == [[], []]


def _of_one(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """The pool's own groups of one rank are those of rank 0."""
    forgotten_group._warned = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cross_entropy(*_batch(), group=group)
    return [(w.filename, str(w.message)) for w in caught if "group=" in str(w.message)]


def test_a_group_of_one_rank_is_told(pool: Pool) -> None:
    assert pool.run(_of_one, 1) == [[]]


def test_a_process_alone_hears_nothing() -> None:
    forgotten_group._warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(*_batch())


def _beyond(group: dist.ProcessGroup, told: bool) -> str:
    logits, target = _batch()
    target[1] = C  # rank 1's first id
    shard = VocabShard(0, C, C) if told else None
    forgotten_group._warned = True
    try:
        cross_entropy(logits, target, shard=shard, check=True)
    except ValueError as problem:
        return str(problem)
    finally:
        forgotten_group._warned = False
    return ""


def test_a_target_beyond_the_shard_names_the_cause(pool: Pool) -> None:
    for rank, message in enumerate(pool.run(_beyond, 2, (False,))):
        assert "row 1 holds 8, which is neither a class in [0, 8)" in message
        assert f"; group= was not passed, so the 8 columns of this rank ({rank} of 4)" in message
        assert "of the group" not in message
    for message in pool.run(_beyond, 2, (True,)):
        assert "row 1 holds 8, which is neither" in message
        assert "group" not in message


def _weighted(group: dist.ProcessGroup) -> str:
    try:
        cross_entropy(*_batch(), move(torch.ones(2 * C)))
    except ValueError as problem:
        return str(problem)
    return ""


def test_a_weight_of_the_whole_vocabulary_names_the_cause(pool: Pool) -> None:
    for message in pool.run(_weighted, 2):
        assert "weight has 16 entries but vocab_size is 8" in message
        assert "; group= was not passed" in message
