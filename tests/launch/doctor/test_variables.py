"""The environment variables that decide how a run goes, set well and badly."""

from __future__ import annotations

from pathlib import Path

import pytest

from vocab_parallel_ce.launch.doctor import variables


def word(name: str, value: str, **others: str) -> str:
    """What is said about ``name=value`` where two NPUs or CUDA cards can be seen."""
    judged = variables.judge({name: value, **others}, ("npu", "cuda"), {"npu": 2, "cuda": 2})
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
    ("VOCAB_PARALLEL_CE_NPU_WAY", "fused", {}, "auto, max_sum, operator, triton"),
    ("VOCAB_PARALLEL_CE_NPU_WAY", "AUTO", {}, "auto, max_sum, operator, triton"),
    ("VOCAB_PARALLEL_CE_NPU_LINEAR", "max_sum", {}, "auto, fused, chunks"),
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
    judged = variables.judge(good, ("npu", "cuda"), {"npu": 2, "cuda": 2})
    assert {v.name: v.word for v in judged if v.word} == {}
    assert set(good) <= {v.name for v in judged}


def test_unset_variables_are_shown_where_they_matter() -> None:
    names = [v.name for v in variables.judge({}, ("cpu",))]
    assert "VOCAB_PARALLEL_CE_CHECK" in names
    assert not any(name.startswith(("HCCL", "NCCL", "ASCEND", "CUDA")) for name in names)
    npu = {v.name: v for v in variables.judge({}, ("npu",))}
    assert npu["HCCL_CONNECT_TIMEOUT"].value is None
    assert npu["HCCL_CONNECT_TIMEOUT"].default == "120 s"
    assert "CUDA_VISIBLE_DEVICES" not in npu


def test_checking_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOCAB_PARALLEL_CE_CHECK", "1")
    assert "not speed" in word("VOCAB_PARALLEL_CE_CHECK", "1")
    monkeypatch.setenv("VOCAB_PARALLEL_CE_CHECK", "off")
    assert word("VOCAB_PARALLEL_CE_CHECK", "off") == ""
