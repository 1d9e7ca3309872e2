"""A device without the operators, or whose operators answer wrongly, makes logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.engines.npu.linear import choice, operators
from vocab_parallel_ce.switches import LINEAR_VARIABLE

from ...npu_sim import linear
from .calls import BACKWARD, BF16, FORWARD, Calls, call_once, names_of


def _forward(change: Callable[[list[Tensor]], None]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        out = list(getattr(torch.ops.npu, FORWARD)(*arguments))
        change(out)
        return tuple(out)

    return kernel


def _backward(change: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[..., Any]:
    def kernel(grad: Tensor, *arguments: Any, **named: Any) -> Any:
        of_hidden, of_weight = getattr(torch.ops.npu, BACKWARD)(grad, *arguments, **named)
        change(grad, of_hidden, of_weight)
        return of_hidden, of_weight

    return kernel


def _mask_from_the_top(out: list[Tensor]) -> None:
    out[3] = out[3] ^ 255


def _end_included(out: list[Tensor]) -> None:
    out[2][2:4] = -1.0


def _nothing_for_negative(grad: Tensor, of_hidden: Tensor, of_weight: Tensor) -> None:
    of_hidden.masked_fill_((grad < 0)[:, None], 0.0)


def _poor_weight(grad: Tensor, of_hidden: Tensor, of_weight: Tensor) -> None:
    of_weight *= 1.1


@pytest.mark.parametrize(
    ("names", "kernel", "said"),
    [
        ("FORWARD_NAMES", _forward(_mask_from_the_top), "its mask: off by"),
        ("FORWARD_NAMES", _forward(_end_included), "x_y - m of the forward operator: off by"),
        ("BACKWARD_NAMES", _backward(_nothing_for_negative), "gradient of hidden states, plain"),
        ("BACKWARD_NAMES", _backward(_poor_weight), "gradient of the weight, plain loss: off by"),
    ],
    ids=["mask", "end", "negative", "weight"],
)
@pytest.mark.usefixtures("fresh")
def test_a_device_that_answers_wrongly_makes_logits(
    names: str, kernel: Any, said: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what it gave."""
    real = operators.found
    monkeypatch.setattr(
        operators, "found", lambda n: kernel if n is getattr(operators, names) else real(n)
    )
    assert said in choice.told(BF16)
    calls.clear()
    call_once()
    assert names_of(calls) == []
    monkeypatch.setenv(LINEAR_VARIABLE, "fused")
    with pytest.raises(RuntimeError, match="NPU_LINEAR='fused' cannot serve") as caught:
        call_once()
    assert said in str(caught.value)


@pytest.mark.usefixtures("fresh")
def test_a_torch_npu_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BACKWARD_NAMES", ("no_such_operator",))
    assert "has neither no_such_operator; 2.6.0.post5 is the first" in choice.told(BF16)
    call_once()


@pytest.mark.parametrize(("cann", "told"), [("8.3.0", "chunks: "), ("8.5.0", "fused operators")])
@pytest.mark.usefixtures("fresh")
def test_versions_of_cann(cann: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_SIM_CANN", cann)
    assert choice.told(BF16).startswith(told)
    call_once()


def test_every_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.FORWARD_NAMES == linear.FORWARD_NAMES
    assert operators.BACKWARD_NAMES == linear.BACKWARD_NAMES
    for names in (operators.FORWARD_NAMES, operators.BACKWARD_NAMES):
        for name in names:
            monkeypatch.setattr(torch.ops, "npu", SimpleNamespace(**{name: len}))
            assert operators.found(names) is len
