"""Which way serves, what the probe says of a device that answers wrongly, and bad settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.engines import select
from vocab_parallel_ce.engines.contract import Coefficients
from vocab_parallel_ce.engines.npu import choice, chunks, engine, max_sum, operator, probe
from vocab_parallel_ce.switches import SCRATCH_MIB, SCRATCH_VARIABLE, WAY_VARIABLE
from vocab_parallel_ce.testing.engine import Subject, random_shard

from ..npu_sim.operators import FUSED_NAMES, OperatorCall
from .ways import SUBJECTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIB = 1 << 20


@pytest.fixture
def fresh() -> Iterator[None]:
    """Verdicts of the probe are kept for the process: not those of a device that was tampered."""
    choice.why_not.cache_clear()
    yield
    choice.why_not.cache_clear()


# The choice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_max_sum_where_it_answers(dtype: torch.dtype) -> None:
    assert choice.way_for(dtype) is max_sum
    assert choice.told(dtype) == "max_sum"


@pytest.mark.parametrize("word", ["max_sum", "operator"])
def test_a_way_by_its_name(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAY_VARIABLE, word)
    assert choice.way_for(torch.bfloat16) is {"max_sum": max_sum, "operator": operator}[word]
    assert choice.told(torch.bfloat16) == f"{word}, by {WAY_VARIABLE}"


@pytest.mark.parametrize("word", ["", "fused", "MAX_SUM", "auto,operator"])
def test_an_unknown_way_is_explained(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAY_VARIABLE, word)
    x, y = torch.randn(2, 3).to("npu"), torch.zeros(2, dtype=torch.int64).to("npu")
    with pytest.raises(ValueError, match="is not one of auto, max_sum, operator, triton") as caught:
        cross_entropy(x, y)
    assert f"{WAY_VARIABLE}={word!r}" in str(caught.value)


def test_triton_without_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAY_VARIABLE, "triton")
    x, y = torch.randn(2, 3).to("npu"), torch.zeros(2, dtype=torch.int64).to("npu")
    with pytest.raises(RuntimeError, match=r"NPU_WAY='triton' cannot serve .*: triton") as caught:
        cross_entropy(x, y)
    assert "unset the variable, or set it to 'operator'" in str(caught.value)


# The probe


def _tampered(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The kernel with another result: ``change`` of the softmax, the sums and the logits."""
    real = max_sum.operator()

    def kernel(top: Tensor, total: Tensor, zeros: Tensor, *, vocab_parallel_logits: Tensor) -> Any:
        x = vocab_parallel_logits
        return zeros, change(real(top, total, zeros, vocab_parallel_logits=x)[1], total, x)

    return kernel


def _zero_times_infinity(p: Tensor, total: Tensor, x: Tensor) -> Tensor:
    return torch.where(total[:, None].isinf(), torch.nan, p)


def _no_remainder(p: Tensor, total: Tensor, x: Tensor) -> Tensor:
    p[:, 16_000:] = 0.0
    return p


def _rounded(p: Tensor, total: Tensor, x: Tensor) -> Tensor:
    return p.bfloat16()


def _only_true_sums(p: Tensor, total: Tensor, x: Tensor) -> Tensor:
    return torch.where(total[:, None] < 0, torch.nan, p)


def _minus_infinity_is_nan(p: Tensor, total: Tensor, x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, torch.nan, p)


def _fp16_is_served_elsewhere(p: Tensor, total: Tensor, x: Tensor) -> Tensor:
    return p * 2 if x.dtype == torch.float16 else p


