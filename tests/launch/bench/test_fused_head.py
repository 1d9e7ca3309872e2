"""The benchmark of the fused head, run for real on a small batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from tests.launch.running import invoke, one_line
from vocab_parallel_ce.launch.bench.fused_head import pages, record
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
    assert not parallel_state.model_parallel_is_initialized()  # nothing stays for who runs next


def test_a_wrong_share_is_refused() -> None:
    ended = invoke("fused-head", *SMALL, "--ignored", "1")
    assert one_line(ended, "fused-head") == "--ignored 1.0 must be below 1"


def test_one_way_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "head.json"
    name = "F.linear + ours in place"
    ended = invoke("fused-head", *SMALL, "--way", name, "--json", str(file))
    assert ended.exit_code == 0, ended.output
    assert [way["name"] for way in json.loads(file.read_text())["ways"]] == [PRODUCTS, name]
    ended = invoke("fused-head", *SMALL, "--way", "mine")
    line = one_line(ended, "fused-head")
    assert line.startswith("--way 'mine' is none of: ours, fused; ours, fused, recompute; ")


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


# The pages


def _way(name: str, ms: float, mib: float) -> dict[str, Any]:
    return {
        "name": name, "status": "", "milliseconds": ms, "products": ms / 1000, "peak_mib": mib,
        "errors": [1e-6, 1e-3, 1e-3, 1e-5, 2e-3, 2e-3],
    }  # fmt: skip


def _run(ranks: int = 1, dtype: str = "fp32", ignored: float = 0.0) -> dict[str, Any]:
    """Three products in a second; 128 + 8 MiB of gradients in fp32 on one rank."""
    absent = {"name": "Liger fused linear", "status": "needs a cuda device", "milliseconds": None}
    ways = [
        _way(PRODUCTS, 1000, 0) | {"errors": []},
        _way(pages.OURS, 1080, 270),
        _way(pages.EACH_TOKEN, 1500, 270),
        _way(pages.TORCH, 2160, 700),
        _way(pages.MEGATRON, 1200, 500),
        absent | {"errors": [], "peak_mib": None, "products": None},
    ]
    case = {"rows": 2048, "width": 1024, "vocab": 32768, "dtype": dtype}
    return case | {"ignored": ignored, "ranks": ranks, "ways": ways}


def test_the_tables_of_the_pages() -> None:
    runs = [_run(), _run(2), _run(ignored=0.7)]
    made = {"machine": "Some, 2 cores", "date": "2026-01-02", "torch": "2.13.0"}
    text = pages.long({"made": made, "busy": False, "runs": runs})
    assert "Some, 2 cores, 2026-01-02, torch 2.13.0." in text
    assert "| time / MiB | 1 process, fp32 | 2 ranks, fp32 | 1 process, fp32, 70% ignored |" in text
    assert "| three products alone | 1.00 s | 1.00 s | 1.00 s |" in text
    assert "| **ours, fused** | 1.08x / 270 |" in text
    assert "Liger" not in text
    assert "| ours, fused | 1.0e-06 | 1.0e-03 |" in text
    judged = {what: (number, limit) for what, number, limit in pages.goals(runs)}
    assert judged["1 process, fp32: the three products"] == (1.08, 1.10)
    assert judged["1 process, fp32, a loss per token: four products"] == (1.5 * 0.75, 1.10)
    assert judged["1 process, fp32: gradients + chunk + 16 MiB"] == (270 / (136 + 128 + 16), 1.0)
    assert judged[f"2 ranks, fp32: memory of {pages.MEGATRON}"] == (0.54, 0.5)
    assert judged[f"1 process, fp32, 70% ignored: time of {pages.TORCH}"] == (0.5, 1 / 3)
    missed = sum(number > limit for number, limit in judged.values())
    assert f"Goals met: {len(judged) - missed} of {len(judged)}." in text
    assert "* 2 ranks, fp32: memory of F.linear + Megatron fused: 0.54, goal 0.50" in text


@pytest.mark.full
def test_the_record_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RUNS", (record.Asked(2, "bf16", 0.5, (pages.OURS,)),))
    small = ["--rows", "256", "--width", "32", "--vocab", "512", "--repeats", "1"]
    (run,) = record.measured([*small, "--device", "cpu"])["runs"]
    assert (run["ranks"], run["dtype"], run["ignored"]) == (2, "bf16", 0.5)
    assert [way["name"] for way in run["ways"]] == [PRODUCTS, pages.OURS]
