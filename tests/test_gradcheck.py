"""The analytical gradients against finite differences in fp64; a second derivative is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics

ENGINES = ("eager", "cpu")
ROWS, CLASSES = 5, 19  # a full vector of the cpu engine and a tail


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target with an ignored row, weight with a zero."""
    x = (3 * torch.randn(ROWS, CLASSES, dtype=torch.float64)).requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))
    target[1] = -100
    target[2] = 4
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.25
    weight[4] = 0.0
    return x, target, weight


def _check(function: Callable[[Tensor], Any], x: Tensor) -> None:
    # Central differences with a step of 1e-6 are good to 1e-9 here; the defaults allow 1e-5.
    assert gradcheck(function, (x,), eps=1e-6, atol=1e-7, rtol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing only": {"label_smoothing": 1.0},
    "z-loss": {"lse_square_scale": 0.05},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.7},
    "all": {"label_smoothing": 0.1, "lse_square_scale": 0.05, "scale": 1.3},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy(name: str, reduction: str, weighted: bool, engine: str) -> None:
    x, target, weight = _batch()
    _check(
        lambda x: cross_entropy(
            x,
            target,
            weight if weighted else None,
            reduction,
            engine=engine,
            **OPTIONS[name],
        ),
        x,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("normalizer", [7.5, torch.tensor(7.5)], ids=["number", "tensor"])
def test_normalizer(normalizer: float | Tensor, engine: str) -> None:
    x, target, weight = _batch()
    _check(
        lambda x: cross_entropy(
            x,
            target,
            weight,
            label_smoothing=0.1,
            lse_square_scale=0.05,
            normalizer=normalizer,
            engine=engine,
        ),
        x,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_operator_outputs(reduction: str, engine: str) -> None:
    """The loss alone, the z-loss alone, and both at once."""
    x, target, weight = _batch()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        out = cross_entropy_loss(
            x,
            target,
            weight,
            reduction,
            label_smoothing=0.1,
            lse_square_scale_for_zloss=0.05,
            return_zloss=True,
            engine=engine,
        )
        return out.loss, out.zloss

    _check(lambda x: both(x)[0], x)
    _check(lambda x: both(x)[1], x)
    _check(both, x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_token_statistics(scale: float, engine: str) -> None:
    x, target, _ = _batch()

    def outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = token_statistics(x, target, entropy=True, argmax=True, scale=scale, engine=engine)
        assert out.entropy is not None
        return out.log_prob, out.lse, out.entropy

    for index in range(3):

        def one(x: Tensor, index: int = index) -> Tensor:
            return outputs(x)[index]

        _check(one, x)
    _check(outputs, x)
    _check(
        lambda x: token_statistics(x, target, scale=scale, engine=engine)[:2],
        x,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", ["3-D", "1-D", "sliced", "transposed"])
def test_layouts(layout: str, engine: str) -> None:
    x, target, _ = _batch()
    views: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "3-D": lambda x: (x[None, :4].expand(2, 4, -1), target[None, :4].expand(2, 4)),
        "1-D": lambda x: (x[0], target[0]),
        "sliced": lambda x: (x[:, 1:-2], target.clamp(max=CLASSES - 4)),
        "transposed": lambda x: (x.t(), torch.arange(CLASSES) % ROWS),
    }
    _check(lambda x: cross_entropy(*views[layout](x), reduction="none", engine=engine), x)


# Second derivatives


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("upstream", ["constant", "differentiable"])
def test_double_backward_is_refused(upstream: str, in_place: bool, engine: str) -> None:
    """It never gives a wrong or a silent zero, whatever else the penalty depends on."""
    x, target, _ = _batch()
    loss = cross_entropy(x * 1, target, inplace_backward=in_place, engine=engine)
    if upstream == "differentiable":
        loss = loss.square()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    # The second term has a gradient of its own: without a refusal the first would be dropped.
    penalty = grad.square().sum() + x.square().sum()
    with pytest.raises(RuntimeError, match="twice"):
        penalty.backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_a_second_derivative_of_the_logits_alone_is_refused(in_place: bool, engine: str) -> None:
    """torch visits only what lies between the gradient and the logits: it must meet the refusal."""
    x, target, _ = _batch()

    def loss(y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(y * 1, target, inplace_backward=in_place, engine=engine)

    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(grad.sum(), x, allow_unused=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.functional.hessian(loss, x.detach())
    with pytest.raises(RuntimeError, match="twice"):  # the trick of a double backward
        torch.autograd.functional.jvp(loss, x.detach(), torch.ones_like(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_create_graph_alone_is_allowed(engine: str) -> None:
    """Other parts of a graph may be differentiated twice, and the gradient is the same."""
    x, target, _ = _batch()
    (plain,) = torch.autograd.grad(cross_entropy(x, target, engine=engine), x)
    (graph,) = torch.autograd.grad(cross_entropy(x, target, engine=engine), x, create_graph=True)
    assert torch.equal(plain, graph)
