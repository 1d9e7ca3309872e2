"""The museum: defects found in other implementations, each with a test that it is not here.

Those of a head or of one device have their tests elsewhere:

    B13  gradient of the embedding not reduced over the ranks (a fused linear loss):
         linear/test_hidden.py, parallel/test_layers.py
    B20  full d_hidden all-reduced under sequence parallelism: linear/test_hidden.py (over Gloo,
         which does not scatter a sum, the fused head does add up whole chunks)
    B21  a kernel whose block size spills registers: engines/triton/test_compiled.py
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import assert_close, batch, even, sized

from .cases import check_gradient, expected
from .museum import COLLECTIVES, follows_the_oracle, full_batch
from .ranks import Pool


def _b01(group: dist.ProcessGroup) -> list[float]:
    return follows_the_oracle(group, *full_batch(), label_smoothing=0.1)


def test_b01_label_smoothing_is_global_and_the_same_on_every_rank(pool: Pool) -> None:
    """TransformerEngine: sum of the scaled logits of the local shard only."""
    for world in (2, 4):
        losses = pool.run(_b01, world)
        assert all(loss == losses[0] for loss in losses)


def _b02(group: dist.ProcessGroup) -> None:
    for factor in (100.0, 1000.0):
        follows_the_oracle(group, *full_batch(factor=factor), label_smoothing=0.1)


def test_b02_label_smoothing_of_wide_logits_is_finite(pool: Pool) -> None:
    """Megatron: local V, local mean, and log(softmax) underflows to -inf."""
    pool.run(_b02, 2)


def _b03(group: dist.ProcessGroup) -> list[float]:
    full = torch.tensor([[0.0, -50.0, -120.0, 3.0]])
    return follows_the_oracle(group, full, torch.tensor([3]), label_smoothing=0.1)


def test_b03_log_of_an_exponential_does_not_underflow(pool: Pool) -> None:
    """Liger: log(exp_buf) is -inf for [0, -50, -120, 3]."""
    full = torch.tensor([[0.0, -50.0, -120.0, 3.0]])
    want = F.cross_entropy(full, torch.tensor([3]), label_smoothing=0.1).item()
    for (loss,) in pool.run(_b03, 2):
        assert loss == pytest.approx(want, rel=1e-6)


def _b04(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    full, _ = full_batch()
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
    full, target = full_batch()
    follows_the_oracle(group, full + 30, target, lse_square_scale=1e-2)
    rank = dist.get_rank(group)
    out = cross_entropy_loss(
        even(64, 2).local(full + 30, rank), target, reduction="none", group=group,
        lse_square_scale_for_zloss=1e-2, return_zloss=True,
    )  # fmt: skip
    return out.zloss.tolist()


def test_b05_z_loss_uses_the_true_lse(pool: Pool) -> None:
    """nanotron: log-sum-exp after the maximum was subtracted."""
    full, target = full_batch()
    want = 1e-2 * (full.double() + 30).logsumexp(-1).square() * (target != -100)
    for zloss in pool.run(_b05, 2):
        assert zloss == pytest.approx(want.tolist(), rel=1e-6)


def _b06(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    full = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    target = torch.tensor([0, 3])
    rows = cross_entropy(even(4, 2).local(full, rank), target, reduction="none", group=group)
    assert rows[0] == 0  # exactly, and it counts
    follows_the_oracle(group, full, target)
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
    follows_the_oracle(group, data.logits, data.target, weight=data.weight)
    follows_the_oracle(group, data.logits, data.target, weight=data.weight, label_smoothing=0.1)


def test_b07_weight_and_ignore_index_go_together_in_backward(pool: Pool) -> None:
    """torch loss_parallel: IndexError -100 in backward; label smoothing not at all."""
    pool.run(_b07, 2)


def _b08(group: dist.ProcessGroup) -> list[str]:
    out = []
    full, _ = full_batch(2)
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
    full, target = full_batch()
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
    full, target = full_batch()
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
    full, _ = full_batch(6, 10)
    sharding = sized("padded", (7, 3), (5, 9))
    # Ids of the other rank that fall on this rank's padding columns, and the shards' ends.
    follows_the_oracle(group, full, torch.tensor([7, 8, 9, 6, 0, 2]), sharding)


def test_b12_a_target_elsewhere_never_meets_a_padding_column(pool: Pool) -> None:
    """CCE: the sentinel of an off-shard label matches a padded column: loss inf."""
    pool.run(_b12, 2)


def _b14(group: dist.ProcessGroup) -> float:
    full, _ = full_batch(4)
    x = even(64, 4).local(full, dist.get_rank(group)).requires_grad_()
    cross_entropy(x, torch.tensor([1, 2, 3, 4]), group=group, reduction="sum").backward()
    assert x.grad is not None
    return x.grad.abs().sum().item()


def test_b14_ranks_without_the_target_get_their_gradient(pool: Pool) -> None:
    """ms-swift: plain all_reduce inside autograd: zero gradient on non-owner shards."""
    full, _ = full_batch(4)
    p = full.double().softmax(-1)
    sums = pool.run(_b14, 4)
    want = [p[:, 16 * r : 16 * r + 16].sum().item() for r in range(4)]
    assert sums[1:] == pytest.approx(want[1:], rel=1e-5)


def _b15(group: dist.ProcessGroup) -> None:
    sharding = sized("uneven", (5, 3, 4))
    edges = torch.tensor([0, 4, 5, 7, 8, 11])
    full, _ = full_batch(6, 12)
    follows_the_oracle(group, full, edges, sharding)
    padded = sized("padded", (5, 3, 4), (1, 2, 3))
    follows_the_oracle(group, full, edges, padded)


def test_b15_the_first_and_the_last_id_of_every_shard_are_found(pool: Pool) -> None:
    """verl on CANN: the last id is lost when vocab_end is inclusive in one place only."""
    pool.run(_b15, 3)


def _b16(group: dist.ProcessGroup) -> None:
    full, target = full_batch()
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
    full, _ = full_batch(3, 8)
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
    full, target = full_batch()
    want = expected(full, target, reduction="none")
    for error in (0.4, 1e-3, 2e-6):
        with pytest.raises(AssertionError, match="are off"):
            assert_close(want.exact.loss.float() + error, want.exact.loss, want.naive.loss)
    exact, plain = want.gradients(lambda r: r.loss.sum())
    with pytest.raises(AssertionError, match="are off"):
        check_gradient(exact.float() + 1e-6, (exact, plain), even(64, 1), 0, "loss")
