"""Which engine serves a tensor, and what happens where Numba or Triton is missing, old or broken.

That is acted out in processes of their own, whose sys.path holds another package or none. CUDA
tensors are fake ones, without memory, and so are the cards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, engines, token_statistics
from vocab_parallel_ce.engines import ENGINES, eager, engine_name, engine_of_device, select, why_not
from vocab_parallel_ce.engines.triton import engine as triton

ROOT = Path(__file__).resolve().parents[2]


# In this process: Numba works


def _name(engine: str, logits: torch.Tensor) -> str:
    return engine_name(select(engine, logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cpu_tensors_take_the_cpu_engine(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3).to(dtype)
    assert _name("auto", x) == "cpu"
    assert select("cpu", x) is select("auto", x)
    assert _name("eager", x) == "eager"


def test_other_devices_take_the_eager_engine() -> None:
    x = torch.randn(2, 3, device="meta")
    assert _name("auto", x) == "eager"


def test_cuda_tensors_take_the_triton_engine_or_eager_with_one_warning() -> None:
    assert engine_of_device("cuda") == "triton"
    reason = why_not("cuda")
    engines._warn_once.cache_clear()  # another test may have met a CUDA tensor before
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            chosen = select("auto", torch.empty(2, 3, device="cuda"))
        assert chosen is (triton if reason is None else eager)
        fp64 = select("auto", torch.empty(2, 3, device="cuda", dtype=torch.float64))
        assert fp64 is eager
    said = [str(warning.message) for warning in caught]
    if reason is not None:
        assert len(said) == 1
        assert reason in said[0]
        assert "serves CUDA tensors" in said[0]
        with pytest.raises(RuntimeError, match=r"engine='triton' is not available: .*'eager'"):
            select("triton", torch.empty(2, 3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"is_available": lambda: False}, "there is no CUDA device"),
        ({"get_device_capability": lambda index: (7, 5)[:2] if index else (9, 0)}, "7.5; 8.0"),
    ],
    ids=["H100", "no card", "an old card beside"],
)
def test_cards(change: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's reason not to serve, on a machine of two cards."""
    cards = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda index: (9, 0),
        "get_device_name": lambda index: "some card",
    }
    for name, value in {**cards, **change}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(triton, "_reach_driver", lambda: None)
    found = triton._card_problem()
    assert found == reason if reason is None else reason in str(found)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in str(triton._card_problem())


@pytest.mark.parametrize("name", ["triton_", "", "CPU", None, 3])
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_loss, token_statistics])
def test_an_unknown_engine_is_refused(function: Any, name: Any) -> None:
    with pytest.raises(ValueError, match=r"engine must be one of auto, .*cpu.*, got ") as error:
        function(torch.randn(2, 3), torch.zeros(2, dtype=torch.long), engine=name)
    assert repr(name) in str(error.value)
    for known in ENGINES:
        assert known in str(error.value)


@pytest.mark.parametrize("device", ["meta", *(["cuda"] if torch.cuda.is_available() else [])])
def test_the_cpu_engine_refuses_other_devices(device: str) -> None:
    x = torch.randn(2, 3, device=device)
    target = torch.zeros(2, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=rf"engine='cpu' does not serve .* on {device}"):
        cross_entropy(x, target, engine="cpu")


def test_the_eager_engine_serves_any_device() -> None:
    """Shapes of a loss on tensors without memory; nothing in it reads a value on the host."""
    x = torch.randn(2, 3, device="meta", requires_grad=True)
    target = torch.zeros(2, dtype=torch.long, device="meta")
    loss = cross_entropy(x, target, label_smoothing=0.1)
    loss.backward()
    assert loss.shape == ()
    assert loss.device.type == "meta"
    assert x.grad is not None
    assert x.grad.shape == x.shape


# In other processes

