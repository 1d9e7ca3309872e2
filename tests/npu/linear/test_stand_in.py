"""The stand-ins of the two operators are as strict as CANN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ...npu_sim import linear
from .calls import BACKWARD, BF16, FORWARD, FP16


def _operands() -> dict[str, Any]:
    return {
        "input": torch.randn(9, 8).to("npu", BF16),
        "weight": torch.randn(128, 8).to("npu", BF16),
        "target": torch.arange(9).int().to("npu"),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": torch.zeros(9, 8)}, "not fp16 or bf16"),
        ({"weight": torch.zeros(128, 8, dtype=FP16)}, "input is torch.bfloat16, weight"),
        ({"weight": torch.zeros(128, 7, dtype=BF16)}, "input has 8 columns, weight 7"),
        ({"target": torch.zeros(9)}, "target is torch.float32"),
        ({"target": torch.zeros(8).int()}, "target has shape"),
        ({"end": 129}, "more ids than weight has rows"),
        ({"start": -1}, r"the shard is \[-1, 128\)"),
        ({"return_logits": True}, "corrupt losses"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_the_stand_in_of_the_forward_is_strict(change: dict[str, Any], said: str) -> None:
    given = {**_operands(), "start": 0, "end": 128, "return_logits": False}
    given |= {n: v.to("npu") if isinstance(v, Tensor) else v for n, v in change.items()}
    with pytest.raises(RuntimeError, match=said):
        getattr(torch.ops.npu, FORWARD)(*given.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grad": torch.ones(9, dtype=BF16)}, "grad is torch.bfloat16, not fp32"),
        ({"weight": torch.zeros(127, 8, dtype=BF16)}, "weight.size.0. is 127"),
        ({"target_mask": torch.zeros(1, dtype=torch.uint8)}, "too few bits for 9 rows"),
        ({"masked_target": torch.full((9,), -1).int()}, "ids outside"),
        ({"label_smoothing": 0.1}, "only 0 is served"),
        ({"logits_max": None}, "logits_max is missing"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_the_stand_in_of_the_backward_is_strict(change: dict[str, Any], said: str) -> None:
    operands = _operands()
    given = {
        "grad": torch.ones(9),
        "input": operands["input"],
        "weight": operands["weight"],
        "target_mask": torch.zeros(2, dtype=torch.uint8),
        "masked_target": operands["target"],
        "label_smoothing": 0.0,
        "logits_max": torch.zeros(9),
        "sum_exp_logits": torch.ones(9),
        **change,
    }
    given = {n: v.to("npu") if isinstance(v, Tensor) else v for n, v in given.items()}
    with pytest.raises(RuntimeError, match=said):
        getattr(torch.ops.npu, BACKWARD)(**given)


def test_the_stand_ins_have_the_schemas_of_torch_npu() -> None:
    for name, schema in ((FORWARD, linear.FORWARD_SCHEMA), (BACKWARD, linear.BACKWARD_SCHEMA)):
        assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{name}{schema}"


def test_the_end_of_a_shard_does_not_belong_to_it() -> None:
    given = _operands()
    target = torch.full((9,), 128).int().to("npu")
    out = getattr(torch.ops.npu, FORWARD)(given["input"], given["weight"], target, 0, 128, False)
    assert out[3].cpu().tolist() == [255, 255]
    assert out[4].cpu().tolist() == [0] * 9
