"""What each row of the fused head may have of its own: a scale, K selected ids, no target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vocab_parallel_ce import VocabShard, linear_cross_entropy, linear_token_statistics
from vocab_parallel_ce.testing import sized

from ..cases import Findings
from ..ranks import Pool
from .cases import check_head_gradients, close, expected_head, head_batch, local_head, scratch_for

ROWS, V, H = 12, 30, 8


def _scales(rows: int = ROWS) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5


def _losses_match(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    rank, world, findings = dist.get_rank(group), dist.get_world_size(group), Findings()
    plan = sized("padded", tuple(V // world + r * (1 - 2 * r) for r in range(world)), (2,) * world)
    plan = plan if world > 1 else sized("padded", (V,), (2,))
    data = head_batch(ROWS, plan.vocab_size, dtype)
    scales: list[Any] = [_scales(), -_scales(), torch.tensor(0.7)]
    for number, scale in enumerate(scales):
        for reduction, gradient in (("mean", "forward"), ("sum", "recompute"), ("none", "auto")):
            options: dict[str, Any] = {"reduction": reduction, "scale": scale, "softcap": 4.0}
            options["label_smoothing"] = 0.1 if number == 0 else 0.0
            want = expected_head(data, **options)
            mine = local_head(data, plan, rank)
            loss = linear_cross_entropy(
                mine.hidden, mine.head, data.target, group=group, shard=plan.shard(rank),
                gradient=gradient, scratch_mib=scratch_for(5, V // world + 1, dtype), **options,
            )  # fmt: skip
            assert isinstance(loss, Tensor)
            got = (*torch.autograd.grad(loss.sum(), mine.leaves[:2]), None)
            what = f"{reduction}, {gradient}, scale {number}"
            with findings:
                exact, naive = want.losses
                close(loss, exact.loss, naive.loss, what)
                wanted = want.gradients(lambda r: r.loss.sum())
                check_head_gradients(got, wanted, plan, rank, what)
    findings.report()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_scale_for_each_row(pool: Pool, world: int, dtype: torch.dtype) -> None:
    pool.run(_losses_match, world, (dtype,))


def _sequence(group: dist.ProcessGroup) -> None:
    """A split sequence, without a target; scale and ids are those of all rows."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    g = torch.Generator().manual_seed(0)
    full = torch.randn(8, 2, H, generator=g, dtype=torch.float64)
    head = torch.randn(V, H, generator=g, dtype=torch.float64)
    selected, scale = torch.randint(V, (8, 2, 3), generator=g), _scales(16).view(8, 2)
    leaves = [full.clone().requires_grad_(), head.clone().requires_grad_()]
    log_p = (F.linear(*leaves) * scale[..., None]).log_softmax(-1)
    want = log_p.gather(-1, selected)
    squares = log_p.exp().square().sum(-1)
    wanted = torch.autograd.grad(want.square().sum(), leaves)

    def part(value: Tensor) -> Tensor:
        return value.chunk(world)[rank].clone().requires_grad_()

    hidden, mine = part(full), part(head)
    out = linear_token_statistics(
        hidden, mine, sum_p_squared=True, selected=selected, scale=scale, group=group,
        sequence_parallel=True, scratch_mib=scratch_for(6, V // world, torch.float64), check=True,
    )  # fmt: skip
    assert out.log_prob is None
    assert out.selected_log_prob is not None
    torch.testing.assert_close(out.selected_log_prob, want)
    torch.testing.assert_close(out.sum_p_squared, squares)
    got = torch.autograd.grad(out.selected_log_prob.square().sum(), (hidden, mine))
    torch.testing.assert_close(got, tuple(w.chunk(world)[rank] for w in wanted))
    for placement in (Shard(0), Replicate()):
        states: Any = distribute_tensor(full, mesh, [placement]).requires_grad_()
        weight: Any = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
        found: Any = linear_token_statistics(states, weight, selected=selected, scale=scale)
        assert isinstance(found.selected_log_prob, DTensor)
        torch.testing.assert_close(found.selected_log_prob.full_tensor(), want)
        grads = torch.autograd.grad(found.selected_log_prob.square().sum(), (states, weight))
        for grad, exact in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.full_tensor(), exact)


