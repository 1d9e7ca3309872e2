"""The loss by Megatron's names: against Megatron where that is right, else against fp64.

What Megatron gets wrong is in ``test_defects.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel import megatron as ours
from vocab_parallel_ce.parallel.megatron import install
from vocab_parallel_ce.parallel.megatron.cross_entropy import pytorch_smoothing

from ...cases import gloo_events
from ...ranks import Pool
from .cases import (
    VOCAB,
    Outcome,
    error,
    exact,
    loss_named,
    megatron,
    outcome,
    shard,
    tokens,
    whole,
)

FUNCTIONS = (
    ours.vocab_parallel_cross_entropy,
    ours.fused_vocab_parallel_cross_entropy,
    ours.te_parallel_cross_entropy,
    ours.cross_entropy_target,
)


def _by_every_name(rank: dist.ProcessGroup, tp: int) -> dict[str, Outcome]:
    with megatron(tp=tp) as group:
        logits, target = tokens()
        x = shard(logits, group)
        out = {"unfused": outcome(loss_named("unfused", group), x, target)}
        for function in FUNCTIONS:
            out[function.__name__] = outcome(function, x, target)
            out[f"{function.__name__} told"] = outcome(function, x, target, tp_group=group)
        out["int32"] = outcome(FUNCTIONS[0], x, target.int())
        return out


@pytest.mark.parametrize("tp", [1, 2])
def test_every_name_gives_megatrons_loss_and_gradient(pair: Pool, tp: int) -> None:
    ranks = pair.run(_by_every_name, 2, (tp,))
    for rank in ranks:
        theirs = rank.pop("unfused")
        for own in rank.values():
            assert error(own["loss"], theirs["loss"]) < 1e-6
            assert error(own["grad"], theirs["grad"]) < 1e-6
            assert own["loss"].dtype == torch.float32
            assert torch.equal(own["loss"], ranks[0]["int32"]["loss"])


def test_no_groups_of_megatrons_means_one_rank() -> None:
    logits, target = tokens()
    want = exact(logits, target)
    for function in FUNCTIONS:
        got = outcome(function, logits, target)
        want.check(got["loss"], got["grad"])


def _smoothed(rank: dist.ProcessGroup, tp: int, amount: float) -> dict[str, Outcome]:
    with megatron(tp=tp) as group:
        logits, target = tokens()
        x = shard(logits, group)
        loss = loss_named("unfused", group)
        out = {"theirs": outcome(loss, x, target, label_smoothing=amount)}
        for formula in ("megatron", "pytorch"):
            with install(smoothing_formula=formula):
                out[formula] = outcome(
                    loss_named("unfused", group), x, target, label_smoothing=amount
                )
        return out


@pytest.mark.parametrize("amount", [0.0, 0.1, 63 / 64, 0.995])
def test_label_smoothing_by_both_formulas(pair: Pool, amount: float) -> None:
    """ "megatron" is what Megatron computes on one rank, on any number of them.

    From (K - 1) / K on, PyTorch's argument would be 1 or more; it is a distribution all the same.
    """
    logits, target = tokens()
    wants = {
        "megatron": exact(logits, target, label_smoothing=amount * VOCAB / (VOCAB - 1)),
        "pytorch": exact(logits, target, label_smoothing=amount),
    }
    one, two = pair.run(_smoothed, 2, (1, amount)), pair.run(_smoothed, 2, (2, amount))
    assert error(one[0]["theirs"]["loss"], wants["megatron"].loss) < 1e-6
    for formula, want in wants.items():
        want.check(one[0][formula]["loss"], one[0][formula]["grad"])
        want.check(two[0][formula]["loss"], whole(two, formula))
        assert torch.equal(two[0][formula]["loss"], two[1][formula]["loss"])


@pytest.mark.parametrize("formula", ["megatron", "pytorch"])
def test_numpys_numbers_smooth_as_pythons_do(formula: str) -> None:
    given: Any = np.float32(0.125)
    assert pytorch_smoothing(given, VOCAB, formula) == pytorch_smoothing(0.125, VOCAB, formula)


@pytest.mark.parametrize(
    ("amount", "formula", "text"),
    [
        (1.0, "megatron", r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (-0.1, "megatron", r"label_smoothing must lie in \[0, 1\), got -0.1"),
        ("0.1", "megatron", r"label_smoothing must lie in \[0, 1\), got '0.1'"),
        (1.1, "pytorch", r"label_smoothing must lie in \[0, 1\], got 1.1"),
    ],
)
def test_wrong_label_smoothing(amount: Any, formula: str, text: str) -> None:
    from megatron.core import tensor_parallel

    logits, target = tokens()
    with install(smoothing_formula=formula), pytest.raises(ValueError, match=text):
        tensor_parallel.vocab_parallel_cross_entropy(logits, target, amount)


def test_smoothing_over_one_class() -> None:
    logits, target = torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(ours.vocab_parallel_cross_entropy(logits, target), torch.zeros(3))
    with pytest.raises(ValueError, match="needs at least two classes"):
        ours.vocab_parallel_cross_entropy(logits, target, 0.1)


def _padded(
    rank: dist.ProcessGroup, true_size: int, amount: float, label: int | None
) -> dict[str, Outcome]:
    """64 columns of which the last ones are padding, full of what nobody may read."""
    with megatron(tp=2) as group:
        logits, target = tokens()
        target = target % true_size
        if label is not None:
            target[0, 0] = label
        logits[..., true_size::2] = torch.inf
        logits[..., true_size + 1 :: 2] = torch.nan
        start = 32 * dist.get_rank(group)
        x, out = shard(logits, group), {}
        all_options: dict[str, dict[str, Any]] = {
            "size": {"vocab_size": true_size},
            "shard": {"shard": VocabShard(start, start + 32, true_size)},
            "ignore": {"vocab_size": true_size, "invalid_target": "ignore"},
        }
        for name, options in all_options.items():
            with install(**options):
                loss = loss_named("unfused", group)
                out[name] = outcome(loss, x, target, label_smoothing=amount)
        return out


@pytest.mark.parametrize("amount", [0.0, 0.1])
@pytest.mark.parametrize("true_size", [50, 33])
def test_padding_columns_take_no_part(pair: Pool, true_size: int, amount: float) -> None:
    logits, target = tokens()
    smoothing = amount * true_size / (true_size - 1)
    want = exact(logits[..., :true_size], target % true_size, label_smoothing=smoothing)
    ranks = pair.run(_padded, 2, (true_size, amount, None))
    for name in ("size", "shard", "ignore"):
        grad = whole(ranks, name)
        want.check(ranks[0][name]["loss"], grad[..., :true_size])
        assert bool((grad[..., true_size:] == 0).all())


def test_a_label_in_the_padding_is_no_class(pair: Pool) -> None:
    for rank in pair.run(_padded, 2, (50, 0.0, 50)):
        for name in ("size", "shard"):
            assert "row 0 holds 50" in rank[name].problem
            assert "[0, 50)" in rank[name].problem
        assert rank["ignore"]["loss"][0, 0] == 0
        assert bool((rank["ignore"]["grad"][0, 0] == 0).all())


def test_a_rank_of_nothing_but_padding_must_be_told(pair: Pool) -> None:
    """With 32 columns and 20 ids a shard cannot be told from gathered logits."""
    ranks = pair.run(_padded, 2, (20, 0.0, None))
    logits, target = tokens()
    want = exact(logits[..., :20], target % 20)
    want.check(ranks[0]["shard"]["loss"], whole(ranks, "shard")[..., :20])
    for rank in ranks:
        assert "looks gathered" in rank["size"].problem
        assert "install(shard=VocabShard(start, stop, vocab_size))" in rank["size"].problem


def _too_few(rank: dist.ProcessGroup) -> str:
    with megatron(tp=2) as group, install(vocab_size=80):
        logits, target = tokens()
        return outcome(loss_named("unfused", group), shard(logits, group), target).problem


def test_a_vocabulary_that_the_ranks_do_not_hold(pair: Pool) -> None:
    for problem in pair.run(_too_few, 2):
        assert "vocabulary ids [64, 80) of vocab_size=80 are on no rank" in problem


def _one_rank_gathers(rank: dist.ProcessGroup, check: bool) -> str:
    with megatron(tp=2) as group, install(vocab_size=40, check=check):
        logits, target = tokens()
        x = logits if dist.get_rank(group) == 1 else shard(logits, group)
        return outcome(loss_named("unfused", group), x, target % 40).problem


def test_with_a_check_all_ranks_raise_together(pair: Pool) -> None:
    """The error of one rank's arguments reaches the other, which would wait for it."""
    first, second = pair.run(_one_rank_gathers, 2, (True,))
    assert "rank 1 of the group: input looks gathered" in first
    assert "input looks gathered" in second


