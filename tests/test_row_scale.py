"""``scale`` as a number, a 0-d tensor or one a row; ``softcap``; statistics without a target."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel_ce import (
    VocabParallelCrossEntropyLoss,
    VocabShard,
    cross_entropy,
    cross_entropy_loss,
    passes,
    token_statistics,
)

from .device import DEVICE, ENGINES, move
from .ranks import Pool

N, C = 6, 24
CPU = pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on CPU tensors")


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    logits = (8 * torch.randn(N, C, generator=g)).to(dtype)
    return logits, torch.tensor([0, 23, -100, 12, 11, 5]), torch.rand(N, generator=g) + 0.5


def _plain(x: Tensor, y: Tensor, scale: Any, softcap: float, **options: Any) -> Tensor:
    x = softcap * (x / softcap).tanh() if softcap else x
    x = x * (scale.double()[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
    return torch.nn.functional.cross_entropy(x, y, **options)


def _matches(group: dist.ProcessGroup) -> None:
    """F.cross_entropy(scale * c * tanh(z / c)) and its gradient, in fp64."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    full, target, row_scale = _batch()
    for scale in (1, 0.7, torch.tensor(0.7), torch.tensor(2), row_scale, -row_scale):
        for softcap in (0.0, 5.0, 30.0):
            for options in ({"reduction": "none"}, {"label_smoothing": 0.2}):
                leaf = full.clone().requires_grad_()
                want = _plain(leaf, target, scale, softcap, **options)
                (grad,) = torch.autograd.grad(want.sum(), leaf)
                shard = full.chunk(world, -1)[rank].clone().requires_grad_()
                got = cross_entropy(
                    shard * 1, target, group=group, scale=scale, softcap=softcap or None,
                    engine=("eager", "auto")[rank % 2], inplace_backward=softcap == 5.0, **options,
                )  # fmt: skip
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
                (mine,) = torch.autograd.grad(got.sum(), shard)
                torch.testing.assert_close(mine, grad.chunk(world, -1)[rank], rtol=1e-8, atol=1e-9)


@CPU
@pytest.mark.parametrize("world", [1, 2, 3])
def test_as_torch_would_on_whole_logits(pool: Pool, world: int) -> None:
    pool.run(_matches, world)


@CPU
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_gradients_of_every_output(engine: str) -> None:
    logits, target, scale = _batch()
    leaf = (logits / 3).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(
            x, target, label_smoothing=0.1, lse_square_scale=0.1, scale=scale.double(),
            softcap=4.0, engine=engine,
        )  # fmt: skip

    def entropy(x: Tensor) -> Tensor:
        out = token_statistics(x, entropy=True, scale=0.8, softcap=4.0, engine=engine)
        assert out.entropy is not None
        return out.entropy + out.lse

    assert torch.autograd.gradcheck(loss, leaf, fast_mode=True)
    assert torch.autograd.gradcheck(entropy, leaf, fast_mode=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_stays_outside(engine: str) -> None:
    """A cap of -inf would be -c, which has a probability."""
    logits, target, scale = _batch(torch.float32)
    wide = torch.cat([logits, torch.full((N, 7), 1e4)], 1)
    x = move(wide).requires_grad_()
    options: dict[str, Any] = {"scale": move(scale), "softcap": 6.0, "engine": engine}
    out = cross_entropy_loss(x, move(target), shard=VocabShard(0, C, C), **options)
    want = cross_entropy_loss(move(logits), move(target), **options)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.log_prob[:, :C], want.log_prob)
    assert bool((out.log_prob[:, C:] == -torch.inf).all())
    out.loss.sum().backward()
    assert x.grad is not None
    assert bool((x.grad[:, C:] == 0).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_module_and_the_operator_take_a_cap(engine: str) -> None:
    logits, target, _ = (move(t) for t in _batch(torch.float32))
    want = cross_entropy(logits, target, softcap=3.0, engine=engine)
    module = VocabParallelCrossEntropyLoss(softcap=3.0, engine=engine)
    torch.testing.assert_close(module(logits, target), want)
    torch.testing.assert_close(
        cross_entropy_loss(logits, target, softcap=3.0, engine=engine).loss[0], want
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_statistics_without_a_target(engine: str) -> None:
    logits, _, scale = (move(t) for t in _batch(torch.float32))
    for ignore_index in (-100, 0):  # nothing is ignored where there are no targets
        got = token_statistics(
            logits, entropy=True, argmax=True, sum_p_squared=True, ignore_index=ignore_index,
            scale=scale, engine=engine,
        )  # fmt: skip
        p = (logits * scale[:, None]).double().softmax(-1)
        assert got.log_prob is None
        assert got.argmax is not None
        assert torch.equal(got.argmax, logits.argmax(-1))
        for actual, want in (
            (got.entropy, -(p * p.log()).sum(-1)),
            (got.sum_p_squared, p.square().sum(-1)),
            (got.lse, (logits * scale[:, None]).double().logsumexp(-1)),
        ):
            assert actual is not None
            torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=1e-6)


def test_squares_have_no_gradient() -> None:
    x = move(_batch(torch.float32)[0]).requires_grad_()
    out = token_statistics(x, sum_p_squared=True)
    assert out.sum_p_squared is not None
    assert not out.sum_p_squared.requires_grad


# What is refused

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": torch.tensor(torch.nan)}, ValueError, "scale must be a finite number, got nan"),
    ({"scale": torch.ones(N - 1)}, ValueError, r"scale has shape \(5,\), but target \(6,\)"),
    ({"scale": torch.ones(N, dtype=torch.bool)}, TypeError, "scale must hold real numbers"),
    ({"scale": torch.ones(N, device="meta")}, ValueError, "scale on meta"),
    ({"scale": torch.ones(N).to_sparse()}, TypeError, "scale must be a plain tensor"),
    ({"softcap": -1.0}, ValueError, "softcap must be a finite number of at least 0"),
    ({"softcap": torch.inf}, ValueError, "softcap must be"),
    ({"softcap": "3"}, ValueError, "softcap must be"),
    ({"softcap": True}, ValueError, "softcap must be"),
]


