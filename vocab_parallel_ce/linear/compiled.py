"""The fused head as custom operators, so that torch.compile(fullgraph=True) sees opaque nodes.

As in ``compiled`` of the package: groups travel by name, a request as its scalars, its floats as a
tensor. The schemas are made of the fields of ``LinearRequest``: a new option needs no word here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..compiled import NO_GROUP, closed, group_named, opened
from ..engines.contract import arithmetic_dtype
from ..passes import RowResult
from ..preflight import together
from ..request import LinearRequest
from ..statistics import stat_names
from .backward import Gradients, Leaves, Needs, linear_gradient
from .call import LinearCall, Statics, linear_call
from .forward import linear_statistics
from .in_forward import loss_with_gradients

_TYPES = {"int": "SymInt", "bool": "bool", "float": "float", "str": "str"}
_REQUEST = ", ".join(f"{_TYPES[str(field.type)]} {field.name}" for field in fields(LinearRequest))
_CALL = (
    "Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor target, Tensor? weight, "
    "Tensor? normalizer, Tensor? row_scales, Tensor? selected, Tensor? numbers, str group_name, "
    f"SymInt chunk, float? scratch_mib, bool partial, bool wide, bool straight, {_REQUEST}"
)
_NEEDS = "bool of_hidden, bool of_weight, bool of_bias"
_TENSORS, _GROUP, _REQUESTS = 9, 9, 15
_CALLS = _REQUESTS + len(fields(LinearRequest))


def _restored(arguments: tuple[Any, ...]) -> LinearCall:
    """The call that ``_CALL`` took apart."""
    hidden, head, bias, target, weight, normalizer, scale, selected, numbers = arguments[:_TENSORS]
    request = opened(_request_of(arguments), numbers)
    statics = Statics(request, *arguments[_GROUP + 1 : _REQUESTS])
    group = group_named(arguments[_GROUP])
    return linear_call(
        hidden, head, bias, target, weight, normalizer, scale, selected, statics, group
    )


def _closed(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    scale: Tensor | None,
    selected: Tensor | None,
    statics: Statics,
    group: dist.ProcessGroup | None,
) -> tuple[Any, ...]:
    """What ``_CALL`` names, in its order."""
    request, numbers = closed(statics.request)
    name = NO_GROUP if group is None else group.group_name
    tensors = (hidden, head_weight, head_bias, target, weight, normalizer, scale, selected)
    return (*tensors, numbers, name, *statics.scalars(), *request.scalars())


def _fresh(value: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns in place of None."""
    return like.new_empty(0) if value is None else value


# Statistics


def _statistics(*arguments: Any) -> tuple[Tensor, ...]:
    with together(group_named(arguments[_GROUP]), _request_of(arguments).check):
        r = linear_statistics(_restored(arguments))
    return r.outputs()


def _request_of(arguments: tuple[Any, ...]) -> LinearRequest:
    return LinearRequest(*arguments[_REQUESTS:_CALLS])


def _fake_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, target, normalizer, selected = (arguments[place] for place in (0, 3, 5, 7))
    request, rows = _request_of(arguments), target.numel()
    dtype, stats = arithmetic_dtype(hidden.dtype), len(stat_names(request.wanted))
    stats += 0 if selected is None else selected.shape[1]
    return (
        hidden.new_empty((stats, rows), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows if request.argmax else 0, dtype=torch.int64),
        hidden.new_empty(0 if normalizer is None else (), dtype=dtype),
    )


def _gradient(*arguments: Any) -> tuple[Tensor, ...]:
    stats, m, s, local_target, grad_stats, *needs = arguments[_CALLS:]
    call = _restored(arguments)
    leaves = Leaves(arguments[1], arguments[2])
    result = RowResult(stats, m, s, local_target, scale=call.scale, selected=call.selected)
    out = linear_gradient(call, leaves, result, grad_stats, Needs(*needs))
    return _handed_out(out, arguments[0])


def _handed_out(out: Gradients, hidden: Tensor) -> tuple[Tensor, ...]:
    of_hidden = None if out.hidden is None else out.hidden.view(hidden.shape)
    return tuple(_fresh(grad, hidden) for grad in (of_hidden, out.weight, out.bias))


