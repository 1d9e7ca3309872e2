"""Every static argument checked before anything is computed, and made into a request.

``option_checks``, ``tensor_checks``, ``shard.resolve`` and ``overwriting`` say what is wrong; here
stands in which order they are asked.

What depends on the values of tensors (targets, weights) is checked by the primitive, after the
exchange, so that all ranks raise together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import forgotten_group, transforms
from .arguments import Options, Outputs
from .collectives import check_backend_dtype, check_group_serves
from .engines import select
from .kinds import Kind, check_kinds, kind_of, ordinary, settled, traced
from .option_checks import check_normalizer, check_plain, check_scale, check_scale_tensor, plain_int
from .overwriting import check_overwritable
from .request import RowRequest
from .scales import number_of
from .shard import Held, VocabShard, group_rank_and_size, rank_suffix, resolve
from .switches import check_word
from .tensor_checks import check_row_scale, check_selected, check_tensors

T = TypeVar("T")


def prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    outputs: Outputs,
    held: Held = Held(),  # noqa: B008 (a tuple of strings)
) -> RowRequest:
    """Check everything static and say what the primitive shall do.

    Raises TypeError or ValueError, or RuntimeError where an engine is asked for that is not
    available.
    """
    request = _prepare(input, target, weight, options, outputs, held)
    if not torch.compiler.is_compiling():
        if not ordinary(input):  # such a call is asked both next, before it sends anything
            if input.is_meta or _served_by_an_engine(input):
                select(options.engine, input)
            if options.group is not None and options.group.size() > 1:
                backend = check_group_serves(input.device.type, options.group)
                check_backend_dtype(backend, input.dtype)
        forgotten_group.warn_if_forgotten(options.group, request)
    return request


def _served_by_an_engine(input: Tensor) -> bool:
    return kind_of(input) is Kind.MEMORY and not traced(input)


def admit(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Options]:
    """The same arguments as tensors with memory of their own, where they only wait to get some.

    Raises as ``kinds.check_kinds`` and ``transforms.check_transforms`` do. What is no tensor at all
    is left for ``prepare``.
    """
    if torch.compiler.is_compiling():
        return input, target, weight, options
    values = (input, target, weight, options.normalizer, options.scale, options.selected)
    plain = forward_ad._current_level < 0 and not transforms.active()
    if plain and ordinary(*(v for v in values if isinstance(v, Tensor))):
        return input, target, weight, options
    names = ("input", "target", "weight", "normalizer", "scale", "selected")
    named = dict(zip(names, values, strict=True))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    rank, world = group_rank_and_size(options.group)
    where = rank_suffix(rank, world)
    check_kinds(tensors, where)
    transforms.check_transforms(tensors, world == 1, where)
    memory: dict[str, Any] = {**named, **{n: settled(v) for n, v in tensors.items()}}
    if memory["input"] is not input and options.inplace_backward and input.requires_grad:
        check_overwritable(input, where)
    options = options._replace(
        **{name: memory.pop(name) for name in ("normalizer", "scale", "selected")}
    )
    return memory["input"], memory["target"], memory["weight"], options


def _prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    outputs: Outputs,
    held: Held,
) -> RowRequest:
    group, scale, shard = options.group, options.scale, options.shard
    check_group(group)
    rank, world = group_rank_and_size(group)
    where = rank_suffix(rank, world)
    check_normalizer(options.normalizer, options.reduction, where)
    check_tensors(input, target, weight, where)
    row_scale = False
    if isinstance(scale, Tensor):
        check_scale_tensor(scale, where)
        number = number_of(scale)
        row_scale = number is None
        if row_scale:
            check_row_scale(scale, input, target, where)
        scale = 1.0 if number is None else number
    if options.selected is not None:
        check_selected(options.selected, input, target, where)
    request = _once(
        _request, input.shape[-1], rank, world, shard, options.normalizer is not None, row_scale,
        scale, held, *outputs, options.inplace_backward, options.finite_logits, options.reduction,
        options.ignore_index, options.label_smoothing, options.lse_square_scale, options.softcap,
        options.engine, options.collective, options.check,
    )  # fmt: skip
    if weight is not None and weight.shape[0] != request.vocab_size:
        raise ValueError(
            f"weight has {weight.shape[0]} entries but vocab_size is {request.vocab_size}: pass "
            f"the full weight vector of all classes on every rank{where}"
            f"{forgotten_group.cause(group, shard is not None, request.size)}"
        )
    if options.inplace_backward and input.requires_grad and torch.is_grad_enabled():
        check_overwritable(input, where)
    return request


def _request(
    columns: int,
    rank: int,
    world: int,
    shard: VocabShard | None,
    normalized: bool,
    row_scale: bool,
    scale: float,
    held: Held,
    entropy: bool,
    argmax: bool,
    squares: bool,
    ignored_rows: bool,
    inplace_backward: bool,
    finite_logits: bool,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float | None,
    engine: str,
    collective: str,
    check: bool | None,
) -> RowRequest:
    """Everything of a call but its tensors, checked."""
    where = rank_suffix(rank, world)
    check_plain(
        reduction, ignore_index, label_smoothing, lse_square_scale, softcap, engine, collective,
        inplace_backward, finite_logits, check, where,
    )  # fmt: skip
    check_scale(scale, where)
    here = resolve(columns, shard, rank, world, where, held)
    return RowRequest(
        start=here.start,
        stop=here.stop,
        vocab_size=here.vocab_size,
        implicit_shard=shard is None,
        smooth=label_smoothing > 0,
        entropy=entropy,
        squares=squares,
        argmax=argmax,
        ignored_rows=ignored_rows,
        normalized=normalized,
        row_scale=row_scale,
        finite_logits=finite_logits,
        ignore_index=plain_int(ignore_index),
        scale=float(scale),
        label_smoothing=float(label_smoothing),
        lse_square_scale=float(lse_square_scale),
        softcap=0.0 if softcap is None else float(softcap),
        reduction=reduction,
        engine=engine,
        collective=collective,
        check=check_word(check),
    )


def check_group(group: object) -> None:
    """Raise TypeError for what is no group."""
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this rank belongs to, or None "
            f"for one rank, got {type(group).__name__} (of a DeviceMesh: mesh.get_group(dim))"
        )


def _once(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)``, which need not run again for arguments that it has had.

    Most calls of a program are like the one before. What cannot be looked up, as symbols of the
    compiler cannot, is computed.
    """
    if not torch.compiler.is_compiling():
        try:
            return cast(T, _remembering(function)(*arguments))
        except TypeError:  # raised by ``function``, which then says it again, or unhashable
            pass
    return function(*arguments)


@functools.cache
def _remembering(function: Callable[..., T]) -> Callable[..., T]:
    """By type as well: True is no 1 here."""
    return cast(Callable[..., T], functools.lru_cache(maxsize=64, typed=True)(function))
