"""Calls of the fused head on device npu, and which of CANN's two operators they made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics
from vocab_parallel_ce.engines.npu.linear import probe
from vocab_parallel_ce.testing import Sharding

from ...linear.cases import LocalHead, local_head
from ...npu_sim import linear
from ...npu_sim.strict import OperatorCall

BF16, FP16 = torch.bfloat16, torch.float16
ROWS = 21
FORWARD, BACKWARD = linear.FORWARD_NAMES[0], linear.BACKWARD_NAMES[0]
Calls = list[OperatorCall]
BOTH = [FORWARD, BACKWARD]


def names_of(calls: Calls) -> list[str]:
    """Of these two, but those of the probe."""
    ours = [call for call in calls if call.name in (FORWARD, BACKWARD)]
    return [call.name for call in ours if call.columns != probe.IDS]


def on_npu(data: Any, sharding: Sharding, rank: int) -> LocalHead:
    mine = local_head(data, sharding, rank)
    return LocalHead(*(t.detach().to("npu").requires_grad_() for t in mine.leaves))


def call_once(**changed: Any) -> None:
    dtype = changed.pop("dtype", BF16)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, changed.pop("width", 16), generator=g).to("npu", dtype)
    head = torch.randn(changed.pop("ids", 128), hidden.shape[1], generator=g).to("npu", dtype)
    frozen = changed.pop("frozen", ())
    hidden.requires_grad_("hidden" not in frozen)
    head.requires_grad_("head" not in frozen)
    if changed.pop("biased", False):
        changed["linear_bias"] = torch.zeros_like(head[:, 0]).detach()
    target = torch.tensor([0, 1, -100, 100, 99]).to("npu")
    if "statistics" in changed:
        asked = changed.pop("statistics")
        out = linear_token_statistics(hidden, head, target if asked else None, **changed)
        total = out.lse.sum()
    else:
        loss = linear_cross_entropy(hidden, head, target, **changed)
        assert isinstance(loss, Tensor)
        total = loss.sum()
    if total.requires_grad:
        total.backward()