def _z(rank: dist.ProcessGroup, inplace: bool) -> dict[str, Any]:
    with megatron(tp=2) as group, install(lse_square_scale=0.01, inplace_backward=inplace) as on:
        logits, target = tokens()
        target[2, 1] = -100
        x = shard(logits, group)
        result = outcome(loss_named("fused", group), x, target)
        overwritten = torch.equal(result["logits"], result["grad"])
        return {"z": result, "zloss": on.zloss, "overwritten": overwritten}


@pytest.mark.parametrize("inplace", [False, True])
def test_z_loss_is_in_the_loss_and_beside_it(pair: Pool, inplace: bool) -> None:
    logits, target = tokens()
    target[2, 1] = -100
    want = exact(logits, target, lse_square_scale=0.01)
    ranks = pair.run(_z, 2, (inplace,))
    want.check(ranks[0]["z"]["loss"], whole(ranks, "z"))
    for rank in ranks:
        torch.testing.assert_close(
            rank["zloss"].double(), want.expected.exact.zloss.detach(), rtol=1e-6, atol=0
        )
        assert rank["overwritten"] == inplace


def _capped(rank: dist.ProcessGroup) -> dict[str, Any]:
    with megatron(tp=2) as group, install(softcap=2.0):
        logits, target = tokens()
        return {"capped": outcome(loss_named("unfused", group), shard(logits, group), target)}


