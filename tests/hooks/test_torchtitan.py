"""torchtitan, the real package: its own loss beside ours, as its trainer calls them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tests.ranks import run_fresh
from vocab_parallel_ce.parallel.torchtitan import summed_loss

B, S, VOCAB = 2, 6, 39


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (B, S))
    labels[0, :2] = -100
    return torch.randn(B, S, VOCAB), labels


def _ours(**options: Any) -> Any:
    from vocab_parallel_ce.parallel.torchtitan import VocabParallelCrossEntropyLoss

    return VocabParallelCrossEntropyLoss.Config(**options).build()


def compared(group: dist.ProcessGroup) -> dict[str, float]:
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    full, labels = _data()
    tokens = torch.tensor(17.0)
    found = {}
    for kind in ("plain labels", "DTensor labels", "replicated logits"):
        placement = Replicate() if kind == "replicated logits" else Shard(2)
        results = []
        for loss in (_ours(), CrossEntropyLoss.Config().build()):
            pred = DTensor.from_local(
                _part(full, placement, group), mesh, [placement], shape=full.shape,
                stride=full.stride(), run_check=False,
            ).requires_grad_()  # fmt: skip
            told: Tensor = labels
            if kind != "plain labels":
                told = DTensor.from_local(labels, mesh, [Replicate()], run_check=False)
            value, metrics = loss(pred * 1, told, tokens)
            assert metrics == {}
            value.backward()
            assert isinstance(pred.grad, DTensor)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            results.append((whole.detach(), pred.grad.full_tensor()))
        (a, da), (b, db) = results
        found[kind] = max(float((a - b).abs()), float((da - db).abs().max()))
    return found


def chunked(group: dist.ProcessGroup) -> dict[str, float]:
    """torchtitan's wrapper around either loss, over a head split by torch's own plan."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.distributed.utils import set_spmd_backend

    from vocab_parallel_ce.parallel.torchtitan import VocabParallelCrossEntropyLoss

    set_spmd_backend("partial_dtensor")
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    _, labels = _data()
    hidden, results = torch.randn(B, S, 16), []
    for loss in (VocabParallelCrossEntropyLoss.Config(), CrossEntropyLoss.Config()):
        torch.manual_seed(1)
        head: Any = torch.nn.Linear(16, VOCAB, bias=False)
        split = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        head = parallelize_module(head, mesh, split)
        wrapper = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=loss).build()
        wrapper.set_lm_head(head)
        x = hidden.clone().requires_grad_()
        value, _ = wrapper(x * 1, labels, torch.tensor(10.0))
        value.backward()
        assert x.grad is not None
        assert isinstance(head.weight.grad, DTensor)
        results.append((value.detach(), x.grad, head.weight.grad.full_tensor()))
    names = ("loss", "hidden states", "head")
    pairs = zip(*results, strict=True)
    return {n: float((a - b).abs().max()) for n, (a, b) in zip(names, pairs, strict=True)}


def _part(full: Tensor, placement: Any, group: dist.ProcessGroup) -> Tensor:
    if isinstance(placement, Replicate):
        return full.clone()
    return full.chunk(group.size(), dim=2)[group.rank()].clone()


def refused(group: dist.ProcessGroup) -> str:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    full, labels = _data()
    pred = DTensor.from_local(full, mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"Partial.* cannot be served") as problem:
        summed_loss(pred, labels)
    part = _part(full, Shard(2), group)
    split = DTensor.from_local(part, mesh, [Shard(2)], run_check=False, shape=full.shape,
                               stride=full.stride())  # fmt: skip
    with pytest.raises(ValueError, match=f"holds {VOCAB} on rank 0 of the group, which is neither"):
        summed_loss(split, torch.full((B, S), VOCAB))
    return str(problem.value)


def test_loss_and_gradient_are_those_of_torchtitan() -> None:
    for outcome in run_fresh(compared, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert len(outcome.value) == 3
        assert max(outcome.value.values()) < 1e-6, outcome.value


def test_in_its_wrapper_by_chunks() -> None:
    for outcome in run_fresh(chunked, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert outcome.value.keys() == {"loss", "hidden states", "head"}
        assert max(outcome.value.values()) < 1e-6, outcome.value


def test_partial_logits_and_labels_beyond_the_vocabulary_are_refused() -> None:
    for outcome in run_fresh(refused, 2, timeout=120):
        assert not outcome.kind, outcome.trace


def test_one_rank_and_every_option() -> None:
    full, labels = _data()
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-3}
    value, _ = _ours(**options)(full.requires_grad_(), labels, torch.tensor(2.0))
    lse = full.double().logsumexp(-1)
    want = (
        torch.nn.functional.cross_entropy(
            full.double().flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1
        )
        + 1e-3 * (lse.square() * (labels != -100)).sum()
    )
    torch.testing.assert_close(value.double(), want / 2, rtol=1e-6, atol=0)


def test_the_class_is_torchtitans() -> None:
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper

    ours = _ours()
    assert isinstance(ours, BaseLoss)
    assert ChunkedLossWrapper.Config(loss_fn=type(ours).Config()).loss_fn is not None


def test_another_torchtitan_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from vocab_parallel_ce.parallel import torchtitan

    torchtitan._loss_class.cache_clear()
    monkeypatch.setitem(sys.modules, "torchtitan.components.loss", None)
    with pytest.raises(ImportError, match=r"cannot be imported .*known to work: torchtitan 0\.3"):
        _ = torchtitan.VocabParallelCrossEntropyLoss
