"""The benchmark of the fused head, run for real on a small batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.launch.running import invoke, one_line
from vocab_parallel_ce.launch.bench.fused_head.contenders import CONTENDERS, Setting
from vocab_parallel_ce.launch.bench.fused_head.measure import PRODUCTS, Case

SMALL = "--rows 256 --width 32 --vocab 512 --repeats 1 --device cpu --dtype bf16".split()  # noqa: SIM905


def test_it_measures_and_compares(tmp_path: Path) -> None:
    file = tmp_path / "head.json"
    ended = invoke("fused-head", *SMALL, "--json", str(file))
    assert ended.exit_code == 0, ended.output
    ways = {way["name"]: way for way in json.loads(file.read_text())["ways"]}
    assert set(ways) == {PRODUCTS, *(c.name for c in CONTENDERS)}
    assert ways["Liger fused linear"]["status"]
    for name in ("ours, fused", "ours, fused, recompute", "F.linear + F.cross_entropy"):
        way = ways[name]
        assert way["status"] == ""
        assert way["milliseconds"] > 0
        assert len(way["errors"]) == 6
        assert max(way["errors"][:3]) < 1e-2
    assert ways["ours, fused"]["errors"][4] < ways["F.linear + F.cross_entropy"]["errors"][4]


def test_a_wrong_share_is_refused() -> None:
    ended = invoke("fused-head", *SMALL, "--ignored", "1")
    assert one_line(ended, "fused-head") == "--ignored 1.0 must be below 1"


def test_confident_rows_are_confident() -> None:
    hidden, head, target = Case(64, 256, 4096, torch.float64, confident=True).tensors(
        0, 1, torch.device("cpu")
    )
    p = torch.softmax(hidden @ head.t(), 1)[torch.arange(64), target]
    assert 0.9 < float(p.median()) < 0.9999


@pytest.mark.parametrize("world", [1, 2])
def test_who_needs_one_rank_says_so(world: int) -> None:
    setting = Setting(None, world, torch.device("cpu"), torch.float32, 8)
    status = {c.name: c.status(setting) for c in CONTENDERS}
    assert (status["F.linear + F.cross_entropy"] == "one rank only") == (world == 2)
    assert status["ours, fused"] == ""
