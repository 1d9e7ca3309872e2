"""Modules that hold a group: copies share it, pickles name it, and a wrong one is never used."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vocab_parallel_ce import (
    VocabParallelCrossEntropyLoss,
    VocabParallelLinearCrossEntropyLoss,
    VocabShard,
    cross_entropy,
)
from vocab_parallel_ce.parallel.layers import VocabParallelEmbedding, VocabParallelHead
from vocab_parallel_ce.testing import batch, even

from .device import DEVICE
from .ranks import Pool, no_group_stays, run_fresh

CLASSES, WIDTH = 12, 4
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a group is held alike for every device")


class _Model(nn.Module):
    """Everything of ours that holds a group, beside a plain layer that is shared twice."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        shard = VocabShard.even(CLASSES, group)
        generator = torch.Generator().manual_seed(0)
        self.embedding = VocabParallelEmbedding(shard, WIDTH, group, generator=generator)
        self.head = VocabParallelHead(
            shard, WIDTH, group, generator=generator, weight=self.embedding.weight
        )
        self.loss = VocabParallelCrossEntropyLoss(
            torch.linspace(0.5, 1.5, CLASSES), label_smoothing=0.1, group=group, shard=shard
        )
        self.fused = VocabParallelLinearCrossEntropyLoss(
            weight=torch.linspace(0.5, 1.5, CLASSES), group=group, shard=shard
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        loss: torch.Tensor = self.loss(self.head(hidden), ids)
        fused: torch.Tensor = self.fused(hidden, self.head.weight, ids)
        return loss + fused


def _saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def _loaded(saved: bytes) -> Any:
    return torch.load(io.BytesIO(saved), weights_only=False)


def _copies(group: dist.ProcessGroup) -> None:
    ids = torch.arange(CLASSES)
    model = _Model(group)
    want = model(ids)
    want.backward()
    deep = copy.deepcopy(model)
    shallow = copy.copy(model.loss)
    for other in (deep.loss, deep.head, deep.embedding, shallow):
        assert other.group is group
    assert deep.loss.weight is not model.loss.weight
    assert deep.head.weight is deep.embedding.weight
    assert deep.head.weight is not model.head.weight
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for again in (deep, averaged, _loaded(_saved(model)), pickle.loads(pickle.dumps(model))):
        got = again(ids)
        assert torch.equal(got, want)
        got.backward()
    assert _loaded(_saved(deep)).loss.group is group
    # Loaded, and saved again before it was ever used.
    assert _loaded(_saved(_loaded(_saved(model)))).loss.group is group
    deep.loss.group = None
    assert model.loss.group is group


@pytest.mark.parametrize("world", [1, 2, 3])
def test_copies_and_pickles_compute_the_same_loss(pool: Pool, world: int) -> None:
    pool.run(_copies, world)


def _another_group(group: dist.ProcessGroup) -> None:
    """A pickle from a run whose group of that name had other ranks, or names no group here."""
    rank = dist.get_rank(group)
    with no_group_stays():
        old = dist.new_group([0, 1])
        assert old.group_name != group.group_name
        saved = _saved(VocabParallelCrossEntropyLoss(group=old))
        again = _loaded(saved)
        dist.destroy_process_group(old)
    data = batch(3, CLASSES, torch.float32)
    mine = even(CLASSES, 2).local(data.logits, rank)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\].*no group of that name.*module.group"):
        again(mine, data.target)
    assert "reduction" in repr(again)
    again.group = group
    assert torch.equal(again(mine, data.target), cross_entropy(mine, data.target, group=group))
    # The same name, other ranks.
    wrong = VocabParallelCrossEntropyLoss(group=group)
    wrong._pickled_group = type(wrong._pickled_group)(group.group_name, (0, 1, 2))
    with pytest.raises(RuntimeError, match=r"\[0, 1, 2\].*has the ranks \[0, 1\].*module.group ="):
        _loaded(_saved(wrong))(mine, data.target)


def test_another_group_is_refused() -> None:
    """In processes of its own: a group of some of the pool's ranks would confuse the others."""
    for outcome in run_fresh(_another_group, 2):
        assert not outcome.kind, outcome.trace


def _saved_at_the_end(group: dist.ProcessGroup) -> bytes:
    model = _Model(group)
    dist.destroy_process_group()
    return _saved(model)


def test_a_process_without_groups() -> None:
    """Saved after the groups were ended, loaded where there are none."""
    (outcome,) = run_fresh(_saved_at_the_end, 1)
    model = _loaded(outcome.value)
    with pytest.raises(RuntimeError, match=r"Embedding was saved.*no process group is initialized"):
        model(torch.arange(CLASSES))
    for module in (model.embedding, model.head, model.loss, model.fused):
        module.group = None
    assert torch.equal(model(torch.arange(CLASSES)), _Model(None)(torch.arange(CLASSES)))


def test_without_a_group() -> None:
    model = _Model(None)
    for again in (copy.deepcopy(model), _loaded(_saved(model))):
        assert again.loss.group is None
        assert torch.equal(again(torch.arange(CLASSES)), model(torch.arange(CLASSES)))
    assert set(model.loss.state_dict()) == {"weight"}


def test_the_text_of_a_module_tells_what_is_no_default() -> None:
    assert "(reduction='mean')" in repr(VocabParallelCrossEntropyLoss())
    told = repr(
        VocabParallelLinearCrossEntropyLoss(
            reduction="sum", hidden_gradient="partial", scratch_mib=3, softcap=30.0, check=True
        )
    )
    for part in ("reduction='sum'", "hidden_gradient='partial'", "scratch_mib=3", "softcap=30.0"):
        assert part in told
    assert "check=True" in told
    assert "engine" not in told
    shard = VocabShard(0, 2, 4)
    assert f"shard={shard}" in repr(VocabParallelCrossEntropyLoss(shard=shard))
