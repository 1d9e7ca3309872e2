"""The cost model against sums done by hand, published timings, and what a run really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.allocations import allocations
from tests.launch.running import Ended, one_line
from tests.launch.running import invoke as invoke_job
from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.header import HEADER_INTS
from vocab_parallel_ce.launch.bench import peers
from vocab_parallel_ce.launch.plan import measured as measuring
from vocab_parallel_ce.launch.plan.devices import DEVICES, MIB, Device, Figure
from vocab_parallel_ce.launch.plan.model import Prediction, predict
from vocab_parallel_ce.launch.plan.ways import Case

ROOT = Path(__file__).parents[3]


def device(**changes: Any) -> Device:
    """A machine of round figures: 1 TB/s, 100 GB/s between ranks, 10 us a collective."""
    figures = {
        "bandwidth": 1e12,
        "link_bandwidth": 1e11,
        "gather_latency": 10e-6,
        "reduce_latency": 10e-6,
    }
    made = replace(DEVICES["h100"], **{k: Figure(v, "round") for k, v in figures.items()})  # type: ignore[arg-type]
    return replace(made, **changes)


def by_name(case: Case, machine: Device) -> dict[str, Prediction]:
    return {prediction.name: prediction for prediction in predict(case, machine)}


# --- by hand ----------------------------------------------------------------------------------

# 1000 rows of 4000 classes over 4 ranks: a million elements a rank, 1 us for each byte of them.
MILLION = {"rows": 1000, "vocab": 4000, "ranks": 4}


@pytest.mark.parametrize(
    ("dtype", "name", "forward", "backward"),
    [
        ("bf16", "ours-inplace", 2, 4),
        ("bf16", "ours", 2, 4),
        ("fp32", "ours", 4, 8),
        # widen 6, max 4, subtract 8, exp 8, sum 4, divide 8; multiply 8, narrow 6
        ("bf16", "megatron", 38, 14),
        ("fp16", "megatron", 38, 14),
        ("fp32", "megatron", 32, 8),
        # widen 6, max 4, subtract to sum 8, divide 8; copy 8, multiply 10
        ("bf16", "megatron-fused", 26, 18),
        # the gradient comes as bf16 whatever the logits are: cast 2 + b
        ("fp16", "megatron-fused", 26, 22),
        ("fp32", "megatron-fused", 20, 24),
    ],
)
def test_bytes_and_time_by_hand(dtype: str, name: str, forward: int, backward: int) -> None:
    found = by_name(Case(dtype=dtype, **MILLION), device())[name]
    assert (found.forward_bytes, found.backward_bytes) == (forward * 10**6, backward * 10**6)
    assert found.forward_kernel_s == pytest.approx(forward * 1e-6)
    assert found.backward_kernel_s == pytest.approx(backward * 1e-6)
    assert found.total_s == pytest.approx((forward + backward) * 1e-6 + found.communication_s)


def test_collectives_by_hand() -> None:
    """A gather receives from 3 others; an all_reduce over 4 ranks sends 1.5 times its size."""
    found = by_name(Case(dtype="bf16", **MILLION), device())
    sent = 3 * 4 * 1000 + 4 * (HEADER_INTS + 1)
    assert found["ours"].collectives == [("all_gather", sent)]
    assert found["ours"].communication_s == pytest.approx(10e-6 + 3 * sent / 1e11)
    assert found["megatron"].collectives == [("all_reduce", 4000)] * 3
    assert found["megatron"].communication_s == pytest.approx(3 * (10e-6 + 1.5 * 4000 / 1e11))
    assert found["megatron-fused"].collectives == [("all_reduce", 4000), ("all_reduce", 8000)]
    assert found["megatron-fused"].communication_s == pytest.approx(2 * 10e-6 + 1.5 * 12000 / 1e11)


def test_one_rank_waits_for_nobody() -> None:
    """Megatron calls its collectives on a group of one as well."""
    found = by_name(Case(1000, 4000, 1, "bf16"), device())
    counts = {name: len(prediction.collectives) for name, prediction in found.items()}
    assert counts == {"ours-inplace": 0, "ours": 0, "megatron": 3, "megatron-fused": 2}
    assert all(prediction.communication_s == 0 for prediction in found.values())


def test_many_rows_are_reduced_instead_of_gathered() -> None:
    """Above the limit of "auto": 8 ranks, 65,536 rows, 3 floats: 6.3 MB."""
    found = by_name(Case(65536, 131072, 8, "bf16"), device())["ours"]
    headers = 4 * 8 * 2 * HEADER_INTS
    assert found.collectives == [("all_reduce", 4 * 65536), ("all_reduce", 8 * 65536 + headers)]


def test_arithmetic_bounds_a_sweep_that_memory_does_not() -> None:
    """exp: 8 us of memory for a million elements; at 1e11 a second 10 us, at 1e12 only 1 us."""
    case = Case(dtype="fp32", **MILLION)
    base = by_name(case, device())["megatron"].forward_kernel_s
    slow = by_name(case, device(rates={"exp": Figure(1e11, "")}))["megatron"].forward_kernel_s
    fast = by_name(case, device(rates={"exp": Figure(1e12, "")}))["megatron"].forward_kernel_s
    assert slow == pytest.approx(base + 2e-6)
    assert fast == base


def test_ranks_that_share_a_machine_share_its_bandwidth() -> None:
    case = Case(dtype="bf16", **MILLION)
    alone, shared = by_name(case, device())["ours"], by_name(case, device(shared=True))["ours"]
    assert shared.forward_kernel_s == pytest.approx(4 * alone.forward_kernel_s)
    assert shared.communication_s == alone.communication_s
    assert shared.forward_bytes == alone.forward_bytes


def test_a_cpu_reads_what_it_is_about_to_overwrite() -> None:
    """Of 1 TB/s that a copy asks for, 1.5 are moved: in place 4 us become 4 / 1.5; elsewhere the 2
    bytes of the gradient are read as well, 6 / 1.5, which is what a copy of them would take."""
    found = by_name(Case(dtype="bf16", **MILLION), device(write_allocates=True))
    assert found["ours-inplace"].backward_kernel_s == pytest.approx(4e-6 / 1.5)
    assert found["ours"].backward_kernel_s == pytest.approx(4e-6)
    assert found["ours"].backward_bytes == 4 * 10**6


def test_fresh_memory_costs_from_the_size_that_malloc_does_not_keep() -> None:
    """2 MB of gradient: 2e6 / 1e9 s more, or nothing where such a buffer comes from the heap."""
    case = Case(dtype="bf16", **MILLION)
    fresh = device(first_touch=Figure(1e9, ""), first_touch_from=2_000_000)
    kept = device(first_touch=Figure(1e9, ""), first_touch_from=2_000_001)
    base = by_name(case, device())
    assert by_name(case, fresh)["ours"].backward_kernel_s == pytest.approx(
        base["ours"].backward_kernel_s + 2e-3
    )
    assert by_name(case, fresh)["ours-inplace"] == base["ours-inplace"]
    assert by_name(case, kept)["ours"] == base["ours"]


@pytest.mark.parametrize(
    ("name", "dtype", "forward", "backward"),
    [
        # amax 2, the fused kernel 6, sum 4; the fused kernel 6, narrow 6, zero 4
        ("ours", "bf16", 12, 16),
        ("ours-inplace", "fp16", 12, 16),
        # amax 4, 8, sum 4; 8, copy 8, zero 8
        ("ours-inplace", "fp32", 16, 24),
        # max 2, subtract 6, the operator 16; subtract 6, exp 8, scale 8, narrow 6, zero 4
        ("ours-inplace-operator", "bf16", 24, 32),
        ("ours-inplace-operator", "fp32", 28, 32),
    ],
)
def test_the_npu_ways_by_hand(name: str, dtype: str, forward: int, backward: int) -> None:
    found = by_name(Case(dtype=dtype, **MILLION), DEVICES["a2"])[name]
    assert (found.forward_bytes, found.backward_bytes) == (forward * 10**6, backward * 10**6)


def test_what_the_cache_of_an_npu_might_answer() -> None:
    # If its cache answered every sweep but the first of a chunk, it would be like any other device.
    cached = by_name(Case(dtype="bf16", **MILLION), DEVICES["a2"])["ours-cached"]
    assert (cached.forward_bytes, cached.backward_bytes) == (2 * 10**6, 4 * 10**6)
    assert (
        cached.peak_bytes
        == by_name(Case(dtype="bf16", **MILLION), DEVICES["a2"])["ours"].peak_bytes
    )
    # No compiler there: Megatron's fused form makes the eager sweeps.
    fused = by_name(Case(dtype="bf16", **MILLION), DEVICES["a2"])["megatron-fused"]
    assert (fused.forward_bytes, fused.backward_bytes) == (38 * 10**6, 14 * 10**6)


# --- published --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward_ms", "both_ms", "memory_mib"),
    [("megatron", 15.82, 21.25, 8192), ("megatron-fused", 11.80, 17.95, 12288)],
)
def test_what_others_measured_of_megatron_on_an_h100(
    name: str, forward_ms: float, both_ms: float, memory_mib: int
) -> None:
    """Liger-Kernel's table of 2026-06 (benchmark/data, [8192, 131072] bf16, one H100).

    Its memory counts the logits. Peaks agree to the MiB; times within 20 % forward and 10 % in all,
    which is how far kernels of one card lie apart in their share of its bandwidth.
    """
    case = Case(8192, 131072, 1, "bf16")
    found = by_name(case, DEVICES["h100"])[name]
    assert found.forward_s * 1e3 == pytest.approx(forward_ms, rel=0.20)
    assert found.total_s * 1e3 == pytest.approx(both_ms, rel=0.10)
    logits = case.elements * case.itemsize
    assert (found.peak_bytes + logits) / MIB == pytest.approx(memory_mib, abs=1)


# --- measured ---------------------------------------------------------------------------------


def test_memory_held_between_the_passes_is_what_torch_allocates() -> None:
    rows, columns = 4096, 512
    logits = torch.randn(rows, columns, requires_grad=True) * 1
    target = torch.randint(columns, (rows,))
    losses: list[Tensor] = [cross_entropy(logits, target)]  # imports, compiles
    kept = sum(allocations(lambda: losses.append(cross_entropy(logits, target))))
    found = by_name(Case(rows, columns, 1, "fp32"), DEVICES["cpu"])["ours"]
    assert kept == pytest.approx(found.held_bytes, abs=64)  # the loss and its mean's divisor


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """--measure as a user types it, on shards large enough that memory is counted exactly."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    command = [sys.executable, "-m", "vocab_parallel_ce.launch.plan", "--measure", "--quick"]
    command += ["--ranks", "1", "--ranks", "2", "--ways", "ours-inplace,ours,megatron"]
    command += ["--tokens", "512", "--vocab", "16384", "--json", str(path)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout and path.read_text())
    return report, done.stdout


