"""The public face: names, signatures and documentation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

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


# Documentation


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
