"""The primitive under torch.func and batched gradients: plain torch that any transform can take.

    torch.func.grad, vjp, jacrev, hessians by reverse mode, vmap of any of them, is_grads_batched

The tensors there stand for many, or for many levels, and no engine could read them. The formulas
are those of ``statistics``, written without writing into anything. One rank only: an exchange of
what a transform holds is not defined. It materialises [N, C_r], as torch itself would.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .engines.contract import ELSEWHERE, IGNORED, arithmetic_dtype
from .kinds import Kind, kind_of
from .request import RowRequest
from .selected import is_allowed, local_columns
from .targets import find_problems, locate
from .verdict import raise_on_own_values

NO_JVP = (
    "forward-mode derivatives (torch.func.jvp, jacfwd, forward_ad) do not go through the loss; use "
    "reverse mode: torch.func.vjp, jacrev, or backward"
)
ONE_RANK_ONLY = (
    "torch.func transforms, vmap and is_grads_batched work on one rank only, and here several hold "
    "the vocabulary; call the loss outside of them, once for each sample, or inside on gathered "
    "logits with group=None"
)


def active() -> bool:
    """Whether a transform of torch.func is running, here or further up the stack.

    Inside, what torch makes of plain tensors is seen through the transform as well. functionalize
    does not count: it only traces.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    only_traces = torch._C._functorch.TransformType.Functionalize
    return any(interpreter.key() != only_traces for interpreter in stack)


def check_transforms(arguments: dict[str, Tensor], alone: bool, where: str) -> None:
    """Raise ValueError for forward mode anywhere, and for any transform over several ranks."""
    tensors = [value for name, value in arguments.items() if name != "normalizer"]
    if forward_ad._current_level >= 0:
        levels = {
            interpreter.level()
            for interpreter in torch._C._functorch.get_interpreter_stack() or ()
            if interpreter.key() == torch._C._functorch.TransformType.Jvp
        }
        if any(_has_tangent(value, levels) for value in tensors):
            raise ValueError(NO_JVP + where)
    if not alone and (active() or any(kind_of(value) is Kind.TRANSFORMED for value in tensors)):
        raise ValueError(ONE_RANK_ONLY + where)


def _has_tangent(value: Tensor, levels: set[int]) -> bool:
    """Whether a jvp of torch.func (at these levels) or ``forward_ad`` follows ``value``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.maybe_get_level(value) in levels:
            return True
        value = torch._C._functorch.get_unwrapped(value)
    return not levels and forward_ad.unpack_dual(value).tangent is not None


def _readable(value: Tensor | None) -> Tensor | None:
    """The numbers beneath torch.func's wrappers; None where one tensor stands for many."""
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return None
        value = torch._C._functorch.get_unwrapped(value)
    plain = value is not None and value.device.type == "cpu" and kind_of(value) is Kind.MEMORY
    return value if plain else None


