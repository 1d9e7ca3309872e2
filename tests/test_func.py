"""torch.func, batched gradients, checkpoints: right on one rank, else refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import batch

from .device import DEVICE, ENGINES
from .ranks import Pool

ROWS, CLASSES = 6, 11
Loss = Callable[[Tensor, Tensor], Tensor]
DATA = batch(ROWS, CLASSES, torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": DATA.weight.double(), "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"lse_square_scale": 0.1, "scale": 0.7},
    "padding": {"shard": VocabShard(0, CLASSES - 2, CLASSES - 2)},
    "normalizer": {"normalizer": 7.0},
}
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="plain torch is the same on every device")


def _target(*shape: int) -> Tensor:
    target = torch.randint(CLASSES - 2, shape)
    target.view(-1)[1] = -100
    return target


def _ours(options: str) -> Loss:
    return lambda x, y: cross_entropy(x, y, **OPTIONS[options])


def _plain(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The loss by torch's own functions."""
    shard, z = options.pop("shard", None), options.pop("lse_square_scale", 0.0)
    x = x[..., : shard.size if shard else None] * options.pop("scale", 1.0)
    normalizer = options.pop("normalizer", None)
    if normalizer is not None:
        return torch.div(F.cross_entropy(x, y, reduction="sum"), normalizer)
    kept = (y != -100).to(x.dtype)
    extra = z * (x.logsumexp(-1).square() * kept).sum() / kept.sum()
    return torch.add(F.cross_entropy(x, y, **options), extra)


@pytest.mark.parametrize("options", OPTIONS)
def test_grad_and_per_sample_gradients(options: str) -> None:
    x, y = torch.randn(3, ROWS, CLASSES, dtype=torch.float64), _target(3, ROWS)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return _plain(a, b, **OPTIONS[options])

    ours = _ours(options)
    transforms: tuple[Callable[[Loss], Any], ...] = (
        lambda f: torch.func.grad(f)(x[0], y[0]),
        lambda f: torch.func.vmap(torch.func.grad(f))(x, y),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(x, y[0]),
        lambda f: torch.func.vmap(f)(x, y),
        lambda f: torch.func.jacrev(f)(x[0], y[0]),
        lambda f: torch.func.jacrev(torch.func.grad(f))(x[0, :2], y[0, :2]),
        lambda f: torch.func.vjp(lambda a: f(a, y[0]), x[0])[1](torch.tensor(2.0).double())[0],
    )
    for transform in transforms:
        torch.testing.assert_close(transform(ours), transform(plain))
    # torch's own loss cannot take many targets for one input.
    many = torch.func.vmap(torch.func.grad(ours), in_dims=(None, 0))(x[0], y)
    torch.testing.assert_close(many, torch.stack([torch.func.grad(plain)(x[0], b) for b in y]))


def test_every_output() -> None:
    """token_statistics and the operator under grad and vmap, against the primitive itself."""
    x, y = torch.randn(3, ROWS, CLASSES, dtype=torch.float64), _target(3, ROWS)

    def outputs(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        s = token_statistics(a, b, entropy=True, argmax=True)
        out = cross_entropy_loss(a, b, lse_square_scale_for_zloss=0.1, return_zloss=True)
        assert s.entropy is not None
        assert s.argmax is not None
        return s.log_prob, s.lse, s.entropy, s.argmax, *out

    for got, *wants in zip(
        torch.func.vmap(outputs)(x, y), *(outputs(a, b) for a, b in zip(x, y, strict=True)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, torch.stack(wants))

    def total(a: Tensor) -> Tensor:
        s = token_statistics(a, y[0], entropy=True)
        assert s.entropy is not None
        return (s.log_prob + s.lse.square() + s.entropy.sin()).sum()

    leaf = x[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(x[0]), want)


def test_ignored_and_masked_rows() -> None:
    """A row that does not count has gradient 0 whatever it holds; a masked column has p = 0."""
    x, y = torch.randn(ROWS, CLASSES), torch.arange(ROWS)
    x[2], x[:, -1], y[2] = torch.nan, -torch.inf, -100
    for entropy in (False, True):

        def loss(a: Tensor, entropy: bool = entropy) -> Tensor:
            s = token_statistics(a, y, entropy=entropy)
            return s.log_prob.sum() if s.entropy is None else s.entropy.sum()

        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf), leaf)
        got = torch.func.grad(loss)(x)
        assert bool((got[2] == 0).all())
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"scale": torch.tensor([1, 2, torch.nan, 4])}]
)
def test_ignored_rows_under_a_cap_and_a_scale(options: dict[str, Any]) -> None:
    """What cap and scale make of such a row does not reach the gradient either."""
    x, y = torch.randn(4, CLASSES), torch.tensor([0, 1, -100, 3])
    x[2] = torch.nan
    leaf = x.clone().requires_grad_()

    def loss(a: Tensor) -> Tensor:
        out: Tensor = cross_entropy(a, y, **options)
        return out

    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    rows = torch.eye(4)
    losses = cross_entropy(leaf, y, reduction="none", **options)
    (many,) = torch.autograd.grad(losses, leaf, rows, is_grads_batched=True)
    assert bool((many[:, 2] == 0).all())
    torch.testing.assert_close(many.sum(0), 3 * want)


