"""Where torch cannot be imported, the package says why in one line, and how to get out.

The failing torch is the real one: a package beside it registers a device backend that breaks as
torch-npu does without CANN. Torch can be imported once in a process, so each case has its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vocab_parallel_ce

REPOSITORY = Path(__file__).resolve().parents[1]
MISSING_LIBRARY = "libhccl.so: cannot open shared object file: No such file or directory"
WAY_OUT = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 or uninstall"


def _python(
    *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    folders = [str(REPOSITORY), *([str(path)] if path else [])]
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def _backend(folder: Path, name: str, error: str) -> Path:
    """A package that registers a device backend whose import raises."""
    info = folder / "broken_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{name} = broken_backend:load\n")
    (folder / "broken_backend.py").write_text(f"raise {error}\n")
    return folder


@pytest.fixture
def without_cann(tmp_path: Path) -> Path:
    return _backend(tmp_path, "torch_npu", f"ImportError({MISSING_LIBRARY!r})")


def test_torch_itself_fails_there(without_cann: Path) -> None:
    """Otherwise the tests below would show nothing."""
    process = _python("-c", "import torch", path=without_cann)
    assert process.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in process.stderr
    assert process.stderr.count("Traceback") > 1


def test_a_command_ends_in_one_line(without_cann: Path) -> None:
    process = _python("-m", "vocab_parallel_ce.launch.train", path=without_cann)
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    for part in ("torch_npu is installed but does not load because CANN is not found",
                 MISSING_LIBRARY, "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
                 f"{WAY_OUT} torch-npu"):  # fmt: skip
        assert part in process.stderr


@pytest.mark.parametrize("site", [[], ["-S"]], ids=["without CANN", "without torch"])
def test_the_package_itself_can_be_imported(without_cann: Path, site: list[str]) -> None:
    code = "import vocab_parallel_ce as v; print(v.__version__, 'cross_entropy' in dir(v))"
    process = _python(*site, "-c", code, path=without_cann)
    assert process.stdout == f"{vocab_parallel_ce.__version__} True\n", process.stderr


def test_an_import_raises_that_line_alone(without_cann: Path) -> None:
    process = _python("-c", "from vocab_parallel_ce import cross_entropy", path=without_cann)
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1  # nothing chained
    assert process.stderr.splitlines()[-1].startswith(
        "ImportError: torch cannot be imported: torch_npu is installed but does not load"
    )


def test_a_second_import_says_the_same(without_cann: Path) -> None:
    code = """
for _ in range(2):
    try:
        from vocab_parallel_ce import cross_entropy
    except ImportError as error:
        print(error)
"""
    first, second = _python("-c", code, path=without_cann).stdout.splitlines()
    assert first == second
    assert "CANN is not found" in first


def test_the_way_out_works(without_cann: Path) -> None:
    code = "import vocab_parallel_ce; print(vocab_parallel_ce.VocabShard.even(8))"
    process = _python("-c", code, path=without_cann, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert process.stdout == "VocabShard(start=0, stop=8, vocab_size=8)\n", process.stderr


def test_another_backend_that_fails_is_named(tmp_path: Path) -> None:
    path = _backend(tmp_path, "torch_xyz", "OSError('version 3 wanted\\nand more')")
    process = _python("-m", "vocab_parallel_ce.launch.train", path=path)
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert (
        "torch_xyz is installed but does not load (version 3 wanted): install the version made "
        f"for your torch; or, to work without it, {WAY_OUT} torch-xyz"
    ) in process.stderr


def test_torch_that_is_not_installed() -> None:
    process = _python("-S", "-m", "vocab_parallel_ce.launch.train")  # -S: no site-packages
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr == (
        "vocab-parallel-ce train: torch is not installed; pip install torch (2.5 or newer)\n"
    )


def test_a_torch_that_is_broken_otherwise_is_not_talked_over(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('half an install')\n")
    process = _python("-c", "from vocab_parallel_ce import VocabShard", path=tmp_path)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "RuntimeError: half an install"
