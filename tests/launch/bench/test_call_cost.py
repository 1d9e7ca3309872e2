"""The fixed cost of a call: what is counted, and that it is shown for one process and for two."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.launch.running import invoke
from vocab_parallel_ce import cross_entropy, engines, passes
from vocab_parallel_ce.engines.triton import engine as triton
from vocab_parallel_ce.launch.bench.call_cost import pages
from vocab_parallel_ce.launch.bench.call_cost.command import host_cost
from vocab_parallel_ce.launch.bench.call_cost.ranks import ALONE
from vocab_parallel_ce.launch.measuring.host_side import launches, triton_without_launches


def test_launches_are_counted_and_not_made() -> None:
    """One each to locate, for the partials, to conclude and for the gradient."""
    micros, counted = host_cost(rounds=1, calls=2)
    assert micros > 0
    assert counted.own == 4
    assert 0 < counted.torch <= 7  # of the mean, of its tape, and where the gradient is added


def test_smoothing_launches_more() -> None:
    logits, target = torch.zeros(2, 8, requires_grad=True), torch.zeros(2, dtype=torch.int64)

    def step() -> None:
        cross_entropy(logits, target, label_smoothing=0.1, engine="triton").backward()

    with triton_without_launches() as kernels:
        step()
        assert launches(step, kernels).torch > host_cost(rounds=1, calls=1)[1].torch


def test_everything_is_put_back() -> None:
    before = (engines._engine_or_reason, triton._kernels, passes._on_host)
    with triton_without_launches():
        assert triton._kernels is not before[1]
    assert (engines._engine_or_reason, triton._kernels, passes._on_host) == before


def test_the_job_shows_all_of_them_and_leaves_them(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    done = invoke("call-cost", "--rounds", "1", "--no-first-calls", "--json", str(file))
    assert done.exit_code == 0, done.output
    for words in ("one process", "two ranks", ALONE, "Triton engine's path"):
        assert words in done.output.replace("\n", " ")
    found = json.loads(file.read_text())
    found["first call"] = {"fp32": (3.04, 0.41), "bf16": (2.9, 0.44)}
    text = pages.text(found)
    assert f"| one process | {found['one process']['cross_entropy']:,.0f} |" in text
    assert f"| two ranks (Gloo) | {found['two ranks']['cross_entropy']:,.0f} |" in text
    assert "which takes 2.9 to 3.0 s. " in text
    assert "the first call takes 0.4 s." in text