@CPU
@pytest.mark.parametrize(("options", "kind", "words"), BAD)
def test_wrong_values_are_refused(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        cross_entropy(*_batch()[:2], **options)


@CPU
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_that_is_not_finite_names_its_row(value: float) -> None:
    logits, target, scale = _batch()
    scale[2] = value  # an ignored row's does not matter
    assert bool(cross_entropy(logits, target, scale=scale).isfinite())
    scale[4] = value
    with pytest.raises(ValueError, match="scale must be finite, but it holds NaN or inf for row 4"):
        cross_entropy(logits, target, scale=scale)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_unseen_it_makes_its_row_nan(value: float, engine: str) -> None:
    """As on an accelerator, where nothing is read; ``scales.of_rows`` makes NaN of infinities."""
    logits, target, scale = _batch(torch.float32)
    scale[4] = value
    scale = scale + (scale - scale)
    x = move(logits).requires_grad_()
    with patch.object(passes, "_on_host", return_value=False):
        losses = cross_entropy(x, move(target), reduction="none", scale=move(scale), engine=engine)
        losses.sum().backward()
    assert x.grad is not None
    others = [0, 1, 2, 3, 5]
    for row in (losses, x.grad):
        assert bool(row[4].isnan().all())
        assert bool(row[others].isfinite().all())


def _different(group: dist.ProcessGroup, check: bool) -> list[str]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    logits, target, scale = _batch(torch.float32)
    shard = logits.chunk(world, -1)[rank]
    calls: list[dict[str, Any]] = [
        {"scale": scale + rank},
        {"scale": scale if rank else 1.0},
        {"softcap": 3.0 + rank},
        {"scale": torch.where(torch.arange(N) == 3, torch.nan, scale)},
    ]
    out = []
    for call in calls:
        for collective in ("all_gather", "all_reduce"):
            try:
                cross_entropy(
                    shard, target, group=group, check=check, collective=collective, **call
                )
                out.append("")
            except ValueError as problem:
                out.append(str(problem))
    with patch.object(passes, "_on_host", return_value=False):
        for call in calls[:3]:
            loss = cross_entropy(shard, target, group=group, **call)
            assert bool(loss.isnan())
    return out


@CPU
@pytest.mark.parametrize("check", [False, True])
def test_ranks_that_disagree_are_told(pool: Pool, check: bool) -> None:
    words = (
        "disagree on scale",
        "disagree on scale (one for each row",
        "disagree on softcap",
        "scale must be finite, but rank 0 of the group holds NaN or inf for row 3",
    )
    for texts in pool.run(_different, 2, (check,)):
        for number, text in enumerate(texts):
            assert words[number // 2] in text


def _on_a_mesh(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    logits, target, scale = _batch()
    want = _plain(logits, target, scale, 0.0)
    shards = {
        "vocabulary": DTensor.from_local(logits.chunk(world, -1)[rank], mesh, [Shard(1)]),
        "rows": DTensor.from_local(logits.chunk(world, 0)[rank], mesh, [Shard(0)]),
    }
    whole: Any = DTensor.from_local(scale, mesh, [Replicate()])
    one: Any = DTensor.from_local(torch.tensor(0.5), mesh, [Replicate()])
    for name, x in shards.items():
        given = target.chunk(world)[rank] if name == "rows" else target
        for value in (scale, whole):
            loss: Any = cross_entropy(x, given, scale=value)
            torch.testing.assert_close(loss.to_local(), want)
        loss = cross_entropy(x, given, scale=one)
        torch.testing.assert_close(loss.to_local(), _plain(logits, target, 0.5, 0.0))
        out: Any = token_statistics(x, sum_p_squared=True)
        p = logits.softmax(-1).square().sum(-1)
        torch.testing.assert_close(out.sum_p_squared.full_tensor(), p)


@CPU
def test_scales_on_a_mesh(pool: Pool) -> None:
    pool.run(_on_a_mesh, 2)
