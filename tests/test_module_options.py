"""The module takes what the function takes, hands it on, and keeps its weight."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import VocabParallelCrossEntropyLoss, VocabShard, cross_entropy


def _batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 11), torch.randint(11, (rows,))


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