def test_a_softcap(pair: Pool) -> None:
    want = exact(*tokens(), softcap=2.0)
    ranks = pair.run(_capped, 2)
    want.check(ranks[0]["capped"]["loss"], whole(ranks, "capped"))


def _collectives(rank: dist.ProcessGroup) -> dict[str, list[list[str]]]:
    with megatron(tp=2) as group:
        logits, target = tokens()
        x = shard(logits, group).requires_grad_()
        group.allreduce([torch.zeros(1)]).wait()
        out: dict[str, list[list[str]]] = {}

        def count(name: str, **options: Any) -> None:
            loss: list[Tensor] = []
            call = loss_named(name.split()[0], group)
            forward = gloo_events(lambda: loss.append(call(x * 1, target, **options).sum()))
            out[name] = [forward, gloo_events(loss[0].backward)]

        count("unfused")
        count("fused")
        count("ours")
        with install(lse_square_scale=0.1, vocab_size=60, invalid_target="ignore"):
            count("unfused with everything", label_smoothing=0.1)
        with install(collective="all_reduce"):
            count("fused by sums")
        return out


def test_collectives(pair: Pool) -> None:
    """Megatron's three and two; ours one, or two; none in backward."""
    for rank in pair.run(_collectives, 2):
        assert rank == {
            "unfused": [["gloo:all_reduce"] * 3, []],
            "fused": [["gloo:all_reduce"] * 2, []],
            "ours": [["gloo:all_gather"], []],
            "unfused with everything": [["gloo:all_gather"], []],
            "fused by sums": [["gloo:all_reduce"] * 2, []],
        }


@pytest.mark.parametrize(
    ("logits", "target", "kind", "text"),
    [
        (torch.tensor(1.0), torch.tensor(0), ValueError, r"input must have shape \[\.\.\., C_r\]"),
        (torch.zeros(3, 8), torch.zeros(4).long(), ValueError, r"target has shape \(4,\)"),
        (torch.zeros(3, 8), torch.zeros(3), TypeError, "class ids in int64 or int32"),
        (torch.zeros(3, 8).long(), torch.zeros(3).long(), TypeError, "fp16, bf16, fp32 or fp64"),
        ([1.0], torch.zeros(3).long(), TypeError, "input must be a tensor"),
        (torch.zeros(3, 8), [0], TypeError, "target must be a tensor"),
    ],
    ids=["0-d", "shapes", "float target", "int logits", "list", "list target"],
)
@pytest.mark.parametrize("options", [{}, {"vocab_size": 5, "invalid_target": "ignore"}], ids=str)
def test_wrong_arguments(
    options: dict[str, Any], logits: Any, target: Any, kind: type[Exception], text: str
) -> None:
    from megatron.core import tensor_parallel

    with install(**options), pytest.raises(kind, match=text):
        tensor_parallel.vocab_parallel_cross_entropy(logits, target)


class _OnlyNumbers:
    """What Megatron asks of a group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_a_group_that_only_has_rank_and_size() -> None:
    logits, target = torch.randn(3, 2, 8), torch.randint(8, (3, 2))
    got = ours.fused_vocab_parallel_cross_entropy(logits, target, _OnlyNumbers())  # type: ignore[arg-type]
    assert torch.equal(got, ours.fused_vocab_parallel_cross_entropy(logits, target))
    two = _OnlyNumbers()
    two.size = lambda: 2  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"tp_group must be a torch.distributed.ProcessGroup"):
        ours.fused_vocab_parallel_cross_entropy(logits, target, two)  # type: ignore[arg-type]
