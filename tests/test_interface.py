"""The public face: names, signatures, documentation, shapes and dtypes, and who imports whom."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vocab_parallel_ce
from vocab_parallel_ce import (
    CrossEntropyLossOutput,
    TokenStatistics,
    VocabParallelCrossEntropyLoss,
    VocabParallelLinearCrossEntropyLoss,
    VocabShard,
    cross_entropy,
    cross_entropy_loss,
    linear_cross_entropy,
    linear_token_statistics,
    token_statistics,
)

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

REQUIRED = inspect.Parameter.empty
LOSS = (
    ("input", REQUIRED),
    ("target", REQUIRED),
    ("weight", None),
    ("reduction", "mean"),
    ("ignore_index", -100),
    ("label_smoothing", 0.0),
)
GROUPED = {"group": None, "shard": None, "inplace_backward": False, "finite_logits": False}
PLACED = {"group": None, "shard": None}
LINEAR = (("input", REQUIRED), ("linear_weight", REQUIRED), ("target", REQUIRED))
LINEAR_RUN = {
    "hidden_gradient": "summed",
    "sequence_parallel": False,
    "scratch_mib": None,
    "drop_ignored": False,
}
RUN = {"scale": 1.0, "softcap": None, "engine": "auto", "collective": "auto", "check": None}
POSITIONAL: dict[Callable[..., Any], tuple[tuple[str, object], ...]] = {
    cross_entropy: LOSS,
    cross_entropy_loss: (*LOSS, ("lse_square_scale_for_zloss", 0.0), ("return_zloss", False)),
    token_statistics: (LOSS[0], ("target", None)),
    linear_cross_entropy: LINEAR,
    linear_token_statistics: (*LINEAR[:2], ("target", None)),
}
KEYWORDS: dict[Callable[..., Any], dict[str, object]] = {
    cross_entropy: {
        "lse_square_scale": 0.0,
        "return_zloss": False,
        **GROUPED,
        "normalizer": None,
        **RUN,
    },
    cross_entropy_loss: {"return_log_prob": True, **GROUPED, "normalizer": None, **RUN},
    token_statistics: {
        "entropy": False,
        "argmax": False,
        "sum_p_squared": False,
        "selected": None,
        "ignore_index": -100,
        **GROUPED,
        **RUN,
    },
    linear_cross_entropy: {
        "linear_bias": None,
        **dict(LOSS[2:]),
        "lse_square_scale": 0.0,
        "return_zloss": False,
        **PLACED,
        "normalizer": None,
        **RUN,
        "gradient": "auto",
        **LINEAR_RUN,
    },
    linear_token_statistics: {
        "linear_bias": None,
        "entropy": False,
        "argmax": False,
        "sum_p_squared": False,
        "selected": None,
        "ignore_index": -100,
        **PLACED,
        **RUN,
        **LINEAR_RUN,
    },
}
FUNCTIONS = tuple(POSITIONAL)


def _batch(*lead: int, classes: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(*lead, classes).to(dtype), torch.randint(classes, lead)


# Names and signatures


def test_public_names() -> None:
    assert sorted(vocab_parallel_ce.__all__) == [
        "CrossEntropyLossOutput",
        "TokenStatistics",
        "VocabParallelCrossEntropyLoss",
        "VocabParallelLinearCrossEntropyLoss",
        "VocabShard",
        "__version__",
        "cross_entropy",
        "cross_entropy_loss",
        "linear_cross_entropy",
        "linear_token_statistics",
        "token_statistics",
    ]
    assert not hasattr(vocab_parallel_ce, "no_such_name")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_signature(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(positional) + len(keywords) == len(parameters)
    assert tuple((p.name, p.default) for p in positional) == POSITIONAL[function]
    assert {p.name: p.default for p in keywords} == KEYWORDS[function]


def test_names_and_defaults_are_pytorchs() -> None:
    """The order is the operator's, as ``POSITIONAL`` has it."""
    torchs = inspect.signature(nn.functional.cross_entropy).parameters
    kept = {n: p.default for n, p in torchs.items() if n not in ("size_average", "reduce")}
    assert dict(LOSS) == kept


