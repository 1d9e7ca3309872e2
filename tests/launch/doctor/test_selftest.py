"""The selftest, and sabotage of one engine function to see that it notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.forks import run_forked
from tests.launch.doctor.asking import DTYPES, MODULE, SMALL, invoke, read
from tests.launch.running import launch
from vocab_parallel_ce import selected
from vocab_parallel_ce.engines.cpu import engine as cpu
from vocab_parallel_ce.launch.doctor import behaviour, checks, environment
from vocab_parallel_ce.launch.doctor.cases import Case, Place, against_truth
from vocab_parallel_ce.launch.doctor.ranks import Outcome
from vocab_parallel_ce.launch.doctor.selftest import judge
from vocab_parallel_ce.launch.doctor.truth import Question


def test_a_healthy_engine_passes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    out = tmp_path / "deep" / "doctor.json"
    result = invoke(*SMALL, "--json", str(out))
    assert result.exit_code == 0, result.output
    assert f"Selftest passed. Written to {out}" in result.stdout
    test = read(out)["selftest"]
    assert (test["passed"], test["failures"], test["world"]) == (True, [], 1)
    assert (test["rows"], test["vocab"]) == (8, 64)
    assert {v["word"] for v in test["verdicts"]} == {"ok"}
    of_dtype = {d: [v["check"] for v in test["verdicts"] if v["dtype"] == d] for d in DTYPES}
    assert len(of_dtype["fp32"]) == 33
    assert set(map(tuple, of_dtype.values())) == {tuple(of_dtype["fp32"])}
    for timing in test["speed"]["passes"]:
        assert timing["forward_s"] > 0
        assert timing["backward_s"] > 0
        assert timing["share"] > 0
        size = 64 * 1024 * (4 if timing["dtype"] == "fp32" else 2)
        assert timing["moved_bytes"] == 3 * size
    kinds = [(p["dtype"], p["inplace"], p["engine"]) for p in test["speed"]["passes"]]
    ways = ((True, "cpu"), (False, "cpu"), (True, "eager"))
    assert kinds == [(dtype, *way) for dtype in ("fp32", "bf16", "fp16") for way in ways]
    assert test["speed"]["collectives"] == []


def test_two_ranks_pass_and_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    done = run_forked(*MODULE, *SMALL, "--json", str(out), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Selftest passed" in done.stdout
    report = read(out)
    assert len(report["other_ranks"]) == 1
    test = report["selftest"]
    assert test["passed"]
    assert test["differences"] == []
    checks = {v["check"] for v in test["verdicts"]}
    assert checks >= {
        "all_gather",
        "all_reduce, every option",
        "uneven shards",
        "an empty shard",
        "selected ids, all_reduce, uneven shards",
        "ranks with different targets",
        "number of collectives",
        "target out of range",
    }
    assert {v["word"] for v in test["verdicts"]} == {"ok"}
    assert {v["worst_rank"] for v in test["verdicts"]} == {0, 1}  # both compare
    sent = {c["name"]: c for c in test["speed"]["collectives"]}
    assert (
        sent["all_gather, 64 rows"]["received_bytes"]
        == 2 * sent["all_gather, 64 rows"]["sent_bytes"]
    )
    assert all(c["seconds"] > 0 and c["bytes_per_s"] > 0 for c in sent.values())


SABOTAGE = """
import os
import torch
from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.engines.cpu import engine as cpu
import sys
from vocab_parallel_ce.launch.doctor.command import app

for smoothing in (0.0, 0.1):  # kernels that still had to be compiled would count as late
    logits = torch.zeros(2, 8, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64)
    cross_entropy(logits, target, label_smoothing=smoothing).backward()

partials, gradient = cpu.partials, cpu.gradient

def wrong_gradient(logits, m, s, target, coefficients, weight, scale, softcap, out, *others):
    gradient(logits, m, s, target, coefficients, weight, scale, softcap, out, *others)
    if isinstance(scale, float) and scale == 1 / 0.7:
        out[0, 1] += 1e-3

def raises(logits, target, weight, scale, *others):
    if isinstance(scale, float) and scale == 0.7:
        raise RuntimeError("sabotaged")
    partials(logits, target, weight, scale, *others)

if os.environ["RANK"] == "1":
    cpu.gradient, cpu.partials = wrong_gradient, raises
app(sys.argv[1:], "doctor")
"""


def test_a_broken_rank_is_named_and_waited_for_no_longer_than_told(tmp_path: Path) -> None:
    """Rank 1 computes a wrong gradient in one check and leaves before a collective in another."""
    (tmp_path / "sabotaged.py").write_text(SABOTAGE)
    out = tmp_path / "doctor.json"
    options = (*SMALL, "--json", str(out), "--timeout", "8")
    started = time.monotonic()
    done = launch(str(tmp_path / "sabotaged.py"), *options, ranks=2)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    test = read(out)["selftest"]
    assert not test["passed"]
    failures = test["failures"]
    assert failures[0].startswith("scale, fp32: rank 1: gradient is off by 1.0e-03, allowed is ")
    assert failures[1:] == [
        "every option, mean, fp32: rank 1: RuntimeError: sabotaged",
        "every option, mean, fp32: rank 0: did not end within 8 s",
        "the rest was not run: rank 0 did not end in time, so the ranks are out of step",
    ]
    for failure in failures:
        assert f"FAILED {failure}" in done.stdout
    words = {(v["check"], v["dtype"]): v["word"] for v in test["verdicts"]}
    assert words["mean", "fp32"] == words["normalizer", "fp32"] == "ok"
    assert words["mean", "bf16"] == "not run"
    assert done.stderr.count("exitcode  : 1 ") == 2  # both ranks left by themselves


# Sabotage of one engine function in this process: (check that must notice, words of its complaint)

Sabotage = Callable[[pytest.MonkeyPatch], None]


def spoil(name: str, after: Callable[..., None]) -> Sabotage:
    """The engine function, and then ``after`` with the same arguments."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(cpu, name)

        def wrong(*arguments: Any) -> None:
            right(*arguments)
            after(*arguments)

        monkeypatch.setattr(cpu, name, wrong)

    return apply


