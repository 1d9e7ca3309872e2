"""Wrong arguments of the fused head on one rank: one clear error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vocab_parallel_ce import VocabShard, linear_cross_entropy, linear_token_statistics

from .calls import H, N, V, a_call
from .cases import scratch_for

FUNCTIONS: tuple[Callable[..., Any], ...] = (linear_cross_entropy, linear_token_statistics)

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden and head": (
        {"linear_weight": torch.zeros(V, H + 1)}, ValueError, r"linear_weight has shape \(10, 5\)",
    ),
    "head 1-D": ({"linear_weight": torch.zeros(H)}, ValueError, "linear_weight has shape"),
    "head dtype": (
        {"linear_weight": torch.zeros(V, H, dtype=torch.bfloat16)}, TypeError, "autocast",
    ),
    "head no tensor": ({"linear_weight": None}, TypeError, "linear_weight must be a tensor"),
    "hidden integers": ({"input": torch.zeros(N, H).long()}, TypeError, "hidden states"),
    "hidden 0-d": ({"input": torch.zeros(())}, ValueError, "0-d"),
    "hidden sparse": ({"input": torch.zeros(N, H).to_sparse()}, TypeError, "input must be a plain"),
    "target": (
        {"target": torch.zeros(N + 1).long()}, ValueError, r"target has shape \(13,\), but input",
    ),
    "bias": ({"linear_bias": torch.zeros(V + 1)}, ValueError, "linear_bias has shape"),
    "bias no tensor": ({"linear_bias": 1.0}, TypeError, "linear_bias must be a tensor"),
    "bias dtype": ({"linear_bias": torch.zeros(V).double()}, TypeError, "linear_bias is"),
    "shard larger": ({"shard": VocabShard(0, 11, 11)}, ValueError, "linear_weight has 10 rows"),
    "no rows": ({"linear_weight": torch.zeros(0, H)}, ValueError, "linear_weight has no rows"),
    "budget below a row": (
        {"scratch_mib": 1e-5}, ValueError, "no room for one row of logits: 10 columns",
    ),
    "drop_ignored": ({"drop_ignored": 1}, TypeError, "drop_ignored must be True or False"),
    "drop_ignored of a sequence": (
        {"drop_ignored": True, "sequence_parallel": True}, ValueError, "use one of the two",
    ),
    "no budget": ({"scratch_mib": 0}, ValueError, "scratch_mib must be"),
    "endless budget": ({"scratch_mib": math.inf}, ValueError, "scratch_mib must be"),
    "hidden_gradient": ({"hidden_gradient": "none"}, ValueError, "hidden_gradient must be one of"),
    "sequence_parallel": ({"sequence_parallel": 1}, TypeError, "sequence_parallel must be"),
    "partial sequence": (
        {"sequence_parallel": True, "hidden_gradient": "partial"}, ValueError, "unsummed",
    ),
    "target value": ({"target": torch.full((N,), V)}, ValueError, "row 0 holds 10"),
    "engine": ({"engine": "fast"}, ValueError, "engine must be one of"),
    "scale": ({"scale": math.nan}, ValueError, "scale must be a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", WRONG)
def test_one_rank(name: str, function: Callable[..., Any]) -> None:
    replaced, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        function(**a_call(**replaced))


def test_gradient_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="gradient must be one of auto, forward, recompute"):
        linear_cross_entropy(**a_call(gradient="backward"))


def test_a_bad_target_of_a_late_chunk_is_named_by_its_row() -> None:
    call = a_call(scratch_mib=scratch_for(2, V, torch.float32))
    call["target"][9] = V
    call["target"][3] = -100
    for gradient in ("forward", "recompute"):
        with pytest.raises(ValueError, match="row 9 holds 10"):
            linear_cross_entropy(**call, gradient=gradient)
