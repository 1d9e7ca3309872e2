"""The operator's own examples, N = 4096 and C = 8080, on one rank and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.testing import assert_close, naive_error
from vocab_parallel_ce.testing import cross_entropy as reference

from ..forks import run_forked
from .seed_examples import EXAMPLES, ROWS, batch

MODULE = "tests.npu.seed_examples"


class Truth(NamedTuple):
    """loss, log_prob and gradient of one example: in fp64, as plain fp32 has them, its errors."""

    exact: tuple[Tensor, Tensor, Tensor]
    naive: tuple[Tensor, Tensor, Tensor]
    errors: tuple[float, float, float]


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    """Unsharded: the fp64 reference, and F.cross_entropy in fp32. Once for all ranks: it is big."""
    logits, target = batch()
    found: list[Truth] = []
    for reduction, ignore_index in EXAMPLES:
        x = logits.double().requires_grad_()
        exact = reference(x, target, None, reduction, ignore_index)
        (gradient,) = torch.autograd.grad(exact.loss, x)
        plain = logits.clone().requires_grad_()
        rows = torch.nn.functional.cross_entropy(
            plain, target, reduction="none", ignore_index=ignore_index
        )
        naive = rows.sum() if reduction == "sum" else rows.mean()
        (naive_gradient,) = torch.autograd.grad(naive, plain)
        if not found:  # those of the logits: every example has the same
            log_prob = exact.log_prob.detach()
            naive_log_prob = plain.detach().log_softmax(1)
            of_log_prob = naive_error(log_prob, naive_log_prob, torch.float32)
        exact_rows = -log_prob.gather(1, target[:, None])[:, 0]
        exact_rows[target == ignore_index] = 0.0
        exacts = (exact.loss.detach(), log_prob, gradient)
        naives = (naive.detach(), naive_log_prob, naive_gradient)
        errors = (
            naive_error(exact_rows, rows, torch.float32) * (ROWS if reduction == "sum" else 1),
            of_log_prob,
            naive_error(gradient, naive_gradient, torch.float32),
        )
        found.append(Truth(exacts, naives, errors))
    return found


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 4))]
)
def test_the_examples_of_the_operator(ranks: int, truths: list[Truth], tmp_path: Path) -> None:
    done = run_forked("-m", MODULE, str(tmp_path), ranks=ranks if ranks > 1 else 0, timeout=300)
    assert done.returncode == 0, done.stderr
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for number, truth in enumerate(truths):
        loss = of_ranks[0][number][0]
        assert loss.shape == (1,)
        assert all(torch.equal(loss, results[number][0]) for results in of_ranks)
        assert_close(loss[0], truth.exact[0], truth.naive[0], "loss", rows_error=truth.errors[0])
        for part, what in ((1, "log_prob"), (2, "gradient")):
            whole = torch.cat([results[number][part] for results in of_ranks], 1)
            # A few rows at a time: comparing all at once takes gigabytes and many seconds.
            compared = zip(
                *(t.split(64) for t in (whole, truth.exact[part], truth.naive[part])), strict=True
            )
            for actual, exact, naive in compared:
                assert_close(actual, exact, naive, what, rows_error=truth.errors[part])
