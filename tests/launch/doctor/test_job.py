"""The doctor, run as its users run it, and sabotaged to see that it notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from vocab_parallel_ce.engines.cpu import engine as cpu
from vocab_parallel_ce.launch.doctor import behaviour as doctor_behaviour
from vocab_parallel_ce.launch.doctor import checks as doctor_checks
from vocab_parallel_ce.launch.doctor import environment as doctor_environment
from vocab_parallel_ce.launch.doctor import software as doctor_software
from vocab_parallel_ce.launch.doctor import variables as doctor_variables
from vocab_parallel_ce.launch.doctor.cases import Case, Found, Place, against_truth
from vocab_parallel_ce.launch.doctor.command import app
from vocab_parallel_ce.launch.doctor.environment import collect
from vocab_parallel_ce.launch.doctor.ranks import LateError, Outcome, Worker
from vocab_parallel_ce.launch.doctor.report import compare_environments
from vocab_parallel_ce.launch.doctor.scrub import Names, scrub
from vocab_parallel_ce.launch.doctor.selftest import judge
from vocab_parallel_ce.launch.doctor.truth import Question, batch, truth
from vocab_parallel_ce.testing import Comparison, compare

ROOT = Path(__file__).parents[3]
DTYPES = ["fp32", "bf16", "fp16", "fp64"]
SMALL = ("--device", "cpu", "--selftest", "--quick", "--rows", "8", "--vocab", "64")


def invoke(*options: str) -> Any:
    """The command, in this process."""
    return CliRunner().invoke(app, list(options))


def one_line(result: Any, status: int = 2) -> str:
    """What the command said on standard error, which must be one line."""
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.strip().splitlines()
    return str(line)


def launch(
    *arguments: str, ranks: int = 0, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A program in processes of its own, under torchrun where ``ranks`` are asked for."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    return subprocess.run(
        [sys.executable, *(launcher if ranks else []), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environ or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


DOCTOR = ("-m", "vocab_parallel_ce.launch.doctor")


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    return report


# --- the report -------------------------------------------------------------------------------


def test_report_says_what_is_here_and_nothing_of_whose(tmp_path: Path) -> None:
    home = tmp_path / "homes" / "gwendolyn"
    (home / "cann" / "x86_64-linux").mkdir(parents=True)
    info = home / "cann" / "x86_64-linux" / "ascend_toolkit_install.info"
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V1\n")
    secret = {
        "USER": "gwendolyn",
        "LOGNAME": "gwendolyn",
        "HOME": str(home),
        "HOSTNAME": "rack7.example.net",
        "HCCL_IF_IP": "10.3.2.1",
        "ASCEND_HOME_PATH": str(home / "cann"),
        "HCCL_DETERMINISTIC": "maybe",
    }
    out = tmp_path / "report.json"
    done = launch(*DOCTOR, "--device", "cpu", "--json", str(out), environ=secret)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = read(out)["environment"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert found["versions"]["vocab_parallel_ce"].startswith("0.")
    assert found["cann"].startswith("8.5.0 (~/cann/")
    assert (found["device"], found["backend"], found["problem"]) == ("cpu", "gloo", "")
    assert {name: choice["engine"] for name, choice in found["engines"].items()} == dict.fromkeys(
        DTYPES, "cpu"
    )
    (device,) = found["devices"]
    assert device["name"]
    variables = {v["name"]: v for v in found["variables"]}
    assert variables["OMP_NUM_THREADS"]["value"] == "1"
    assert variables["VOCAB_PARALLEL_CE_CHECK"]["verdict"] == "ok"
    # Set, but nothing to a CPU: shown and not judged.
    assert variables["HCCL_DETERMINISTIC"] == {
        "name": "HCCL_DETERMINISTIC",
        "value": "maybe",
        "default": "false",
        "verdict": "ok",
        "word": "",
    }
    for secret_word in ("gwendolyn", "rack7", "10.3.2.1", str(home)):
        assert secret_word not in out.read_text()
    for said in ("torch", "CANN", "8.5.0", "driver", "backend", "gloo", "engine, bf16"):
        assert said in done.stdout


MISSING = "libhccl.so: cannot open shared object file: No such file or directory"


def broken_torch_npu(folder: Path) -> str:
    """A torch_npu as one finds it where CANN is missing; the path to import it from."""
    package, about = folder / "torch_npu", folder / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text(f"raise ImportError({MISSING!r})\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_torch_npu_without_cann_is_explained(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": broken_torch_npu(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out = tmp_path / "report.json"
    done = launch(*DOCTOR, "--device", "npu", "--json", str(out), environ=environ)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("rank 0: device='npu', but torch_npu")
    assert "CANN" in line
    found = read(out)["environment"]
    assert found["versions"]["torch_npu"].startswith("2.13.0, does not import: ")
    assert "libhccl.so" in found["versions"]["torch_npu"]
    assert found["problem"] == line.removeprefix("rank 0: ")
    assert found["engines"] == {}
    words = {v["name"]: v["word"] for v in found["variables"]}
    assert "import torch_npu itself" in words["TORCH_DEVICE_BACKEND_AUTOLOAD"]


def test_every_rank_says_that_there_is_no_device() -> None:
    done = launch(
        *DOCTOR, "--device", "cuda", "--selftest", ranks=2, environ={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: device='cuda', but" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    assert "'tpu' is not one of npu, cuda, cpu" in one_line(invoke("--device", "tpu"))
    assert "--timeout 0.0 must be" in one_line(invoke("--timeout", "0"))
    assert "--vocab 7 is too small" in one_line(invoke("--vocab", "7"))
    assert "--rows 3 is too small" in one_line(invoke("--rows", "3"))
    assert "--timed-vocab 7 is too small" in one_line(invoke("--timed-vocab", "7"))
    (tmp_path / "file").write_text("")
    taken = str(tmp_path / "file" / "report.json")
    line = one_line(invoke("--device", "cpu", "--json", taken))
    assert f"--json {taken} cannot be written" in line


def test_a_launcher_that_is_half_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    line = one_line(invoke(*SMALL, "--json", os.devnull))
    assert "RANK=0 is set but MASTER_ADDR and MASTER_PORT not" in line


# --- what is read from the machine ------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=x\nversion=8.0.RC3\n"),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.3:8.0.RC3]\n"),
        ("compiler/version.info", "Version=8.0.RC3\nversion_dir=x\n"),
    ],
)
def test_cann_is_found_wherever_it_says_its_version(
    file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = doctor_software.cann_version()
    assert found.endswith(f" ({path})")
    assert "8.0.RC3" in found


def fake_tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_drivers_are_asked_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/usr/local/Ascend/driver/version.info").exists():
        pytest.skip("this machine has a driver of its own")
    fake_tool(tmp_path, "npu-smi", "echo '| npu-smi 24.1.rc2   Version: 24.1.rc2 |'", monkeypatch)
    fake_tool(tmp_path, "nvidia-smi", "echo 535.104.05; echo 535.104.05", monkeypatch)
    assert doctor_software.driver_version(("npu", "cuda")) == "npu 24.1.rc2, cuda 535.104.05"
    assert doctor_software.driver_version(("cpu",)) == "none needed"
    monkeypatch.setattr(doctor_software, "TOOL_SECONDS", 0.2)
    fake_tool(tmp_path, "npu-smi", "exec sleep 30", monkeypatch)
    started = time.monotonic()
    assert doctor_software.driver_version(("npu",)) == "npu not found"
    assert time.monotonic() - started < 5


def test_more_ranks_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    two_cards = SimpleNamespace(device_count=lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: two_cards)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert doctor_environment._crowded("npu").startswith("3 processes were started here, but there")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert doctor_environment._crowded("npu") == ""


def test_a_device_that_does_not_answer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_environment, "DEVICE_SECONDS", 1.0)
    monkeypatch.setattr(doctor_environment, "_engines", lambda kind: time.sleep(30))
    found = collect("cpu", look_around=True)
    assert found.notes == ["asking the device: did not end within 1 s"]
    assert found.problem.startswith("device='cpu' does not work: asking the device: did not end")


def test_ranks_with_other_environments_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    one = collect("cpu", look_around=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    other = collect("cpu", look_around=False)
    assert compare_environments([one, one]) == []
    (line,) = compare_environments([one, other])
    assert line.startswith("OMP_NUM_THREADS differs: rank 0 has ")
    assert line.endswith("rank 1 has '77'")


# --- environment variables --------------------------------------------------------------------


def word(name: str, value: str, **others: str) -> str:
    """What is said about ``name=value`` where two NPUs or CUDA cards can be seen."""
    judged = doctor_variables.judge({name: value, **others}, ("npu", "cuda"), {"npu": 2, "cuda": 2})
    (found,) = (v for v in judged if v.name == name)
    assert found.value == value
    assert found.verdict == ("warning" if found.word else "ok")
    return found.word


BAD: list[tuple[str, str, dict[str, str], str]] = [
    ("ASCEND_RT_VISIBLE_DEVICES", "", {}, "names no card"),
    ("ASCEND_RT_VISIBLE_DEVICES", "0,1,0", {}, "names 0 more than once"),
    ("ASCEND_RT_VISIBLE_DEVICES", "0,one", {}, "must be numbers"),
    ("ASCEND_RT_VISIBLE_DEVICES", "0,1,9", {}, "names 3 cards, but 2 can be seen"),
    ("ASCEND_HOME_PATH", "/no/such/folder", {}, "is no folder"),
    ("HCCL_CONNECT_TIMEOUT", "60", {}, "in 120..7200"),
    ("HCCL_CONNECT_TIMEOUT", "7201", {}, "in 120..7200"),
    ("HCCL_CONNECT_TIMEOUT", "two minutes", {}, "must be a whole number of seconds"),
    ("HCCL_EXEC_TIMEOUT", "0", {}, "without end"),
    ("HCCL_EXEC_TIMEOUT", "-5", {}, "at least 1"),
    ("HCCL_BUFFSIZE", "0", {}, "at least 1"),
    ("HCCL_BUFFSIZE", "200M", {}, "whole number of MB"),
    ("HCCL_DETERMINISTIC", "yes", {}, "false, true, strict"),
    ("HCCL_OP_EXPANSION_MODE", "GPU", {}, "aiv"),
    ("HCCL_WHITELIST_DISABLE", "0", {}, "HCCL_WHITELIST_FILE"),
    ("HCCL_WHITELIST_DISABLE", "2", {}, "0, 1"),
    ("HCCL_IF_IP", "localhost", {}, "IP address"),
    ("HCCL_SOCKET_IFNAME", "nosuch", {}, "matches no interface"),
    ("HCCL_SOCKET_IFNAME", "=l", {}, "matches no interface"),
    ("INF_NAN_MODE_ENABLE", "0", {}, "saturates"),
    ("INF_NAN_MODE_ENABLE", "on", {}, "0, 1"),
    ("INF_NAN_MODE_FORCE_DISABLE", "1", {}, "saturates"),
    ("TASK_QUEUE_ENABLE", "0", {}, "slow"),
    ("TASK_QUEUE_ENABLE", "3", {}, "0, 1, 2"),
    ("TASK_QUEUE_ENABLE", "2", {"ASCEND_LAUNCH_BLOCKING": "1"}, "no effect"),
    ("ASCEND_LAUNCH_BLOCKING", "1", {}, "slow"),
    ("MULTI_STREAM_MEMORY_REUSE", "0", {}, "memory"),
    ("MULTI_STREAM_MEMORY_REUSE", "5", {}, "0, 1, 2, 3"),
    ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", {}, "import torch_npu itself"),
    ("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0", {}, "a lost rank"),
    ("TORCH_HCCL_BLOCKING_WAIT", "1", {}, "slow"),
    ("VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB", "0", {}, "at least 1"),
    ("CUDA_VISIBLE_DEVICES", "-1", {}, "names no card"),
    ("CUDA_VISIBLE_DEVICES", "1,1", {}, "more than once"),
    ("CUDA_LAUNCH_BLOCKING", "1", {}, "slow"),
    ("NCCL_SOCKET_IFNAME", "nosuch", {}, "matches no interface"),
    ("NCCL_P2P_DISABLE", "1", {}, "host memory"),
    ("NCCL_IB_DISABLE", "1", {}, "sockets"),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", {}, "a lost rank"),
    ("OMP_NUM_THREADS", "many", {}, "whole number"),
    ("OMP_NUM_THREADS", "100000", {}, "100000 threads share"),
    ("OMP_NUM_THREADS", "1", {"LOCAL_WORLD_SIZE": "100000"}, "100000 processes of 1 threads"),
    ("GLOO_SOCKET_IFNAME", "lo,nosuch", {}, "nosuch is no interface"),
    ("RANK", "0", {}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
    ("LOCAL_RANK", "2", {"LOCAL_WORLD_SIZE": "2"}, "below LOCAL_WORLD_SIZE=2"),
    ("LOCAL_RANK", "x", {}, "whole number"),
    ("WORLD_SIZE", "2", {}, "RANK, MASTER_ADDR, MASTER_PORT not"),
    ("LOCAL_WORLD_SIZE", "0", {}, "at least 1"),
    ("MASTER_ADDR", "localhost", {}, "torchrun"),
    ("MASTER_PORT", "29500", {}, "torchrun"),
]


@pytest.mark.parametrize(("name", "value", "others", "expected"), BAD)
def test_a_variable_that_is_set_badly(
    name: str, value: str, others: dict[str, str], expected: str
) -> None:
    assert expected in word(name, value, **others)


def test_variables_that_are_set_well(tmp_path: Path) -> None:
    good = {
        "ASCEND_RT_VISIBLE_DEVICES": "1,0",
        "ASCEND_HOME_PATH": str(tmp_path),
        "HCCL_CONNECT_TIMEOUT": "7200",
        "HCCL_EXEC_TIMEOUT": "1836",
        "HCCL_BUFFSIZE": "400",
        "HCCL_DETERMINISTIC": "strict",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "HCCL_WHITELIST_DISABLE": "0",
        "HCCL_WHITELIST_FILE": "list.json",
        "HCCL_IF_IP": "10.0.0.1",
        "HCCL_SOCKET_IFNAME": "^nosuch",
        "INF_NAN_MODE_ENABLE": "1",
        "TASK_QUEUE_ENABLE": "2",
        "ASCEND_LAUNCH_BLOCKING": "0",
        "MULTI_STREAM_MEMORY_REUSE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "TORCH_HCCL_ANYTHING": "5",
        "CUDA_VISIBLE_DEVICES": "GPU-8932f937,1",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "OMP_NUM_THREADS": "1",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
    }
    good["LOCAL_RANK"] = "0"
    judged = doctor_variables.judge(good, ("npu", "cuda"), {"npu": 2, "cuda": 2})
    assert {v.name: v.word for v in judged if v.word} == {}
    assert set(good) <= {v.name for v in judged}


def test_unset_variables_are_shown_where_they_matter() -> None:
    names = [v.name for v in doctor_variables.judge({}, ("cpu",))]
    assert "VOCAB_PARALLEL_CE_CHECK" in names
    assert not any(name.startswith(("HCCL", "NCCL", "ASCEND", "CUDA")) for name in names)
    npu = {v.name: v for v in doctor_variables.judge({}, ("npu",))}
    assert npu["HCCL_CONNECT_TIMEOUT"].value is None
    assert npu["HCCL_CONNECT_TIMEOUT"].default == "120 s"
    assert "CUDA_VISIBLE_DEVICES" not in npu


def test_checking_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOCAB_PARALLEL_CE_CHECK", "1")
    assert "not speed" in word("VOCAB_PARALLEL_CE_CHECK", "1")
    monkeypatch.setenv("VOCAB_PARALLEL_CE_CHECK", "off")
    assert word("VOCAB_PARALLEL_CE_CHECK", "off") == ""


# --- scrubbing --------------------------------------------------------------------------------

NAMES = Names(
    frozenset({"alice", "npu"}), frozenset({"node7.corp", "node7"}), frozenset({"/data/a"})
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/bob/x.py and /root/y", "~/x.py and ~/y"),
        ("/data/a/runs of alice", "~/runs of <user>"),
        ("connect node7.corp:29500, node7", "connect <host>:29500, <host>"),
        ("10.1.2.3:29500 [fe80::1:2]:80", "<address>:29500 [<address>]:80"),
        ("127.0.0.1 at 17:08:10", "127.0.0.1 at 17:08:10"),
        ("malice, npu and std::vector", "malice, npu and std::vector"),
        ("/rootfs 7.3.0.1.231", "/rootfs 7.3.0.1.231"),
    ],
)
def test_scrubbing(text: str, clean: str) -> None:
    assert scrub({"a": [text, 1, None]}, NAMES) == {"a": [clean, 1, None]}


def test_versions_are_not_taken_for_addresses() -> None:
    report = {"versions": {"x": "1.2.3.4"}, "driver": "24.1.0.3", "other": "1.2.3.4"}
    assert scrub(report, NAMES) == report | {"other": "<address>"}


def test_names_of_all_ranks_are_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "carol")
    both = Names.union([NAMES, Names.of_this_process()])
    assert scrub("alice and carol", both) == "<user> and <user>"


# --- judging ----------------------------------------------------------------------------------


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


def test_a_worker_leaves_a_late_call_behind() -> None:
    worker = Worker()
    assert worker.call(lambda: 3, 10) == 3
    with pytest.raises(ValueError, match="no number"):
        worker.call(lambda: int("no number"), 10)
    with pytest.raises(LateError, match=r"did not end within 0.1 s"):
        worker.call(lambda: time.sleep(5), 0.1)


# --- the selftest -----------------------------------------------------------------------------


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
    assert len(of_dtype["fp32"]) == 30
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
    done = launch(*DOCTOR, *SMALL, "--json", str(out), ranks=2)
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
from vocab_parallel_ce.launch.doctor.command import app

for smoothing in (0.0, 0.1):  # kernels that still had to be compiled would count as late
    logits = torch.zeros(2, 8, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64)
    cross_entropy(logits, target, label_smoothing=smoothing).backward()

partials, gradient = cpu.partials, cpu.gradient

def wrong_gradient(logits, m, s, target, coefficients, weight, scale, out):
    gradient(logits, m, s, target, coefficients, weight, scale, out)
    if scale != 1.0:
        out[0, 1] += 1e-3

def raises(logits, target, weight, scale, *others):
    if scale == 0.7:
        raise RuntimeError("sabotaged")
    partials(logits, target, weight, scale, *others)

if os.environ["RANK"] == "1":
    cpu.gradient, cpu.partials = wrong_gradient, raises
app()
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
    base = arguments[7]._base
    (arguments[7] if base is None else base)[..., -1] = 1.0


calls = iter(range(10**6))


@pytest.mark.parametrize(
    ("check", "dtype", "sabotage", "complaint"),
    [
        ("sum", "fp32", spoil("gradient", add(7, 1e-5)), "gradient is off by 1"),
        ("none", "bf16", spoil("gradient", add(7, 2.0**-6)), "gradient is off by"),
        ("none", "fp64", spoil("gradient", add(7, 1e-13)), "gradient is off by 1.0e-13"),
        ("none", "fp32", spoil("partials", add(5, 1e-4)), "loss is off by"),
        ("ignore_index", "fp32", spoil("gradient", add(7, 1e-3)), "gradient is off"),
        ("cross_entropy_loss, none", "fp32", spoil("log_prob", add(4, 1e-4)), "log_prob is off"),
        ("padding columns", "fp32", spoil("gradient", forget_padding), "padding is not 0"),
        ("all rows ignored", "fp32", spoil("gradient", add(7, 1e-9)), "gradient that is not 0"),
        (
            "the same bits twice",
            "fp32",
            spoil("gradient", lambda *a: add(7, 1e-3 * next(calls))(*a)),
            "its gradient has other bits",
        ),
    ],
)
def test_sabotage_is_noticed(
    check: str, dtype: str, sabotage: Sabotage, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    torch_dtype = doctor_environment.DTYPES[dtype]
    (chosen,) = (c for c in doctor_checks.for_dtype(place, torch_dtype) if c.name == check)

    def verdict() -> Any:
        return judge(check, dtype, [Outcome(chosen.run(place, torch_dtype))])

    assert verdict().word == "ok"
    sabotage(monkeypatch)
    found = verdict()
    assert found.word == "FAILED"
    assert any(complaint in problem for problem in found.problems), found.problems


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
    assert doctor_behaviour.bad_target(place, torch.float32).wrong == []
    monkeypatch.setattr(doctor_behaviour, "ask", lambda *_: {"loss": torch.zeros(6)})
    wrong = doctor_behaviour.bad_target(place, torch.float32).wrong
    assert wrong == ["on a CPU: there is no ValueError", "with check=True: there is no ValueError"]


def test_a_dtype_that_torch_cannot_hold_is_skipped() -> None:
    """torch_npu makes fp32 of fp64 on cards without it; the meta device has no values at all."""
    place = Place(torch.device("cpu"), 0, 1, None, rows=8, vocab=64, quick=True)
    for dtype in doctor_environment.DTYPES.values():
        found = doctor_behaviour.torch_itself(place, dtype)
        assert (found.skipped, found.wrong) == ("", [])
    nowhere = Place(torch.device("meta"), 0, 1, None, rows=8, vocab=64, quick=True)
    assert doctor_behaviour.torch_itself(nowhere, torch.float64).skipped.startswith(
        "torch itself: "
    )
    (wrong,) = doctor_behaviour.torch_itself(nowhere, torch.float32).wrong
    assert wrong.startswith("torch itself: ")