def test_measure_puts_what_was_seen_beside_the_model(
    measured: tuple[dict[str, Any], str],
) -> None:
    report, text = measured
    assert [run["case"]["ranks"] for run in report["runs"]] == [1, 2]
    present = peers.installed("megatron.core")
    for run in report["runs"]:
        machine, ways = run["device"], {way["prediction"]["name"]: way for way in run["ways"]}
        assert machine["shared"]
        assert machine["bandwidth"]["value"] > 1e8
        assert set(machine["rates"]) == {"exp", "max", "partials", "gradient"}
        assert (machine["gather_latency"]["value"] > 0) == (run["case"]["ranks"] > 1)
        assert ways["megatron-fused"]["status"] == "not asked for"
        assert ways["megatron"]["status"] == ("" if present else "not installed")
        for name in ("ours-inplace", "ours", *(["megatron"] if present else [])):
            way = ways[name]
            assert way["total_s"] >= way["backward_s"] > 0
            assert way["prediction"]["total_s"] > 0
            assert way["collectives"] == len(way["prediction"]["collectives"])
    assert "seen" in text
    assert "The model leaves out" in text


def test_predicted_peaks_are_the_measured_ones(measured: tuple[dict[str, Any], str]) -> None:
    """Within the MiB that the budget leaves to pages and threads."""
    report, _ = measured
    for run in report["runs"]:
        for way in run["ways"]:
            if way["peak_bytes"] is None:
                continue
            assert way["peak_bytes"] == pytest.approx(way["prediction"]["peak_bytes"], abs=MIB)


