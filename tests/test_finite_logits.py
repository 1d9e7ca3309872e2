"""The promise of finite logits reaches the engine from every public function, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import (
    VocabParallelCrossEntropyLoss,
    cross_entropy,
    cross_entropy_loss,
    token_statistics,
)
from vocab_parallel_ce.engines import eager
from vocab_parallel_ce.parallel.megatron import MegatronOptions, cross_entropy_target

EAGER: dict[str, Any] = {"engine": "eager"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the eager engine's ``gradient`` is told, call by call."""
    heard: list[bool] = []
    real = eager.gradient

    def gradient(*arguments: Any) -> None:
        heard.append(arguments[9])
        real(*arguments)

    monkeypatch.setattr(eager, "gradient", gradient)
    return heard


def _compiled(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = cross_entropy(x, y, **options)
        return out

    out: Tensor = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, y)
    return out


class OneRank:
    """A group as Megatron knows them; without one it would take what an earlier test has left."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


ONE_RANK: Any = OneRank()

CALLS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "in place": lambda x, y, **o: cross_entropy(x * 1, y, inplace_backward=True, **o),
    "compiled": _compiled,
    "compiled in place": lambda x, y, **o: _compiled(x * 1, y, inplace_backward=True, **o),
    "cross_entropy_loss": lambda x, y, **o: cross_entropy_loss(x, y, **o).loss,
    "token_statistics": lambda x, y, **o: token_statistics(x, y, **o).log_prob.sum(),
    "module": lambda x, y, **o: VocabParallelCrossEntropyLoss(**o)(x, y),
    "Megatron": lambda x, y, **o: cross_entropy_target(
        x, y, ONE_RANK, options=MegatronOptions(**o)
    ).sum(),
}


@pytest.mark.parametrize("call", CALLS)
def test_it_reaches_the_engine(call: str, told: list[bool]) -> None:
    """And changes no number; nothing is promised by default."""
    y = torch.tensor([1, 0, -100])
    gradients: list[Tensor] = []
    for options in ({}, {"finite_logits": True}):
        x = torch.arange(12.0).view(3, 4).requires_grad_()
        loss = CALLS[call](x, y, **EAGER, **options)
        gradients += torch.autograd.grad(loss, x)
    assert told == [False, True]
    assert torch.equal(*gradients)