def _fake_gradients(
    arguments: tuple[Any, ...], needs: tuple[bool, ...], wide: bool = False
) -> tuple[Tensor, ...]:
    out = []
    for value, needed in zip(arguments[:3], needs, strict=True):
        shape = value.shape if needed and value is not None else (0,)
        dtype = torch.float32 if wide and needed and value is not None else arguments[0].dtype
        out.append(arguments[0].new_empty(shape, dtype=dtype))
    return tuple(out)


def _fake_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments, arguments[_CALLS + 5 :])


# A loss with its gradients


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    with together(group_named(arguments[_GROUP]), _request_of(arguments).check):
        call = _restored(arguments)
        leaves = Leaves(arguments[1], arguments[2])
        out = loss_with_gradients(call, leaves, Needs(*arguments[_CALLS:]))
    factor = torch.ones_like(out.loss) if out.factor is None else out.factor
    return out.loss, out.zloss, factor, *_handed_out(out.gradients, arguments[0])


def _fake_loss(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, request = arguments[0], _request_of(arguments)
    loss = hidden.new_empty((), dtype=arithmetic_dtype(hidden.dtype))
    wide = hidden.dtype == torch.float16 and request.reduction == "mean"
    gradients = _fake_gradients(arguments, arguments[_CALLS:], wide)
    return loss, torch.empty_like(loss), torch.empty_like(loss), *gradients


def _operator(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(
        f"vocab_parallel_ce::{name}", run, mutates_args=(), schema=schema
    )
    operator.register_fake(fake)
    return operator


_statistics_op = _operator(
    "linear_row_statistics",
    f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _statistics,
    _fake_statistics,
)
_gradient_op = _operator(
    "linear_row_gradient",
    f"({_CALL}, Tensor stats, Tensor m, Tensor s, Tensor local_target, Tensor grad_stats, "
    f"{_NEEDS}) -> (Tensor, Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)
_loss_op = _operator(
    "linear_loss_and_gradients",
    f"({_CALL}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _fake_loss,
)


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stats, m, s, local_target, argmax, normalizer = output
    ctx.save_for_backward(*inputs[:_TENSORS], stats, m, s, local_target)
    ctx.mark_non_differentiable(m, s, local_target, argmax, normalizer)
    ctx.statics = inputs[_TENSORS:_CALLS]


def _statistics_backward(ctx: Any, grad_stats: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, stats, m, s, local_target = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    rows = (stats, m, s, local_target, grad_stats)
    grads = _gradient_op(*tensors, *ctx.statics, *rows, *needs)
    return _asked_for(grads, needs, _CALLS)


def _asked_for(
    grads: tuple[Tensor, ...], needs: tuple[bool, ...], inputs: int
) -> tuple[Tensor | None, ...]:
    given = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return (*given, *[None] * (inputs - 3))


_statistics_op.register_autograd(_statistics_backward, setup_context=_keep_statistics)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, zloss, factor, *gradients = output
    ctx.save_for_backward(factor, *gradients)
    ctx.mark_non_differentiable(zloss, factor, *gradients)
    ctx.dtype = inputs[0].dtype


def _loss_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    factor, *gradients = ctx.saved_tensors
    factor = factor * grad_loss
    needs = ctx.needs_input_grad[:3]
    scaled = tuple((grad.to(factor.dtype) * factor).to(ctx.dtype) for grad in gradients)
    return _asked_for(scaled, needs, _CALLS + 3)


_loss_op.register_autograd(_loss_backward, setup_context=_keep_gradients)


def linear_row_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``primitive.linear_row_statistics`` as one node of a compiled graph."""
    stats, _, _, _, argmax, agreed = _statistics_op(*_closed(*arguments))
    return stats, argmax, agreed


def linear_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``primitive.linear_loss`` as one node of a compiled graph."""
    leaves = arguments[:3]
    needs = [x is not None and x.requires_grad for x in leaves]
    loss, zloss, *_ = _loss_op(*_closed(*arguments), *needs)
    return loss, zloss
