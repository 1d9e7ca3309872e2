"""In-place backward: the same gradient in the logits' own memory, whatever their layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import assert_close

from .cases import expected
from .device import DEVICE, DTYPES, ENGINES
from .head_logits import CLASSES, LAYOUTS, OPTIONS, assert_same, made_of, random_leaf, random_target


def _address_of_gradient(x: Tensor) -> list[int]:
    """Filled by backward with where the gradient of ``x`` lies."""
    seen: list[int] = []
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))
    return seen


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, options: str, engine: str) -> None:
    """Any strides: the loss and gradient are right, and the same in place, where they belong."""
    leaf = random_leaf(2, 6, CLASSES + 1)
    target = random_target(*LAYOUTS[layout](leaf).shape[:-1], classes=2)
    results = []
    for in_place in (False, True):
        logits = LAYOUTS[layout](made_of(leaf))
        address = _address_of_gradient(logits)
        loss = cross_entropy(
            logits,
            target,
            reduction="sum",
            inplace_backward=in_place,
            engine=engine,
            **OPTIONS[options],
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        if logits.numel():
            assert (address == [logits.data_ptr()]) == in_place
        results.append((loss.detach(), LAYOUTS[layout](grad)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    want = expected(LAYOUTS[layout](leaf), target, reduction="sum", **OPTIONS[options])
    assert_close(
        results[0][0], want.exact.loss, want.naive.loss, "loss", rows_error=want.rows_error
    )
    assert_close(results[0][1], *want.gradients(lambda outcome: outcome.loss), "gradient")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_equals_out_of_place(
    reduction: str, options: str, weighted: bool, dtype: torch.dtype, engine: str
) -> None:
    """Bit for bit, at the logits' own address."""
    leaf, target = random_leaf(7, CLASSES, dtype=dtype), random_target(7)
    weight = torch.rand(CLASSES).to(DEVICE) if weighted else None
    grads: list[Tensor | None] = []
    for in_place in (False, True):
        leaf.grad = None
        logits = made_of(leaf)
        address = _address_of_gradient(logits)
        loss = cross_entropy(
            logits,
            target,
            weight,
            reduction,
            inplace_backward=in_place,
            engine=engine,
            **OPTIONS[options],
        )
        upstream = torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype).view(loss.shape)
        loss.backward(upstream.to(DEVICE))
        assert (address == [logits.data_ptr()]) == in_place
        grads.append(leaf.grad)
    assert_same(grads)
    assert grads[0] is not None
    assert bool(grads[0].any())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_other_functions_in_place(dtype: torch.dtype, engine: str) -> None:
    """Entropy's gradient, and a z-loss beside a log_prob that must survive."""
    leaf, target = random_leaf(7, CLASSES, dtype=dtype), random_target(7)
    grads: list[Tensor | None] = []
    for in_place in (False, True):
        leaf.grad = None
        stats = token_statistics(
            made_of(leaf), target, entropy=True, inplace_backward=in_place, engine=engine
        )
        assert stats.entropy is not None
        (stats.log_prob + 0.5 * stats.entropy - 0.25 * stats.lse).sum().backward()
        out = cross_entropy_loss(
            made_of(leaf),
            target,
            lse_square_scale_for_zloss=1e-3,
            return_zloss=True,
            inplace_backward=in_place,
            engine=engine,
        )
        before = out.log_prob.clone()
        (out.loss + 2 * out.zloss).backward()
        assert torch.equal(out.log_prob, before)
        grads.append(leaf.grad)
    assert_same(grads)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_gets_exactly_zero(dtype: torch.dtype, in_place: bool, engine: str) -> None:
    """Whatever the padding columns hold, they are not read and their gradient is 0."""
    size = CLASSES - 5
    leaf, target = random_leaf(7, CLASSES, dtype=dtype), random_target(7, classes=size)
    zeros = leaf.detach().clone()  # not without padding: bits may depend on where a row begins
    zeros[:, size:] = 0
    with torch.no_grad():
        leaf[:, size:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e4, 0.0], dtype=dtype)
    results = []
    for padded in (leaf, zeros.requires_grad_()):
        loss = cross_entropy(
            made_of(padded),
            target,
            shard=VocabShard(0, size, size),
            inplace_backward=in_place,
            engine=engine,
        )
        results.append((loss, *torch.autograd.grad(loss, padded)))
    (loss, grad), (usual, wanted) = results
    assert torch.equal(loss, usual)
    assert torch.equal(grad, wanted)
    assert int(grad[:, size:].count_nonzero()) == 0
    assert int(grad[:, :size].count_nonzero()) > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", ["shifted", "columns cut", "every other row", "1-D"])
def test_in_place_writes_the_logits_only(layout: str, engine: str) -> None:
    """Memory between and around the logits of a view is left alone."""
    leaf = random_leaf(2, 6, CLASSES + 1)
    memory = made_of(leaf)
    logits = LAYOUTS[layout](memory)
    target = random_target(*logits.shape[:-1])
    loss = cross_entropy(logits, target, reduction="sum", inplace_backward=True, engine=engine)
    inside = torch.zeros_like(memory.detach(), dtype=torch.bool)
    LAYOUTS[layout](inside).fill_(True)
    before = memory.detach().clone()
    loss.backward()
    after = memory.detach()
    assert torch.equal(after[~inside], before[~inside])
    assert not torch.equal(after[inside], before[inside])
