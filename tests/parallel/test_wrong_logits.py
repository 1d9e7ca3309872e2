"""What the hooks say to logits that were gathered, that are not equal parts, or labels beyond them.

Here with plain tensors on two ranks, which needs no framework: where a hook asks its framework for
the group, it is told. Heads and DTensors of the frameworks themselves are in ``tests/hooks``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import Pool
from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel import automodel, torchtitan, verl
from vocab_parallel_ce.parallel.causal_lm import CausalLMLoss

VOCAB = 40
Hook = Callable[[Tensor, Tensor, int, dist.ProcessGroup], Any]


def _transformers_and_deepspeed(
    logits: Tensor, labels: Tensor, size: int, group: dist.ProcessGroup
) -> Tensor:
    return CausalLMLoss(group, VocabShard.even(size, group))(logits, shift_labels=labels)


def _automodel(logits: Tensor, labels: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    return automodel.masked_loss(logits, labels, reduction="mean", tp_group=group)


def _torchtitan(logits: Tensor, labels: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    with mock.patch.object(torchtitan, "_spmd_group", return_value=group):
        return torchtitan.summed_loss(logits, labels, global_vocab_size=size) / labels.numel()


def _verl(logits: Tensor, labels: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    with mock.patch.object(verl, "_group", return_value=group):
        return -verl.vocab_parallel_log_probs_from_logits(logits, labels).mean()


def _verl_entropy(logits: Tensor, labels: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    with mock.patch.object(verl, "_group", return_value=group):
        return verl.vocab_parallel_entropy(logits)


HOOKS: dict[str, Hook] = {
    "transformers and DeepSpeed": _transformers_and_deepspeed,
    "NeMo-Automodel": _automodel,
    "torchtitan": _torchtitan,
    "verl": _verl,
    "verl's entropy": _verl_entropy,
}


def answers(group: dist.ProcessGroup, name: str) -> dict[str, str]:
    hook = HOOKS[name]
    torch.manual_seed(0)
    full, labels = torch.randn(2, 6, VOCAB), torch.randint(VOCAB - 1, (2, 6))
    own = slice(20 * group.rank(), 20 * (group.rank() + 1))
    calls: dict[str, tuple[Tensor, Tensor, int]] = {
        "gathered": (full, labels, VOCAB),
        "uneven": (full[..., : VOCAB - 1][..., own], labels, VOCAB - 1),
        "beyond": (full[..., own], labels + VOCAB, VOCAB),
    }
    told = {}
    for what, (logits, target, size) in calls.items():
        try:
            value = hook(logits.clone(), target, size, group)
        except ValueError as problem:
            told[what] = str(problem)
            continue
        if value.dim():
            told[what] = "values"
            continue
        whole = full[..., :size].flatten(0, 1)
        want = torch.nn.functional.cross_entropy(whole, target.flatten())
        told[what] = f"off by {float((value - want).abs()):.1e}"
    return told


@pytest.mark.parametrize("name", HOOKS)
def test_each_is_one_clear_line_or_right(name: str, pair: Pool) -> None:
    for told in pair.run(answers, 2, (name,)):
        assert "gathered" in told["gathered"], told
        if name in ("transformers and DeepSpeed", "torchtitan"):  # these know the whole size
            assert float(told["uneven"].removeprefix("off by ")) < 1e-6, told
        else:
            assert told["uneven"].startswith("ranks disagree on vocab_size: rank 0"), told
            assert "uneven ones need" in told["uneven"]
        if name != "verl's entropy":  # which has no labels
            assert "is out of range: row " in told["beyond"], told
            assert f"neither a class in [0, {VOCAB})" in told["beyond"]
        assert not any("\n" in line for line in told.values())
