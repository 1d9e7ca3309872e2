"""The benchmark, run as a user runs it: real processes, tiny shapes, its bench.json read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vocab_parallel_ce.launch.bench import goals, peers
from vocab_parallel_ce.launch.terminal import ranks_in_words

ROOT = Path(__file__).parents[3]
LABELS = {peer.name: peer.label for peer in peers.PEERS}


def command(out: Path, *options: str) -> list[str]:
    module = "vocab_parallel_ce.launch.bench"
    return [sys.executable, "-m", module, "--quick", "--device", "cpu", "--out", str(out), *options]


def environment(*before: Path) -> dict[str, str]:
    path = os.pathsep.join([*map(str, before), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}


def read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return report


def by_name(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {peer["name"]: peer for peer in run["peers"]}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One process, two dtypes, on a machine where Megatron is not to be found."""
    out = tmp_path_factory.mktemp("one")
    # Ranks are processes of their own: only what Python runs at start-up can hide it from them.
    hide = "import sys\nsys.modules['megatron'] = None\n"
    (out / "sitecustomize.py").write_text(hide)
    options = ["--ranks", "1", "--peers", "ours,ours-inplace,torch,loss-parallel,megatron"]
    options += ["--dtype", "fp32", "--dtype", "bf16"]
    done = subprocess.run(
        command(out, *options), env=environment(out), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return read(out), done.stdout, out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("two")
    # Megatron takes twice as long as all others together; the plan's test measures it on two ranks.
    options = ["--ranks", "2", "--dtype", "fp32", "--wait-idle", "0"]
    options += ["--peers", "ours,ours-inplace,torch,loss-parallel"]
    done = subprocess.run(
        command(out, *options), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return read(out), done.stdout


def test_ours_and_torch_agree_on_one_process(one: tuple[dict[str, Any], str, Path]) -> None:
    report, _, _ = one
    assert [run["dtype"] for run in report["runs"]] == ["fp32", "bf16"]
    for run in report["runs"]:
        found = by_name(run)
        for name in ("ours", "ours-inplace", "torch"):
            assert found[name]["status"] == "", found[name]
            assert found[name]["wrong"] == "", found[name]
        loose = torch.finfo(getattr(torch, found["torch"]["loss_dtype"])).eps * 16
        assert found["ours"]["loss"] == pytest.approx(found["torch"]["loss"], rel=loose)
        for name in ("ours", "ours-inplace"):
            assert found[name]["loss"] == pytest.approx(run["reference"]["loss"], rel=1e-6)
    fp32 = by_name(report["runs"][0])
    for name in ("ours", "ours-inplace", "torch"):
        assert fp32[name]["gradient_norm_error"] < 1e-6
        assert fp32[name]["softmax_gradient_error"] < 1e-5


def test_what_is_missing_is_said(one: tuple[dict[str, Any], str, Path]) -> None:
    report, text, _ = one
    found = by_name(report["runs"][0])
    assert found["megatron"]["status"] == "not installed"
    assert "Megatron-core unfused: not installed" in text
    assert found["loss-parallel"]["status"] == "needs more than one rank"
    found_goals = [row for row in report["goals"] if "Megatron-core unfused" in row["what"]]
    assert found_goals
    assert {row["verdict"] for row in found_goals} == {"not measured"}


def test_a_run_holds_every_number(one: tuple[dict[str, Any], str, Path]) -> None:
    report, _, out = one
    assert report["environment"]["versions"]["torch"]
    assert report["environment"]["cpu"]
    assert (out / "bench.png").stat().st_size > 5000
    for run in report["runs"]:
        assert run["threads_per_rank"] >= 1
        assert run["copy_bandwidth"]["median"] > 0
        for name in ("ours", "ours-inplace", "torch"):
            peer = by_name(run)[name]
            assert len(peer["total_s"]["all"]) == run["repeats"] == 3
            # sums are taken rank by rank and run by run: never less than the larger half
            assert peer["total_s"]["min"] >= peer["backward_s"]["min"] > 0
            assert peer["bandwidth_share"] > 0
        assert by_name(run)["ours"]["bytes_moved"] == 3 * 64 * 1024 * (
            4 if run["dtype"] == "fp32" else 2
        )


def test_two_ranks_agree_and_count_collectives(two: tuple[dict[str, Any], str]) -> None:
    report, _ = two
    (run,) = report["runs"]
    found = by_name(run)
    assert (run["ranks"], run["threads_per_rank"]) == (2, 1)
    for name in ("ours", "ours-inplace", "loss-parallel"):
        assert found[name]["status"] == ""
        assert found[name]["wrong"] == ""
        assert found[name]["loss"] == pytest.approx(run["reference"]["loss"], rel=1e-6)
    assert found["torch"]["status"].endswith("one process only")
    # Three by loss_parallel are known from its source: the counter counts.
    assert found["loss-parallel"]["collectives"] == {"forward": 3, "backward": 0}
    for name in ("ours", "ours-inplace"):
        assert found[name]["collectives"] == {"forward": 1, "backward": 0}


def test_every_goal_has_a_row(two: tuple[dict[str, Any], str]) -> None:
    report, text = two
    rows = [row["what"] for row in report["goals"]]
    for ratio in goals.RATIOS:
        where = ranks_in_words(ratio.ranks)
        expected = f"{where}, {ratio.dtype}: {LABELS[ratio.ours]} against {LABELS[ratio.against]}"
        assert rows.count(expected) == 1
    assert sum("extra memory at peak" in row for row in rows) == 2
    assert sum("collectives in forward" in row for row in rows) == 2
    assert sum("share of the copy bandwidth" in row for row in rows) == 1
    assert "goals met" in text
    assert "…" not in text


def run_of(times: dict[str, float], **changes: Any) -> dict[str, Any]:
    """A run as the ranks report it, with these median seconds."""
    found = []
    for name, seconds in times.items():
        summary = {"median": seconds, "min": seconds, "all": [seconds]}
        peer: dict[str, Any] = {
            "name": name,
            "label": LABELS[name],
            "status": "",
            "wrong": "",
            "total_s": summary,
        }
        peer |= {"ours": peers.BY_NAME[name].ours}
        peer |= {"peak_bytes": 100, "budget_bytes": 200, "bandwidth_share": 0.5}
        peer |= {"collectives": {"forward": 1, "backward": 0}}
        found.append(peer)
    run: dict[str, Any] = {"ranks": 1, "dtype": "fp32", "device": "cpu", "peers": found}
    return run | {"rows": 4096, "vocab": 32768} | changes


@pytest.mark.parametrize(
    ("theirs", "verdict", "words"),
    [
        (12.0, "met", "met exactly"),
        (18.0, "met", "met, with 50% to spare"),
        (9.0, "MISSED", "MISSED by 25%"),
        (8.0, "MISSED", "MISSED by 33%"),
        (6.0, "MISSED", "MISSED by 50%"),
    ],
)
def test_a_ratio_is_judged(theirs: float, verdict: str, words: str) -> None:
    judged = goals.judge([run_of({"ours-inplace": 1.0, "torch": theirs})], LABELS)
    (row,) = (j for j in judged if j.what.startswith("1 process, fp32: ours, in place against F."))
    assert (row.verdict, row.words, row.measured) == (verdict, words, f"{theirs:.2f}x")


def test_memory_over_budget_is_missed() -> None:
    run = run_of({"ours-inplace": 1.0})
    for used, verdict in ((200, "met"), (250, "MISSED"), (400, "below the gate")):
        run["peers"][0]["peak_bytes"] = used
        judged = goals.judge([run], LABELS)
        assert [j.verdict for j in judged if "memory" in j.what] == [verdict]


def cuda_run(times: dict[str, float], **changes: Any) -> dict[str, Any]:
    run = run_of(times, device="cuda", dtype="bf16", rows=8192, vocab=131072)
    return run | changes


def goals_of(run: dict[str, Any], what: str) -> list[goals.Judged]:
    return [row for row in goals.judge([run], LABELS) if what in row.what]


@pytest.mark.parametrize(("theirs", "verdict"), [(1.2, "met"), (0.9, "MISSED")])
def test_on_cuda_every_shape_must_beat_every_peer(theirs: float, verdict: str) -> None:
    """The fastest one is named, where we are faster and where we are not."""
    run = cuda_run({"ours-inplace": 1.0, "ours": 0.5, "torch": 3.0, "quack": theirs})
    (row,) = goals_of(run, "faster than every peer")
    assert row.what == (
        "1 process, [8192, 131072] bf16: ours, in place, faster than every peer (quack, in place)"
    )
    assert (row.verdict, row.measured) == (verdict, f"{theirs:.2f}x")


def test_a_wrong_or_missing_peer_is_not_the_one_to_beat() -> None:
    run = cuda_run({"ours-inplace": 1.0, "torch": 0.1, "quack": 0.2, "liger": 2.0})
    run["peers"][1]["wrong"] = "loss 1 instead of 2"
    run["peers"][2]["status"] = "out of memory"
    (row,) = goals_of(run, "faster than every peer")
    assert row.what.endswith("(Liger)")
    assert goals_of(cuda_run({"ours-inplace": 1.0}), "faster than every peer") == []


@pytest.mark.parametrize(("share", "verdict"), [(0.85, "met"), (0.84, "MISSED")])
def test_on_cuda_bf16_must_reach_a_share_of_the_copy_bandwidth(share: float, verdict: str) -> None:
    run = cuda_run({"ours-inplace": 1.0})
    run["peers"][0]["bandwidth_share"] = share
    (row,) = goals_of(run, "share of the copy bandwidth")
    assert row.verdict == verdict
    # fp32 has no such goal, and then it says that it was not measured.
    (row,) = goals_of(cuda_run({"ours-inplace": 1.0}, dtype="fp32"), "share of the copy bandwidth")
    assert row.verdict == "not measured"


def test_a_cards_goals_are_not_a_cpus() -> None:
    assert goals_of(cuda_run({"ours-inplace": 1.0}), "against F.cross_entropy") == []


def test_a_wrong_peer_is_named() -> None:
    run = run_of({"torch": 1.0})
    run["peers"][0]["wrong"] = "loss 1 instead of 2"
    (line,) = goals.failures([run])
    assert "F.cross_entropy is WRONG: loss 1 instead of 2" in line
    assert goals.failures([run], ours_only=True) == []


def test_ranks_that_die_are_reported(tmp_path: Path) -> None:
    broken = environment() | {"GLOO_SOCKET_IFNAME": "no-such-interface"}
    done = subprocess.run(
        command(tmp_path, "--ranks", "1", "--peers", "torch"),
        env=broken,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (line,) = read(tmp_path)["not_run"]
    assert line == "1 process not measured: rank 0 ended first, with 1"
    assert line in done.stdout


def test_ranks_end_with_the_benchmark(tmp_path: Path) -> None:
    """However the benchmark dies, no rank stays behind on the machine."""
    marker = f"VPCE_BENCH_TEST={os.getpid()}"
    name, value = marker.split("=")
    process = subprocess.Popen(
        command(tmp_path, "--ranks", "1", "--peers", "torch", "--repeats", "100000"),
        env=environment() | {name: value},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def alive() -> int:
        count = 0
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                count += marker.encode() in entry.read_bytes()
            except OSError:
                continue
        return count

    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    wait_for(lambda: alive() == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: alive() == 0)


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
