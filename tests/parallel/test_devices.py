"""The device of a process: what is missing is said in one line, with the way out."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce.parallel import devices
from vocab_parallel_ce.parallel.devices import (
    default_device_type,
    local_device,
    npu_is_available,
    npu_problem,
)
from vocab_parallel_ce.parallel.groups import ParallelGroups


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device='tpu' is not one of npu, cuda, cpu"):
        local_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but this machine shows none"):
        local_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2 has no cuda device.*shows 2"):
        local_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"LOCAL_WORLD_SIZE=3 .* 2 cuda devices; start at most 2"):
        local_device("cuda")


@pytest.fixture
def fresh_import(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is remembered of torch_npu forgotten, before and after."""
    remembered = (
        devices._torch_npu_import_problem,
        devices._warn_that_no_npu_is_used,
    )
    for function in remembered:
        function.cache_clear()
    yield monkeypatch
    for function in remembered:
        function.cache_clear()


def _fake_torch_npu(patch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    (folder / "torch_npu.py").write_text(code)
    patch.delitem(sys.modules, "torch_npu", raising=False)
    patch.syspath_prepend(folder)


def test_an_npu_without_torch_npu(fresh_import: pytest.MonkeyPatch) -> None:
    fresh_import.setattr(importlib.util, "find_spec", lambda name: None)
    version = torch.__version__.split("+")[0]
    assert npu_problem() == (
        "torch_npu is not installed; install CANN and the torch-npu that belongs to torch "
        f"{version}, or use --device cpu"
    )
    with pytest.raises(ValueError, match="device='npu', but torch_npu is not installed"):
        local_device("npu")
    fresh_import.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a machine that never had one is not worth a word
        assert default_device_type() == "cpu"


def test_torch_npu_without_cann(fresh_import: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
import os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
"""
    _fake_torch_npu(fresh_import, tmp_path, code)
    fresh_import.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    reason = npu_problem()
    assert reason is not None
    assert "CANN is not found (libhccl.so: cannot open shared object file" in reason
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh; or" in reason
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in os.environ  # children would inherit it
    assert not npu_is_available()
    with pytest.raises(ValueError, match=r"device='npu', but torch_npu .* CANN is not found"):
        ParallelGroups.open("npu")
    assert not dist.is_initialized()
    fresh_import.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match=r"running on the CPU: torch_npu .* CANN is not found"):
        assert default_device_type() == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert default_device_type() == "cpu"


def test_a_torch_npu_for_another_torch(fresh_import: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_torch_npu(fresh_import, tmp_path, "raise AttributeError('no attribute _x\\nsecond')\n")
    assert npu_problem() == (
        "torch_npu is installed but does not load (no attribute _x): install the version made "
        "for your torch; or, to work without it, set TORCH_DEVICE_BACKEND_AUTOLOAD=0 or uninstall "
        "torch-npu"
    )
