"""Wrong arguments of the fused head: one clear error, on every rank, and nothing that hangs."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import (
    VocabShard,
    linear_cross_entropy,
    linear_token_statistics,
    repeated_head,
)

from ..ranks import Pool
from .cases import scratch_for

N, H, V = 12, 4, 10
FUNCTIONS: tuple[Callable[..., Any], ...] = (linear_cross_entropy, linear_token_statistics)


def _call(**replaced: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(N, H, generator=g).requires_grad_(),
        "linear_weight": torch.randn(V, H, generator=g).requires_grad_(),
        "target": torch.randint(V, (N,), generator=g),
        **replaced,
    }


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
        function(**_call(**replaced))


def test_gradient_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="gradient must be one of auto, forward, recompute"):
        linear_cross_entropy(**_call(gradient="backward"))


def test_a_bad_target_of_a_late_chunk_is_named_by_its_row() -> None:
    call = _call(scratch_mib=scratch_for(2, V, torch.float32))
    call["target"][9] = V
    call["target"][3] = -100
    for gradient in ("forward", "recompute"):
        with pytest.raises(ValueError, match="row 9 holds 10"):
            linear_cross_entropy(**call, gradient=gradient)


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("shape", [(0, H), (2, 0, H), (3, 0), (0, 0)], ids=str)
def test_no_rows_and_no_width(shape: tuple[int, ...], gradient: str) -> None:
    call = _call(
        input=torch.zeros(shape).requires_grad_(),
        linear_weight=torch.zeros(V, shape[-1]).requires_grad_(),
        target=torch.zeros(shape[:-1]).long(),
    )
    loss = linear_cross_entropy(**call, reduction="sum", gradient=gradient)
    assert isinstance(loss, Tensor)
    loss.backward()
    for leaf in (call["input"], call["linear_weight"]):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert bool((leaf.grad == 0).all())
    rows = math.prod(shape[:-1])
    torch.testing.assert_close(loss, torch.tensor(rows * math.log(V)))


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_width_of_one_and_one_row(gradient: str) -> None:
    hidden, head = torch.randn(1, requires_grad=True), torch.randn(V, 1, requires_grad=True)
    target = torch.tensor(3)
    loss = linear_cross_entropy(hidden, head, target, gradient=gradient)
    assert isinstance(loss, Tensor)
    want = F.cross_entropy(F.linear(hidden, head), target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(want, (hidden, head))
    )


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_ignored_rows_hold_goes_nowhere(value: float, gradient: str) -> None:
    call = _call()
    call["target"][::2] = -100
    clean = linear_cross_entropy(**call, gradient=gradient)
    assert isinstance(clean, Tensor)
    call["input"] = call["input"].detach().clone()
    call["input"][::2] = value
    call["input"].requires_grad_()
    loss = linear_cross_entropy(**call, gradient=gradient)
    assert isinstance(loss, Tensor)
    assert torch.equal(loss, clean)
    of_hidden, of_head = torch.autograd.grad(loss, (call["input"], call["linear_weight"]))
    assert bool(of_head.isfinite().all())
    assert bool((of_hidden[::2] == 0).all())


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_fp16_logits_that_overflow_are_not_hidden(gradient: str) -> None:
    hidden = torch.full((2, H), 200.0, dtype=torch.float16, requires_grad=True)
    head = torch.full((V, H), 200.0, dtype=torch.float16)
    loss = linear_cross_entropy(hidden, head, torch.tensor([0, 1]), gradient=gradient)
    assert isinstance(loss, Tensor)
    assert not bool(loss.isfinite())
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not bool(grad.isfinite().any())


def test_torch_func_is_served_on_one_rank() -> None:
    call = _call()
    hidden, head, target = (call[n] for n in ("input", "linear_weight", "target"))

    def loss(hidden: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, head, target)
        assert isinstance(out, Tensor)
        return out

    got = torch.func.grad(loss)(hidden.detach())
    (want,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head), target), hidden)
    torch.testing.assert_close(got, want)


def test_shapes_alone() -> None:
    """On meta a model's shapes are counted; gradients have theirs."""
    call = _call(
        input=torch.zeros(N, H, device="meta").requires_grad_(),
        linear_weight=torch.zeros(V, H, device="meta").requires_grad_(),
        target=torch.zeros(N, device="meta").long(),
    )
    loss = linear_cross_entropy(**call)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert call["linear_weight"].grad.shape == (V, H)
    assert linear_token_statistics(**call, entropy=True).entropy is not None


# Several ranks


def _sharded(group: dist.ProcessGroup, **replaced: Any) -> dict[str, Any]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    head = torch.randn(V * world, H, generator=g)
    return {
        "input": torch.randn(N, H, generator=g).requires_grad_(),
        "linear_weight": head.chunk(world)[rank].clone().requires_grad_(),
        "target": torch.randint(V * world, (N,), generator=g),
        "group": group,
        "scratch_mib": scratch_for(5, V, torch.float32),
        **replaced,
    }


def _said(call: dict[str, Any]) -> str:
    try:
        linear_cross_entropy(**call)
    except (ValueError, TypeError, RuntimeError) as problem:
        return str(problem)
    return ""