@pytest.mark.parametrize(
    ("change", "dtypes", "said"),
    [
        (_zero_times_infinity, DTYPES, "with a sum of infinity: element 0 is nan, not 0.0"),
        (_no_remainder, DTYPES, "with sum 1: element 16000 is 0.0, not 0.0"),
        (_rounded, DTYPES, "its kernel gives torch.bfloat16, not torch.float32"),
        (_only_true_sums, DTYPES, "with a negative sum: element 0 is nan, not -"),
        (_minus_infinity_is_nan, DTYPES, "with a sum of 2.5: element 3 is nan, not 0.0"),
        (_fp16_is_served_elsewhere, DTYPES[2:], "float16, the kernel alone with sum 1: element 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.usefixtures("fresh")
def test_a_device_that_answers_wrongly_keeps_the_operator(
    change: Any, dtypes: tuple[torch.dtype, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what it gave."""
    kernel = _tampered(change)
    monkeypatch.setattr(max_sum, "operator", lambda: kernel)
    for dtype in DTYPES:
        expected = operator if dtype in dtypes else max_sum
        assert choice.way_for(dtype) is expected
        assert (said in choice.told(dtype)) == (dtype in dtypes)
    monkeypatch.setenv(WAY_VARIABLE, "max_sum")
    with pytest.raises(RuntimeError) as caught:
        choice.way_for(dtypes[0])
    assert said in str(caught.value)


@pytest.mark.usefixtures("fresh")
def test_a_put_that_misses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 alone: the kernel is right, what follows it is not."""
    real = Tensor.put_

    def put(self: Tensor, index: Tensor, source: Tensor) -> Tensor:
        return self if self.dtype == torch.float16 else real(self, index, source)

    monkeypatch.setattr(Tensor, "put_", put)
    assert choice.way_for(torch.float32) is max_sum
    assert choice.way_for(torch.bfloat16) is operator
    assert "bfloat16, the gradient of a row with a target at the end" in str(
        choice.why_not("max_sum", torch.bfloat16)
    )


@pytest.mark.usefixtures("fresh")
def test_a_torch_npu_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(max_sum, "NAMES", ("no_such_operator",))
    assert max_sum.operator() is None
    assert choice.way_for(torch.float32) is operator
    assert "has neither no_such_operator; 2.6.0.post5 is the first" in choice.told(torch.float32)
    monkeypatch.setenv(WAY_VARIABLE, "max_sum")
    x, y = torch.randn(2, 3).to("npu"), torch.zeros(2, dtype=torch.int64).to("npu")
    with pytest.raises(RuntimeError, match="has neither no_such_operator") as caught:
        cross_entropy(x, y)
    assert "NPU_WAY='max_sum' cannot serve torch.float32 logits here" in str(caught.value)


def test_either_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max_sum.NAMES == FUSED_NAMES
    for name in FUSED_NAMES:
        monkeypatch.setattr(torch.ops, "npu", SimpleNamespace(**{name: len}))
        assert max_sum.operator() is len


@pytest.mark.parametrize(
    ("cann", "told"),
    [
        ("8.3.0", "operator; not max_sum: bfloat16: .*WithMaxSum is not in libopapi.so of CANN 8"),
        ("8.5.0", "max_sum$"),
        ("9.0.0", "max_sum$"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_versions_of_cann(cann: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_SIM_CANN", cann)
    assert re.match(told, choice.told(torch.bfloat16))
    x, y = torch.zeros(2, 8).to("npu").requires_grad_(), torch.tensor([0, -100]).to("npu")
    loss = cross_entropy(x, y)
    loss.backward()
    assert abs(loss.item() - 3 * 0.6931472) < 1e-6
    monkeypatch.setenv(WAY_VARIABLE, "max_sum")
    if cann == "8.3.0":
        with pytest.raises(RuntimeError, match=r"bfloat16: .*WithMaxSum is not in libopapi.so"):
            choice.way_for(torch.bfloat16)


def test_the_probe_is_short(calls: list[OperatorCall]) -> None:
    """Three calls of the kernel on a few rows, one of them in each pass."""
    assert probe.of_max_sum(torch.bfloat16) is None
    assert [(call.rows, call.columns) for call in calls] == [(5, 16_001), (4, 16_001), (5, 16_001)]


# Scratch


def _properties(size: Any) -> Any:
    return SimpleNamespace() if size is None else SimpleNamespace(L2_cache_size=size)


@pytest.mark.parametrize("told", [None, 0, -1, "?"])
def test_a_card_whose_properties_tell_nothing(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.get_device_module("npu")
    monkeypatch.delenv(SCRATCH_VARIABLE, raising=False)
    monkeypatch.setattr(card, "get_device_properties", lambda index: _properties(told))
    assert chunks.cache_bytes() is None
    chunks._scratch_of_card.cache_clear()
    assert chunks.scratch_bytes() == SCRATCH_MIB * MIB
    monkeypatch.setattr(card, "get_device_properties", lambda index: _properties(192 * MIB))
    assert chunks.cache_bytes() == 192 * MIB


# The target's column


def test_a_stride_that_no_view_can_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's column is put a range of rows at a time where a flat view would be too long."""
    from vocab_parallel_ce.engines.npu import target_column

    shard = random_shard(12, 40, torch.bfloat16)
    ones = torch.ones(12)
    c = Coefficients(ones, 0.5 * ones)
    before = SUBJECTS["max_sum"].gradient(shard, ones, ones, c)
    for most in (39, 40, 100, 479):
        monkeypatch.setattr(target_column, "_LONGEST_VIEW", most)
        assert torch.equal(SUBJECTS["max_sum"].gradient(shard, ones, ones, c), before)


def test_the_engine_is_chosen_before_the_way() -> None:
    x = torch.randn(2, 3).to("npu")
    chosen: Any = select("auto", x)
    assert chosen is engine


@pytest.mark.parametrize("way", SUBJECTS)
def test_a_replaced_view_loses_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpeed's torch.Tensor.view copies what is not dense: the target is put into the result."""
    real = Tensor.view
    shard = random_shard(16, 130, torch.bfloat16)

    def view(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return real(tensor if tensor.is_contiguous() else tensor.contiguous(), *args, **options)

    monkeypatch.setattr(Tensor, "view", view)
    subject = Subject(SUBJECTS[way].engine, "npu", 16, sums_as_logs=way == "operator")
    subject.check_gradient(shard)
    subject.check_partials(shard)


@pytest.mark.parametrize("way", ["max_sum", "operator"])
@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms(
    warn_only: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is refused, the same bits come out, and the setting is as before."""
    monkeypatch.setenv(WAY_VARIABLE, way)
    x, y = torch.randn(12, 40).to("npu").requires_grad_(), torch.arange(12).to("npu")
    (before,) = torch.autograd.grad(cross_entropy(x, y, label_smoothing=0.1), x)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        loss = cross_entropy(x, y, label_smoothing=0.1)
        (after,) = torch.autograd.grad(loss, x)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(after, before)
