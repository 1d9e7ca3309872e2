"""In-place backward: the same gradient in the logits' own memory, refused where it would lie.

And its counterpart: without ``inplace_backward`` no input is ever modified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import assert_close

from .cases import expected
from .device import DEVICE, DTYPES, ENGINES

CLASSES = 37  # two vectors of the cpu engine and a tail

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "lse_square_scale": 1e-3, "scale": 0.7},
}


def assert_same(tensors: Sequence[Tensor | None]) -> None:
    """Two gradients, both there and equal bit for bit."""
    first, second = tensors
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape)).to(DEVICE, dtype).requires_grad_()


def _target(*lead: int, classes: int = CLASSES) -> Tensor:
    """The second row is ignored."""
    target = torch.randint(classes, lead)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    return target.to(DEVICE)


def _made(leaf: Tensor) -> Tensor:
    """A non-leaf of the same values whose producer saves nothing of them."""
    return leaf * 1


def _address_of_gradient(x: Tensor) -> list[int]:
    """Filled by backward with where the gradient of ``x`` lies."""
    seen: list[int] = []
    x.register_hook(lambda grad: seen.append(grad.data_ptr()))
    return seen


# Layouts: how logits arrive from the memory [2, 6, CLASSES + 1] of a head

Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "3-D": lambda x: x,
    "flattened": lambda x: x.view(-1, x.shape[-1]),
    "shifted": lambda x: x[:, :-1],  # the next-token shift: rows that cannot be flattened
    "shifted and flattened in part": lambda x: x[:1, :-1].view(-1, x.shape[-1]),
    "sequence first": lambda x: x.transpose(0, 1),
    "columns cut": lambda x: x[..., :-1],
    "columns cut in front": lambda x: x.view(-1, x.shape[-1])[:, 1:],
    "every other column": lambda x: x[..., ::2],
    "every other row": lambda x: x.view(-1, x.shape[-1])[::2],
    "transposed": lambda x: x.view(-1, x.shape[-1]).t(),
    "4-D": lambda x: x.view(2, 2, 3, -1)[:, :, :-1].transpose(0, 2),
    "1-D": lambda x: x[1, 2],
    "1-D with a stride": lambda x: x[1, :, 3],
    "one row": lambda x: x[:1, 2],
    "expanded over one": lambda x: x[:1].expand(1, 6, CLASSES + 1),
    "no rows": lambda x: x[:, :0],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, options: str, engine: str) -> None:
    """Any strides: the loss and gradient are right, and the same in place, where they belong."""
    leaf = _leaf(2, 6, CLASSES + 1)
    target = _target(*LAYOUTS[layout](leaf).shape[:-1], classes=2)
    results = []
    for in_place in (False, True):
        logits = LAYOUTS[layout](_made(leaf))
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
    leaf, target = _leaf(7, CLASSES, dtype=dtype), _target(7)
    weight = torch.rand(CLASSES).to(DEVICE) if weighted else None
    grads: list[Tensor | None] = []
    for in_place in (False, True):
        leaf.grad = None
        logits = _made(leaf)
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
    leaf, target = _leaf(7, CLASSES, dtype=dtype), _target(7)
    grads: list[Tensor | None] = []
    for in_place in (False, True):
        leaf.grad = None
        stats = token_statistics(
            _made(leaf), target, entropy=True, inplace_backward=in_place, engine=engine
        )
        assert stats.entropy is not None
        (stats.log_prob + 0.5 * stats.entropy - 0.25 * stats.lse).sum().backward()
        out = cross_entropy_loss(
            _made(leaf),
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
    leaf, target = _leaf(7, CLASSES, dtype=dtype), _target(7, classes=size)
    zeros = leaf.detach().clone()  # not without padding: bits may depend on where a row begins
    zeros[:, size:] = 0
    with torch.no_grad():
        leaf[:, size:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e4, 0.0], dtype=dtype)
    results = []
    for padded in (leaf, zeros.requires_grad_()):
        loss = cross_entropy(
            _made(padded),
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


# Refused


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_loss, token_statistics])
def test_a_leaf_is_refused(function: Callable[..., Any], engine: str) -> None:
    leaf, target = _leaf(4, CLASSES), _target(4)
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
    logits = view(_leaf(2, 4, CLASSES))
    with pytest.raises(ValueError, match="leaf that input is a view of"):
        cross_entropy(logits, _target(*logits.shape[:-1]), inplace_backward=True)


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
    leaf = _leaf(4, CLASSES)
    logits = overlap(_made(leaf))
    target = _target(logits.shape[0], classes=4)
    with pytest.raises(ValueError, match=r"do not share memory.*strides"):
        cross_entropy(logits, target, inplace_backward=True)
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), leaf)
    wanted = []
    for dtype in (torch.float64, torch.float32):
        plain = leaf.detach().cpu().to(dtype).requires_grad_()
        loss = F.cross_entropy(overlap(_made(plain)), target.cpu())
        wanted += torch.autograd.grad(loss, plain)
    assert_close(grad, *wanted, "gradient")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_allowed_where_no_gradient_flows(
    mode: Callable[[], AbstractContextManager[None]], engine: str
) -> None:
    """Evaluation with the same arguments: leaves and overlaps are not going to be written."""
    leaf, target = _leaf(4, CLASSES), _target(4)
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


def _identity(x: Tensor) -> Tensor:
    return x


def _no_hooks() -> AbstractContextManager[None]:
    return torch.enable_grad()


HOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no hooks": _no_hooks,
    "identity": lambda: saved_tensors_hooks(_identity, _identity),
    "clone": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "save_on_cpu": save_on_cpu,
}
SECOND = "a second backward through a loss with inplace_backward=True"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("retain_graph", [False, True], ids=["", "retain_graph"])
@pytest.mark.parametrize("hooks", HOOKS)
def test_a_second_backward_is_refused(hooks: str, retain_graph: bool, engine: str) -> None:
    """By our own message, also where saved-tensor hooks hide the version counter."""
    leaf, target = _leaf(4, CLASSES), _target(4)
    (usual,) = torch.autograd.grad(cross_entropy(leaf, target, engine=engine), leaf)
    logits = _made(leaf)
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
    loss = cross_entropy(_made(_leaf(4, CLASSES)), _target(4), inplace_backward=True, engine=engine)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("whole", [False, True], ids=["loss", "head and loss"])
def test_under_checkpoint(whole: bool, engine: str) -> None:
    """The forward pass is run again before backward; the gradient is right, a second refused."""
    leaf, target = _leaf(4, CLASSES), _target(4)
    (grad,) = torch.autograd.grad(cross_entropy(leaf, target, engine=engine), leaf)

    def loss_of(x: Tensor) -> Tensor:
        logits = _made(x) if whole else x
        return cross_entropy(logits, target, inplace_backward=True, engine=engine)

    start = leaf if whole else _made(leaf)
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
    leaf, target = _leaf(6, CLASSES), _target(6)
    loss = cross_entropy(_made(leaf), target, engine=engine, **OPTIONS[options])
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, second)
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, 2 * first)


# Other readers of the same logits


@pytest.mark.parametrize("engine", ENGINES)
def test_the_version_counter_rises(engine: str) -> None:
    logits = _made(_leaf(4, CLASSES))
    loss = cross_entropy(logits, _target(4), inplace_backward=True, engine=engine)
    assert logits._version == 0
    loss.backward()
    assert logits._version > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "view", [_identity, lambda x: x.view(-1, CLASSES), lambda x: x[:, :-1]], ids=["", "view", "cut"]
)
def test_a_producer_that_saved_the_logits_raises(view: Layout, engine: str) -> None:
    """tanh's gradient reads its own output: it must not read ours instead."""
    logits = _leaf(2, 4, CLASSES).tanh()
    x = view(logits)
    loss = cross_entropy(x, _target(*x.shape[:-1]), inplace_backward=True, engine=engine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_that_runs_later_in_backward_raises(engine: str) -> None:
    logits, target = _made(_leaf(4, CLASSES)), _target(4)
    other = logits.square().sum()  # its backward runs after that of the younger loss
    loss = cross_entropy(logits, target, inplace_backward=True, engine=engine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_that_runs_earlier_in_backward_is_right(engine: str) -> None:
    leaf, target = _leaf(4, CLASSES), _target(4)
    grads: list[Tensor | None] = []
    for in_place in (False, True):
        logits = _made(leaf)
        loss = cross_entropy(logits, target, inplace_backward=in_place, engine=engine)
        grads += torch.autograd.grad(loss + logits.square().sum(), leaf)
    assert_same(grads)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first", ["in place", "out of place"])
def test_two_losses_of_the_same_logits(first: str, engine: str) -> None:
    """Whatever the order, the one that finds the logits overwritten raises."""
    logits, target = _made(_leaf(4, CLASSES)), _target(4)
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
    leaf, target = _leaf(2, 4, CLASSES), _target(8)
    logits = _made(leaf)
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
    memory = _leaf(2, 6, CLASSES + 1, dtype=dtype)
    with torch.no_grad():
        memory[0, 1] = -torch.inf
        memory[1, 1, 3] = torch.nan
    logits = LAYOUTS[layout](memory)
    target = _target(*logits.shape[:-1], classes=2)
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

    made = _made(memory)
    seen = made.detach().clone()
    cross_entropy(LAYOUTS[layout](made), target, weight, inplace_backward=True, **options)
    assert torch.equal(made.detach().view(torch.uint8), seen.view(torch.uint8))
    assert unchanged()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", ["shifted", "columns cut", "every other row", "1-D"])
def test_in_place_writes_the_logits_only(layout: str, engine: str) -> None:
    """Memory between and around the logits of a view is left alone."""
    leaf = _leaf(2, 6, CLASSES + 1)
    memory = _made(leaf)
    logits = LAYOUTS[layout](memory)
    target = _target(*logits.shape[:-1])
    loss = cross_entropy(logits, target, reduction="sum", inplace_backward=True, engine=engine)
    inside = torch.zeros_like(memory.detach(), dtype=torch.bool)
    LAYOUTS[layout](inside).fill_(True)
    before = memory.detach().clone()
    loss.backward()
    after = memory.detach()
    assert torch.equal(after[~inside], before[~inside])
    assert not torch.equal(after[inside], before[inside])
