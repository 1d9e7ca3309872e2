"""torch.compile where options change from call to call, under compiled autograd, over DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import batch

from .device import DEVICE
from .ranks import Pool

ROWS, CLASSES = 5, 9
KEEPS_FLOATS_OPEN = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
Loss = Callable[[Tensor, Tensor, float], Tensor]
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the compiler's part is the same")


def _entropy(x: Tensor, y: Tensor, v: float) -> Tensor:
    entropy = token_statistics(x * 1, y, entropy=True, scale=v).entropy
    assert entropy is not None
    return entropy.sum()


def _operator(x: Tensor, y: Tensor, v: float) -> Tensor:
    out = cross_entropy_loss(x * 1, y, lse_square_scale_for_zloss=v, return_zloss=True)
    return (out.loss + out.zloss).sum()


def _every_output(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    of_targets = token_statistics(x * 1, y, entropy=True, sum_p_squared=True, scale=scale)
    of_rows = token_statistics(x * 1, sum_p_squared=True, scale=scale, softcap=4.0)
    out = cross_entropy_loss(x * 1, y, scale=scale, softcap=3.0)
    assert of_targets.entropy is not None
    assert of_targets.sum_p_squared is not None
    assert of_rows.sum_p_squared is not None
    total = of_targets.entropy + of_targets.sum_p_squared + of_rows.lse + of_rows.sum_p_squared
    return total.sum() + out.loss.sum() + out.log_prob.exp().sum()


# The loss, the values in turn, and how often it may have been compiled after each
OPTIONS: dict[str, tuple[Loss, tuple[float, ...], tuple[int, ...]]] = {
    "scale": (
        lambda x, y, v: cross_entropy(x * 1, y, scale=v, inplace_backward=True),
        (1.0, 0.7, 0.6, 1.3, -0.5),
        (1, 2, 2, 2, 2),
    ),
    "smoothing": (
        lambda x, y, v: cross_entropy(x * 1, y, label_smoothing=v),
        (0.1, 0.2, 0.3, 0.0, 0.4),
        (1, 2, 2, 3, 3),
    ),
    "z-loss": (
        lambda x, y, v: cross_entropy(x * 1, y, lse_square_scale=v),
        (0.0, 0.1, 0.2, 0.0, 0.3),
        (1, 2, 2, 2, 2),
    ),
    "z-loss switched off": (_operator, (0.1, 0.2, 0.3, 0.0, 0.4), (1, 2, 2, 3, 3)),
    "scale of statistics": (_entropy, (1.0, 0.7, 0.6), (1, 2, 2)),
    "softcap": (
        lambda x, y, v: cross_entropy(x * 1, y, softcap=v, scale=0.7),
        (5.0, 4.0, 3.0, 0.0, 2.0),
        (1, 2, 2, 3, 3),
    ),
    "scale of every row": (
        lambda x, y, v: _every_output(x, y, torch.linspace(0.5, 1.5, ROWS) * v),
        (1.0, 2.0, 3.0),
        (1, 2, 2),
    ),
    "scale of no dimension": (
        lambda x, y, v: _every_output(x, y, torch.ones(()) * v),
        (1.0, 2.0, 3.0),
        (1, 2, 2),
    ),
    "normalizer": (
        lambda x, y, v: cross_entropy(x * 1, y, normalizer=v),
        (3.0, 4.0, 5.5),
        (1, 2, 2),
    ),
}


def _result(loss: Loss, x: Tensor, y: Tensor, value: float) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = loss(leaf, y, value)
    return out.detach(), torch.autograd.grad(out, leaf)[0]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in OPTIONS),
        ("scale", "inductor"),
        pytest.param("smoothing", "inductor", marks=pytest.mark.full),
    ],
)
def test_a_float_that_changes(name: str, backend: str) -> None:
    """Never a stale value, and no more compilations than one a change of kind."""
    loss, values, allowed = OPTIONS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    fast = torch.compile(loss, fullgraph=True, backend=counter)
    data = batch(ROWS, CLASSES, torch.float32)
    for value, most in zip(values, allowed, strict=True):
        got = _result(fast, data.logits, data.target, value)
        for a, b in zip(got, _result(loss, data.logits, data.target, value), strict=True):
            torch.testing.assert_close(a, b)
        if KEEPS_FLOATS_OPEN:
            assert counter.frame_count <= most, value


def test_not_finite_is_an_error_when_it_runs() -> None:
    loss, *_ = OPTIONS["scale"]
    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    data = batch(ROWS, CLASSES, torch.float32)
    for value in (1.0, 0.5):
        fast(data.logits, data.target, value)
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            fast(data.logits, data.target, value)


def test_dynamic_shapes() -> None:
    """Rows and classes both change; at most one compilation more than the first."""

    def loss(x: Tensor, y: Tensor, v: float) -> Tensor:
        return cross_entropy(x.view(-1, x.shape[-1]), y.view(-1), label_smoothing=v)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for rows, classes in ((2, 9), (3, 9), (5, 12), (7, 20)):
        x, y = torch.randn(rows, 4, classes), torch.randint(classes, (rows, 4))
        want = _result(loss, x, y, 0.1)
        for a, b in zip(_result(fast, x, y, 0.1), want, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def _compiled_autograd(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data = batch(ROWS, CLASSES * world, torch.float32)
    mine = data.logits[:, rank * CLASSES : (rank + 1) * CLASSES].contiguous()
    for in_place in (False, True):

        def loss(x: Tensor, y: Tensor, v: float, in_place: bool = in_place) -> Tensor:
            return cross_entropy(
                x * 1, y, label_smoothing=v, scale=0.7, group=group, inplace_backward=in_place
            )

        torch._dynamo.reset()
        leaf = mine.clone().requires_grad_()
        out = loss(leaf, data.target, 0.1)
        compiler = torch.compile(backend="aot_eager", fullgraph=True)
        enable: Any = compiled_autograd._enable
        with enable(compiler):
            out.backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, _result(loss, mine, data.target, 0.1)[1])


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_autograd_around_an_eager_loss(pool: Pool, world: int) -> None:
    pool.run(_compiled_autograd, world, timeout=120)


def _compiled_dtensor(group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    data = batch(ROWS, CLASSES, torch.float32)

    def loss(x: Any, y: Tensor, v: float) -> Tensor:
        out: Any = cross_entropy(x * 1, y, label_smoothing=v)
        return out.full_tensor()  # type: ignore[no-any-return]

    for placement in (Shard(1), Shard(0), Replicate()):
        torch._dynamo.reset()
        fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = []
        for f in (loss, fast):
            leaf = data.logits.clone().requires_grad_()
            full = DTensor.from_local(leaf, mesh, [Replicate()], run_check=False)
            out = f(full.redistribute(placements=[placement]), data.target, 0.1)
            out.backward()
            results.append((out.detach(), leaf.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_dtensor_logits(pool: Pool) -> None:
    pool.run(_compiled_dtensor, 2, timeout=120)
