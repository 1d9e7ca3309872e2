"""The archives that `python -m build` makes: complete, without doubles, and they install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

import vocab_parallel_ce

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def _run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist, as an index would."""
    pytest.importorskip("build")
    # Of all workers of pytest one builds: setuptools writes beside the sources.
    alone = os.environ.get("PYTEST_XDIST_WORKER") is None
    base = tmp_path_factory.getbasetemp()
    out = (base if alone else base.parent) / "dist"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            # Without isolation nothing is downloaded: the `test` extra brings setuptools.
            _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_module_once(archives: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(archives[0]).namelist()
    assert len(names) == len(set(names))
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        "vocab_parallel_ce",
        f"vocab_parallel_ce-{vocab_parallel_ce.__version__}.dist-info",
    }
    wanted = set()
    for top, place in (
        ("vocab_parallel_ce", "vocab_parallel_ce"),
        ("parallel", "vocab_parallel_ce/parallel"),
        ("launch", "vocab_parallel_ce/launch"),
    ):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT / top)
            if top != "vocab_parallel_ce" or inside.parts[0] not in ("parallel", "launch"):
                wanted.add(f"{place}/{inside}")
    modules = {name for name in names if name.endswith(".py")}
    assert modules == wanted  # a folder that pyproject.toml does not name would be missing
    assert "vocab_parallel_ce/py.typed" in names
    assert "vocab_parallel_ce/launch/ascend/run.sh" in names  # `vocab-parallel-ce ascend` runs it


def test_the_sdist_holds_every_tracked_file(archives: tuple[Path, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: there is no list of tracked files")
    with tarfile.open(archives[1]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    links = {"vocab_parallel_ce/launch", "vocab_parallel_ce/parallel"}  # folders there
    tracked = set(_run("git", "ls-files").splitlines()) - links
    assert not tracked - inside


@pytest.mark.parametrize("kind", [0, 1], ids=["wheel", "sdist"])
def test_an_archive_installs_into_a_bare_environment(
    archives: tuple[Path, Path], kind: int, tmp_path: Path
) -> None:
    """Without torch: the package says its version, and what is missing in one line."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    archive = archives[kind]
    if kind == 1:  # pip builds a wheel from it, here, where setuptools is
        offline = ("--no-deps", "--no-build-isolation", "--no-index")
        wheels = ("--wheel-dir", str(tmp_path))
        _run(sys.executable, "-m", "pip", "wheel", *offline, *wheels, str(archive))
        (archive,) = tmp_path.glob("*.whl")
    _run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(archive))
    code = "import vocab_parallel_ce as v; print(v.__version__, v.__file__)"
    version, file = _run(python, "-c", code, cwd=tmp_path).split()
    assert version == vocab_parallel_ce.__version__
    assert file.startswith(str(tmp_path))
    done = subprocess.run(
        [python, "-c", "from vocab_parallel_ce import cross_entropy"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert "torch is not installed; pip install torch" in done.stderr.splitlines()[-1]
    command = str(Path(python).with_name("vocab-parallel-ce"))
    assert vocab_parallel_ce.__version__ in _run(command, "--version", cwd=tmp_path)


def test_versions_agree() -> None:
    """Of the package, the citation and the changelog."""
    version = vocab_parallel_ce.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] in (version, "Unreleased")
