"""The public functions over the triton engine, in the interpreter, against the fp64 oracle."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, passes, row_steps, token_statistics
from vocab_parallel_ce.testing import Sharding, assert_close, batch, even, sized

from ...cases import Findings, check_gradient, expected
from ...options import OPTIONS, REDUCTIONS
from ...ranks import Pool

ROWS = 12
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_RANK = sized("padded", (61,), (6,))
TWO_RANKS = (even(48, 2), sized("uneven", (37, 24), (3, 0)), sized("empty", (40, 0), (0, 2)))


def _losses_match(
    group: dist.ProcessGroup | None,
    sharding: Sharding,
    names: list[str],
    collective: str = "auto",
) -> int:
    """Loss and gradient under these options, every reduction in turn, out of place and in place."""
    rank, done, findings = 0 if group is None else dist.get_rank(group), 0, Findings()
    for turn, name in enumerate(names):
        chosen = dict(OPTIONS[name])
        weighted = chosen.pop("weight", False)
        if isinstance(chosen.get("scale"), Tensor):
            chosen["scale"] = chosen["scale"][:ROWS]
        reduction = REDUCTIONS[turn % len(REDUCTIONS)]
        dtype = DTYPES[turn % len(DTYPES)]
        data = batch(ROWS, sharding.vocab_size, dtype, chosen.get("ignore_index", -100), seed=turn)
        weight = data.weight if weighted else None
        want = expected(data.logits, data.target, weight, reduction=reduction, **chosen)
        up = data.upstream if reduction == "none" else data.upstream[0]
        gradients = want.gradients(lambda r, up=up: (r.loss * up.to(r.loss.dtype)).sum())
        for in_place in (False, True):
            leaf = sharding.local(data.logits, rank).requires_grad_()
            loss = cross_entropy(
                leaf * 1, data.target, weight, reduction, group=group, engine="triton",
                shard=sharding.shard(rank), inplace_backward=in_place, collective=collective,
                **chosen,
            )  # fmt: skip
            (grad,) = torch.autograd.grad(loss, leaf, up)
            what = f"{name}, {reduction}, {dtype}{', in place' if in_place else ''}"
            with findings:
                assert_close(
                    loss, want.exact.loss, want.naive.loss, what, rows_error=want.rows_error
                )
                check_gradient(grad, gradients, sharding, rank, what)
            done += 1
    findings.report()
    return done


def test_cross_entropy_of_one_rank() -> None:
    assert _losses_match(None, ONE_RANK, list(OPTIONS)) == 2 * len(OPTIONS)


@pytest.mark.parametrize("sharding", TWO_RANKS, ids=lambda s: s.name)
def test_cross_entropy_of_two_ranks(pair: Pool, sharding: Sharding) -> None:
    names = ["plain", "all", "z-loss"]
    assert pair.run(_losses_match, 2, (sharding, names)) == [2 * len(names)] * 2


def _losses_match_as_on_a_card(group: dist.ProcessGroup | None, *args: Any) -> int:
    """Nothing is looked at on the host, and the engine's own row functions serve."""
    with (
        patch.object(passes, "_on_host", return_value=False),
        patch.object(row_steps, "TorchSteps", None),
    ):
        return _losses_match(group, *args)


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_as_on_two_cards(pair: Pool, collective: str) -> None:
    args = (TWO_RANKS[0], ["all", "weight"], collective)
    assert pair.run(_losses_match_as_on_a_card, 2, args) == [4, 4]


def test_as_on_one_card() -> None:
    assert _losses_match_as_on_a_card(None, ONE_RANK, ["all", "plain"]) == 4


def _statistics_match(group: dist.ProcessGroup, sharding: Sharding) -> None:
    rank = dist.get_rank(group)
    data = batch(ROWS, sharding.vocab_size, torch.float32)
    want = expected(data.logits, data.target, reduction="none", scale=0.8)
    shard = sharding.shard(rank)
    options: dict[str, Any] = {"scale": 0.8, "group": group, "engine": "triton"}
    leaf = sharding.local(data.logits, rank).requires_grad_()
    got: Any = token_statistics(
        leaf, data.target, entropy=True, argmax=True, shard=shard, **options
    )
    assert_close(-got.log_prob, want.exact.loss, want.naive.loss, "log_prob")
    assert_close(got.entropy, want.exact.entropy, want.naive.entropy, "entropy")
    assert torch.equal(got.argmax, want.exact.argmax)
    total = (got.entropy * data.upstream).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    up: Tensor = data.upstream
    wanted = want.gradients(lambda r: (r.entropy * up.to(r.entropy.dtype)).sum())
    check_gradient(grad, wanted, sharding, rank, "entropy")
    out = cross_entropy_loss(leaf.detach(), data.target, shard=shard, **options)
    size = sharding.bounds[rank][1] - sharding.bounds[rank][0]
    exact, naive = (sharding.columns(r.log_prob, rank) for r in (want.exact, want.naive))
    assert_close(out.log_prob[:, :size], exact, naive, "log_prob of the shard")


def test_statistics_of_two_ranks(pair: Pool) -> None:
    pair.run(_statistics_match, 2, (TWO_RANKS[1],))


class _Counted(TorchDispatchMode):
    """What torch would launch. The interpreter moves tensors by copy_ and set_ of its own."""

    NO_LAUNCH = ("empty", "new_empty", "empty_like", "detach", "copy_", "set_")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.name().split("::")[1].split(".")[0]
        if not func.is_view and name not in self.NO_LAUNCH:
            self.names.append(name)
        return func(*args, **kwargs or {})


def _launched(group: dist.ProcessGroup) -> tuple[list[str], list[str]]:
    rank = dist.get_rank(group)
    data = batch(ROWS, 64, torch.float32)
    leaf = data.logits[:, 32 * rank : 32 * rank + 32].clone().requires_grad_()
    with patch.object(passes, "_on_host", return_value=False):
        with _Counted() as forward:
            loss = cross_entropy(leaf, data.target, group=group, engine="triton")
        with _Counted() as backward:
            loss.backward()
    return forward.names, backward.names


def test_little_is_launched_on_vectors_of_rows(pair: Pool) -> None:
    """Beside four kernels of the engine in forward and one in backward; torch's own steps: ~100."""
    for forward, backward in pair.run(_launched, 2):
        assert forward.count("_allgather_base_") == 1
        assert len(forward) <= 7, forward
        assert len(backward) <= 5, backward