def test_a_case_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "available_bytes", lambda: 100 * MIB)
    case = Case(4096, 32768, 2, "fp32")
    # Two copies of 512 MiB, and the fused peak of 6 bytes an element beside them.
    assert measuring.needed_bytes(case) // MIB == 1024 + 768
    with pytest.raises(RuntimeError, match="needs 1792 MiB of memory, 100 MiB are available"):
        measuring.run_case(case, ("ours",), 3, 0.0)


# --- the command ------------------------------------------------------------------------------


def invoke(*options: str) -> Ended:
    return invoke_job("plan", *options)


def test_a_prediction_as_a_user_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    options = ["--vocab", "131072", "--tokens", "8192", "--tp", "8", "--json", str(path)]
    done = invoke(*options, "--bandwidth", "1000", "--link-bandwidth", "100", "--latency", "10")
    assert done.exit_code == 0, done.output
    for words in ("Megatron-core fused", "given by you", "2 + 4", "1 all_gather, 96.2 KiB"):
        assert words in done.stdout
    report = json.loads(path.read_text())
    ours = report["predictions"][0]
    assert ours["name"] == "ours-inplace"
    # 8192 x 16384 elements, 6 bytes each, at 1 TB/s
    kernels = ours["forward_kernel_s"] + ours["backward_kernel_s"]
    assert kernels == pytest.approx(6 * 8192 * 16384 / 1e12)
    assert ours["communication_s"] == pytest.approx(10e-6 + 7 * ours["collectives"][0][1] / 1e11)
    assert ours["total_s"] == pytest.approx(kernels + ours["communication_s"])


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_of_a_device_has_a_source(name: str) -> None:
    done = invoke("--device", name.upper())
    assert done.exit_code == 0, done.output
    figures = [value for value in vars(DEVICES[name]).values() if isinstance(value, Figure)]
    figures += DEVICES[name].rates.values()
    assert len(figures) >= 5
    for figure in figures:
        assert figure.value > 0
        assert len(figure.source) > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "a100"], "--device 'a100' is not one of a2, a3, h100"),
        (["--dtype", "fp8"], "--dtype 'fp8' is not one of fp32, bf16, fp16"),
        (["--vocab", "100", "--tp", "8"], "--vocab 100 does not divide into 8 equal shards"),
        (["--vocab", "0"], "--vocab 0 must be at least 1"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--tp", "0"], "must be at least 1"),
        (["--bandwidth", "0"], "--bandwidth 0 must be positive"),
        (["--link-bandwidth", "inf"], "--link-bandwidth inf is not a finite number"),
        (["--latency", "-1"], "--latency -1 must be at least 0"),
        (["--ranks", "2"], "--ranks needs --measure"),
        (["--ways", "ours"], "--ways needs --measure"),
        (["--quick"], "--quick needs --measure"),
        (["--measure", "--card", "h100"], "--card h100: --measure runs on this machine's CPU"),
        (["--measure", "--tp", "2"], "--tp has no meaning with --measure; say --ranks"),
        (["--measure", "--latency", "1"], "--latency has no meaning with --measure"),
        (["--measure", "--ways", "torch"], "--ways 'torch' is not one of ours-inplace"),
        (["--measure", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--measure", "--ranks", "3"], "does not divide into 3 equal shards"),
        (["--json", "/proc/no/plan.json"], "cannot be written: No such file"),
    ],
)
def test_bad_options_end_with_one_line(options: list[str], words: str) -> None:
    assert words in one_line(invoke(*options), "plan")


def test_80_columns_show_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        said = invoke().stdout
        assert max(map(len, said.splitlines())) <= int(columns)
        assert "…" not in said
        shown.append({word for word in said.replace("┃", " ").replace("│", " ").split()})
    assert {word for word in shown[1] if word[0].isalnum()} <= shown[0]
