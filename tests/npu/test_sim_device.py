"""The stand-in device: how it gets into a program, what aten does on it, and what it refuses."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ..npu_sim import libraries
from ..npu_sim.libraries import CannotBuildError, environment

ROOT = Path(__file__).resolve().parents[2]
NPU = torch.get_device_module("npu")
ADD = "print((torch.ones(2, device='npu') + 1).tolist())"


def _python(
    *arguments: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment() if variables is None else variables,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def _bare() -> dict[str, str]:
    """The environment of somebody who has installed torch_npu, and nothing of CANN."""
    theirs = ("LD_LIBRARY_PATH", "PYTHONPATH", "ASCEND", "NPU_SIM", "TORCH_DEVICE_BACKEND")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)}


# ---- getting in


@pytest.mark.parametrize("imports", ["import torch", "import torch_npu, torch"])
def test_a_plain_program(imports: str) -> None:
    done = _python("-c", f"{imports}; {ADD}; print(torch.npu.device_count())")
    assert (done.returncode, done.stdout) == (0, "[2.0, 2.0]\n8\n"), done.stderr


def test_children_of_a_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, torch\n"
        f"def child():\n    {ADD}\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start(); process.join(); raise SystemExit(process.exitcode)\n"
    )
    done = _python(str(program))
    assert (done.returncode, done.stdout) == (0, "[2.0, 2.0]\n"), done.stderr


def test_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, torch, torch.distributed as dist\n"
        "torch.npu.set_device(int(os.environ['LOCAL_RANK']))\n"
        "dist.init_process_group('hccl')\n"
        "value = torch.ones(3, device='npu'); dist.all_reduce(value)\n"
        "line = [*value.tolist(), str(value.device), dist.get_backend()]\n"
        "print(line, flush=True); dist.destroy_process_group()\n"
    )
    done = _python(
        *("-m", "tests.npu_sim", "torchrun", "--standalone", "--nproc-per-node", "2"),
        str(program),
    )
    assert done.returncode == 0, done.stderr
    # Ranks share one output: the end of a line may come after the other rank's line.
    lines = sorted(re.findall(r"\[2.*?\]", done.stdout))
    assert lines == [f"[2.0, 2.0, 2.0, 'npu:{rank}', 'hccl']" for rank in range(2)]


def test_without_the_runner_torch_npu_has_no_cann() -> None:
    done = _python("-c", "import torch", variables=_bare())
    assert done.returncode != 0
    assert "libhccl.so: cannot open shared object file" in done.stderr


def test_the_runner_needs_nothing_that_needs_cann() -> None:
    variables = {**_bare(), "PYTHONPATH": str(ROOT)}
    done = _python(
        "-m", "tests.npu_sim", "python", "-c", f"import torch; {ADD}", variables=variables
    )
    assert (done.returncode, done.stdout) == (0, "[2.0, 2.0]\n"), done.stderr
    done = _python("-m", "tests.npu_sim", variables=variables)
    assert (done.returncode, done.stderr) == (1, "usage: python -m tests.npu_sim COMMAND ...\n")
    done = _python("-m", "tests.npu_sim", "no-such-command", variables=variables)
    assert done.returncode == 1
    assert done.stderr == (
        "tests.npu_sim: cannot run 'no-such-command': No such file or directory\n"
    )


def test_devices_are_counted_from_the_environment() -> None:
    """The first that is not there cannot be taken."""
    program = (
        "import torch; print(torch.npu.device_count(), torch.npu.is_available(), flush=True); "
    )
    for count, expected in (("0", "0 False"), ("3", "3 True")):
        done = _python(
            "-c", f"{program} torch.npu.set_device({count})",
            variables={**environment(), "NPU_SIM_DEVICES": count},
        )  # fmt: skip
        assert (done.returncode, done.stdout.splitlines()[0]) == (1, expected), done.stderr
        assert "set_device" in done.stderr


# ---- building


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.prefix = {str(tmp_path)!r}; "
        "from tests.npu_sim.libraries import build; print(build())"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    homes = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    built = list((tmp_path / "npu_sim").iterdir())
    assert homes == {str(path) for path in built}
    assert (built[0] / "lib64" / "libhccl.so").is_file()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotBuildError, match="gcc is needed to build the stand-in for CANN"):
        libraries.build()
    assert list((tmp_path / "npu_sim").iterdir()) == []

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    with pytest.raises(CannotBuildError, match=r"torch_npu is not installed for .*: run `make "):
        libraries.build()


# ---- aten

CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda x, i: x + 2 * x,
    "matmul": lambda x, i: x @ x.t(),
    "matrix times vector": lambda x, i: x @ x[0],
    "batched matmul": lambda x, i: torch.matmul(x[None].expand(3, -1, -1), x.t()),
    "linear": lambda x, i: F.linear(x, x, x[:, 0]),
    "softmax": lambda x, i: x.softmax(1),
    "log_softmax": lambda x, i: x.log_softmax(1),
    "logsumexp": lambda x, i: x.logsumexp(1),
    "cross_entropy": lambda x, i: F.cross_entropy(x, i),
    "max": lambda x, i: x.max(1)[0],
    "amax": lambda x, i: x.amax(1),
    "sort": lambda x, i: x.sort(1)[0],
    "topk": lambda x, i: x.topk(2, 1)[0],
    "gather": lambda x, i: x.gather(1, i[:, None]),
    "index": lambda x, i: x[i % 4],
    "boolean index": lambda x, i: x[x > 0],
    "index_put": lambda x, i: x.clone().index_put_((i % 4,), x[0]),
    "scatter_add": lambda x, i: x.clone().scatter_add_(1, i[:, None], x[:, :1]),
    "masked_fill": lambda x, i: x.masked_fill(x > 0, 0.0),
    "where": lambda x, i: torch.where(x > 0, x, -x),
    "view of a transpose": lambda x, i: (x.t().contiguous() * 2).view(-1, 4),
    "slice written in place": lambda x, i: x.clone()[:, 1::2].mul_(3),
    "split and stack": lambda x, i: torch.stack(x.split(2, 1)),
    "cat": lambda x, i: torch.cat([x, x[:1]]),
    "pad": lambda x, i: F.pad(x, (1, 2)),
    "cumsum": lambda x, i: x.cumsum(1),
    "norm": lambda x, i: x.norm(),
    "layer_norm": lambda x, i: F.layer_norm(x, (6,)),
    "gelu": lambda x, i: F.gelu(x),
    "attention": lambda x, i: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "bfloat16": lambda x, i: (x.bfloat16() * 2).float(),
}


@pytest.mark.parametrize("name", CASES)
def test_aten_is_the_cpu(name: str) -> None:
    numbers, index = torch.randn(4, 6), torch.tensor([1, 5, 0, 3])
    results = []
    for device in ("cpu", "npu"):
        x = numbers.to(device, copy=True).requires_grad_()
        result = CASES[name](x, index.to(device))
        result.square().sum().backward()
        assert x.grad is not None
        assert result.device.type == x.grad.device.type == device
        results.append((result.detach().cpu(), x.grad.cpu()))
    torch.testing.assert_close(results[1], results[0])


def test_an_optimizer_step() -> None:
    weights = []
    for device in ("cpu", "npu"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(torch.ones(2, 5, device=device)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach().cpu())
    torch.testing.assert_close(weights[1], weights[0])


def test_out_is_resized_and_other_shapes_are_not_changed() -> None:
    x, out = torch.arange(6.0, device="npu"), torch.empty(0, device="npu")
    assert torch.add(x, 1, out=out).tolist() == [1, 2, 3, 4, 5, 6]
    assert out.tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(RuntimeError, match="resize"), pytest.warns(UserWarning, match="resized"):
        torch.add(x, 1, out=torch.empty(2, device="npu"))


def test_random_numbers_follow_the_seed() -> None:
    torch.manual_seed(3)
    first = torch.randn(5, device="npu")
    torch.manual_seed(3)
    assert torch.equal(torch.randn(5, device="npu"), first)
    assert not torch.equal(torch.randn(5, device="npu"), first)


def test_devices_are_apart() -> None:
    first, second = torch.ones(2, device="npu:1"), torch.ones(2, device="npu:2")
    assert (first + 1).device == torch.device("npu:1")
    assert second.to("npu:1").device == first.device
    assert (first + second.to("npu:1")).tolist() == [2, 2]


# ---- what it refuses


def test_an_operator_without_a_cpu_kernel_raises() -> None:
    import torch_npu

    x = torch.rand(4, 4, device="npu")
    with pytest.raises(RuntimeError, match="aclnnSwiGluGetWorkspaceSize not in libopapi"):
        torch_npu.npu_swiglu(x)
    with pytest.raises(RuntimeError, match="npu_sim: the operator CIoU reached CANN, but no"):
        torch_npu.npu_ciou(x, x, trans=True, is_cross=False, mode=0)
    if "dtype" in torch.ops.aten.mm.overloads():  # which torch 2.7 does not have
        with pytest.raises(RuntimeError, match="npu_sim: the operator MatMul reached CANN, but no"):
            torch.mm(x.half(), x.half(), out_dtype=torch.float32)


# ---- memory and time


def test_memory_is_counted_by_the_allocator_of_torch_npu() -> None:
    gc.collect()
    NPU.empty_cache()
    before, (free, total) = NPU.memory_allocated(), NPU.mem_get_info()
    NPU.reset_peak_memory_stats()
    large = torch.empty(40 << 20, dtype=torch.uint8, device="npu")
    small = torch.empty(1000, dtype=torch.uint8, device="npu")
    # torch_npu adds 32 bytes to a block and rounds it up: to 2 MiB where it is large.
    assert large.numel() < NPU.memory_allocated() - before <= large.numel() + (2 << 20) + 1536
    assert NPU.mem_get_info()[0] <= free - large.numel()
    assert total == 64 << 30
    del large
    assert small.numel() < NPU.memory_allocated() - before <= 1536
    assert NPU.max_memory_allocated() - before > 40 << 20
    NPU.reset_peak_memory_stats()
    assert NPU.max_memory_allocated() == NPU.memory_allocated()
    del small
    NPU.empty_cache()
    assert NPU.mem_get_info() == (free, total)


def test_a_full_device_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"NPU out of memory\. Tried to allocate 65\.00 GiB"):
        torch.empty(65 << 30, dtype=torch.uint8, device="npu")


def test_events_measure_time() -> None:
    start, end = NPU.Event(enable_timing=True), NPU.Event(enable_timing=True)
    start.record()
    time.sleep(0.02)
    end.record()
    NPU.synchronize()
    assert 20 <= start.elapsed_time(end) < 2000


def test_names_and_versions() -> None:
    from torch_npu.npu.utils import get_cann_version

    assert NPU.get_device_name() == "Ascend910B2"
    assert get_cann_version() == os.environ["NPU_SIM_CANN"]
