"""The museum: defects found in other implementations, each with a test that it is not here.

Not here, because it cannot happen in a loss over logits:

    B13  embedding gradient not reduced over the ranks (a fused linear loss): the loss has no head;
         the vocabulary-parallel layers and their gradients have tests of their own
    B20  full d_hidden all-reduced under sequence parallelism: the same
    B21  a kernel whose block size spills registers: a matter of speed on one GPU, measured by the
         benchmark
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import Sharding, assert_close, batch, even, sized

from .cases import Findings, check_gradient, expected
from .ranks import Pool

COLLECTIVES = ("all_gather", "all_reduce")


def _follows_the_oracle(
    group: dist.ProcessGroup,
    full: Tensor,
    target: Tensor,
    sharding: Sharding | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> list[float]:
    """Loss and gradient, rows and mean, both collectives and engines; returns the row losses."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sharding = sharding or even(full.shape[-1], world)
    findings = Findings()
    out: list[float] = []
    for engine in ("auto", "eager"):
        for collective in COLLECTIVES:
            for reduction in ("none", "mean"):
                x = sharding.local(full, rank).requires_grad_()
                loss = cross_entropy(
                    x, target, weight, reduction, group=group, shard=sharding.shard(rank),
                    engine=engine, collective=collective, **options,
                )  # fmt: skip
                want = expected(full, target, weight, reduction=reduction, **options)
                what = f"{engine}, {collective}, {reduction}"
                with findings:
                    assert_close(
                        loss, want.exact.loss, want.naive.loss, what, rows_error=want.rows_error
                    )
                with findings:
                    (grad,) = torch.autograd.grad(loss.sum(), x)
                    gradients = want.gradients(lambda r: r.loss.sum())
                    check_gradient(grad, gradients, sharding, rank, what)
                if reduction == "none":
                    out = loss.tolist()
    findings.report()
    return out


