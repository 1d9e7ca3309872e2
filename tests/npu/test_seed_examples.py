"""The operator's own examples, N = 4096 and C = 8080, on one rank and sharded under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.reference import cross_entropy as reference

from ..tolerance import assert_close, naive_error
from .seed_examples import EXAMPLES, ROWS, batch

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.npu.seed_examples"


class Truth(NamedTuple):
    """loss, log_prob and gradient of one example."""

    exact: tuple[Tensor, Tensor, Tensor]
    naive: tuple[Tensor, Tensor, Tensor]
    rows_error: float


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    """Unsharded: the fp64 reference, and F.cross_entropy in fp32. Once for all ranks: it is big."""
    logits, target = batch()
    found = []
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
        exact_rows = reference(x.detach(), target, None, "none", ignore_index).loss
        found.append(
            Truth(
                (exact.loss.detach(), exact.log_prob.detach(), gradient),
                (naive.detach(), plain.detach().log_softmax(1), naive_gradient),
                naive_error(exact_rows, rows, torch.float32) * (ROWS if reduction == "sum" else 1),
            )
        )
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_examples_of_the_operator(ranks: int, truths: list[Truth], tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, str(tmp_path)]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, "-m", MODULE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for number, truth in enumerate(truths):
        loss = of_ranks[0][number][0]
        assert loss.shape == (1,)
        assert all(torch.equal(loss, results[number][0]) for results in of_ranks)
        whole = [torch.cat([results[number][part] for results in of_ranks], 1) for part in (1, 2)]
        assert_close(loss[0], truth.exact[0], truth.naive[0], "loss", rows_error=truth.rows_error)
        assert_close(whole[0], truth.exact[1], truth.naive[1], "log_prob")
        assert_close(whole[1], truth.exact[2], truth.naive[2], "gradient")