def test_module_takes_the_functions_arguments() -> None:
    """All but the batch itself, in the function's order."""
    function = inspect.signature(cross_entropy).parameters
    module = inspect.signature(VocabParallelCrossEntropyLoss).parameters
    batch = ("input", "target", "normalizer")
    expected = [(p.name, p.kind, p.default) for p in function.values() if p.name not in batch]
    assert [(p.name, p.kind, p.default) for p in module.values()] == expected
    forward = inspect.signature(VocabParallelCrossEntropyLoss.forward).parameters
    assert list(forward) == ["self", *batch]


def test_linear_module_takes_the_functions_arguments() -> None:
    function = inspect.signature(linear_cross_entropy).parameters
    module = inspect.signature(VocabParallelLinearCrossEntropyLoss).parameters
    batch = ("input", "linear_weight", "target", "linear_bias", "normalizer")
    expected = [(p.name, p.kind, p.default) for p in function.values() if p.name not in batch]
    assert [(p.name, p.kind, p.default) for p in module.values()] == expected
    forward = inspect.signature(VocabParallelLinearCrossEntropyLoss.forward).parameters
    assert list(forward) == ["self", *batch]


def test_linear_names_are_torchs() -> None:
    if not hasattr(nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    torchs = list(inspect.signature(nn.functional.linear_cross_entropy).parameters)
    ours = list(inspect.signature(linear_cross_entropy).parameters)
    assert ours[: len(torchs) - 1] == torchs[:-1]  # all but its options


def test_result_fields() -> None:
    assert CrossEntropyLossOutput._fields == ("loss", "log_prob", "zloss", "lse_for_zloss")
    assert TokenStatistics._fields == (
        "log_prob", "lse", "entropy", "argmax", "sum_p_squared", "selected_log_prob",
    )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in vocab_parallel_ce.__all__ if n != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    public = getattr(vocab_parallel_ce, name)
    # A NamedTuple or dataclass without a docstring gets one made of its signature.
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}(")
    if inspect.isclass(public):
        for attribute, value in vars(public).items():
            if not attribute.startswith("_") and (inspect.isroutine(value)):
                assert inspect.getdoc(value), f"{name}.{attribute} has no docstring"


SECTIONS = ("Args:", "Returns:", "Raises:", "Communication:", "Example:")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_argument_is_documented_where_it_is(function: Callable[..., Any]) -> None:
    """The docstring of each function stands for itself: every argument, and every section."""
    told = inspect.getdoc(function) or ""
    for section in SECTIONS:
        assert f"\n{section}\n" in told, f"{function.__name__} has no section {section}"
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in told, f"{function.__name__}({name}=) is not documented"


@pytest.mark.parametrize(
    "public", [VocabParallelCrossEntropyLoss, VocabParallelLinearCrossEntropyLoss, VocabShard]
)
def test_every_argument_of_a_class_is_documented(public: type) -> None:
    told = inspect.getdoc(public) or ""
    for name in inspect.signature(public).parameters:
        assert f"\n    {name}: " in told, f"{public.__name__}({name}=) is not documented"
    assert "\nExample:\n" in told


# Shapes and dtypes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_cross_entropy_result(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = _batch(*lead, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction, shape in (("none", lead), ("sum", ()), ("mean", ())):
        loss = cross_entropy(x, target, reduction=reduction)
        assert loss.shape == shape
        assert loss.dtype == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_operator_result(lead: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    """Everything in the input's dtype; loss [N] or [1]; what is not asked for is empty."""
    x, target = _batch(*lead, dtype=dtype)
    shape = lead if reduction == "none" else (1,)

    plain = cross_entropy_loss(x, target, reduction=reduction)
    assert plain.loss.shape == shape
    assert plain.log_prob.shape == x.shape
    assert plain.zloss.shape == plain.lse_for_zloss.shape == (0,)

    full = cross_entropy_loss(
        x, target, None, reduction, lse_square_scale_for_zloss=1e-3, return_zloss=True
    )
    assert full.zloss.shape == full.loss.shape == shape
    assert full.lse_for_zloss.shape == lead
    for value in (*plain, *full):
        assert value.dtype == dtype

    # The scale alone returns lse; the flag alone returns a z-loss of 0.
    assert cross_entropy_loss(x, target, lse_square_scale_for_zloss=1e-3).zloss.shape == (0,)
    flag = cross_entropy_loss(x, target, None, reduction, return_zloss=True)
    assert flag.zloss.shape == shape
    assert flag.lse_for_zloss.shape == (0,)
    assert torch.equal(flag.zloss, torch.zeros(shape, dtype=dtype))

    assert cross_entropy_loss(x, target, return_log_prob=False).log_prob.shape == (0,)


def test_operator_gradients_flow_where_the_operators_do() -> None:
    x, target = _batch(5)
    out = cross_entropy_loss(
        x.requires_grad_(), target, lse_square_scale_for_zloss=1e-3, return_zloss=True
    )
    assert [value.requires_grad for value in out] == [True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_token_statistics_result(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x, target = _batch(*lead, dtype=dtype)
    x.requires_grad_()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    few = token_statistics(x, target)
    assert few.entropy is None
    assert few.argmax is None
    full = token_statistics(x, target, entropy=True, argmax=True)
    assert full.entropy is not None
    assert full.argmax is not None
    for value in (few.log_prob, few.lse, full.log_prob, full.lse, full.entropy):
        assert value.shape == lead
        assert value.dtype == expected
        assert value.requires_grad
    assert full.argmax.shape == lead
    assert full.argmax.dtype == torch.int64
    assert not full.argmax.requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_target_dtypes(dtype: torch.dtype) -> None:
    x, target = _batch(6)
    assert torch.equal(cross_entropy(x, target.to(dtype)), cross_entropy(x, target))


# The module


def test_module_equals_function() -> None:
    x, target = _batch(7)
    target[2] = 3
    weight = torch.rand(11)
    options: dict[str, Any] = {
        "reduction": "sum",
        "ignore_index": 3,
        "label_smoothing": 0.1,
        "lse_square_scale": 1e-3,
        "shard": VocabShard(0, 11, 11),
        "scale": 0.5,
        "engine": "eager",
        "collective": "all_reduce",
        "check": True,
        "inplace_backward": True,
    }
    module = VocabParallelCrossEntropyLoss(weight, **options)
    results = []
    function: Any = lambda x, t: cross_entropy(x, t, weight, **options)  # noqa: E731
    for loss in (module, function):
        leaf = x.clone().requires_grad_()
        value: Any = loss(leaf * 1, target)
        value.backward()
        assert leaf.grad is not None
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    # No option is dropped on the way: each one alone, away from its default, shows in the module.
    for name, value in options.items():
        assert getattr(module, name) == value


def test_module_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the parameter of the same name, and the normalizer of the call with them."""
    seen: dict[str, object] = {}

    def record(*args: object, **kwargs: object) -> Tensor:
        seen.update(inspect.signature(cross_entropy).bind(*args, **kwargs).arguments)
        return torch.zeros(())

    monkeypatch.setattr("vocab_parallel_ce.modules.cross_entropy", record)
    names = list(inspect.signature(VocabParallelCrossEntropyLoss).parameters)
    given: dict[str, Any] = {name: object() for name in names if name != "weight"}
    weight = torch.rand(11)
    x, target = _batch(3)
    VocabParallelCrossEntropyLoss(weight, **given)(x, target, normalizer=5.0)
    assert seen.pop("weight") is weight
    assert seen.pop("input") is x
    assert seen.pop("target") is target
    assert seen.pop("normalizer") == 5.0
    assert seen == given


def test_module_keeps_its_weight() -> None:
    module = VocabParallelCrossEntropyLoss(torch.rand(4), label_smoothing=0.1)
    assert list(module.state_dict()) == ["weight"]
    assert module.double().weight is not None
    assert module.weight is not None
    assert module.weight.dtype == torch.float64
    assert not list(module.parameters())
    assert "label_smoothing=0.1" in repr(module)


def test_module_takes_a_normalizer_with_every_call() -> None:
    x, target = _batch(5)
    module = VocabParallelCrossEntropyLoss()
    assert torch.equal(module(x, target, normalizer=3.0), cross_entropy(x, target, normalizer=3.0))


# Who imports whom


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