def _disagreement(group: dist.ProcessGroup, name: str, gradient: str) -> str:
    bad = dist.get_rank(group) == 1
    call = _sharded(group, gradient=gradient)
    if name == "same head" and bad:
        first = torch.Generator().manual_seed(0)
        call["linear_weight"] = torch.randn(2 * V, H, generator=first)[:V].requires_grad_()
    if name == "same head":
        call["target"] = call["target"] % V
    if bad and name == "hidden":
        call["input"] = torch.randn(N, H, generator=torch.Generator().manual_seed(9))
        call["input"].requires_grad_()
    if bad and name == "hidden sign":
        call["input"] = (-call["input"]).detach().requires_grad_()
    if bad and name == "hidden NaN":
        call["input"] = (call["input"] * math.nan).detach().requires_grad_()
    if bad and name == "target":
        call["target"] = call["target"].roll(1)
    if bad and name == "ignored":  # another number of kept rows: other chunks
        call["target"] = torch.where(torch.arange(N) < 9, -100, call["target"])
    if bad and name == "value":
        call["target"][11] = 2 * V
    if bad and name == "overlap":
        call["shard"] = VocabShard(V - 1, 2 * V - 1, 2 * V)
    if name == "overlap" and not bad:
        call["shard"] = VocabShard(0, V, 2 * V)
    if bad and name == "option":
        call["label_smoothing"] = 0.2
    if name == "option":
        call.setdefault("label_smoothing", 0.1)
    if bad and name == "bias":
        call["linear_bias"] = torch.zeros(V)
    if bad and name == "drop_ignored":
        call["drop_ignored"] = True
    first_try = _said(call)
    assert _said(_sharded(group, gradient=gradient)) == "", "the next call is not disturbed"
    return first_try


DISAGREEMENTS = {
    "same head": "linear_weight looks gathered",
    "hidden": "ranks disagree on input: the hidden states of rank 0 and rank 1",
    "hidden sign": "ranks disagree on input: the hidden states",
    "hidden NaN": "ranks disagree on input: the hidden states",
    "target": "ranks disagree on target",
    "ignored": "ranks disagree on target",
    "value": "row 11 holds 20 on rank 1",
    "overlap": "vocabulary shards overlap",
    "option": "ranks disagree on label_smoothing",
    "bias": "ranks disagree on linear_bias (given on one rank only)",
    "drop_ignored": "ranks disagree on drop_ignored",
}


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_raise_alike(pool: Pool, name: str, gradient: str) -> None:
    texts = pool.run(_disagreement, 2, (name, gradient))
    assert texts[0] == texts[1]
    assert DISAGREEMENTS[name] in texts[0]


def test_hidden_states_that_differ_by_rounding_are_fine(pool: Pool) -> None:
    assert pool.run(_by_rounding, 2) == ["", ""]


def _by_rounding(group: dist.ProcessGroup) -> str:
    call = _sharded(group)
    noise = 1 + 1e-3 * dist.get_rank(group)  # more than layers that sum in another order make
    call["input"] = (call["input"] * noise).detach().requires_grad_()
    return _said(call)


