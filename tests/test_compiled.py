"""torch.compile(fullgraph=True) over the loss at 2 ranks, and the operators it is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import (
    VocabShard,
    compiled,
    cross_entropy,
    cross_entropy_loss,
    token_statistics,
)
from vocab_parallel_ce.request import RowRequest
from vocab_parallel_ce.testing import assert_close, batch, even

from .cases import Findings, check_gradient, expected
from .ranks import Pool

COLUMNS = 12
Result = tuple[Tensor, ...]


def _head(leaf: Tensor) -> Tensor:
    """Something before the loss, so that in-place backward has a non-leaf to overwrite."""
    return leaf * 1.5


def _plain(leaf: Tensor, target: Tensor, group: dist.ProcessGroup) -> Result:
    return (cross_entropy(_head(leaf), target, group=group),)


def _in_place(leaf: Tensor, target: Tensor, group: dist.ProcessGroup) -> Result:
    return (cross_entropy(_head(leaf), target, group=group, inplace_backward=True),)


def _everything(leaf: Tensor, target: Tensor, group: dist.ProcessGroup) -> Result:
    weight = torch.linspace(0.5, 1.5, 2 * COLUMNS)
    rank = dist.get_rank(group)
    shard = VocabShard(COLUMNS * rank, COLUMNS * rank + COLUMNS, 2 * COLUMNS)
    loss = cross_entropy(
        _head(leaf), target, weight, "sum", -100, 0.1, lse_square_scale=0.01, group=group,
        shard=shard, scale=0.7, normalizer=None, collective="all_reduce",
    )  # fmt: skip
    return (loss,)


def _statistics(leaf: Tensor, target: Tensor, group: dist.ProcessGroup) -> Result:
    got = token_statistics(_head(leaf), target, entropy=True, argmax=True, group=group)
    assert got.entropy is not None
    assert got.argmax is not None
    return got.log_prob.sum() + got.lse.sum() + got.entropy.sum(), got.entropy, got.argmax


def _operator(leaf: Tensor, target: Tensor, group: dist.ProcessGroup) -> Result:
    out = cross_entropy_loss(
        _head(leaf), target, lse_square_scale_for_zloss=0.01, return_zloss=True, group=group
    )
    return (out.loss + out.zloss).sum(), out.log_prob, out.lse_for_zloss


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, dist.ProcessGroup], Result]] = {
    "out of place": _plain,
    "in place": _in_place,
    "every option": _everything,
    "token_statistics": _statistics,
    "cross_entropy_loss": _operator,
}


def _run(
    function: Callable[[Tensor, Tensor, dist.ProcessGroup], Result],
    group: dist.ProcessGroup,
    rows: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    world = dist.get_world_size(group)
    data = batch(rows, COLUMNS * world, dtype, seed=rows)
    leaf = even(COLUMNS * world, world).local(data.logits, dist.get_rank(group)).requires_grad_()
    out = function(leaf, data.target, group)
    (grad,) = torch.autograd.grad(out[0], leaf)
    return [*(value.detach() for value in out), grad]


def _compiles(group: dist.ProcessGroup, name: str) -> None:
    function = FUNCTIONS[name]
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        # Other numbers of rows recompile or go dynamic; in either case they must not be wrong.
        for rows in (6, 9, 17):
            want = _run(function, group, rows, dtype)
            got = _run(fast, group, rows, dtype)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b), (name, dtype, rows)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_compiled_equals_eager(pool: Pool, name: str) -> None:
    pool.run(_compiles, 2, (name,), timeout=240)


def _inductor(group: dist.ProcessGroup) -> None:
    """Inductor fuses the arithmetic around the operators, bits may differ: the oracle decides."""
    torch._dynamo.reset()
    fast = torch.compile(_in_place, fullgraph=True, backend="inductor")
    findings = Findings()
    for rows in (36, 48):
        loss, grad = _run(fast, group, rows, torch.float32)
        data = batch(rows, 2 * COLUMNS, torch.float32, seed=rows)
        want = expected(_head(data.logits), data.target)
        exact, plain = (_head(g) for g in want.gradients(lambda r: r.loss))
        with findings:
            assert_close(loss, want.exact.loss, want.naive.loss, "loss", rows_error=want.rows_error)
            check_gradient(grad, (exact, plain), even(2 * COLUMNS, 2), dist.get_rank(group), "loss")
    findings.report()


def test_inductor(pool: Pool) -> None:
    pool.run(_inductor, 2, timeout=240)


def test_one_rank_without_a_group() -> None:
    def function(leaf: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(_head(leaf), target, label_smoothing=0.1)

    data = batch(5, COLUMNS, torch.float32)
    leaf = data.logits.requires_grad_()
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    (want,), (got,) = (torch.autograd.grad(f(leaf, data.target), leaf) for f in (function, fast))
    assert torch.equal(got, want)


def _writes_into_the_logits(group: dist.ProcessGroup) -> None:
    """In place, compiled: a later read of the logits in the graph must see what eager sees."""

    def function(leaf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = _head(leaf)
        loss = cross_entropy(logits, target, group=group, inplace_backward=True)
        return loss, logits.logsumexp(-1)

    data = batch(6, 2 * COLUMNS, torch.float32)
    leaf = even(2 * COLUMNS, 2).local(data.logits, dist.get_rank(group)).requires_grad_()
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, fast):
        loss, after = f(leaf, data.target)
        want = _head(leaf).logsumexp(-1)
        assert torch.equal(after, want)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(after, want)
        results.append(grad)
    assert torch.equal(*results)


def test_in_place_compiled_keeps_the_order_of_reads_and_writes(pool: Pool) -> None:
    pool.run(_writes_into_the_logits, 2)


def _compiled_errors(group: dist.ProcessGroup) -> list[str]:
    def function(leaf: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(leaf, target, group=group)

    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    out = []
    for target in (torch.tensor([0, 1, 99]), torch.tensor([0, 1, dist.get_rank(group)])):
        try:
            out.append(str(fast(leaf, target)))
        except ValueError as problem:
            out.append(str(problem))
    fast(leaf, torch.tensor([0, 1, 2]))
    return out


def test_a_compiled_loss_raises_as_an_eager_one_does(pool: Pool) -> None:
    for out_of_range, disagree in pool.run(_compiled_errors, 2):
        assert "row 2 holds 99" in out_of_range
        assert "ranks disagree on target" in disagree


# The operators by themselves


def _operators_check(group: dist.ProcessGroup | None) -> None:
    rank = 0 if group is None else dist.get_rank(group)
    world = 1 if group is None else dist.get_world_size(group)
    name = "" if group is None else group.group_name
    ops = torch.ops.vocab_parallel_ce
    data = batch(5, COLUMNS * world, torch.float32)
    for smooth, entropy, argmax in ((False, False, False), (True, True, True)):
        request = RowRequest(
            COLUMNS * rank, COLUMNS * rank + COLUMNS, COLUMNS * world, True,
            smooth=smooth, entropy=entropy, squares=smooth, argmax=argmax, normalized=smooth,
            row_scale=smooth, finite_logits=argmax, label_smoothing=0.1 if smooth else 0.0,
            softcap=9.0 if smooth else 0.0, check="off",
        )  # fmt: skip
        weight = data.weight if smooth else None
        logits = even(COLUMNS * world, world).local(data.logits, rank)
        leaf = logits.clone().requires_grad_()
        normalizer = torch.tensor(3.0) if smooth else None
        scales = torch.linspace(0.5, 1.5, 5) if smooth else None
        options = (*request.scalars(), name, False, None, scales)
        selected = data.target[:, None].clamp(min=0).expand(5, 3) if smooth else None
        arguments = (leaf, data.target, weight, normalizer, selected, *options)
        torch.library.opcheck(ops.row_statistics.default, arguments)

        stats, m, s, local_target, *_ = ops.row_statistics(logits, *arguments[1:])
        for_log_prob = (*compiled._Place.of(request), None, scales)
        place = (*for_log_prob, selected)
        rows = (stats, m, s, local_target, weight, torch.ones_like(stats))
        torch.library.opcheck(ops.row_gradient.default, (logits, *rows, *place))
        torch.library.opcheck(ops.row_gradient_.default, (logits.clone(), *rows, *place))
        torch.library.opcheck(ops.log_prob.default, (logits, m, s, *for_log_prob))


def test_opcheck_on_one_rank() -> None:
    _operators_check(None)


def test_opcheck_over_gloo(pool: Pool) -> None:
    pool.run(_operators_check, 2, timeout=240)