def _full(rows: int = 6, columns: int = 64, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    data = batch(rows, columns, torch.float32)
    return data.logits * factor, data.target


def _b01(group: dist.ProcessGroup) -> list[float]:
    return _follows_the_oracle(group, *_full(), label_smoothing=0.1)


def test_b01_label_smoothing_is_global_and_the_same_on_every_rank(pool: Pool) -> None:
    """TransformerEngine: sum of the scaled logits of the local shard only."""
    for world in (2, 4):
        losses = pool.run(_b01, world)
        assert all(loss == losses[0] for loss in losses)


def _b02(group: dist.ProcessGroup) -> None:
    for factor in (100.0, 1000.0):
        _follows_the_oracle(group, *_full(factor=factor), label_smoothing=0.1)


def test_b02_label_smoothing_of_wide_logits_is_finite(pool: Pool) -> None:
    """Megatron: local V, local mean, and log(softmax) underflows to -inf."""
    pool.run(_b02, 2)


def _b03(group: dist.ProcessGroup) -> list[float]:
    full = torch.tensor([[0.0, -50.0, -120.0, 3.0]])
    return _follows_the_oracle(group, full, torch.tensor([3]), label_smoothing=0.1)


def test_b03_log_of_an_exponential_does_not_underflow(pool: Pool) -> None:
    """Liger: log(exp_buf) is -inf for [0, -50, -120, 3]."""
    full = torch.tensor([[0.0, -50.0, -120.0, 3.0]])
    want = F.cross_entropy(full, torch.tensor([3]), label_smoothing=0.1).item()
    for (loss,) in pool.run(_b03, 2):
        assert loss == pytest.approx(want, rel=1e-6)


def _b04(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    full, _ = _full()
    target = torch.tensor([3, -100, 40, -100, -100, 0])
    for collective in COLLECTIVES:
        x = even(64, world).local(full, rank).requires_grad_()
        loss = cross_entropy(x, target, reduction="none", group=group, collective=collective)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        ignored = target == -100
        assert bool((loss[ignored] == 0).all())
        assert bool((grad[ignored] == 0).all())
        assert bool((loss[~ignored] > 0).all())


def test_b04_ignored_rows_have_no_loss_and_no_gradient(pool: Pool) -> None:
    """Megatron, nanotron: label -100 gives lse - max and a full softmax gradient."""
    pool.run(_b04, 2)


def _b05(group: dist.ProcessGroup) -> list[float]:
    full, target = _full()
    _follows_the_oracle(group, full + 30, target, lse_square_scale=1e-2)
    rank = dist.get_rank(group)
    out = cross_entropy_loss(
        even(64, 2).local(full + 30, rank), target, reduction="none", group=group,
        lse_square_scale_for_zloss=1e-2, return_zloss=True,
    )  # fmt: skip
    return out.zloss.tolist()


def test_b05_z_loss_uses_the_true_lse(pool: Pool) -> None:
    """nanotron: log-sum-exp after the maximum was subtracted."""
    full, target = _full()
    want = 1e-2 * (full.double() + 30).logsumexp(-1).square() * (target != -100)
    for zloss in pool.run(_b05, 2):
        assert zloss == pytest.approx(want.tolist(), rel=1e-6)


def _b06(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    full = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    target = torch.tensor([0, 3])
    rows = cross_entropy(even(4, 2).local(full, rank), target, reduction="none", group=group)
    assert rows[0] == 0  # exactly, and it counts
    _follows_the_oracle(group, full, target)
    x = even(4, 2).local(full, rank).requires_grad_()
    loss = cross_entropy(x, torch.tensor([-100, -100]), group=group)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert bool((grad == 0).all())


def test_b06_the_mean_counts_rows_whose_loss_is_zero(pool: Pool) -> None:
    """ColossalAI: divides by the number of losses that are not 0."""
    pool.run(_b06, 2)


def _b07(group: dist.ProcessGroup) -> None:
    data = batch(12, 64, torch.float32, ignored=0.5)
    _follows_the_oracle(group, data.logits, data.target, weight=data.weight)
    _follows_the_oracle(group, data.logits, data.target, weight=data.weight, label_smoothing=0.1)


def test_b07_weight_and_ignore_index_go_together_in_backward(pool: Pool) -> None:
    """torch loss_parallel: IndexError -100 in backward; label smoothing not at all."""
    pool.run(_b07, 2)


def _b08(group: dist.ProcessGroup) -> list[str]:
    out = []
    full, _ = _full(2)
    for value in (64, 65, 1000, -1, -99):
        for collective in COLLECTIVES:
            try:
                loss = cross_entropy(
                    even(64, 2).local(full, dist.get_rank(group)), torch.tensor([5, value]),
                    reduction="none", group=group, collective=collective,
                )  # fmt: skip
                out.append(str(loss))
            except ValueError as problem:
                out.append(f"row 1 holds {value}" if f"row 1 holds {value} " in str(problem) else
                           str(problem))  # fmt: skip
    return out


def test_b08_a_label_that_nobody_owns_is_an_error(pool: Pool) -> None:
    """flash-attn: loss = lse; TransformerEngine: inf; Megatron: finite; Liger tests that it is."""
    want = [f"row 1 holds {v}" for v in (64, 65, 1000, -1, -99) for _ in COLLECTIVES]
    assert pool.run(_b08, 2) == [want] * 2


def _b09(group: dist.ProcessGroup) -> None:
    full, target = _full()
    x = even(64, 2).local(full, dist.get_rank(group)).requires_grad_()
    before = x.detach().clone()
    for collective in COLLECTIVES:
        with torch.no_grad():
            first = cross_entropy(x, target, group=group, collective=collective)
            second = cross_entropy(x, target, group=group, collective=collective)
        assert torch.equal(first, second)
        loss = cross_entropy(x, target, group=group, collective=collective)
        (once,) = torch.autograd.grad(loss, x, retain_graph=True)
        (twice,) = torch.autograd.grad(loss, x)
        assert torch.equal(once, twice)
        assert torch.equal(x, before)


def test_b09_logits_are_untouched_and_backward_runs_twice(pool: Pool) -> None:
    """Megatron: fp32 logits overwritten in forward, under no_grad too; second backward raises."""
    pool.run(_b09, 2)


def _b10(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    full, target = _full()
    x = even(64, 2).local(full.to(dtype), dist.get_rank(group)).requires_grad_()
    before = x.detach().clone()
    got = token_statistics(x, target, entropy=True, group=group)
    assert got.entropy is not None
    got.entropy.sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_b10_the_backward_of_entropy_leaves_the_logits_alone(
    pool: Pool, dtype: torch.dtype
) -> None:
    """verl: subtracts and adds back, which changes 45 % of bf16 logits."""
    pool.run(_b10, 2, (dtype,))


def _b11(group: dist.ProcessGroup) -> float:
    # p of the target is 0.9995: 1 in bf16, whose last place there is 2^-8.
    full = torch.zeros(1, 2, dtype=torch.bfloat16)
    full[0, 0] = math.log(0.9995 / 0.0005)
    x = even(2, 2).local(full, dist.get_rank(group)).requires_grad_()
    cross_entropy(x, torch.tensor([0]), group=group).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    return x.grad.item()


def test_b11_the_gradient_of_the_target_is_formed_before_it_is_rounded(pool: Pool) -> None:
    """TransformerEngine, FLA, Liger: p rounded to bf16 before 1 is subtracted: 0, not -5e-4."""
    at_target, elsewhere = pool.run(_b11, 2)
    assert at_target == -elsewhere
    assert at_target == pytest.approx(-5e-4, rel=2**-6)


def _b12(group: dist.ProcessGroup) -> None:
    full, _ = _full(6, 10)
    sharding = sized("padded", (7, 3), (5, 9))
    # Ids of the other rank that fall on this rank's padding columns, and the shards' ends.
    _follows_the_oracle(group, full, torch.tensor([7, 8, 9, 6, 0, 2]), sharding)


def test_b12_a_target_elsewhere_never_meets_a_padding_column(pool: Pool) -> None:
    """CCE: the sentinel of an off-shard label matches a padded column: loss inf."""
    pool.run(_b12, 2)


def _b14(group: dist.ProcessGroup) -> float:
    full, _ = _full(4)
    x = even(64, 4).local(full, dist.get_rank(group)).requires_grad_()
    cross_entropy(x, torch.tensor([1, 2, 3, 4]), group=group, reduction="sum").backward()
    assert x.grad is not None
    return x.grad.abs().sum().item()


def test_b14_ranks_without_the_target_get_their_gradient(pool: Pool) -> None:
    """ms-swift: plain all_reduce inside autograd: zero gradient on non-owner shards."""
    full, _ = _full(4)
    p = full.double().softmax(-1)
    sums = pool.run(_b14, 4)
    want = [p[:, 16 * r : 16 * r + 16].sum().item() for r in range(4)]
    assert sums[1:] == pytest.approx(want[1:], rel=1e-5)


def _b15(group: dist.ProcessGroup) -> None:
    sharding = sized("uneven", (5, 3, 4))
    edges = torch.tensor([0, 4, 5, 7, 8, 11])
    full, _ = _full(6, 12)
    _follows_the_oracle(group, full, edges, sharding)
    padded = sized("padded", (5, 3, 4), (1, 2, 3))
    _follows_the_oracle(group, full, edges, padded)


def test_b15_the_first_and_the_last_id_of_every_shard_are_found(pool: Pool) -> None:
    """verl on CANN: the last id is lost when vocab_end is inclusive in one place only."""
    pool.run(_b15, 3)


def _b16(group: dist.ProcessGroup) -> None:
    full, target = _full()
    leaf = even(64, 2).local(full, dist.get_rank(group)).requires_grad_()
    logits = leaf * 1.0
    best = logits.argmax(-1)
    loss = cross_entropy(logits, target, group=group)
    assert torch.equal(logits.argmax(-1), best)  # a metric after the loss
    loss.backward()
    assert torch.equal(logits.argmax(-1), best)  # and after its backward
    assert torch.equal(logits, leaf)


def test_b16_metrics_may_read_the_logits_after_the_loss(pool: Pool) -> None:
    """Megatron-Bridge: a loss in place zeroes acceptance metrics that read logits later."""
    pool.run(_b16, 2)


def _b17(group: dist.ProcessGroup, offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    full = torch.randn(16, 8192, generator=g) * 3 + offset
    target = torch.zeros(16, dtype=torch.int64)
    want = expected(full, target, reduction="none")
    x = even(8192, 2).local(full, dist.get_rank(group))
    for engine in ("auto", "eager"):
        for collective in COLLECTIVES:
            got = token_statistics(
                x, target, entropy=True, group=group, engine=engine, collective=collective
            )
            assert got.entropy is not None
            assert_close(got.entropy, want.exact.entropy, want.naive.entropy, engine)
            # The formula of the others is further off than that, as soon as there is an offset.
            plain = full.logsumexp(-1) - (full.softmax(-1) * full).sum(-1)
            errors = [(e.double() - want.exact.entropy).abs().max() for e in (got.entropy, plain)]
            assert offset == 0 or errors[0] < errors[1] / 10


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_b17_entropy_does_not_cancel(pool: Pool, offset: float) -> None:
    """AReaL, slime, verl, torchtitan: lse - sum(p x) loses 2e-2 at logits near 1000."""
    pool.run(_b17, 2, (offset,))


def _b18(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    full, _ = _full(3, 8)
    for ignore_index in (-100, -1, 8, 2**40):
        for weight in (None, torch.ones(8)):
            x = even(8, 2).local(full, rank).requires_grad_()
            out = cross_entropy_loss(
                x, torch.tensor([ignore_index, 3, 7]), weight, "sum", ignore_index, 0.1, 0.1,
                group=group,
            )  # fmt: skip
            (grad,) = torch.autograd.grad(out.loss, x)
            assert bool(grad.isfinite().all())
            assert bool((grad[0] == 0).all())
            assert bool((grad[1:].abs().sum(-1) > 0).all())


def test_b18_no_index_of_an_ignored_row_is_followed(pool: Pool) -> None:
    """Megatron-LM-FL: gather and scatter on label -100 without a clamp: NaN gradients."""
    pool.run(_b18, 2)


def test_b19_the_tolerance_of_these_tests_is_not_a_half() -> None:
    """Megatron's unit test compares rounded losses, forward only: an error of 0.5 passes."""
    full, target = _full()
    want = expected(full, target, reduction="none")
    for error in (0.4, 1e-3, 2e-6):
        with pytest.raises(AssertionError, match="are off"):
            assert_close(want.exact.loss.float() + error, want.exact.loss, want.naive.loss)
    exact, plain = want.gradients(lambda r: r.loss.sum())
    with pytest.raises(AssertionError, match="are off"):
        check_gradient(exact.float() + 1e-6, (exact, plain), even(64, 1), 0, "loss")


# What else Megatron's two losses were seen to do


def _uneven(group: dist.ProcessGroup) -> None:
    full, target = _full()
    _follows_the_oracle(group, full, target, sized("40 + 24", (40, 24)))


def test_megatron_uneven_shards(pool: Pool) -> None:
    """Shards of 40 and 24 ids: loss off by 4.36, silently."""
    pool.run(_uneven, 2)


def _poisoned(group: dist.ProcessGroup, poison: float) -> None:
    rank = dist.get_rank(group)
    full, _ = _full(3)
    target = torch.tensor([3, -100, 60])
    clean = full.clone()
    full[1] = poison
    full[1, ::3] = 1.0
    for engine in ("auto", "eager"):
        for collective in COLLECTIVES:
            options: dict[str, Any] = {
                "group": group, "collective": collective, "engine": engine,
                "label_smoothing": 0.1, "lse_square_scale": 0.1,
            }  # fmt: skip
            x = even(64, 2).local(full, rank).requires_grad_()
            loss = cross_entropy(x, target, **options)
            assert torch.equal(loss, cross_entropy(even(64, 2).local(clean, rank), target,
                                                   **options))  # fmt: skip
            (grad,) = torch.autograd.grad(loss, x)
            assert bool((grad[1] == 0).all())
            assert bool(grad.isfinite().all())


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_megatron_ignored_rows_may_hold_inf_and_nan(pool: Pool, poison: float) -> None:
    """A row of inf or NaN with mask 0: NaN gradient, because 0 * NaN is NaN."""
    pool.run(_poisoned, 2, (poison,))


def _strange_layouts(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    local = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(rank))
    target = torch.randint(0, 16, (3, 4), generator=torch.Generator().manual_seed(9))
    plain = local.transpose(0, 1).contiguous().requires_grad_()
    loss = cross_entropy(plain, target, group=group)
    (want,) = torch.autograd.grad(loss, plain)

    leaf = local.clone().requires_grad_()
    transposed = cross_entropy(leaf.transpose(0, 1), target, group=group)
    (grad,) = torch.autograd.grad(transposed, leaf)
    assert torch.equal(transposed, loss)
    assert torch.equal(grad.transpose(0, 1), want)

    both = torch.cat([plain.detach(), torch.zeros_like(plain)], -1).requires_grad_()
    for inplace in (False, True):
        chunk, other = (both * 1.0 if inplace else both).chunk(2, -1)
        if inplace:
            chunk = chunk.clone()  # an output of chunk is one of several views of its base
        chunked = cross_entropy(chunk, target, group=group, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(chunked + 0.0 * other.sum(), both)
        assert torch.equal(chunked, loss)
        assert torch.equal(grad[..., :8], want)


def test_megatron_transposed_logits_and_chunks(pool: Pool) -> None:
    """Transposed logits raise in view(); a chunk of a bigger tensor is modified in place."""
    pool.run(_strange_layouts, 2)


def _z_after(group: dist.ProcessGroup) -> None:
    full, target = _full()
    rank = dist.get_rank(group)
    x = even(64, 2).local(full, rank).requires_grad_()
    y = torch.tanh(x)  # an operation that saved its output
    want = y.detach().logsumexp(-1)
    loss = cross_entropy(y, target, group=group)
    after = y.logsumexp(-1)
    assert torch.equal(after, want)
    (loss + after.sum()).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_megatron_a_z_loss_after_the_loss_sees_the_logits(pool: Pool) -> None:
    """z-loss after the loss on fp32 logits: 17.36 instead of 21.61; before it, backward raises."""
    pool.run(_z_after, 2)


def _gathered(group: dist.ProcessGroup) -> list[str]:
    full, _ = _full()
    target = torch.tensor([3, 40, 12, 63, 0, 1])
    out = []
    for collective in COLLECTIVES:
        for shard in (None, VocabShard(32 * dist.get_rank(group), 32 * dist.get_rank(group) + 32,
                                       64)):  # fmt: skip
            try:
                out.append(str(cross_entropy(full, target, group=group, shard=shard,
                                             collective=collective)))  # fmt: skip
            except ValueError as problem:
                out.append(str(problem)[:20])
    return out


def test_megatron_gathered_logits_are_refused(pool: Pool) -> None:
    """parallel_output=False with labels: the loss is too large by log(TP), the gradients wrong."""
    assert pool.run(_gathered, 2) == [["input looks gathered"] * 4] * 2


def _precision(group: dist.ProcessGroup) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        data = batch(48, 64, dtype)
        x = even(64, 2).local(data.logits, dist.get_rank(group)).requires_grad_()
        loss = cross_entropy(x, data.target, group=group)
        (grad,) = torch.autograd.grad(loss, x)
        gradients = expected(data.logits, data.target).gradients(lambda r: r.loss)
        check_gradient(grad, gradients, even(64, 2), dist.get_rank(group), str(dtype))


def test_megatron_gradients_are_not_rounded_to_bf16(pool: Pool) -> None:
    """The fused loss casts every gradient to bf16, those of fp32 and fp16 logits included."""
    pool.run(_precision, 2)
