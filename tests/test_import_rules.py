"""Who imports whom: launch, parallel, the loss, its engines and its testing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _imports(path: Path, package: str) -> Iterator[str]:
    """Absolute names of all modules that a file imports, ``import_module`` calls included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*above, *filter(None, [node.module])]) if node.level else node.module
            assert base
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = _literal_head(node.args[0])
            if name:
                yield package + name if name.startswith(".") else name


def _literal_head(argument: ast.expr) -> str:
    """A module's name as written; of an f-string the package in front of what is filled in.

    Empty for a name that is computed.
    """
    if isinstance(argument, ast.JoinedStr):
        package, _, _ = ast.literal_eval(argument.values[0]).rpartition(".")
        return str(package)
    return str(argument.value) if isinstance(argument, ast.Constant) else ""


def _all_imports(folder: str, package: str) -> Iterator[tuple[str, str]]:
    """Of every Python file in ``folder`` and in the folders below it, not through links."""
    linked = ROOT / "vocab_parallel_ce/launch", ROOT / "vocab_parallel_ce/parallel"
    files = [
        path
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(path.is_relative_to(link) for link in linked)
    ]
    assert files, f"{folder} holds no Python files"
    for path in files:
        parts = path.parent.relative_to(ROOT / folder).parts
        for name in _imports(path, ".".join([package, *parts])):
            yield str(path.relative_to(ROOT)), name


def _under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


LAUNCH, PARALLEL = "vocab_parallel_ce.launch", "vocab_parallel_ce.parallel"


@pytest.mark.parametrize(
    ("folder", "package", "forbidden"),
    [
        ("vocab_parallel_ce", "vocab_parallel_ce", (LAUNCH, PARALLEL, "launch", "parallel")),
        ("parallel", PARALLEL, (LAUNCH, "launch", "parallel")),
        ("launch", LAUNCH, ("launch", "parallel")),
    ],
)
def test_layers_import_downwards_only(
    folder: str, package: str, forbidden: tuple[str, ...]
) -> None:
    """launch -> parallel -> the loss; ``launch`` and ``parallel`` only by their full names."""
    wrong = [
        f"{path} imports {name}"
        for path, name in _all_imports(folder, package)
        if any(_under(name, other) for other in forbidden)
    ]
    assert not wrong


TESTING = "vocab_parallel_ce.testing"


def test_the_library_does_not_import_its_testing() -> None:
    wrong = [
        f"{path} imports {name}"
        for folder, package in (("vocab_parallel_ce", "vocab_parallel_ce"), ("parallel", PARALLEL))
        for path, name in _all_imports(folder, package)
        if _under(name, TESTING) and not path.startswith("vocab_parallel_ce/testing/")
    ]
    assert not wrong


def test_testing_needs_torch_and_the_contract_alone() -> None:
    """No test framework, nothing above it, and no engine or loss: those are what it judges."""
    allowed = ("torch", TESTING, "vocab_parallel_ce.engines.contract", "vocab_parallel_ce.shard")
    wrong = [
        f"{path} imports {name}"
        for path, name in _all_imports("vocab_parallel_ce/testing", TESTING)
        if not any(_under(name, other) for other in allowed)
        and name.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong


def test_no_engine_imports_another() -> None:
    """An engine is a file or a folder; they share the contract alone."""
    package = "vocab_parallel_ce.engines"
    folder = Path("vocab_parallel_ce/engines")
    seen = set()
    for file, name in _all_imports(str(folder), package):
        engine = Path(file).relative_to(folder).parts[0].removesuffix(".py")
        seen.add(engine)
        if engine == "__init__" or not _under(name, "vocab_parallel_ce"):
            continue
        common = ("vocab_parallel_ce.switches", "vocab_parallel_ce.views")  # variables; memory
        words = (f"{package}.contract", *common)
        allowed = name == package or any(_under(name, word) for word in words)
        own = engine != "contract" and _under(name, f"{package}.{engine}")
        assert allowed or own, f"{file} imports {name}: an engine may import the contract"
    assert {"cpu", "eager", "npu", "triton"} <= seen


def test_the_import_reader_sees_every_form(tmp_path: Path) -> None:
    """The two tests above can fail: every way to import something is seen."""
    file = tmp_path / "some.py"
    file.write_text(
        "import a.b\nfrom c import d\nfrom .e import f\nfrom .. import g\n"
        "def late():\n    from . import h\n    importlib.import_module('.i', __package__)\n"
        "    importlib.import_module(f'j.k.{late}')\n"
    )
    seen = set(_imports(file, "p.q"))
    assert {"a.b", "c.d", "p.q.e", "p.g", "p.q.h", "p.q.i", "j.k"} <= seen
