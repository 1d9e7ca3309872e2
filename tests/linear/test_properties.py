"""Any shape, option, way, sharding and size of chunk of the fused head, on real ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.testing import Sharding

from ..cases import Findings
from ..ranks import Pool
from ..test_properties import SETTINGS, shardings
from .cases import expected_head, head_batch, local_head, scratch_for


@dataclass(frozen=True)
class Config:
    """One call, and how its batch is made from ``seed``."""

    sharding: Sharding
    rows: int
    width: int
    dtype: torch.dtype
    ignored: float
    seed: int
    biased: bool
    weighted: bool
    split: bool
    chunk: int | None
    ways: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    sharding = draw(shardings().filter(lambda plan: plan.vocab_size > 1))
    world = len(sharding.bounds)
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    # Of each rank the same number, so that a sequence can be split.
    rows = world * draw(st.sampled_from([1, 3, 10]))
    gradient = draw(st.sampled_from(["auto", "recompute", "forward"]))
    return Config(
        sharding,
        rows,
        draw(st.sampled_from([1, 5, 9])),
        draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16])),
        draw(st.sampled_from([0.0, 0.3, 0.9])),
        draw(st.integers(0, 10**6)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([None, 1, 4])),
        {
            "gradient": "auto" if reduction == "none" else gradient,
            "engine": draw(st.sampled_from(["auto", "eager"])),
            "collective": draw(st.sampled_from(["auto", "all_gather", "all_reduce"])),
        },
        {
            "reduction": reduction,
            "ignore_index": draw(st.sampled_from([-100, -1, 0, 10**6])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "lse_square_scale": draw(st.sampled_from([0.0, 1e-3])),
            "scale": draw(st.sampled_from([1.0, 0.5, 1.3])),
            "softcap": draw(st.sampled_from([None, 4.0])),
        },
    )


def _near(
    got: Tensor, exact: Tensor, naive: Tensor, largest: float, factor: float, what: str
) -> None:
    """In the norm. Logits that are computed again, in products of another shape, may differ in
    their last bit: that is e^(eps |x|) in p, and as much of whatever p is multiplied by.
    """
    eps = torch.finfo(got.dtype).eps
    size = float(exact.norm()) + factor
    allowed = 3 * float((naive.double() - exact).norm()) + 8 * eps * (1 + largest) * size
    apart = float((got.double() - exact).norm())
    assert apart <= allowed, f"{what}: off by {apart:.3g}, allowed {allowed:.3g}"


def _holds(group: dist.ProcessGroup, config: Config) -> None:
    rank, world, findings = dist.get_rank(group), dist.get_world_size(group), Findings()
    sharding, options = config.sharding, dict(config.options)
    data = head_batch(
        config.rows, sharding.vocab_size, config.dtype, options["ignore_index"],
        width=config.width, ignored=config.ignored, seed=config.seed,
    )  # fmt: skip
    if config.weighted:
        options["weight"] = data.weight
    want = expected_head(data, biased=config.biased, **options)
    mine = local_head(data, sharding, rank)
    hidden = mine.hidden
    if config.split:
        hidden = hidden.detach().chunk(world)[rank].clone().requires_grad_()
    leaves = [hidden, mine.head, *([mine.bias] if config.biased else [])]
    share = -(-sharding.vocab_size // world)
    chunk = None if config.chunk is None else max(config.chunk, world)
    loss = linear_cross_entropy(
        hidden, mine.head, data.target, linear_bias=mine.bias if config.biased else None,
        group=group, shard=sharding.shard(rank), sequence_parallel=config.split,
        scratch_mib=None if chunk is None else scratch_for(chunk, share, config.dtype),
        **config.ways, **options,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    up = data.upstream if options["reduction"] == "none" else data.upstream[0]
    got = list(torch.autograd.grad(loss, leaves, up.to(loss.dtype)))
    exact, naive = want.losses
    wanted = want.gradients(lambda r: (r.loss * up.to(r.loss.dtype)).sum())
    if config.split:
        length = config.rows // world
        own = slice(rank * length, (rank + 1) * length)
        wanted[0] = (wanted[0][0][own], wanted[0][1][own])
    kept = data.target != options["ignore_index"]
    largest = float((data.hidden[kept].double() @ data.head.double().t()).abs().max())
    with findings:
        _near(loss, exact.loss, naive.loss, largest, 1.0, "loss")
    start, stop = sharding.bounds[rank]
    for name, grad, (right, plain) in zip(("hidden", "head", "bias"), got, wanted, strict=False):
        if name != "hidden":
            assert bool((grad[stop - start :] == 0).all()), f"{name}: padding is not exactly 0"
            grad, right, plain = grad[: stop - start], right[start:stop], plain[start:stop]
        with findings:
            factor = float((data.head if name == "hidden" else data.hidden[kept]).double().norm())
            _near(grad, right, plain, largest, factor * float(up.abs().max()), name)
    findings.report()


@given(configs())
@settings(max_examples=20, **SETTINGS)
def test_any_call(pool: Pool, config: Config) -> None:
    pool.run(_holds, len(config.sharding.bounds), (config,))


@pytest.mark.full
@given(configs())
@settings(max_examples=400, **SETTINGS)
def test_many_calls(pool: Pool, config: Config) -> None:
    pool.run(_holds, len(config.sharding.bounds), (config,))
