"""Tensors that do not simply own their numbers: served right, or refused by name, on any engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import batch

from .device import DEVICE, ENGINES
from .ranks import Pool, run_fresh

ROWS, COLUMNS = 6, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated|quantize).*"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the kinds are the same on every device"),
]
Arguments = dict[str, Any]


def _arguments() -> Arguments:
    data = batch(ROWS, COLUMNS, torch.float32)
    return {
        "input": data.logits,
        "target": data.target,
        "weight": data.weight,
        "normalizer": torch.tensor(3.0),
    }


ARGUMENTS = tuple(_arguments())


def _zero(value: Tensor) -> Tensor:
    return torch._efficientzerotensor(value.shape, dtype=value.dtype)


def _as_subclass(value: Tensor) -> Tensor:
    class Named(Tensor):
        """A subclass that only has a name of its own."""

    return value.as_subclass(Named)


# What becomes plain numbers: (how it is made, the plain tensor it stands for)
SERVED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "async collective": (funcol.AsyncCollectiveTensor, lambda x: x),
    "view of an async collective": (
        lambda x: funcol.AsyncCollectiveTensor(x.clone()).view(x.shape), lambda x: x,
    ),
    "pending negation": (lambda x: torch._neg_view(-x), lambda x: x),
    "zeros in name only": (_zero, torch.zeros_like),
    "subclass with memory": (_as_subclass, lambda x: x),
    "parameter": (lambda x: torch.nn.Parameter(x, requires_grad=False), lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("kind", SERVED)
def test_served(kind: str, name: str, engine: str) -> None:
    """The loss is that of the plain tensor, the gradient arrives, and no engine crashes."""
    make, plain = SERVED[kind]
    results = []
    for as_kind in (make, plain):
        arguments = _arguments()
        leaf = arguments["input"].requires_grad_()
        arguments[name] = as_kind(arguments[name].detach())
        if name == "input":
            leaf = arguments[name] = arguments[name].requires_grad_()
        loss = cross_entropy(**arguments, engine=engine)
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append((loss.detach().as_subclass(Tensor), grad))
    for got, want in zip(*results, strict=True):  # a normalizer of 0 makes NaN of both
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# What is refused: how it is made, and the way out that the message must name
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda x: x.to_sparse(), "to_dense"),
    "sparse csr": (lambda x: x.reshape(x.shape[0] if x.dim() else 1, -1).to_sparse_csr(), "to_den"),
    "mkldnn": (lambda x: x.float().reshape(x.shape or (1,)).to_mkldnn(), "to_dense"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), "values"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x.reshape(-1)] * 2, layout=torch.jagged), "values",
    ),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "qint8",
    ),
    "wrapper": (lambda x: TwoTensor(x, x), "plain tensor"),
    "masked": (
        lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), "plain",
    ),
    "meta": (lambda x: x.to("meta"), "meta"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), "fake"),
    "complex": (lambda x: torch.complex(x.float(), x.float()), "complex"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, name: str, engine: str) -> None:
    make, way_out = REFUSED[kind]
    arguments = _arguments()
    arguments[name] = make(arguments[name])
    with pytest.raises((TypeError, ValueError), match=rf"(?s){name}.*{way_out}"):
        cross_entropy(**arguments, engine=engine)
    if name in ("input", "target"):
        for function in (cross_entropy_loss, token_statistics):
            with pytest.raises((TypeError, ValueError), match=name):
                function(arguments["input"], arguments["target"], engine=engine)


@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_float8_is_refused(name: str) -> None:
    arguments = _arguments()
    arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    with pytest.raises((TypeError, ValueError), match=rf"{name} must .*float8_e4m3fn"):
        cross_entropy(**arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_freed_memory_is_not_read(engine: str) -> None:
    """Before forward, until backward, and what a hook for saved tensors hands back."""
    target = torch.zeros(ROWS, dtype=torch.int64)
    leaf = torch.randn(ROWS, COLUMNS, requires_grad=True)
    logits = leaf * 1.0
    loss = cross_entropy(logits, target, engine=engine)
    logits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"has no memory.*storage freed"):
        loss.backward()
    with pytest.raises(ValueError, match="has no memory"):
        cross_entropy(logits.detach(), target, engine=engine)

    def sparse(value: Tensor) -> Tensor:
        return value.to_sparse() if value.dim() == 2 and value.shape[1] == COLUMNS else value

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, sparse):
        loss = cross_entropy(leaf * 1.0, target, engine=engine)
    with pytest.raises(ValueError, match=r"has no memory.*hook"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_freed_memory_of_any_argument_is_refused_by_name(name: str, engine: str) -> None:
    arguments = _arguments()
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name} of shape .* has no memory.*storage freed"):
        cross_entropy(**arguments, engine=engine)


def test_a_weight_freed_before_backward_is_refused() -> None:
    arguments = _arguments()
    leaf, weight = arguments["input"].requires_grad_(), arguments["weight"]
    loss = cross_entropy(leaf, arguments["target"], weight, label_smoothing=0.1)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^weight of shape .* has no memory"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_in_place_after_an_async_collective(engine: str) -> None:
    target, data = torch.arange(ROWS), torch.randn(ROWS, COLUMNS)
    grads = []
    for in_place in (False, True):
        leaf = data.clone().requires_grad_()
        logits = funcol.AsyncCollectiveTensor(leaf.detach() * 1.0).requires_grad_()
        if in_place:
            with pytest.raises(ValueError, match=r"inplace_backward=True.*leaf"):
                cross_entropy(logits, target, inplace_backward=True, engine=engine)
        made = logits.view(ROWS, COLUMNS) * 1.0 if in_place else logits
        cross_entropy(made, target, inplace_backward=in_place, engine=engine).backward()
        grads.append(logits.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


def _async(value: Tensor) -> Tensor:
    made: Any = funcol.AsyncCollectiveTensor
    out: Tensor = made(value)
    return out


def _upstream(kind: str, rows: int) -> Tensor:
    plain = torch.linspace(-1, 1, rows)
    return {
        "pending negation": lambda: torch._neg_view(-plain),
        "async collective": lambda: _async(plain.clone()),
        "expanded": lambda: plain,
    }[kind]()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["pending negation", "async collective"])
def test_incoming_gradients(kind: str, engine: str) -> None:
    leaf, target = torch.randn(ROWS, COLUMNS, requires_grad=True), torch.arange(ROWS)
    grads = []
    for name in (kind, "expanded"):
        loss = cross_entropy(leaf, target, reduction="none", engine=engine)
        grads.append(torch.autograd.grad(loss, leaf, _upstream(name, ROWS))[0])
    assert torch.equal(*grads)


# Over real ranks


def _collective_logits(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data = batch(ROWS, COLUMNS * world, torch.float32)
    mine = data.logits[:, rank * COLUMNS : (rank + 1) * COLUMNS].contiguous()
    want = cross_entropy(mine, data.target, group=group)
    gathered = funcol.all_gather_tensor(mine.chunk(world)[rank].contiguous(), 0, group)
    assert isinstance(gathered, funcol.AsyncCollectiveTensor)
    shard = VocabShard.even(COLUMNS * world, group)
    got = cross_entropy(gathered, data.target, group=group, shard=shard)
    plain = gathered.wait().clone()
    assert torch.equal(got, cross_entropy(plain, data.target, group=group, shard=shard))

    mesh = DeviceMesh.from_group(group, "cpu")  # a mesh of its own would want all ranks of the pool
    leaf = mine.clone().requires_grad_()
    wide = DTensor.from_local(leaf, mesh, [Shard(1)])
    rows = wide.redistribute(placements=[Shard(0)], async_op=True)
    replicated = rows.redistribute(placements=[Replicate()], async_op=True)
    loss: Any = cross_entropy(replicated, data.target)
    loss.full_tensor().backward()
    other = mine.clone().requires_grad_()
    cross_entropy(other, data.target, group=group).backward()
    torch.testing.assert_close(leaf.grad, other.grad)

    # With check on, all ranks learn of what only one was given.
    for bad in ({"input": mine.to_sparse()}, {"weight": data.weight.to(torch.float8_e5m2)}):
        call: Arguments = {"input": mine, "target": data.target}
        if rank == 0:
            call |= bad
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            cross_entropy(**call, group=group, check=True)
    assert torch.equal(cross_entropy(mine, data.target, group=group), want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_over_ranks(pool: Pool) -> None:
    pool.run(_collective_logits, 2)


# Shapes without numbers


def _calls(x: Tensor, y: Tensor) -> list[Tensor]:
    out = cross_entropy_loss(x, y, lse_square_scale_for_zloss=0.1, return_zloss=True)
    stats = token_statistics(x, y, entropy=True, argmax=True)
    assert stats.entropy is not None
    assert stats.argmax is not None
    loss = cross_entropy(x * 1, y, label_smoothing=0.1, inplace_backward=True)
    return [loss, *out, stats.log_prob, stats.lse, stats.entropy, stats.argmax]


@pytest.mark.parametrize("mode", [FakeTensorMode, nullcontext], ids=["fake", "meta"])
def test_shapes_of_every_output(mode: Callable[[], Any]) -> None:
    """As for F.cross_entropy: shapes and dtypes are those of a real call, gradients included."""
    device = "cpu" if mode is FakeTensorMode else "meta"
    real = _calls(torch.randn(ROWS, COLUMNS, requires_grad=True), torch.arange(ROWS))
    with mode():
        leaf = torch.randn(ROWS, COLUMNS, device=device, requires_grad=True)
        outputs = _calls(leaf, torch.zeros(ROWS, dtype=torch.int64, device=device))
        for got, want in zip(outputs, real, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
        outputs[0].backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape


def test_real_tensors_under_fake_mode_are_refused() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=r"input.*fake_mode.from_tensor"):
        cross_entropy(torch.nn.Parameter(_REAL), _TARGET)


_REAL, _TARGET = torch.randn(ROWS, COLUMNS), torch.arange(ROWS)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: Any) -> None:
    """The traced graph computes what the function does, on other numbers too."""

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = cross_entropy(x * 2, y, inplace_backward=mode != "real")
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    graph = make_fx(gradient, tracing_mode=mode)(_REAL, _TARGET)
    rows = ROWS + 3 if mode == "symbolic" else ROWS
    x, y = torch.randn(rows, COLUMNS), torch.randint(COLUMNS, (rows,))
    for got, want in zip(graph(x, y), gradient(x, y), strict=True):
        assert torch.equal(got, want)


def test_functionalize() -> None:
    want = cross_entropy(_REAL, _TARGET)
    assert torch.equal(torch.func.functionalize(lambda x: cross_entropy(x, _TARGET))(_REAL), want)


def test_flop_counter() -> None:
    """Matrix products are counted, a loss has none; numbers are the usual ones."""
    leaf = _REAL.clone().requires_grad_()
    hidden = torch.eye(ROWS)
    with FlopCounterMode(display=False) as ours:
        loss = cross_entropy(hidden @ leaf, _TARGET)
        loss.backward()
    with FlopCounterMode(display=False) as theirs:
        F.cross_entropy(hidden @ leaf, _TARGET).backward()
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
    assert torch.equal(loss, cross_entropy(_REAL, _TARGET))


# Dry runs of many ranks in one process


def _dry_run(_: Any) -> None:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=1000)
    group = dist.group.WORLD
    leaf, target = _REAL.clone().requires_grad_(), _TARGET
    for collective, check in itertools.product(("all_gather", "all_reduce"), (False, True)):
        loss = cross_entropy(leaf, target, group=group, collective=collective, check=check)
        loss.backward()
        assert loss.isfinite()
    with pytest.raises(ValueError, match="rank 3 of the group"):
        cross_entropy(leaf, target[1:], group=group, check=True)
    assert VocabShard.from_group(5, group) == VocabShard(15, 20, 5000)
    mesh = init_device_mesh("cpu", (1000,))
    with FakeTensorMode():
        x = torch.randn(ROWS, COLUMNS, requires_grad=True)
        y = torch.zeros(ROWS, dtype=torch.int64)
        cross_entropy(x * 1, y, group=group, inplace_backward=True).backward()
        assert x.grad is not None
        logits = DTensor.from_local(x, mesh, [Shard(1)])
        cross_entropy(logits, y).backward()
        assert VocabShard.from_group(5, group) == VocabShard(15, 20, 5000)
        on_cuda = torch.randn(ROWS, COLUMNS, device="cuda")
        ids = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
        assert token_statistics(on_cuda, ids, group=group, check=True).lse.shape == (ROWS,)
        assert cross_entropy(on_cuda, ids, group=group).shape == ()


def test_dry_run_of_a_thousand_ranks() -> None:
    (outcome,) = run_fresh(_dry_run, 1)
    assert not outcome.kind, outcome.trace
