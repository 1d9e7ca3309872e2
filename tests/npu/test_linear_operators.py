"""The fused head by CANN's fused operators: right, chosen where they fit, and lean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics
from vocab_parallel_ce.engines.contract import ELSEWHERE, IGNORED, Coefficients, Wanted
from vocab_parallel_ce.engines.npu import choice as npu_choice
from vocab_parallel_ce.engines.npu.linear import choice, functions, operators, probe
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.switches import LINEAR_VARIABLE
from vocab_parallel_ce.testing import Sharding
from vocab_parallel_ce.testing.shardings import even, sized

from ..cases import Findings
from ..linear.cases import (
    LocalHead,
    check_head_gradients,
    close,
    expected_head,
    head_batch,
    local_head,
    rank_of,
)
from ..npu_sim import ledger, linear
from ..npu_sim.strict import OperatorCall
from ..ranks import Pool

BF16, FP16 = torch.bfloat16, torch.float16
ROWS = 21
FORWARD, BACKWARD = linear.FORWARD_NAMES[0], linear.BACKWARD_NAMES[0]
Calls = list[OperatorCall]


@pytest.fixture
def fresh() -> Iterator[None]:
    """The device is asked anew, and again after the test."""
    asked = (choice.problem, npu_choice.why_not)
    for answers in asked:
        answers.cache_clear()
    yield
    for answers in asked:
        answers.cache_clear()


def _names(calls: Calls) -> list[str]:
    """Of these two, but those of the probe."""
    ours = [call for call in calls if call.name in (FORWARD, BACKWARD)]
    return [call.name for call in ours if call.columns != probe.IDS]


# Against whole logits in fp64

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight, ignore 7": {"weight": True, "ignore_index": 7},
    "smoothing": {"label_smoothing": 0.3},
    "z-loss": {"lse_square_scale": 0.02},
    "scale 0.5": {"scale": 0.5},
    "all": {
        "weight": True,
        "ignore_index": 7,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "scale": 2.0,
    },
}


def _on_npu(data: Any, sharding: Sharding, rank: int) -> LocalHead:
    mine = local_head(data, sharding, rank)
    return LocalHead(*(t.detach().to("npu").requires_grad_() for t in mine.leaves))


def _match(group: dist.ProcessGroup | None, sharding: Sharding, dtype: torch.dtype) -> list[int]:
    """Calls of the operators in each case."""
    from ..npu_sim.strict import calls

    rank, findings, counted = rank_of(group), Findings(), []
    for name, chosen in OPTIONS.items():
        options = dict(chosen)
        if dtype == FP16 and options.get("scale", 1) != 1:
            continue
        data = head_batch(ROWS, sharding.vocab_size, dtype, options.get("ignore_index", -100))
        given = dict(options)
        if options.pop("weight", False):
            options["weight"] = data.weight
            given["weight"] = data.weight.to("npu")
        for reduction in ("none", "mean"):
            want = expected_head(data, reduction=reduction, **options)
            mine = _on_npu(data, sharding, rank)
            calls.clear()
            loss = linear_cross_entropy(
                mine.hidden, mine.head, data.target.to("npu"), reduction=reduction, group=group,
                shard=sharding.shard(rank), **given,
            )  # fmt: skip
            assert isinstance(loss, Tensor)
            up = data.upstream if reduction == "none" else data.upstream[0]
            got = torch.autograd.grad(loss, mine.leaves[:2], up.to("npu", loss.dtype))
            counted.append(len(_names(calls)))
            exact, naive = want.losses
            wanted = want.gradients(lambda r, up=up: (r.loss * up.to(r.loss.dtype)).sum())  # type: ignore[misc]
            with findings:
                close(loss.cpu(), exact.loss, naive.loss, f"{name}, {reduction}")
                check_head_gradients(
                    (*(g.cpu() for g in got), None), wanted, sharding, rank, f"{name}, {reduction}"
                )
    findings.report()
    return counted


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_one_device(dtype: torch.dtype) -> None:
    assert set(_match(None, sized("padded", (300,), (5,)), dtype)) == {2}


@pytest.mark.parametrize("name", ["even", "padded", "one small"])
def test_two_devices(npu_pool: Pool, name: str) -> None:
    """A rank with fewer ids than the backward takes makes logits of them; the others do not."""
    plan = {
        "even": even(300, 2),
        "padded": sized("padded", (170, 130), (3, 4)),
        "one small": sized("one small", (100, 210)),
    }[name]
    first, second = npu_pool.run(_match, 2, (plan, BF16))
    assert set(first) == ({0} if name == "one small" else {2})
    assert set(second) == {2}


def _split(group: dist.ProcessGroup, sharding: Sharding) -> None:
    """A part of the sequence on each rank, three rows of each at a time."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data = head_batch(20, sharding.vocab_size, BF16)
    want = expected_head(data, reduction="mean", label_smoothing=0.1, lse_square_scale=0.01)
    mine = _on_npu(data, sharding, rank)
    part = mine.hidden.detach().chunk(world)[rank].clone().requires_grad_()
    loss = linear_cross_entropy(
        part, mine.head, data.target.to("npu"), group=group, sequence_parallel=True,
        label_smoothing=0.1, lse_square_scale=0.01, scratch_mib=6 * 150 * 2 / (1 << 20),
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    of_part, of_head = torch.autograd.grad(loss, (part, mine.head))
    (of_hidden, naive), of_weight, _ = want.gradients(lambda r: r.loss)
    close(loss.cpu(), want.losses[0].loss, want.losses[1].loss, "loss")
    own = slice(rank * 10, rank * 10 + 10)
    close(of_part.cpu(), of_hidden[own], naive[own], "hidden states")
    check_head_gradients((None, of_head.cpu(), None), [of_weight] * 3, sharding, rank, "head")


def test_a_split_sequence(npu_pool: Pool) -> None:
    npu_pool.run(_split, 2, (even(300, 2),))


def _statistics(group: dist.ProcessGroup | None, sharding: Sharding) -> None:
    """A gradient of lse alone, and of log_prob alone: two coefficients a row."""
    rank = rank_of(group)
    data = head_batch(ROWS, sharding.vocab_size, BF16)
    want = expected_head(data, reduction="none")
    mine = _on_npu(data, sharding, rank)
    out = linear_token_statistics(
        mine.hidden, mine.head, data.target.to("npu"), group=group, shard=sharding.shard(rank)
    )
    up, kept = data.upstream, data.target != -100
    close(out.lse.cpu(), want.losses[0].lse * kept, want.losses[1].lse, "lse")
    total = (out.lse * up.to("npu") - 2 * out.log_prob).sum()
    got = torch.autograd.grad(total, mine.leaves[:2])
    wanted = want.gradients(lambda r: (r.lse * kept * up + 2 * r.loss).sum())
    check_head_gradients((*(g.cpu() for g in got), None), wanted, sharding, rank, "statistics")


def test_statistics() -> None:
    _statistics(None, even(300, 1))


def _bits(group: dist.ProcessGroup, reduction: str) -> tuple[bytes, tuple[int | None, ...]]:
    data = head_batch(ROWS, 300, BF16)
    mine = _on_npu(data, even(300, 2), dist.get_rank(group))
    loss, sent = count_collectives(
        lambda: linear_cross_entropy(
            mine.hidden, mine.head, data.target.to("npu"), group=group, reduction=reduction
        )
    )
    _, back = count_collectives(loss.sum().backward)
    return loss.detach().cpu().numpy().tobytes(), (sent, back)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_gather_and_the_same_bits(npu_pool: Pool, reduction: str) -> None:
    first, second = npu_pool.run(_bits, 2, (reduction,))
    assert first == second
    assert first[1] == (1, 1)


@pytest.mark.usefixtures("fresh")
def test_a_bad_target_is_nan_and_with_check_an_error() -> None:
    data = head_batch(6, 300, BF16, ignored=0.0)
    data.target[4] = 300
    mine = _on_npu(data, even(300, 1), 0)
    loss = linear_cross_entropy(mine.hidden, mine.head, data.target.to("npu"), reduction="none")
    assert isinstance(loss, Tensor)
    assert loss.isnan().cpu().tolist() == [False] * 4 + [True, False]
    with pytest.raises(ValueError, match="row 4 holds 300"):
        linear_cross_entropy(mine.hidden, mine.head, data.target.to("npu"), check=True)


# Where they serve


def _call(**changed: Any) -> None:
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


BOTH = [FORWARD, BACKWARD]
SERVED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "128 ids": ({}, BOTH),
    "127 ids": ({"ids": 127}, []),
    "fp16": ({"dtype": FP16}, BOTH),
    "fp32": ({"dtype": torch.float32}, []),
    "a bias": ({"biased": True}, []),
    "a softcap": ({"softcap": 30.0}, []),
    "entropy": ({"statistics": True, "entropy": True}, []),
    "argmax": ({"statistics": True, "argmax": True}, []),
    "statistics": ({"statistics": True}, BOTH),
    "statistics without a target": ({"statistics": False}, BOTH),
    "selected ids": ({"statistics": True, "selected": torch.zeros(5, 1).long()}, []),
    "the sum of squares": ({"statistics": True, "sum_p_squared": True}, []),
    "a scale for each row": ({"scale": torch.full((5,), 0.5)}, []),
    "width": ({"width": 65_534}, BOTH),
    "more width": ({"width": 65_535}, []),
    "scale 0.25": ({"scale": 0.25}, BOTH),
    "scale 0.3": ({"scale": 0.3}, []),
    "scale 0.5 in fp16": ({"scale": 0.5, "dtype": FP16}, []),
    "gradients in forward": ({"gradient": "forward"}, []),
    "recompute": ({"gradient": "recompute"}, BOTH),
    "the eager engine": ({"engine": "eager"}, []),
    "a frozen head": ({"frozen": ("head",)}, []),
    "frozen hidden states": ({"frozen": ("hidden",)}, []),
    "nothing to be learned": ({"frozen": ("head", "hidden")}, [FORWARD]),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_they_serve(name: str, calls: Calls) -> None:
    options, expected = SERVED[name]
    _call(**{n: v.to("npu") if isinstance(v, Tensor) else v for n, v in options.items()})
    assert _names(calls) == expected


def test_what_is_asked_for(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in (("chunks", []), ("fused", BOTH), ("auto", BOTH)):
        monkeypatch.setenv(LINEAR_VARIABLE, word)
        calls.clear()
        _call()
        assert _names(calls) == expected
    monkeypatch.setenv(LINEAR_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"NPU_LINEAR='fast' is not one of auto, fused, chunks"):
        _call()


@pytest.mark.parametrize("way", ["fused", "recompute by chunks", "forward by chunks"])
def test_ignored_rows_are_dropped_on_request(
    way: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = head_batch(64, 300, BF16, ignored=0.7)
    kept = int((data.target != -100).sum())
    want = expected_head(data, reduction="mean")
    mine = _on_npu(data, even(300, 1), 0)
    monkeypatch.setenv(LINEAR_VARIABLE, "fused" if way == "fused" else "chunks")
    rows = []
    for drop in (False, True):
        calls.clear()
        loss = linear_cross_entropy(
            mine.hidden, mine.head, data.target.to("npu"), drop_ignored=drop,
            gradient="forward" if "forward" in way else "recompute",
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        got = torch.autograd.grad(loss, mine.leaves[:2])
        rows.append({call.rows for call in calls if call.columns == 300})
        close(loss.cpu(), want.losses[0].loss, want.losses[1].loss, way)
        wanted = want.gradients(lambda r: r.loss)
        check_head_gradients((*(g.cpu() for g in got), None), wanted, even(300, 1), 0, way)
    assert rows == [{64}, {kept}]


def _other_hidden(group: dist.ProcessGroup, check: bool) -> str:
    data = head_batch(ROWS, 300, BF16, seed=0)
    mine = _on_npu(data, even(300, 2), dist.get_rank(group))
    hidden = (mine.hidden.detach() * (1 + dist.get_rank(group))).requires_grad_()
    try:
        linear_cross_entropy(hidden, mine.head, data.target.to("npu"), group=group, check=check)
    except ValueError as problem:
        return str(problem)
    return ""


def test_hidden_states_are_compared_with_check(npu_pool: Pool) -> None:
    """Without it nobody would wait for the answer."""
    for text in npu_pool.run(_other_hidden, 2, (True,)):
        assert "ranks disagree on input: the hidden states of rank 0 and rank 1" in text
    assert npu_pool.run(_other_hidden, 2, (False,)) == ["", ""]


def _dropped(group: dist.ProcessGroup) -> str:
    """Another number of kept rows would mean other chunks: told instead."""
    data = head_batch(ROWS, 300, BF16)
    mine = _on_npu(data, even(300, 2), dist.get_rank(group))
    target = data.target.clone()
    if dist.get_rank(group) == 1:
        target[:9] = -100
    try:
        linear_cross_entropy(
            mine.hidden, mine.head, target.to("npu"), group=group, drop_ignored=True,
            gradient="forward", scratch_mib=4 * 150 * 2 / (1 << 20),
        )  # fmt: skip
    except ValueError as problem:
        return str(problem)
    return ""


def test_other_targets_where_rows_are_dropped_raise_together(npu_pool: Pool) -> None:
    first, second = npu_pool.run(_dropped, 2)
    assert first == second
    assert "ranks disagree on target" in first


@pytest.mark.usefixtures("fresh")
def test_compiled(calls: Calls) -> None:
    """The device is asked while the compiler looks on."""
    torch._dynamo.reset()
    data = head_batch(ROWS, 300, BF16)
    mine, target = _on_npu(data, even(300, 1), 0), data.target.to("npu")

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, head, target, label_smoothing=0.1)
        assert isinstance(out, Tensor)
        return out

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(mine.hidden, mine.head)
    gradients = torch.autograd.grad(got, mine.leaves[:2])
    assert _names(calls) == BOTH
    want = loss(mine.hidden, mine.head)
    assert torch.equal(got, want)
    for a, b in zip(gradients, torch.autograd.grad(want, mine.leaves[:2]), strict=True):
        assert torch.equal(a, b)


# The probe


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
    _call()
    assert _names(calls) == []
    monkeypatch.setenv(LINEAR_VARIABLE, "fused")
    with pytest.raises(RuntimeError, match="NPU_LINEAR='fused' cannot serve") as caught:
        _call()
    assert said in str(caught.value)


@pytest.mark.usefixtures("fresh")
def test_a_torch_npu_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BACKWARD_NAMES", ("no_such_operator",))
    assert "has neither no_such_operator; 2.6.0.post5 is the first" in choice.told(BF16)
    _call()


@pytest.mark.parametrize(("cann", "told"), [("8.3.0", "chunks: "), ("8.5.0", "fused operators")])
@pytest.mark.usefixtures("fresh")
def test_versions_of_cann(cann: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_SIM_CANN", cann)
    assert choice.told(BF16).startswith(told)
    _call()


def test_every_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.FORWARD_NAMES == linear.FORWARD_NAMES
    assert operators.BACKWARD_NAMES == linear.BACKWARD_NAMES
    for names in (operators.FORWARD_NAMES, operators.BACKWARD_NAMES):
        for name in names:
            monkeypatch.setattr(torch.ops, "npu", SimpleNamespace(**{name: len}))
            assert operators.found(names) is len


# What they move


def test_bytes() -> None:
    """Nothing of the size of the logits, and a few readings of the operands: see ``traffic``."""
    rows, width, ids = 1024, 64, 2048
    hidden, head = torch.randn(rows, width).to("npu", BF16), torch.randn(ids, width).to("npu", BF16)
    local = torch.arange(rows) * 7 % ids
    local[::3], local[1::3] = ELSEWHERE, IGNORED
    local = local.to("npu")
    out = torch.empty(3, rows, device="npu")
    g = torch.ones(rows, device="npu")
    vectors = 300 * rows
    with ledger.recording() as forward:
        functions.partials(hidden, head, local, None, 1.0, Wanted(), out)
    with ledger.recording() as backward:
        functions.gradients(
            hidden, head, out[0], out[1], local, Coefficients(g, g), None, 1.0, True
        )
    operands = hidden.nbytes + head.nbytes
    for entries, allowed in ((forward, operands), (backward, 2 * operands + 2 * hidden.nbytes)):
        assert max(entry.largest for entry in entries) <= ids * width < rows * ids
        assert operands <= sum(entry.moved.bytes for entry in entries) <= allowed + vectors
    assert [e.operator for e in backward].count(BACKWARD) == 1


# The stand-in


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
