"""Several losses in place on parts of one tensor: right, or an error that names the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy

from .device import DEVICE, ENGINES

Parts = Callable[[Tensor], Sequence[Tensor]]
PARTS: dict[str, Parts] = {
    "chunk": lambda x: x.chunk(2),
    "split": lambda x: x.split([2, 4]),
    "tensor_split": lambda x: x.tensor_split(3),
    "unbind": lambda x: x.view(2, 3, 8).unbind(0),
    "views of chunks": lambda x: [part.view(-1, 8) for part in x.view(2, 3, 8).chunk(2)],
    "slices": lambda x: (x[:2], x[2:]),
    "rows": lambda x: (x[0], x[1]),
    "columns": lambda x: (x[:, :4], x[:, 4:]),
    "every other row": lambda x: (x[::2], x[1::2]),
    "overlap": lambda x: (x[:4], x[2:]),
    "the same": lambda x: (x, x),
    "whole and part": lambda x: (x.view(6, 8), x[4:]),
}
NAMED = r"(?s)inplace_backward=True.*\.clone\(\).*inplace_backward=False"


def _loss(part: Tensor, engine: str, in_place: bool = True) -> Tensor:
    target = torch.zeros(part.shape[:-1], dtype=torch.int64, device=part.device)
    return cross_entropy(part, target, reduction="sum", inplace_backward=in_place, engine=engine)


def _together(parts: Sequence[Tensor], engine: str) -> None:
    torch.stack([_loss(part, engine) for part in parts]).sum().backward()


def _one_by_one(parts: Sequence[Tensor], engine: str) -> None:
    for part in parts:
        _loss(part, engine).backward(retain_graph=True)


def _forward_first(parts: Sequence[Tensor], engine: str) -> None:
    for loss in [_loss(part, engine) for part in parts]:
        loss.backward(retain_graph=True)


def _mixed(parts: Sequence[Tensor], engine: str) -> None:
    losses = [_loss(part, engine, in_place=i > 0) for i, part in enumerate(parts)]
    torch.stack(losses).sum().backward()


ORDERS = {f.__name__.strip("_"): f for f in (_together, _one_by_one, _forward_first, _mixed)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts", PARTS)
def test_right_or_named(parts: str, order: str, engine: str) -> None:
    leaf = torch.randn(6, 8).to(DEVICE).requires_grad_()
    usual = torch.stack([_loss(part, "eager", False) for part in PARTS[parts](leaf * 1)]).sum()
    (want,) = torch.autograd.grad(usual, leaf)
    message = ""
    try:
        ORDERS[order](PARTS[parts](leaf * 1), engine)
    except (RuntimeError, ValueError) as problem:
        message = str(problem)
    if message:
        assert re.search(NAMED, message)
    else:
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parts", ["slices", "rows", "columns"])
def test_one_after_the_other_is_right(parts: str, engine: str) -> None:
    """Parts that share no element, each backward before the next forward: nothing is lost."""
    leaf = torch.randn(6, 8).to(DEVICE).requires_grad_()
    _one_by_one(PARTS[parts](leaf * 1), engine)
    usual = torch.stack([_loss(part, "eager", False) for part in PARTS[parts](leaf * 1)]).sum()
    (want,) = torch.autograd.grad(usual, leaf)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_written_anew_is_logits_again(engine: str) -> None:
    leaf = torch.randn(6, 8).to(DEVICE).requires_grad_()
    logits = leaf * 1
    _loss(logits, engine).backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"holds the gradient of an earlier loss.*inplace_back"):
        _loss(logits, engine)
    again = logits.mul_(0)
    _loss(again, engine).backward()


def test_a_part_with_memory_of_its_own_is_right() -> None:
    """The way out that the message names."""
    leaf = torch.randn(6, 8).to(DEVICE).requires_grad_()
    _together([part.clone() for part in (leaf * 1).chunk(2)], "auto")
    (want,) = torch.autograd.grad(_loss(leaf * 1, "auto"), leaf)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want)
