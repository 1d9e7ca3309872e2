"""Any shape, dtype, option and sharding that hypothesis can think of, on real ranks.

The parent draws a whole configuration; one call of the pool runs it. Failures shrink as usual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import ReferenceLoss, Sharding, assert_close, naive_error, sized

from .cases import Findings, check_gradient, expected
from .device import DTYPES, move
from .ranks import Pool

SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@dataclass(frozen=True)
class Config:
    """One call, and how its batch is made from ``seed``."""

    sharding: Sharding
    rows: int
    dtype: torch.dtype
    spread: float
    offset: float
    masked: str
    seed: int
    weighted: bool
    options: dict[str, Any] = field(default_factory=dict)
    engine: str = "auto"
    collective: str = "auto"

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Full logits [N, V], target [N], weight [V] or None."""
        g = torch.Generator().manual_seed(self.seed)
        vocab = self.sharding.vocab_size
        full = torch.randn(self.rows, vocab, generator=g) * self.spread + self.offset
        target = torch.randint(0, vocab, (self.rows,), generator=g)
        drop = torch.zeros(vocab, dtype=torch.bool)
        if self.masked == "columns":
            drop = torch.rand(vocab, generator=g) < 0.4
        elif self.masked == "shard":
            start, stop = self.sharding.bounds[self.seed % len(self.sharding.bounds)]
            drop[start:stop] = True
        if bool(drop.all()):
            drop[0] = False
        full[:, drop] = -torch.inf
        # A kept target has a finite logit; a masked one is tested by itself.
        columns = (~drop).nonzero().squeeze(1)
        target = torch.where(drop[target], columns[target % len(columns)], target)
        ignored = torch.rand(self.rows, generator=g) < 0.3
        target = torch.where(ignored, self.options["ignore_index"], target)
        weight = None
        if self.weighted:
            # 0 * -inf is NaN, in PyTorch's smoothing as well: weights are positive.
            weight = torch.rand(vocab, generator=g) + 0.1
        return full.to(self.dtype), target, weight


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """1 to 4 ranks in any order of ids, sizes down to 0, padding."""
    world = draw(st.integers(1, 4))
    sizes = [draw(st.sampled_from([0, 1, 2, 5, 16, 33])) for _ in range(world)]
    if sum(sizes) == 0:
        sizes[draw(st.integers(0, world - 1))] = 7
    padding = tuple(draw(st.sampled_from([0, 0, 1, 4])) for _ in range(world))
    plan = sized("drawn", tuple(sizes), padding)
    order = draw(st.permutations(plan.bounds))
    whole = [stop - start == plan.vocab_size for start, stop in order]
    # Columns that add up to the whole vocabulary would look gathered beside another shard.
    padding = tuple(
        0 if size[1] - size[0] + pad == plan.vocab_size else pad
        for size, pad in zip(order, padding, strict=True)
    )
    if world == 1:
        assert whole == [True]
    return Sharding("drawn", plan.vocab_size, tuple(order), padding)


@st.composite
def configs(draw: st.DrawFn, smoothing: bool = True) -> Config:
    masked = draw(st.sampled_from(["", "", "columns", "shard"]))
    dtype = draw(st.sampled_from(DTYPES))
    ignore_index = draw(st.sampled_from([-100, 0, 2, -1, 10**6]))
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 1e3, 1e4]))
    offset = draw(st.sampled_from([0.0, 30.0, -1e3, 1e4]))
    options = {
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": (
            draw(st.sampled_from([0.0, 0.1, 1.0])) if smoothing and not masked else 0.0
        ),
        "lse_square_scale": draw(st.sampled_from([0.0, 1e-4])),
        "scale": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }
    return Config(
        draw(shardings()),
        draw(st.sampled_from([1, 7, 40])),
        dtype,
        spread,
        offset,
        masked,
        draw(st.integers(0, 10**6)),
        draw(st.booleans()),
        options,
        draw(st.sampled_from(["auto", "eager"])),
        draw(st.sampled_from(["all_gather", "all_reduce", "auto"])),
    )


def _loss_holds(group: dist.ProcessGroup, config: Config) -> None:
    rank = dist.get_rank(group)
    full, target, weight = config.batch()
    want = expected(full, target, weight, **config.options)
    there = move(target), None if weight is None else move(weight)
    x = move(config.sharding.local(full, rank)).requires_grad_()
    before = x.detach().clone()
    loss = cross_entropy(
        x, *there, **config.options, group=group, shard=config.sharding.shard(rank),
        engine=config.engine, collective=config.collective,
    )  # fmt: skip
    findings = Findings()
    with findings:
        assert_close(loss, want.exact.loss, want.naive.loss, "loss", rows_error=want.rows_error)
    with findings:
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.equal(x.nan_to_num(5), before.nan_to_num(5))
        gradients = want.gradients(lambda r: r.loss.sum())
        check_gradient(grad, gradients, config.sharding, rank, "loss")
    # The same in place: the same bits, written into the logits.
    y = move(config.sharding.local(full, rank)).requires_grad_() * 1.0
    again = cross_entropy(
        y, *there, **config.options, group=group, shard=config.sharding.shard(rank),
        engine=config.engine, collective=config.collective, inplace_backward=True,
    )  # fmt: skip
    with findings:
        (in_place,) = torch.autograd.grad(again.sum(), y)
        assert torch.equal(in_place.nan_to_num(5), grad.nan_to_num(5))
        assert in_place.data_ptr() == y.data_ptr()
    findings.report()


