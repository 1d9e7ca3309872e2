"""How results become verdicts."""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.launch.doctor.cases import Found
from vocab_parallel_ce.launch.doctor.ranks import Outcome
from vocab_parallel_ce.launch.doctor.selftest import judge
from vocab_parallel_ce.launch.doctor.truth import Question, batch, truth
from vocab_parallel_ce.testing import Comparison, compare


def test_a_result_is_compared_by_the_rule() -> None:
    exact = torch.tensor([1.0, -torch.inf, torch.nan], dtype=torch.float64)
    same = compare("x", exact.float(), exact, error=0.0)
    assert same.ratio == 0
    # One ulp of bf16 at 1 is 2^-7; E counts twice on top.
    off = compare("x", torch.tensor([1 + 2.0**-7], dtype=torch.bfloat16), exact[:1], error=0.0)
    assert off.ratio == 1
    assert compare("x", torch.tensor([1.25]), exact[:1], error=0.125).ratio == pytest.approx(1)
    for wrong in (
        [1.0, 0.0, torch.nan],
        [1.0, -torch.inf, 0.0],
        [torch.nan, -torch.inf, torch.nan],
    ):
        assert compare("x", torch.tensor(wrong), exact, error=1.0).ratio == torch.inf
    with pytest.raises(ValueError, match="shape"):
        compare("x", torch.zeros(2), exact, error=0.0)


def test_verdicts_name_the_rank() -> None:
    good = Outcome(Found(comparisons=[Comparison("loss", 1e-8, 1e-7)], digest="a"))
    bad = Outcome(
        Found(comparisons=[Comparison("gradient", 3.0, 1.0)], wrong=["is odd"], digest="a")
    )
    other = Outcome(Found(digest="b"))
    raised, late = Outcome[Found](error="RuntimeError: no"), Outcome[Found](error="late", late=True)
    assert judge("c", "fp32", [good, good]).word == "ok"
    verdict = judge("c", "fp32", [good, bad])
    assert (verdict.word, verdict.worst_rank) == ("FAILED", 1)
    assert verdict.problems == [
        "rank 1: is odd",
        "rank 1: gradient is off by 3.0e+00, allowed is 1.0e+00",
    ]
    assert judge("c", "fp32", [late, raised]).problems == [
        "rank 1: RuntimeError: no",
        "rank 0: late",
    ]
    assert "not the same bits" in judge("c", "fp32", [good, other]).problems[0]
    nan = Outcome(Found(comparisons=[Comparison("loss", torch.inf, 1.0)]))
    assert judge("c", "fp32", [nan]).word == "FAILED"
    skipped = judge("c", "fp64", [Outcome(Found(skipped="no fp64"))])
    assert (skipped.word, skipped.why) == ("skipped", "no fp64")


def test_the_truth_knows_how_torch_errs() -> None:
    q = Question(rows=16, vocab=1000, reduction="none")
    right = truth(q, "loss", torch.device("cpu"))
    logits = batch(q).logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, batch(q).target, reduction="none")
    loss.backward(batch(q).upstream)
    assert logits.grad is not None
    for name, result in (("loss", loss), ("gradient", logits.grad)):
        found = compare(name, result, right.exact[name], right.error[name])
        assert 0 < found.ratio <= 1
        assert found.allowed < 1e-5
    wider = truth(Question(torch.float64, 16, 1000, "none"), "loss", torch.device("cpu"))
    assert wider.error["loss"] < 1e-13