_LOSS = """
import json, sys, warnings
import torch
import vocab_parallel_ce as v

x, target = torch.randn(6, 40), torch.tensor([0, 1, 2, 39, -100, 5])
report = {"imported": "numba" in sys.modules}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    v.cross_entropy(x, target, engine="eager")
    report["imported by eager"] = "numba" in sys.modules
    report["warned by eager"] = len(caught)
    good = []
    for scale in (1.0, 0.5):
        leaf, other = (x.clone().requires_grad_() for _ in range(2))
        loss = v.cross_entropy(leaf, target, scale=scale)
        loss.backward()
        usual = torch.nn.functional.cross_entropy(other.double() * scale, target)
        usual.backward()
        good.append(abs(loss.item() - usual.item()) < 1e-5)
        good.append((leaf.grad - other.grad).abs().max().item() < 1e-6)
        v.token_statistics(x, target, entropy=True)
    report["good"] = all(good)
    report["warnings"] = [str(w.message) for w in caught if "vocab_parallel_ce" in str(w.message)]
    try:
        v.cross_entropy(x, target, engine="cpu")
        report["engine cpu"] = ""
    except RuntimeError as error:
        report["engine cpu"] = str(error)
print(json.dumps(report))
"""


def _run(*first_on_path: Path, site: Path | None = None, **environment: str) -> dict[str, Any]:
    """Run the script above with these folders before all others on sys.path.

    ``site`` replaces the installed packages.
    """
    path = os.pathsep.join(map(str, (*first_on_path, ROOT, *([site] if site else []))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *(["-S"] if site else []), "-c", _LOSS]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def _package(folder: Path, version: str, code: str, name: str = "numba") -> Path:
    """A folder that holds a package of this name and version."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def _check_fallback(report: dict[str, Any], reason: str) -> None:
    """The loss works on the eager engine, and one warning said why, however many calls."""
    assert report["good"]
    assert report["warned by eager"] == 0
    assert len(report["warnings"]) == 1, report["warnings"]
    assert reason in report["warnings"][0]
    assert "pip install" in report["warnings"][0]
    assert reason in report["engine cpu"]
    assert "engine='eager'" in report["engine cpu"]


def test_with_numba_nothing_is_said_and_nothing_imported_early() -> None:
    """Importing the library, and the eager engine, cost no import of Numba."""
    report = _run()
    assert not report["imported"]
    assert not report["imported by eager"]
    assert report["good"]
    assert report["warnings"] == []
    assert report["engine cpu"] == ""


def test_without_numba(tmp_path: Path) -> None:
    """A site folder that links to everything installed but Numba."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if not entry.name.startswith(("numba", "llvmlite", "__")):
                (tmp_path / entry.name).symlink_to(entry)
    _check_fallback(_run(site=tmp_path), "numba is not installed")


def test_with_an_old_numba(tmp_path: Path) -> None:
    """It is told by its version, as numbers and not as text, and not even imported."""
    code = "raise AssertionError('an old numba was imported')"
    _check_fallback(_run(_package(tmp_path, "0.9.1", code)), "numba 0.9.1 is older than 0.60")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libLLVM is gone')", "libLLVM is gone"),
        ("", "cannot be used here"),
    ],
    ids=["ImportError", "hollow"],
)
def test_with_a_broken_numba(code: str, reason: str, tmp_path: Path) -> None:
    report = _run(_package(tmp_path, "0.68.1", code))
    _check_fallback(report, reason)
    assert "numba 0.68.1 cannot be used here" in report["warnings"][0]


def test_with_numba_switched_off() -> None:
    """Kernels that Python interprets would be a thousand times slower than the eager engine."""
    _check_fallback(_run(NUMBA_DISABLE_JIT="1"), "NUMBA_DISABLE_JIT")


@pytest.mark.parametrize(
    ("version", "code", "reason"),
    [
        ("3.0.0", "raise AssertionError('an old triton was imported')", "is older than 3.1"),
        ("3.7.1", "raise ImportError('libtriton is gone')", "cannot be used here: libtriton"),
    ],
    ids=["old", "broken"],
)
def test_with_another_triton(version: str, code: str, reason: str, tmp_path: Path) -> None:
    path = _package(tmp_path, version, code, "triton")
    script = "from vocab_parallel_ce.engines import why_not; print(why_not('cuda'))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (path, ROOT)))}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"triton {version} {reason}" in done.stdout
