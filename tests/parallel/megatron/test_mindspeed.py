"""Beside MindSpeed, by an imitation of what it replaces in torch and in Megatron.

Its sources are not here: what they do was read at Ascend/MindSpeed@0041b91 and @2435777, in
patch_utils.py (how a patch is put in and taken out) and features_manager/megatron_basic/
requirements_basic.py (what is replaced in torch). With its own code it was run once, at 028de58.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, token_statistics
from vocab_parallel_ce.parallel.megatron import install

SEQUENCE, BATCH, COLUMNS, CLASSES = 6, 4, 12, 10  # two columns are padding
METHOD = "calculate_predicted_logits"


# What it replaces


def view_of_a_copy(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In the place of torch.Tensor.view: what is not contiguous is copied first."""

    def view(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return real(tensor if tensor.is_contiguous() else tensor.contiguous(), *args, **kwargs)

    return view


class MindSpeedPatch:
    """One entry of its table: put everywhere where the original stands, and taken out again."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self.owner, self.name, self.new = owner, name, new
        self.original = getattr(owner, name)

    def _exchange(self, old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, self.name, None) is old:
                setattr(module, self.name, new)

    def apply(self) -> None:
        standing = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.new)
        self._exchange(standing, self.new)

    def remove(self) -> None:
        setattr(self.owner, self.name, self.original)
        self._exchange(self.new, self.original)


def _patches() -> list[MindSpeedPatch]:
    """The method below Megatron's loss, torch.Tensor.view, and a wrapper around all_reduce."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Theirs

    method, all_reduce = getattr(Theirs, METHOD), dist.all_reduce

    def predicted(*args: Any) -> Any:
        return method(*args)

    def reduced(*args: Any, **kwargs: Any) -> Any:
        return all_reduce(*args, **kwargs)

    return [
        MindSpeedPatch(Theirs, METHOD, staticmethod(predicted)),
        MindSpeedPatch(torch.Tensor, "view", view_of_a_copy(torch.Tensor.view)),
        MindSpeedPatch(dist, "all_reduce", reduced),
    ]


@contextmanager
def mindspeed() -> Iterator[Callable[[], None]]:
    """Patched while the block lasts; yields its repatch(), which takes all out and puts it in."""
    patches = _patches()

    def repatch() -> None:
        for patch in patches:
            patch.remove()
        for patch in patches:
            patch.apply()

    for patch in patches:
        patch.apply()
    try:
        yield repatch
    finally:
        for patch in patches:
            patch.remove()


# Views


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x[..., :CLASSES].contiguous(),
    "padded": lambda x: x[..., :CLASSES],
    "turned": lambda x: x.transpose(0, 1),
    "turned and padded": lambda x: x.transpose(0, 1)[..., :CLASSES],
    "every second row": lambda x: x[::2],
}


def _gradient(logits: Tensor, target: Tensor, inplace: bool, engine: str) -> tuple[Tensor, Tensor]:
    shard = VocabShard(0, CLASSES, CLASSES)
    loss = cross_entropy(
        logits, target, reduction="sum", shard=shard, inplace_backward=inplace, engine=engine
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


@pytest.mark.parametrize("engine", ["cpu", "eager"])
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_reaches_the_logits(layout: str, inplace: bool, engine: str) -> None:
    """Where Tensor.view copies: what is written into a copy would be lost, and nobody would say."""
    torch.manual_seed(0)
    whole = torch.randn(SEQUENCE, BATCH, COLUMNS, requires_grad=True)
    shape = LAYOUTS[layout](whole).shape[:-1]
    target = torch.randint(CLASSES, shape)
    results = []
    for patched in (False, True):
        logits = LAYOUTS[layout](whole * 1)
        if not patched:
            results.append(_gradient(logits, target, inplace, engine))
            continue
        with mindspeed():
            results.append(_gradient(logits, target, inplace, engine))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    exact = LAYOUTS[layout](whole.detach().double())[..., :CLASSES].requires_grad_()
    F.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="sum").backward()
    assert exact.grad is not None
    torch.testing.assert_close(results[1][1][..., :CLASSES].double(), exact.grad, atol=1e-6, rtol=0)


def test_statistics_of_padded_logits() -> None:
    """argmax travels as bits in a row of a larger tensor."""
    torch.manual_seed(1)
    logits = torch.randn(SEQUENCE, BATCH, COLUMNS).transpose(0, 1)
    target = torch.randint(CLASSES, (BATCH, SEQUENCE))
    with mindspeed():
        got = token_statistics(
            logits, target, argmax=True, entropy=True, shard=VocabShard(0, CLASSES, CLASSES)
        )
    assert got.argmax is not None
    assert torch.equal(got.argmax, logits[..., :CLASSES].argmax(-1))


# Patches in Megatron


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    from megatron.core.models.common.language_module import language_module

    loss: Tensor = language_module.fused_vocab_parallel_cross_entropy(logits, target, None)
    return loss


def test_ours_stands_whoever_comes_first_and_after_repatch() -> None:
    torch.manual_seed(2)
    logits, target = torch.randn(3, 2, 8), torch.randint(8, (3, 2))
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(3, 2)
    with mindspeed() as repatch, install() as installation:
        torch.testing.assert_close(_loss(logits, target), want)
        repatch()
        torch.testing.assert_close(_loss(logits, target), want)
        assert installation.calls == 2
    with install() as installation, mindspeed() as repatch:
        torch.testing.assert_close(_loss(logits, target), want)
        repatch()
        torch.testing.assert_close(_loss(logits, target), want)
        assert installation.calls == 2


def test_its_patch_is_still_there_after_uninstall() -> None:
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Theirs

    before = getattr(Theirs, METHOD)
    with mindspeed():
        patched = getattr(Theirs, METHOD)
        assert patched is not before
        with install():
            assert getattr(Theirs, METHOD) is patched
        assert getattr(Theirs, METHOD) is patched
    assert getattr(Theirs, METHOD) is before