def _checked(group: dist.ProcessGroup, name: str, gradient: str) -> str:
    """With check=True: what would hang otherwise."""
    bad = dist.get_rank(group) == 1
    call = _sharded(group, gradient=gradient, check=True)
    if bad:
        if name == "rows":
            call["input"] = torch.zeros(N - 2, H).requires_grad_()
            call["target"] = call["target"][2:]
        elif name == "more chunks":
            call["input"] = torch.zeros(2 * N, H).requires_grad_()
            call["target"] = call["target"].repeat(2)
        elif name == "width":
            call["input"] = torch.zeros(N, H + 1).requires_grad_()
            call["linear_weight"] = torch.zeros(V, H + 1).requires_grad_()
        elif name == "budget":
            call["scratch_mib"] = scratch_for(3, V, torch.float32)
        elif name == "frozen hidden":
            call["input"] = call["input"].detach()
        elif name == "partial":
            call["hidden_gradient"] = "partial"
        elif name == "grad mode":
            call["input"], call["linear_weight"] = torch.zeros(N, H), torch.zeros(V, H)
        elif name == "sequence":
            call["input"] = call["input"][N // 2 :].detach().requires_grad_()
            call["sequence_parallel"] = True
        elif name == "bias":
            call["linear_bias"] = torch.zeros(V)
        elif name == "argument":
            call["linear_weight"] = None
        elif name == "unknown":
            call["no_such_argument"] = 1
    first_try = _said(call)
    assert _said(_sharded(group, gradient=gradient, check=True)) == ""
    return first_try


CHECKED = {
    "rows": "ranks disagree on the number of rows: rank 0 of the group has 12, rank 1 has 10",
    "more chunks": "ranks disagree on the number of rows: rank 0 of the group has 12, rank 1",
    "width": "ranks disagree on the width of input",
    "budget": "ranks disagree on the rows of an exchange",
    "grad mode": "ranks disagree on the rows of an exchange",
    "frozen hidden": "ranks disagree on the sum of the gradient of input",
    "partial": "ranks disagree on the sum of the gradient of input",
    "argument": "linear_weight must be a tensor",
    "unknown": "no_such_argument",
}


@pytest.mark.parametrize("name", CHECKED)
def test_with_check_nothing_hangs(pool: Pool, name: str) -> None:
    for text in pool.run(_checked, 2, (name, "forward")):
        assert CHECKED[name] in text, text


@pytest.mark.parametrize("name", ["frozen hidden", "partial", "grad mode"])
def test_a_sum_that_only_some_would_join_in_backward_is_told_in_forward(
    pool: Pool, name: str
) -> None:
    for text in pool.run(_checked, 2, (name, "recompute")):
        assert "ranks disagree on the sum of the gradient of input" in text, text


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("name", ["sequence", "bias"])
def test_what_one_rank_has_and_another_has_not(pool: Pool, name: str, gradient: str) -> None:
    """A sequence that only one rank splits is told before that rank gathers the others' parts."""
    said = {"sequence": "sequence_parallel", "bias": "linear_bias (given on one rank only)"}[name]
    texts = pool.run(_checked, 2, (name, gradient))
    assert texts[0] == texts[1]
    assert f"ranks disagree on {said}: rank 0 of the group passed False, rank 1" in texts[0]


def _warnings(group: dist.ProcessGroup, head: str) -> list[str]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    call = _sharded(group)
    if head == "repeated":
        first = torch.Generator().manual_seed(0)
        call["linear_weight"] = torch.randn(V, H, generator=first).requires_grad_()
    elif head == "zero":
        call["linear_weight"] = torch.zeros(V, H, requires_grad=True)
    call["shard"] = VocabShard(rank * V, (rank + 1) * V, world * V)
    repeated_head._warned = False
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # the others leave it to the first of the host
        warnings.simplefilter("always")
        for _ in range(2):
            assert _said(call) == ""
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("head", ["repeated", "zero", "right"])
def test_a_head_that_is_the_same_on_every_rank_warns_once(pool: Pool, head: str) -> None:
    """With shards that were told: else it is an error, above."""
    for said in pool.run(_warnings, 2, (head,)):
        assert len(said) == (head == "repeated"), said
        assert all("linear_weight of all 2 ranks of the group give the same" in w for w in said)


def _own_mistake(group: dist.ProcessGroup, name: str) -> tuple[int, str]:
    """Of every rank alike; what it says of itself, with the budget that it asks for."""
    rank = dist.get_rank(group)
    call = _sharded(group)
    if name == "row":
        call["scratch_mib"] = 1e-6
    elif name == "sequence":
        call |= {"input": call["input"][: N // 2], "sequence_parallel": True}
        call["scratch_mib"] = scratch_for(1, V, torch.float32)
    else:
        call |= {"gradient": "forward", "reduction": "none"}
    text = _said(call)
    if name != "gradient":
        (least,) = re.findall(r"pass at least ([0-9.e-]+)", text)
        assert _said({**call, "scratch_mib": float(least)}) == ""
    return rank, text


@pytest.mark.parametrize("name", ["row", "sequence", "gradient"])
def test_a_mistake_names_its_rank_and_the_way_out(pool: Pool, name: str) -> None:
    for rank, text in pool.run(_own_mistake, 2, (name,)):
        assert f"(rank {rank} of the group)" in text
        assert "use gradient=" in text or "or None for the default" in text


def _in_a_late_chunk(group: dist.ProcessGroup, gradient: str, split: bool) -> str:
    """The engine of rank 1 fails in its second chunk of six."""
    from unittest import mock

    from vocab_parallel_ce.engines import eager

    usual, calls = eager.partials, []

    def partials(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        usual(*arguments)

    rank = dist.get_rank(group)
    bad = rank == 1
    scratch = scratch_for(N // 6, V, torch.float32)
    call = _sharded(group, gradient=gradient, check=True, engine="eager", scratch_mib=scratch)
    if split:
        call |= {"input": call["input"].chunk(2)[rank], "sequence_parallel": True}
    with mock.patch.object(eager, "partials", partials if bad else usual):
        try:
            linear_cross_entropy(**call)
        except (RuntimeError, MemoryError) as problem:
            return str(problem)
    return ""


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_what_fails_in_a_late_chunk_reaches_all_ranks(
    pool: Pool, gradient: str, split: bool
) -> None:
    first, second = pool.run(_in_a_late_chunk, 2, (gradient, split))
    assert "rank 1 of the group: MemoryError: no room" in first
    assert second == "no room"


def _nothing_kept(group: dist.ProcessGroup, gradient: str) -> tuple[Tensor, Tensor]:
    call = _sharded(group, gradient=gradient, target=torch.full((N,), -100))
    loss = linear_cross_entropy(**call)
    assert isinstance(loss, Tensor)
    (grad,) = torch.autograd.grad(loss, call["input"])
    return loss.detach(), grad


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_all_rows_ignored_on_several_ranks(pool: Pool, gradient: str) -> None:
    for loss, grad in pool.run(_nothing_kept, 2, (gradient,)):
        assert bool(loss.isnan())
        assert bool((grad == 0).all())
