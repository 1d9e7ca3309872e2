"""Every public name says what it takes and gives, and its example runs as it is printed."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

from vocab_parallel_ce import testing
from vocab_parallel_ce.testing import engine

PUBLIC = {name: getattr(testing, name) for name in testing.__all__ if name != "KINDS"}
PUBLIC |= {name: getattr(engine, name) for name in engine.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
NOT_RUN = {"move"}  # to a device that is not here


@pytest.mark.parametrize("name", PUBLIC)
def test_it_is_documented(name: str) -> None:
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    assert not doc.startswith(f"{name}(")  # what dataclass writes by itself


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_explained(name: str) -> None:
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in doc, f"{name}({argument}=) is not explained"
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert "Returns:" in doc or len(doc.splitlines()) < 12, (
            f"{name} does not say what it returns"
        )


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in NOT_RUN])
def test_the_example_runs(name: str) -> None:
    value = PUBLIC[name]
    names = vars(testing) | vars(engine) | {"torch": torch}
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in found:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