@given(config=configs())
@settings(max_examples=60, **SETTINGS)
def test_cross_entropy(pool: Pool, config: Config) -> None:
    pool.run(_loss_holds, len(config.sharding.bounds), (config,))


def _operator_holds(group: dist.ProcessGroup, config: Config) -> None:
    rank = dist.get_rank(group)
    full, target, weight = config.batch()
    options = dict(config.options)
    want = expected(full, target, weight, **options)
    z_scale = options.pop("lse_square_scale")
    x = move(config.sharding.local(full, rank)).requires_grad_()
    out = cross_entropy_loss(
        x, move(target), None if weight is None else move(weight), **options,
        lse_square_scale_for_zloss=z_scale, return_zloss=True,
        group=group, shard=config.sharding.shard(rank), engine=config.engine,
        collective=config.collective,
    )  # fmt: skip
    exact, plain = want.exact, want.naive
    shape, inherited = out.loss.shape, want.rows_error
    findings = Findings()
    if full.dtype != torch.float16 or bool((exact.loss.abs() < 60000).all()):
        with findings:
            assert_close(out.loss, exact.loss.reshape(shape), plain.loss.reshape(shape), "loss",
                         rows_error=inherited)  # fmt: skip
            assert_close(out.zloss, exact.zloss.reshape(shape), plain.zloss.reshape(shape),
                         "zloss", rows_error=inherited)  # fmt: skip
    size = config.sharding.bounds[rank][1] - config.sharding.bounds[rank][0]
    with findings:
        below = exact.log_prob < torch.finfo(full.dtype).min  # what fp16 holds as -inf
        assert_close(
            out.log_prob[..., :size],
            config.sharding.columns(exact.log_prob.masked_fill(below, -torch.inf), rank),
            config.sharding.columns(plain.log_prob, rank),
            "log_prob",
            rows_error=naive_error(exact.log_prob, plain.log_prob, full.dtype),
        )
        assert bool((out.log_prob[..., size:] == -torch.inf).all())

    def total(loss: Tensor, zloss: Tensor) -> Tensor:
        return loss.sum() - 0.5 * zloss.sum()

    with findings:
        (grad,) = torch.autograd.grad(total(out.loss, out.zloss), x)
        gradients = want.gradients(lambda r: total(r.loss, r.zloss))
        check_gradient(grad, gradients, config.sharding, rank, "loss and zloss")
    findings.report()


@given(config=configs())
@settings(max_examples=40, **SETTINGS)
def test_cross_entropy_loss(pool: Pool, config: Config) -> None:
    pool.run(_operator_holds, len(config.sharding.bounds), (config,))


def _statistics_hold(group: dist.ProcessGroup, config: Config, argmax: bool) -> None:
    rank = dist.get_rank(group)
    full, target, _ = config.batch()
    ignore_index, scale = config.options["ignore_index"], config.options["scale"]
    kept = target != ignore_index
    g = torch.Generator().manual_seed(config.seed)
    there = (full[0] != -torch.inf).nonzero().squeeze(1)
    selected = there[torch.randint(len(there), (config.rows, config.seed % 4), generator=g)]
    want = expected(
        full, target, ignore_index=ignore_index, scale=scale, reduction="none", selected=selected
    )
    x = move(config.sharding.local(full, rank)).requires_grad_()
    got = token_statistics(
        x, move(target), entropy=True, argmax=argmax, selected=move(selected),
        ignore_index=ignore_index, scale=scale, group=group, shard=config.sharding.shard(rank),
        engine=config.engine, collective=config.collective,
    )  # fmt: skip
    assert got.entropy is not None
    assert got.selected_log_prob is not None
    findings = Findings()
    exact, plain = want.exact, want.naive
    with findings:
        assert_close(got.log_prob, -exact.loss, -plain.loss, "log_prob")
        assert_close(
            got.lse, torch.where(kept, exact.lse, 0.0), torch.where(kept, plain.lse, 0.0), "lse"
        )
        assert_close(got.entropy, exact.entropy, plain.entropy, "entropy")
        found = got.selected_log_prob
        assert_close(found, exact.selected_log_prob, plain.selected_log_prob, "selected")
    if got.argmax is not None:
        with findings:
            # In the arithmetic dtype: a scale may round two neighbours to one number.
            rounded = full.to(got.lse.dtype) * scale
            assert torch.equal(got.argmax.cpu(), torch.where(kept, rounded.argmax(-1), -1))

    def total(log_prob: Tensor, lse: Tensor, entropy: Tensor, selected: Tensor) -> Tensor:
        return (log_prob + 0.25 * lse - 2 * entropy).sum() + 0.5 * selected.sum()

    def same(r: ReferenceLoss) -> Tensor:
        lse = torch.where(kept, r.lse, 0.0)
        return total(-r.loss, lse, r.entropy, r.selected_log_prob)

    with findings:
        (grad,) = torch.autograd.grad(total(got.log_prob, got.lse, got.entropy, found), x)
        check_gradient(grad, want.gradients(same), config.sharding, rank, "statistics")
    findings.report()


@given(config=configs(smoothing=False), argmax=st.booleans())
@settings(max_examples=40, **SETTINGS)
def test_token_statistics(pool: Pool, config: Config, argmax: bool) -> None:
    pool.run(_statistics_hold, len(config.sharding.bounds), (config, argmax))