@pytest.mark.parametrize("function", ["loss", "operator", "statistics"])
def test_inside_a_transform_of_something_else(function: str) -> None:
    """Nothing of the call is seen through the transform, but what torch makes of it is."""
    x, y = torch.randn(ROWS, CLASSES, requires_grad=True), _target(ROWS)

    def value() -> Tensor:
        if function == "loss":
            out: Tensor = cross_entropy(x, y, normalizer=3, scale=torch.full((ROWS,), 0.5))
            return out
        if function == "operator":
            result = cross_entropy_loss(x, y)
            return result.loss.sum() + result.log_prob.square().mean()
        return token_statistics(x, y, selected=y.clamp(min=0)[:, None]).lse.sum()

    want = value()
    (gradient,) = torch.autograd.grad(want, x)
    torch.testing.assert_close(torch.func.vmap(lambda a: a * value())(torch.ones(2))[1], want)
    by_factor, got = torch.func.grad_and_value(lambda a: a * value())(torch.ones(()))
    torch.testing.assert_close(by_factor, want)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], gradient)


def test_no_rows() -> None:
    def loss(a: Tensor) -> Tensor:
        none = torch.empty(0, dtype=torch.int64)
        return cross_entropy(a, none, reduction="sum", label_smoothing=0.1)

    assert torch.func.grad(loss)(torch.randn(0, CLASSES)).shape == (0, CLASSES)


def test_invalid_targets() -> None:
    """An error where values can be looked at, NaN in the row under vmap; never a number."""
    x, y = torch.randn(2, ROWS, CLASSES), _target(2, ROWS)
    y[1, 3] = CLASSES
    with pytest.raises(ValueError, match=r"row 3 holds 11"):
        torch.func.grad(cross_entropy)(x[1], y[1])
    grads = torch.func.vmap(torch.func.grad(cross_entropy))(x, y)
    assert grads[0].isfinite().all()
    assert grads[1, 3].isnan().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_is_grads_batched(engine: str) -> None:
    leaf, y = torch.randn(ROWS, CLASSES, requires_grad=True), _target(ROWS)
    out = cross_entropy(leaf, y, reduction="none", label_smoothing=0.1, engine=engine)
    many = torch.randn(4, ROWS)
    (got,) = torch.autograd.grad(out, leaf, many, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(out, leaf, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(got, torch.stack(want))
    in_place = cross_entropy(leaf * 1, y, reduction="none", inplace_backward=True, engine=engine)
    with pytest.raises(ValueError, match="inplace_backward=True has room for one gradient"):
        torch.autograd.grad(in_place, leaf, many, is_grads_batched=True)


def _forward_mode(x: Tensor, y: Tensor, **options: Any) -> None:
    def loss(a: Tensor) -> Tensor:
        out: Tensor = cross_entropy(a, y, **options)
        return out

    for attempt in (
        lambda: torch.func.jvp(loss, (x,), (x,)),
        lambda: torch.func.jacfwd(loss)(x),
        lambda: torch.func.hessian(loss)(x),
    ):
        with pytest.raises(ValueError, match=r"forward-mode.*reverse mode"):
            attempt()
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match=r"forward-mode.*reverse mode"):
            loss(forward_ad.make_dual(x, x))
        assert loss(x).isfinite()  # nothing is asked of it here


def test_forward_mode_is_refused() -> None:
    _forward_mode(torch.randn(ROWS, CLASSES), _target(ROWS))


def _on_several_ranks(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3, ROWS, CLASSES, generator=generator)
    y = torch.arange(ROWS)

    def loss(a: Tensor) -> Tensor:
        return cross_entropy(a, y, group=group)

    for attempt in (
        lambda: torch.func.grad(loss)(x[0]),
        lambda: torch.func.vmap(torch.func.grad(loss))(x),
        lambda: torch.func.vmap(loss)(x),
    ):
        with pytest.raises(ValueError, match=rf"one rank only.*rank {rank} of the group"):
            attempt()
    # Neither is a loss inside a transform of something else: torch would wrap what it makes.
    for options in ({}, {"scale": torch.ones(ROWS)}, {"normalizer": 3}, {"check": True}):
        for transform in (torch.func.grad, torch.func.vmap):
            with pytest.raises(ValueError, match="one rank only"):
                transform(lambda a, o=options: a + cross_entropy(x[0], y, group=group, **o))(
                    torch.ones(()) if transform is torch.func.grad else torch.ones(2)
                )
    leaf = x[0].clone().requires_grad_()
    out = cross_entropy(leaf, y, group=group, reduction="none")
    with pytest.raises(ValueError, match="one rank only"):
        torch.autograd.grad(out, leaf, torch.eye(ROWS), is_grads_batched=True)
    _forward_mode(x[0], y, group=group)
    assert loss(x[0]).isfinite()


def test_several_ranks_are_refused(pool: Pool) -> None:
    pool.run(_on_several_ranks, 2)


def _checkpoints(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data = batch(ROWS, CLASSES * world, torch.float32)
    mine = data.logits[:, rank * CLASSES : (rank + 1) * CLASSES].contiguous()

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x * 1.5, data.target, group=group, inplace_backward=True)

    grads = []
    for run in (
        lambda x: loss(x),
        lambda x: checkpoint(loss, x, use_reentrant=True),
        lambda x: checkpoint(loss, x, use_reentrant=False),
    ):
        leaf = mine.clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    for grad in grads[1:]:
        assert torch.equal(grad, grads[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoints(pool: Pool, world: int) -> None:
    pool.run(_checkpoints, world)