@pytest.mark.parametrize("world", [1, 2])
def test_a_split_sequence_without_a_target(pool: Pool, world: int) -> None:
    pool.run(_sequence, world)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selected_columns_are_rounded_once(dtype: torch.dtype) -> None:
    """The head's gradient at a selected id that is the target: of one row, one product."""
    data = head_batch(1, V, dtype, ignored=0.0, unreadable=False)
    hidden, head = data.hidden.requires_grad_(), data.head.requires_grad_()
    selected = data.target[:, None].expand(1, 2)
    out = linear_token_statistics(hidden, head, data.target, selected=selected)
    assert out.selected_log_prob is not None
    (got,) = torch.autograd.grad(out.selected_log_prob.sum() + out.log_prob.sum(), head)
    p = F.linear(hidden, head).double().softmax(-1)
    one_hot = F.one_hot(data.target, V)
    want = (3 * (one_hot - p)).to(dtype).double().t() @ hidden.double()
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradcheck_and_transforms() -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    head = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
    selected, scale = torch.randint(7, (4, 2)), _scales(4)

    def outputs(hidden: Tensor, head: Tensor) -> Tensor:
        out = linear_token_statistics(hidden, head, selected=selected, scale=scale, entropy=True)
        assert out.selected_log_prob is not None
        assert out.entropy is not None
        return out.selected_log_prob + out.entropy[:, None]

    assert torch.autograd.gradcheck(outputs, (hidden, head))
    (want,) = torch.autograd.grad(outputs(hidden, head).sum(), hidden)
    got = torch.func.grad(lambda h: outputs(h, head.detach()).sum())(hidden.detach())
    torch.testing.assert_close(got, want)


def test_compiled() -> None:
    def step(hidden: Tensor, head: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden, head, target, scale=scale)
        assert isinstance(loss, Tensor)
        ids = torch.stack([target.clamp(min=0), target.clamp(min=0)], -1)
        out = linear_token_statistics(hidden, head, selected=ids, scale=scale, sum_p_squared=True)
        assert out.selected_log_prob is not None
        assert out.sum_p_squared is not None
        return loss + out.selected_log_prob.sum() + out.sum_p_squared.sum()

    torch._dynamo.reset()
    data = head_batch(ROWS, V, torch.float32, unreadable=False)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (data.hidden, data.head)]
        value = function(leaves[0], leaves[1], data.target, _scales())
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[1], results[0])


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": torch.ones(2)}, ValueError, r"scale has shape \(2,\), but target \(3,\)"),
    ({"scale": torch.tensor([1, torch.nan, 1])}, ValueError, "holds NaN or inf for row 1"),
    ({"scale": "hot"}, ValueError, "scale must be a finite number"),
    ({"selected": torch.zeros(3, dtype=torch.int64)}, ValueError, "selected has shape"),
    ({"selected": torch.zeros(3, 1)}, TypeError, "selected must hold class ids"),
    ({"selected": torch.tensor([[1], [2], [V]])}, ValueError, f"row 2 holds {V}, which is no"),
]


@pytest.mark.parametrize(("options", "kind", "words"), BAD)
def test_wrong_values_are_refused(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    hidden, head, target = torch.randn(3, H), torch.randn(V, H), torch.tensor([0, 1, 2])
    with pytest.raises(kind, match=words):
        linear_token_statistics(hidden, head, target, **options)


def _told(group: dist.ProcessGroup, gradient: str) -> list[str]:
    """Of ranks with other scales and other ids, and of a bad scale in a row of the last chunk."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data, out = head_batch(ROWS, V, torch.float32, unreadable=False), []
    head = data.head.chunk(world)[rank].clone().requires_grad_()
    shard = VocabShard.even(V, group)
    scale, selected = _scales(), torch.zeros(ROWS, 2, dtype=torch.int64)
    bad = torch.where(torch.arange(ROWS) == ROWS - 1, torch.inf, scale)
    calls: list[Any] = [{"scale": scale + rank}, {"scale": bad}]
    if gradient == "none":
        calls += [{"selected": selected + rank}, {"selected": selected[:, : 2 - rank]}]
    target = data.target.clone()
    target[-1] = 3
    for options in calls:
        scratch = scratch_for(5, V // world, torch.float32)
        common: dict[str, Any] = {"group": group, "shard": shard, "scratch_mib": scratch}
        try:
            if gradient == "none":
                linear_token_statistics(data.hidden, head, target, check=True, **common, **options)
            else:
                linear_cross_entropy(
                    data.hidden, head, target, gradient=gradient, **common, **options
                )
            out.append("")
        except ValueError as problem:
            out.append(str(problem))
    return out


@pytest.mark.parametrize("gradient", ["forward", "recompute", "none"])
def test_ranks_that_disagree_are_told(pool: Pool, gradient: str) -> None:
    words = [
        "ranks disagree on scale",
        f"scale must be finite, but rank 0 of the group holds NaN or inf for row {ROWS - 1}",
        "ranks disagree on selected",
        "ranks disagree on the number of selected ids a row",
    ]
    for texts in pool.run(_told, 2, (gradient,)):
        assert len(texts) == (4 if gradient == "none" else 2)
        for text, part in zip(texts, words, strict=False):
            assert part in text