def add(position: int, value: float) -> Callable[..., None]:
    def after(*arguments: Any) -> None:
        out: Tensor = arguments[position]
        out[..., -1] += value

    return after


def forget_padding(*arguments: Any) -> None:
    base = arguments[8]._base
    (arguments[8] if base is None else base)[..., -1] = 1.0


calls = iter(range(10**6))


@pytest.mark.parametrize(
    ("check", "dtype", "sabotage", "complaint"),
    [
        ("sum", "fp32", spoil("gradient", add(8, 1e-5)), "gradient is off by 1"),
        ("none", "bf16", spoil("gradient", add(8, 2.0**-6)), "gradient is off by"),
        ("none", "fp64", spoil("gradient", add(8, 1e-13)), "gradient is off by 1.0e-13"),
        ("none", "fp32", spoil("partials", add(6, 1e-4)), "loss is off by"),
        ("ignore_index", "fp32", spoil("gradient", add(8, 1e-3)), "gradient is off"),
        ("cross_entropy_loss, none", "fp32", spoil("log_prob", add(5, 1e-4)), "log_prob is off"),
        ("padding columns", "fp32", spoil("gradient", forget_padding), "padding is not 0"),
        ("all rows ignored", "fp32", spoil("gradient", add(8, 1e-9)), "gradient that is not 0"),
        (
            "the same bits twice",
            "fp32",
            spoil("gradient", lambda *a: add(8, 1e-3 * next(calls))(*a)),
            "its gradient has other bits",
        ),
    ],
)
def test_sabotage_is_noticed(
    check: str, dtype: str, sabotage: Sabotage, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    torch_dtype = environment.DTYPES[dtype]
    (chosen,) = (c for c in checks.for_dtype(place, torch_dtype) if c.name == check)

    def verdict() -> Any:
        return judge(check, dtype, [Outcome(chosen.run(place, torch_dtype))])

    assert verdict().word == "ok"
    sabotage(monkeypatch)
    found = verdict()
    assert found.word == "FAILED"
    assert any(complaint in problem for problem in found.problems), found.problems


@pytest.mark.parametrize(
    ("name", "complaint"), [("log_prob", "selected is off by"), ("touched", "gradient is off by")]
)
def test_selected_ids_that_are_wrong_are_noticed(
    name: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    every = checks.for_dtype(place, torch.float32)
    (check,) = (c for c in every if c.name == "token_statistics, selected ids")
    assert judge("", "", [Outcome(check.run(place, torch.float32))]).word == "ok"
    right = getattr(selected, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        (result if name == "log_prob" else result.values)[2, 3] += 1e-4
        return result

    monkeypatch.setattr(selected, name, wrong)
    (problem,) = judge("", "", [Outcome(check.run(place, torch.float32))]).problems
    assert complaint in problem


def test_an_engine_that_writes_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It spoils the logits that backward still needs, or leaves them when it may not."""
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    case = Case(Question(rows=8, vocab=64, reduction="none"))

    def partials_in_place(logits: Tensor, *others: Any) -> None:
        right(logits, *others)
        logits[0, 0] += 1e-3

    right = cpu.partials
    monkeypatch.setattr(cpu, "partials", partials_in_place)
    found = against_truth(case, place, torch.float32)
    assert "the logits were modified" in found.wrong


def test_a_target_that_is_let_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    assert behaviour.bad_target(place, torch.float32).wrong == []
    monkeypatch.setattr(behaviour, "ask", lambda *_: {"loss": torch.zeros(6)})
    wrong = behaviour.bad_target(place, torch.float32).wrong
    assert wrong == ["on a CPU: there is no ValueError", "with check=True: there is no ValueError"]


def test_a_dtype_that_torch_cannot_hold_is_skipped() -> None:
    """torch_npu makes fp32 of fp64 on cards without it; the meta device has no values at all."""
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    for dtype in environment.DTYPES.values():
        found = behaviour.torch_itself(place, dtype)
        assert (found.skipped, found.wrong) == ("", [])
    nowhere = Place(torch.device("meta"), 0, 1, None, rows=8, vocab=64, quick=True)
    assert behaviour.torch_itself(nowhere, torch.float64).skipped.startswith("torch itself: ")
    (wrong,) = behaviour.torch_itself(nowhere, torch.float32).wrong
    assert wrong.startswith("torch itself: ")
