"""Who else reads logits that a backward overwrites; and without ``inplace_backward`` nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics

from .device import DEVICE, DTYPES, ENGINES

# Other readers of the same logits
from .head_logits import (
    CLASSES,
    LAYOUTS,
    Layout,
    assert_same,
    identity,
    made_of,
    random_leaf,
    random_target,
)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_version_counter_rises(engine: str) -> None:
    logits = made_of(random_leaf(4, CLASSES))
    loss = cross_entropy(logits, random_target(4), inplace_backward=True, engine=engine)
    assert logits._version == 0
    loss.backward()
    assert logits._version > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "view", [identity, lambda x: x.view(-1, CLASSES), lambda x: x[:, :-1]], ids=["", "view", "cut"]
)
def test_a_producer_that_saved_the_logits_raises(view: Layout, engine: str) -> None:
    """tanh's gradient reads its own output: it must not read ours instead."""
    logits = random_leaf(2, 4, CLASSES).tanh()
    x = view(logits)
    loss = cross_entropy(x, random_target(*x.shape[:-1]), inplace_backward=True, engine=engine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_that_runs_later_in_backward_raises(engine: str) -> None:
    logits, target = made_of(random_leaf(4, CLASSES)), random_target(4)
    other = logits.square().sum()  # its backward runs after that of the younger loss
    loss = cross_entropy(logits, target, inplace_backward=True, engine=engine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_that_runs_earlier_in_backward_is_right(engine: str) -> None:
    leaf, target = random_leaf(4, CLASSES), random_target(4)
    grads: list[Tensor | None] = []
    for in_place in (False, True):
        logits = made_of(leaf)
        loss = cross_entropy(logits, target, inplace_backward=in_place, engine=engine)
        grads += torch.autograd.grad(loss + logits.square().sum(), leaf)
    assert_same(grads)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first", ["in place", "out of place"])
def test_two_losses_of_the_same_logits(first: str, engine: str) -> None:
    """Whatever the order, the one that finds the logits overwritten raises."""
    logits, target = made_of(random_leaf(4, CLASSES)), random_target(4)
    order = (True, False) if first == "in place" else (False, True)
    losses = [
        cross_entropy(logits, target, inplace_backward=in_place, engine=engine)
        for in_place in order
    ]
    losses[order.index(True)].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[order.index(False)].backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_reads_see_the_gradient(engine: str) -> None:
    """As documented: a metric that reads the logits after backward reads their gradient (B16)."""
    leaf, target = random_leaf(2, 4, CLASSES), random_target(8)
    logits = made_of(leaf)
    plain = logits.detach()
    cross_entropy(logits.view(-1, CLASSES), target, inplace_backward=True, engine=engine).backward()
    assert leaf.grad is not None
    assert torch.equal(plain, leaf.grad)
    assert torch.equal(logits, leaf.grad)


# Inputs are never modified


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["3-D", "shifted", "columns cut", "transposed"])
def test_inputs_are_not_modified(layout: str, dtype: torch.dtype, engine: str) -> None:
    """B9, B10: bit for bit, memory around the logits included, forward and backward.

    With ``inplace_backward`` this holds until backward.
    """
    memory = random_leaf(2, 6, CLASSES + 1, dtype=dtype)
    with torch.no_grad():
        memory[0, 1] = -torch.inf
        memory[1, 1, 3] = torch.nan
    logits = LAYOUTS[layout](memory)
    target = random_target(*logits.shape[:-1], classes=2)
    weight = torch.rand(logits.shape[-1]).to(DEVICE)
    inputs = (memory, target, weight)
    before = [value.detach().clone() for value in inputs]

    def unchanged() -> bool:
        pairs = zip(inputs, before, strict=True)
        return all(torch.equal(a.detach().view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)

    options: dict[str, Any] = {"label_smoothing": 0.1, "engine": engine}
    loss = cross_entropy(logits, target, weight, lse_square_scale=1e-3, **options)
    assert unchanged()
    loss.backward(retain_graph=True)
    loss.backward()
    assert unchanged()

    out = cross_entropy_loss(
        logits, target, weight, lse_square_scale_for_zloss=1e-3, return_zloss=True, **options
    )
    (out.loss + out.zloss).backward()
    stats = token_statistics(logits, target, entropy=True, argmax=True, engine=engine)
    assert stats.entropy is not None
    (stats.log_prob + stats.entropy + stats.lse).sum().backward()
    assert unchanged()

    made = made_of(memory)
    seen = made.detach().clone()
    cross_entropy(LAYOUTS[layout](made), target, weight, inplace_backward=True, **options)
    assert torch.equal(made.detach().view(torch.uint8), seen.view(torch.uint8))
    assert unchanged()
