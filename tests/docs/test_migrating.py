"""The table of docs/migrating.md: what gradient each kind of gather gives, measured.

A head ``hidden @ weight.T`` split over the vocabulary; the loss is computed on gathered logits, in
the ways that people gather them, and by this library on the shard. One case a row of the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.parallel.layers import copy_to_group
from vocab_parallel_ce.parallel.megatron.on_cpu import run_megatron_on_cpu

from ..ranks import Pool

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"
ROWS, WIDTH, VOCAB = 5, 4, 24


def _autograd_gather(logits: Tensor, group: Any) -> Tensor:
    import torch.distributed.nn.functional as dnn

    return torch.cat(dnn.all_gather(logits, group=group), -1)


def _functional_collective(logits: Tensor, group: Any) -> Tensor:
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    whole: Tensor = all_gather_tensor_autograd(logits.t().contiguous(), 0, group).t()
    return whole


def _own_shard(logits: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.detach(), group=group)
    parts[dist.get_rank(group)] = logits
    return torch.cat(parts, -1)


def _megatron(logits: Tensor, group: Any) -> Tensor:
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    with run_megatron_on_cpu():
        whole: Tensor = gather_from_tensor_model_parallel_region(logits, group)
    return whole


def _dtensor(logits: Tensor, group: Any) -> Tensor:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(logits, mesh, [Shard(1)]).full_tensor()


# What the page calls it -> the gather, and how many times the gradient of the one loss it gives.
GATHERS = {
    "`torch.distributed.nn.functional.all_gather`": (_autograd_gather, "tp"),
    "`all_gather_tensor_autograd` of functional collectives": (_functional_collective, "tp"),
    "a plain `all_gather` that keeps the own shard": (_own_shard, "1"),
    "Megatron's `gather_from_tensor_model_parallel_region`": (_megatron, "1"),
    "`DTensor.full_tensor()`": (_dtensor, "1"),
}


def _gradients(group: Any) -> dict[str, tuple[float, float]]:
    """Of every way: (norm of the logits' gradient, of the summed hidden gradient) over ours."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=g)
    weight = torch.randn(VOCAB, WIDTH, generator=g).chunk(world)[rank]
    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    shard = VocabShard.even(VOCAB, group)

    def run(loss_of: Any) -> tuple[Tensor, Tensor]:
        h = hidden.clone().requires_grad_()
        logits = copy_to_group(h, group) @ weight.t()
        logits.retain_grad()
        loss_of(logits).backward()
        assert logits.grad is not None
        assert h.grad is not None
        return logits.grad, h.grad

    ours = run(lambda logits: cross_entropy(logits, target, group=group, shard=shard))
    ratios = {}
    for name, (gather, _) in GATHERS.items():
        theirs = run(lambda logits, way=gather: F.cross_entropy(way(logits, group), target))
        factors = [float(t.norm() / o.norm()) for t, o in zip(theirs, ours, strict=True)]
        for theirs_grad, ours_grad, factor in zip(theirs, ours, factors, strict=True):
            torch.testing.assert_close(theirs_grad, ours_grad * factor)  # nothing but a factor
        ratios[name] = (factors[0], factors[1])
    return ratios


@pytest.mark.parametrize("world", [2, 3])
def test_the_factors_are_those_of_the_table(pool: Pool, world: int) -> None:
    for ratios in pool.run(_gradients, world=world):
        for name, (_, factor) in GATHERS.items():
            want = world if factor == "tp" else 1
            assert ratios[name] == pytest.approx((want, want), rel=1e-5), name


def test_the_page_says_so() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", PAGE.read_text(), re.MULTILINE)
    told = dict(rows)
    for name, (_, factor) in GATHERS.items():
        assert told[name] == ("tp times" if factor == "tp" else "the same"), name


def _hidden_without_the_sum(group: Any) -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=g)
    full = torch.randn(VOCAB, WIDTH, generator=g)
    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    alone = hidden.clone().requires_grad_()
    F.cross_entropy(alone @ full.t(), target).backward()
    forgotten = hidden.clone().requires_grad_()
    logits = forgotten @ full.chunk(world)[rank].t()
    cross_entropy(logits, target, group=group).backward()
    assert alone.grad is not None
    assert forgotten.grad is not None
    return alone.grad, forgotten.grad


def test_a_head_that_forgets_to_sum_gives_each_rank_a_part(pool: Pool) -> None:
    """The parts add up to the gradient of the hidden states; none of them is it."""
    results = pool.run(_hidden_without_the_sum, world=2)
    whole = results[0][0]
    torch.testing.assert_close(results[0][1] + results[1][1], whole)
    assert not torch.allclose(results[0][1], whole, rtol=0.1)
