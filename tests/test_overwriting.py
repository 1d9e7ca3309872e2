"""In-place backward is refused where it would lie, and so is a second one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import assert_close

from .device import ENGINES
from .head_logits import CLASSES, OPTIONS, Layout, identity, made_of, random_leaf, random_target


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_loss, token_statistics])
def test_a_leaf_is_refused(function: Callable[..., Any], engine: str) -> None:
    leaf, target = random_leaf(4, CLASSES), random_target(4)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match=r"inplace_backward=True would overwrite input.*leaf"):
        function(leaf, target, inplace_backward=True, engine=engine)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(-1, CLASSES),
        lambda x: x[:2],
        lambda x: x.transpose(0, 1),
        lambda x: x.view_as(x),
        lambda x: x.view(-1, CLASSES)[1:].view(7, 1, CLASSES),
    ],
    ids=["view", "slice", "transpose", "alias", "view of a view"],
)
def test_a_view_of_a_leaf_is_refused(view: Layout) -> None:
    logits = view(random_leaf(2, 4, CLASSES))
    with pytest.raises(ValueError, match="leaf that input is a view of"):
        cross_entropy(logits, random_target(*logits.shape[:-1]), inplace_backward=True)


@pytest.mark.parametrize(
    "overlap",
    [
        lambda x: x[:1].expand(4, -1),
        lambda x: x[:, :1].expand(-1, CLASSES),
        lambda x: x.as_strided((4, CLASSES), (1, 1)),
        lambda x: x.as_strided((4, CLASSES), (CLASSES - 1, 1)),
        lambda x: x.flatten().unfold(0, CLASSES, 5),
        lambda x: x.flatten().unfold(0, 4, 3).t()[:, :CLASSES],
    ],
    ids=["rows expanded", "columns expanded", "shifted by 1", "overlap of 1", "unfold", "unfold.t"],
)
def test_overlapping_memory_is_refused(overlap: Layout) -> None:
    """In place one row's gradient would be the next one's logit; out of place it works."""
    leaf = random_leaf(4, CLASSES)
    logits = overlap(made_of(leaf))
    target = random_target(logits.shape[0], classes=4)
    with pytest.raises(ValueError, match=r"do not share memory.*strides"):
        cross_entropy(logits, target, inplace_backward=True)
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), leaf)
    wanted: list[Tensor] = []
    for dtype in (torch.float64, torch.float32):
        plain = leaf.detach().cpu().to(dtype).requires_grad_()
        loss = F.cross_entropy(overlap(made_of(plain)), target.cpu())
        wanted += torch.autograd.grad(loss, plain)
    exact, naive = wanted
    assert_close(grad, exact, naive, "gradient")


def test_no_elements_share_no_memory() -> None:
    """A stride of 0 on one rank alone would let the others wait."""
    leaf = random_leaf(3, 0, 1)
    target = torch.empty(3, 0, dtype=torch.int64, device=leaf.device)
    logits = made_of(leaf).as_strided((3, 0, 1), (0, 1, 0))
    loss = cross_entropy(logits, target, reduction="sum", inplace_backward=True)
    assert float(loss) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_allowed_where_no_gradient_flows(
    mode: Callable[[], AbstractContextManager[None]], engine: str
) -> None:
    """Evaluation with the same arguments: leaves and overlaps are not going to be written."""
    leaf, target = random_leaf(4, CLASSES), random_target(4)
    before = leaf.detach().clone()
    usual = cross_entropy(leaf.detach(), target, engine=engine)
    with mode():
        assert torch.equal(cross_entropy(leaf, target, inplace_backward=True, engine=engine), usual)
        cross_entropy(leaf[:1].expand(4, -1), target, inplace_backward=True, engine=engine)
    plain = leaf.detach()
    assert torch.equal(cross_entropy(plain, target, inplace_backward=True, engine=engine), usual)
    cross_entropy(plain[:1].expand(4, -1), target, inplace_backward=True, engine=engine)
    assert torch.equal(leaf, before)


# A second backward


def _no_hooks() -> AbstractContextManager[None]:
    return torch.enable_grad()


HOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no hooks": _no_hooks,
    "identity": lambda: saved_tensors_hooks(identity, identity),
    "clone": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "save_on_cpu": save_on_cpu,
}
SECOND = "a second backward through a loss with inplace_backward=True"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("retain_graph", [False, True], ids=["", "retain_graph"])
@pytest.mark.parametrize("hooks", HOOKS)
def test_a_second_backward_is_refused(hooks: str, retain_graph: bool, engine: str) -> None:
    """By our own message, also where saved-tensor hooks hide the version counter."""
    leaf, target = random_leaf(4, CLASSES), random_target(4)
    (usual,) = torch.autograd.grad(cross_entropy(leaf, target, engine=engine), leaf)
    logits = made_of(leaf)
    with HOOKS[hooks]():
        # Through the primitive alone: what follows it saves tensors that backward would free.
        stats = token_statistics(logits, target, inplace_backward=True, engine=engine)
    upstream = torch.where(target == -100, 0.0, -1 / 3)
    (grad,) = torch.autograd.grad(stats.log_prob, logits, upstream, retain_graph=retain_graph)
    assert torch.equal(grad, usual)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(stats.log_prob, logits, upstream)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_second_backward_of_the_loss_is_refused(engine: str) -> None:
    loss = cross_entropy(
        made_of(random_leaf(4, CLASSES)), random_target(4), inplace_backward=True, engine=engine
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("whole", [False, True], ids=["loss", "head and loss"])
def test_under_checkpoint(whole: bool, engine: str) -> None:
    """The forward pass is run again before backward; the gradient is right, a second refused."""
    leaf, target = random_leaf(4, CLASSES), random_target(4)
    (grad,) = torch.autograd.grad(cross_entropy(leaf, target, engine=engine), leaf)

    def loss_of(x: Tensor) -> Tensor:
        logits = made_of(x) if whole else x
        return cross_entropy(logits, target, inplace_backward=True, engine=engine)

    start = leaf if whole else made_of(leaf)
    loss = checkpoint(loss_of, start, use_reentrant=False)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, grad)
    # Logits that the checkpoint itself keeps are guarded by their version.
    message = SECOND if whole else "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", OPTIONS)
def test_two_backwards_out_of_place(options: str, engine: str) -> None:
    """B9: retain_graph and a second backward, through the whole loss and with the same bits."""
    leaf, target = random_leaf(6, CLASSES), random_target(6)
    loss = cross_entropy(made_of(leaf), target, engine=engine, **OPTIONS[options])
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, second)
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, 2 * first)