def row_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable stats [j + K, N] as often as one likes; then m [N], s [N] and argmax.

    A target or a selected id that is no class, or a scale that is not finite, raises where its
    values can be looked at; else its row is NaN.
    """
    target = target.reshape(-1).long()
    located = locate(target, request)
    numbers = _readable(target)
    if numbers is not None:
        located_numbers = locate(numbers, request)
        problems = find_problems(
            numbers, located_numbers, _readable(weight), _readable(scale), _readable(selected),
            request.vocab_size,
        )  # fmt: skip
        raise_on_own_values(problems, request)
    stats, m, s, argmax = statistics(logits, located.local_target, weight, request, scale, selected)
    allowed = located.allowed
    if selected is not None:
        allowed = allowed & is_allowed(selected, located.ignored, request.vocab_size).all(1)
    # Multiplied, so that the gradient of the row is NaN as well.
    return stats * torch.where(allowed, 1.0, torch.nan).to(stats.dtype), m, s, argmax


def statistics(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the columns of the targets; ``weight`` is the full vector."""
    dtype, wanted = arithmetic_dtype(logits.dtype), request.wanted
    ignored = (local_target == IGNORED)[:, None]
    x = _unpadded(logits, request)
    blank = x.detach() if wanted.ignored_rows else torch.zeros_like(x)
    # No gradient for what is ignored, whatever scale and cap make of it: NaN included.
    x = _scaled(torch.where(ignored, blank, x), request, scale)
    m = x.detach().amax(1, keepdim=True)
    shifted = x - torch.where(m == -torch.inf, 0.0, m)
    e = shifted.exp()
    s = e.sum(1)
    log_s, owned = s.log(), local_target >= 0
    y = shifted.gather(1, torch.where(owned, local_target, 0)[:, None])[:, 0]
    nll = torch.where(ignored[:, 0], 0.0, log_s - torch.where(owned, y, 0.0))
    lse = m[:, 0] + log_s
    rows = [nll, lse if wanted.ignored_rows else torch.where(ignored[:, 0], 0.0, lse)]
    if request.smooth:
        w = x.new_ones(x.shape[1]) if weight is None else weight.to(dtype)[: request.size]
        rows.append(torch.where(ignored[:, 0], 0.0, log_s * w.sum() - (shifted * w).sum(1)))
    if request.entropy:
        t = torch.where(e == 0, 0.0, e * torch.where(e == 0, 0.0, shifted)).sum(1)
        rows.append(torch.where(ignored[:, 0], 0.0, log_s - t / s))
    if request.squares:
        p = (e / s[:, None]).detach()
        rows.append(torch.where(ignored[:, 0], 0.0, p.square().sum(1)))
    if selected is not None:
        columns = local_columns(selected, local_target, request)
        there = shifted.gather(1, columns.clamp(min=0))
        rows += torch.where(columns == ELSEWHERE, 0.0, there - log_s[:, None]).unbind(1)
    argmax = _argmax(x.detach(), m, ignored) if request.argmax else local_target[:0]
    return torch.stack(rows), m[:, 0], s.detach(), argmax


def gradient(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    grad_stats: Tensor,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """d(logits) for many ``grad_stats`` [j + K, N] at once (is_grads_batched)."""
    if request.size != request.vocab_size:
        raise ValueError(ONE_RANK_ONLY)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        stats = statistics(leaf, local_target, weight, request, scale, selected)[0]
        (grad,) = torch.autograd.grad(stats, leaf, grad_stats)
    unused = (grad_stats == 0).all(0).reshape(*logits.shape[:-1], 1)
    return grad.masked_fill(unused, 0.0)  # as the engines do: 0 * NaN is NaN


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, request: RowRequest, scale: Tensor | None = None
) -> Tensor:
    """``passes.compute_log_prob`` by plain torch."""
    x = _scaled(_unpadded(logits, request), request, scale) - m[:, None] - s.log()[:, None]
    padding = logits.shape[-1] - request.size
    x = torch.nn.functional.pad(x, (0, padding), value=-torch.inf)
    return x.to(logits.dtype).reshape(logits.shape)


def _unpadded(logits: Tensor, request: RowRequest) -> Tensor:
    """[N, C] in the dtype of the arithmetic"""
    x = logits.reshape(-1, logits.shape[-1])[:, : request.size]
    return x.to(arithmetic_dtype(logits.dtype))


def _scaled(x: Tensor, request: RowRequest, scale: Tensor | None) -> Tensor:
    if request.softcap != 0:
        x = request.softcap * (x / request.softcap).tanh()
    return x * (request.scale if scale is None else (scale + (scale - scale))[:, None])


def _argmax(x: Tensor, m: Tensor, ignored: Tensor) -> Tensor:
    columns = torch.arange(x.shape[1], device=x.device)
    first = torch.where(x == m, columns, x.shape[1]).amin(1)
    return torch.where(ignored[:, 0] | (first == x.shape[1]), -1, first)
