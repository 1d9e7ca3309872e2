"""What the stand-in operator refuses, as the operator itself does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..npu_sim.operators import OperatorCall
from .operator_calls import C, N, backward, forward, some_logits, some_target


def _forward_error(calls: list[OperatorCall], *args: Any, **options: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        forward(*args, **options)
    assert not calls
    line = str(caught.value)
    assert line.startswith("npu_cross_entropy_loss: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((C,), "input has shape [53], not [N, C]"),
        ((N, 1, C), "input has shape [37, 1, 53], not [N, C]"),
        ((0, C), "input has shape [0, 53]: it is empty"),
        ((N, 0), "input has shape [37, 0]: it is empty"),
        ((200_001, 2), "N is 200001, more than 200000"),
    ],
)
def test_shape_of_input(calls: list[OperatorCall], shape: tuple[int, ...], rule: str) -> None:
    assert rule in _forward_error(calls, torch.zeros(shape), torch.zeros(shape[0]).long())


def test_the_most_rows_are_taken(calls: list[OperatorCall]) -> None:
    forward(torch.zeros(200_000, 2), torch.zeros(200_000).long(), None, "none")
    assert [call.rows for call in calls] == [200_000]


def test_dtypes(calls: list[OperatorCall]) -> None:
    x, target = some_logits(), some_target()
    assert "input is torch.int32" in _forward_error(calls, x.int(), target)
    fp64 = torch.zeros(N, C, dtype=torch.float64, device="npu")
    assert "input is torch.float64" in _forward_error(calls, fp64, target)
    assert "target is torch.int32; A2 and A3" in _forward_error(calls, x, target.int())
    half = torch.ones(C, dtype=torch.bfloat16)
    assert "weight is torch.bfloat16, not fp32" in _forward_error(calls, x.bfloat16(), target, half)


def test_other_shapes(calls: list[OperatorCall]) -> None:
    x, target = some_logits(), some_target()
    assert "target has shape [36]" in _forward_error(calls, x, target[1:])
    assert "target has shape [37, 1]" in _forward_error(calls, x, target[:, None])
    assert "weight has shape [54]" in _forward_error(calls, x, target, torch.ones(C + 1))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"reduction": "batchmean"}, "reduction='batchmean' is not known"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 is not in [0, 1]"),
        ({"label_smoothing": 1.1}, "label_smoothing=1.1 is not in [0, 1]"),
        ({"lse_square_scale_for_zloss": 1e-4}, "no CANN has z-loss enabled"),
        ({"return_zloss": True}, "no CANN has z-loss enabled"),
    ],
)
def test_options(calls: list[OperatorCall], options: dict[str, Any], rule: str) -> None:
    assert rule in _forward_error(calls, some_logits(), some_target(), **options)


@pytest.mark.parametrize("bad", [-101, -1, C, C + 1, 2**40])
def test_a_target_outside_the_classes(calls: list[OperatorCall], bad: int) -> None:
    target = some_target()
    target[11] = bad
    line = f"target[11] is {bad}: it is not in [0, 53)"
    assert line in _forward_error(calls, some_logits(), target)
    log_prob = some_logits().log_softmax(1)
    with pytest.raises(RuntimeError, match=r"target\[11\] is "):
        backward(torch.ones(1), log_prob, target)
    assert not calls


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, C, C + 9])
def test_ignore_index_by_version(
    calls: list[OperatorCall], monkeypatch: pytest.MonkeyPatch, ignore_index: int
) -> None:
    x, target = some_logits(), some_target()
    target[target == ignore_index] = 4
    target[11] = ignore_index
    options: dict[str, Any] = {"reduction": "none", "ignore_index": ignore_index}
    monkeypatch.setenv("NPU_SIM_CANN", "9.0.0")
    loss, _, _, _ = forward(x, target, **options)
    assert (loss == 0).nonzero().tolist() == [[11]]
    gradient = backward(torch.ones(N), x.log_softmax(1), target, **options)
    assert (gradient == 0).all(1).nonzero().tolist() == [[11]]
    calls.clear()
    monkeypatch.setenv("NPU_SIM_CANN", "8.5.0")
    if ignore_index >= 0:
        assert torch.equal(forward(x, target, **options)[0], loss)
    else:
        line = f"target[11] is {ignore_index}: CANN 8.5.0 reads out of bounds"
        assert line in _forward_error(calls, x, target, **options)
        with pytest.raises(RuntimeError, match="reads out of bounds"):
            backward(torch.ones(N), x.log_softmax(1), target, **options)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"grad_loss": torch.ones(N).bfloat16()}, "grad_loss is torch.bfloat16 but log_prob is"),
        ({"grad_loss": torch.ones(1)}, "grad_loss has shape [1], reduction='none' wants [37]"),
        ({"reduction": "sum"}, "grad_loss has shape [37], reduction='sum' wants [1]"),
        ({"grad_loss": torch.ones(N, 1)}, "grad_loss has shape [37, 1]"),
        ({"log_prob": torch.zeros(N)}, "log_prob has shape [37], not [N, C]"),
        ({"target": torch.zeros(N).int()}, "target is torch.int32; A2 and A3"),
        ({"target": torch.zeros(N - 1).long()}, "target has shape [36]"),
        ({"weight": torch.ones(C).bfloat16()}, "weight is torch.bfloat16, not fp32"),
        ({"label_smoothing": 0.1}, "no gradient with label_smoothing=0.1"),
        ({"lse_square_scale_for_zloss": 0.1}, "no CANN has z-loss enabled"),
        ({"grad_zloss": torch.ones(N, device="meta")}, "no CANN has z-loss enabled"),
        ({"reduction": "mean", "grad_loss": torch.ones(1), "ignore_index": 3}, "takes no weight"),
        (
            {"reduction": "mean", "grad_loss": torch.ones(1), "weight": torch.ones(C)},
            "takes no weight",
        ),
    ],
)
def test_backward_refuses(calls: list[OperatorCall], changed: dict[str, Any], rule: str) -> None:
    arguments: dict[str, Any] = {
        "grad_loss": torch.ones(N),
        "log_prob": some_logits().log_softmax(1),
        "target": some_target(),
        "reduction": "none",
    }
    if "grad_zloss" in changed:
        changed = {"grad_zloss": torch.ones(N, device="npu")}
    with pytest.raises(RuntimeError) as caught:
        backward(**{**arguments, **changed})
    assert rule in str(caught.value)
    assert not calls


def test_the_cpu_has_no_such_operator() -> None:
    with pytest.raises(NotImplementedError):
        torch.ops.npu.npu_cross_entropy_loss.default(some_logits(), some_target())
