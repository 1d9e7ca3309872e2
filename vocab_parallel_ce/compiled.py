"""The primitive as custom operators, so that torch.compile(fullgraph=True) sees one opaque node.

Three operators under ``torch.ops.vocab_parallel_ce``; the group travels by name because a schema
has no process groups, and a RowRequest travels as its scalars, its floats as a tensor. The
fakes give shapes only. The in-place backward is an operator that declares that it mutates the
logits: the compiler keeps the order of its reads and writes, and copies where overwriting would be
seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._dynamo import trace_rules
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .engines.contract import arithmetic_dtype
from .overwriting import refuse_second_backward
from .passes import (
    RowResult,
    compute_gradient,
    compute_log_prob,
    compute_statistics,
)
from .preflight import together
from .request import RowRequest
from .statistics import apart

NO_GROUP = ""
_FLOATS: dict[str, Any] = {
    "scale": 1.0,
    "label_smoothing": 0.0,
    "lse_square_scale": 0.0,
    "softcap": 0.0,
}
"""the float options and what each is when it is off"""
# Older compilers, torch 2.7's among them, cannot follow the question: there all floats stay open.
_TELLS = f"{statically_known_true.__module__}.{statically_known_true.__name__}" in getattr(
    trace_rules, "manual_torch_name_rule_map", ()
)


Request = TypeVar("Request", bound=RowRequest)


def group_named(name: str) -> dist.ProcessGroup | None:
    """The group that a schema names; None for ``NO_GROUP``."""
    return None if name == NO_GROUP else _resolve_process_group(name)  # type: ignore[arg-type]


def closed(request: Request) -> tuple[Request, Tensor | None]:
    """The float options as a tensor [4] on the host, and the request without them.

    A float in the schema would be a constant of the graph: each new value of a temperature would
    compile anew. Products with ones are what the compiler can keep open. None where all are off
    for good: then nothing lies on the host, which Inductor's CUDA graphs do not allow (as their
    rules say; none of those was captured on a card).
    """
    floats = [getattr(request, name) for name in _FLOATS]
    offs = _FLOATS.values()
    if _TELLS and all(statically_known_true(a == b) for a, b in zip(floats, offs, strict=True)):
        return request, None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return replace(request, **_FLOATS), torch.stack([one * value for value in floats])


def opened(request: Request, numbers: Tensor | None) -> Request:
    """The request whose floats ``numbers`` holds; ValueError where one is not finite.

    Looked at when it runs, for the compiler cannot.
    """
    if numbers is None:
        return request
    values = dict(zip(_FLOATS, numbers.tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            name = "the z-loss scale (lse_square_scale)" if name == "lse_square_scale" else name
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    return replace(request, **values)


@torch.library.custom_op("vocab_parallel_ce::row_statistics", mutates_args=())
def _row_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    selected: Tensor | None,
    start: int,
    stop: int,
    vocab_size: int,
    implicit_shard: bool,
    smooth: bool,
    entropy: bool,
    squares: bool,
    argmax: bool,
    ignored_rows: bool,
    normalized: bool,
    row_scale: bool,
    finite_logits: bool,
    ignore_index: int,
    scale: float,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float,
    reduction: str,
    engine: str,
    collective: str,
    check: str,
    group_name: str,
    inplace_backward: bool,
    numbers: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = RowRequest(
        start, stop, vocab_size, implicit_shard, smooth, entropy, squares, argmax, ignored_rows,
        normalized, row_scale, finite_logits, ignore_index, scale, label_smoothing,
        lse_square_scale, softcap, reduction, engine, collective, check,
    )  # fmt: skip
    group = group_named(group_name)
    with together(group, check):
        request = opened(request, numbers)
        r = compute_statistics(
            logits, target, weight, request, group, normalizer=normalizer, scale=scales,
            selected=selected,
        )  # fmt: skip
    return r.outputs()


@_row_statistics.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    selected: Tensor | None,
    start: int,
    stop: int,
    vocab_size: int,
    implicit_shard: bool,
    smooth: bool,
    entropy: bool,
    squares: bool,
    argmax: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = target.numel(), arithmetic_dtype(logits.dtype)
    further = 0 if selected is None else selected.shape[1]
    return (
        logits.new_empty((2 + smooth + entropy + squares + further, rows), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows if argmax else 0, dtype=torch.int64),
        logits.new_empty(0 if normalizer is None else (), dtype=dtype),
    )


@dataclass(frozen=True)
class _Place:
    """What a pass after the forward one must know of a request, for a schema."""

    start: int
    stop: int
    vocab_size: int
    smooth: bool
    entropy: bool
    squares: bool
    finite_logits: bool
    scale: float
    softcap: float
    engine: str

    @classmethod
    def of(cls, request: RowRequest) -> tuple[Any, ...]:
        return tuple(getattr(request, name) for name in _PLACE)

    def request(self, numbers: Tensor | None) -> RowRequest:
        options = {name: getattr(self, name) for name in _PLACE}
        return opened(RowRequest(**options, implicit_shard=False), numbers)


_PLACE = tuple(field.name for field in fields(_Place))


@torch.library.custom_op("vocab_parallel_ce::row_gradient", mutates_args=())
def _row_gradient(
    logits: Tensor,
    stats: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    grad_stats: Tensor,
    start: int,
    stop: int,
    vocab_size: int,
    smooth: bool,
    entropy: bool,
    squares: bool,
    finite_logits: bool,
    scale: float,
    softcap: float,
    engine: str,
    numbers: Tensor | None = None,
    scales: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    place = _Place(
        start, stop, vocab_size, smooth, entropy, squares, finite_logits, scale, softcap, engine
    )
    request = place.request(numbers)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    result = RowResult(stats, m, s, local_target, scale=scales, selected=selected)
    grads = apart(grad_stats, request.wanted, selected)
    compute_gradient(logits, result, weight, grads, request, grad)
    return grad


@_row_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("vocab_parallel_ce::row_gradient_", mutates_args=("logits",))
def _row_gradient_inplace(
    logits: Tensor,
    stats: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    grad_stats: Tensor,
    start: int,
    stop: int,
    vocab_size: int,
    smooth: bool,
    entropy: bool,
    squares: bool,
    finite_logits: bool,
    scale: float,
    softcap: float,
    engine: str,
    numbers: Tensor | None = None,
    scales: Tensor | None = None,
    selected: Tensor | None = None,
) -> None:
    place = _Place(
        start, stop, vocab_size, smooth, entropy, squares, finite_logits, scale, softcap, engine
    )
    request = place.request(numbers)
    result = RowResult(stats, m, s, local_target, scale=scales, selected=selected)
    grads = apart(grad_stats, request.wanted, selected)
    compute_gradient(logits, result, weight, grads, request, logits)


@_row_gradient_inplace.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("vocab_parallel_ce::log_prob", mutates_args=())
def _log_prob(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    start: int,
    stop: int,
    vocab_size: int,
    smooth: bool,
    entropy: bool,
    squares: bool,
    finite_logits: bool,
    scale: float,
    softcap: float,
    engine: str,
    numbers: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    place = _Place(
        start, stop, vocab_size, smooth, entropy, squares, finite_logits, scale, softcap, engine
    )
    return compute_log_prob(logits, m, s, place.request(numbers), scales)


@_log_prob.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, weight, _, selected = inputs[:5]
    *scalars, _, inplace_backward, numbers, scales = inputs[5:]
    stats, m, s, local_target, argmax, normalizer = output
    ctx.save_for_backward(logits, stats, m, s, local_target, weight, numbers, scales, selected)
    ctx.mark_non_differentiable(m, s, local_target, argmax, normalizer)
    ctx.place = _Place.of(RowRequest(*scalars))
    ctx.inplace_backward = inplace_backward
    ctx.overwritten = False


def _backward(ctx: Any, grad_stats: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_backward(ctx)
    logits, *saved, numbers, scales, selected = ctx.saved_tensors
    none = [None] * (8 + len(fields(RowRequest)))
    arguments = (*saved, grad_stats, *ctx.place, numbers, scales, selected)
    if not ctx.inplace_backward:
        return (_row_gradient(logits, *arguments), *none)
    ctx.overwritten = True
    memory = logits.detach()
    _row_gradient_inplace(memory, *arguments)
    return (memory, *none)


def gradient(
    logits: Tensor,
    result: RowResult,
    weight: Tensor | None,
    grad_stats: Tensor,
    request: RowRequest,
    inplace_backward: bool,
) -> Tensor:
    """The backward of an eager loss, for the compiler that follows the tape (compiled autograd)."""
    r, numbers = closed(request)
    rows = (result.stats, result.m, result.s, result.local_target, weight, grad_stats)
    scalars = (*_Place.of(r), numbers, result.scale, result.selected)
    if not inplace_backward:
        grad: Tensor = _row_gradient(logits, *rows, *scalars)
        return grad
    memory = logits.detach()
    _row_gradient_inplace(memory, *rows, *scalars)
    return memory


_row_statistics.register_autograd(_backward, setup_context=_setup_context)


def row_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    group: dist.ProcessGroup | None,
    inplace_backward: bool,
    normalizer: Tensor | None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``primitive.row_statistics`` as one node of a compiled graph, its statistics one tensor."""
    name = NO_GROUP if group is None else group.group_name
    static, numbers = closed(request)
    stats, m, s, _, argmax, agreed = _row_statistics(
        logits, target, weight, normalizer, selected, *static.scalars(), name, inplace_backward,
        numbers, scale,
    )  # fmt: skip
    return stats, m, s, argmax, agreed


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, request: RowRequest, scale: Tensor | None = None
) -> Tensor:
    """``primitive.log_prob`` as one node of a compiled graph."""
    r, numbers = closed(request)
    out: Tensor = _log_prob(logits.detach(), m, s, *_Place.of(r), numbers, scale)
    return out
