"""The check at the end of a run tells a right loss from a slightly wrong one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.launch.train import text as text_module
from vocab_parallel_ce.launch.train.selfcheck import LossCall, check_against_reference, compare_cost
from vocab_parallel_ce.parallel.groups import ParallelGroups

VOCAB_SIZE = 513


class _SlightlyWrong(LossCall):
    """Its loss and gradient are off by one part in a thousand."""

    def loss(self, logits: Tensor, groups: ParallelGroups) -> Tensor:
        return super().loss(logits, groups) * 1.001


@pytest.mark.parametrize("inplace", [True, False])
def test_the_check_tells_right_from_wrong(inplace: bool) -> None:
    logits = torch.randn(300, VOCAB_SIZE) * 4
    target = torch.randint(VOCAB_SIZE, (300,))
    target[::7] = text_module.IGNORE_INDEX
    with ParallelGroups.open("cpu") as groups:
        from vocab_parallel_ce import VocabShard

        call = LossCall(
            logits=logits,
            target=target,
            shard=VocabShard(0, VOCAB_SIZE, VOCAB_SIZE),
            normalizer=torch.tensor(211.0),
            label_smoothing=0.1,
            z_loss=1e-4,
            inplace=inplace,
        )
        kept = logits.clone()
        right = check_against_reference(call, groups)
        wrong = check_against_reference(_SlightlyWrong(**vars(call)), groups)
        costs = compare_cost(call, groups, rounds=1)
    assert right.within
    assert right.gradient_error < 2e-6
    assert not wrong.within
    assert wrong.loss_error == pytest.approx(1e-3, rel=0.01)
    assert wrong.gradient_error == pytest.approx(1e-3, rel=0.01)
    assert torch.equal(call.logits, kept)
    assert len(costs) == 2  # one rank gathers nothing
    assert all(cost.milliseconds > 0 for cost in costs)
