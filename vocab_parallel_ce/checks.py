"""Every static argument checked before anything is computed: shapes, dtypes, ranges, names.

What depends on the values of tensors (targets, weights) is checked by the primitive, after the
exchange, so that all ranks raise together.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import forgotten_group
from .collectives import COLLECTIVES
from .collectives import check_backend_dtype as check_backend_dtype
from .engines import ENGINES, select
from .header import REDUCTIONS
from .kinds import Kind, check_kinds, kind_of, ordinary, settled, traced
from .overwriting import check_not_overwritten
from .request import RowRequest
from .scales import number_of
from .shard import VocabShard, group_rank_and_size
from .switches import check_word
from .transforms import check_transforms

T = TypeVar("T")

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
DEVICES_WITHOUT_FP64 = ("npu",)
_INT64 = torch.iinfo(torch.int64)
_LARGEST = sys.float_info.max


class Options(NamedTuple):
    """The arguments of a public function beside its first tensors."""

    reduction: str = "none"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    group: dist.ProcessGroup | None = None
    shard: VocabShard | None = None
    inplace_backward: bool = False
    normalizer: Tensor | float | None = None
    scale: Tensor | float = 1.0
    softcap: float | None = None
    engine: str = "auto"
    collective: str = "auto"
    check: bool | None = None
    finite_logits: bool = False
    selected: Tensor | None = None


class Held(NamedTuple):
    """What messages call the tensor that holds this rank's part of the vocabulary."""

    name: str = "input"
    places: str = "columns"
    part: str = "logits[..., {start}:{stop}]"


class Outputs(NamedTuple):
    """Which optional outputs a public function asks for."""

    entropy: bool = False
    argmax: bool = False
    squares: bool = False
    ignored_rows: bool = False


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
        # An ordinary call asks for its engine next, before it does anything.
        if not ordinary(input) and (input.is_meta or _served_by_an_engine(input)):
            select(options.engine, input)
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
    if forward_ad._current_level < 0 and ordinary(*(v for v in values if isinstance(v, Tensor))):
        return input, target, weight, options
    names = ("input", "target", "weight", "normalizer", "scale", "selected")
    named = dict(zip(names, values, strict=True))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    rank, world = group_rank_and_size(options.group)
    where = _where(rank, world)
    check_kinds(tensors, where)
    check_transforms(tensors, world == 1, where)
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
    where = _where(rank, world)
    _check_normalizer(options.normalizer, options.reduction, where)
    _check_tensors(input, target, weight, where)
    number: object = scale
    if isinstance(scale, Tensor):
        _check_scale_tensor(scale, where)
        number = number_of(scale)
        if number is None:
            _check_row_scale(scale, input, target, where)
    if options.selected is not None:
        _check_selected(options.selected, input, target, where)
    request = _once(
        _request, input.shape[-1], rank, world, shard, options.normalizer is not None, number,
        held, *outputs, options.finite_logits, options.reduction, options.ignore_index,
        options.label_smoothing, options.lse_square_scale, options.softcap, options.engine,
        options.collective, options.check,
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


def _where(rank: int, world: int) -> str:
    """What an error adds where ranks are several."""
    return f" (rank {rank} of the group)" if world > 1 else ""


def _request(
    columns: int,
    rank: int,
    world: int,
    shard: VocabShard | None,
    normalized: bool,
    scale: float | None,
    held: Held,
    entropy: bool,
    argmax: bool,
    squares: bool,
    ignored_rows: bool,
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
    """Everything of a call but its tensors, checked. ``scale`` is None where each row has one."""
    where = _where(rank, world)
    _check_plain(
        reduction, ignore_index, label_smoothing, lse_square_scale, softcap, engine, collective,
        finite_logits, check, where,
    )  # fmt: skip
    if scale is not None:
        _check_scale(scale, where)
    here = _resolve_shard(columns, shard, rank, world, where, held)
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
        row_scale=scale is None,
        finite_logits=finite_logits,
        ignore_index=_plain_int(ignore_index),
        scale=1.0 if scale is None else float(scale),
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


def check_numbers(options: Options, where: str = "") -> None:
    """Raise for an option whose value alone is wrong, whatever the tensors."""
    _check_plain(
        options.reduction, options.ignore_index, options.label_smoothing, options.lse_square_scale,
        options.softcap, options.engine, options.collective, options.finite_logits, options.check,
        where,
    )  # fmt: skip
    _check_scale(options.scale, where)
    _check_normalizer(options.normalizer, options.reduction, where)


def _check_plain(
    reduction: object,
    ignore_index: object,
    label_smoothing: object,
    lse_square_scale: object,
    softcap: object,
    engine: object,
    collective: object,
    finite_logits: object,
    check: object,
    where: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}{where}"
        )
    if not _is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}{where}")
    if not _INT64.min <= ignore_index <= _INT64.max:
        raise ValueError(
            f"ignore_index must be an int64, got {ignore_index}{where}; targets are ids in "
            "int64 or int32, and none can have this value"
        )
    if not is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}{where}")
    if not is_number(lse_square_scale) or not _is_finite(lse_square_scale):
        raise ValueError(
            "the z-loss scale (lse_square_scale) must be a finite number, got "
            f"{lse_square_scale!r}{where}"
        )
    _check_softcap(softcap, where)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}{where}")
    if collective not in COLLECTIVES:
        raise ValueError(
            f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}{where}"
        )
    if not isinstance(finite_logits, bool):
        raise TypeError(f"finite_logits must be True or False, got {finite_logits!r}{where}")
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check must be True, False or None, got {check!r}{where}")


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


def _check_scale(scale: object, where: str) -> None:
    if isinstance(scale, Tensor):
        _check_scale_tensor(scale, where)
        scale = number_of(scale)
        if scale is None:
            return
    if not is_number(scale) or not _is_finite(scale):
        raise ValueError(
            f"scale must be a finite number, got {scale!r}{where}; it multiplies the "
            "logits (1 / temperature)"
        )


def _check_scale_tensor(scale: Tensor, where: str) -> None:
    if scale.is_complex() or scale.is_quantized or scale.dtype == torch.bool:
        raise TypeError(f"scale must hold real numbers, got {scale.dtype}{where}")


def _check_row_scale(scale: Any, input: Tensor, target: Tensor, where: str) -> None:
    if scale.dim() > 0 and scale.shape != target.shape:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, but target {tuple(target.shape)}{where}: one "
            "number for each row of logits, or one for all"
        )
    if scale.device != input.device:
        raise ValueError(f"scale is on {scale.device}, input on {input.device}{where}")


def _check_selected(selected: Any, input: Tensor, target: Tensor, where: str) -> None:
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected must be a tensor or None, got {type(selected).__name__}{where}")
    if selected.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"selected must hold class ids in int64 or int32, got {selected.dtype}{where}"
        )
    if selected.dim() != target.dim() + 1 or selected.shape[:-1] != target.shape:
        raise ValueError(
            f"selected has shape {tuple(selected.shape)}, but target {tuple(target.shape)}{where}: "
            "K ids for each row, in a last dimension of their own"
        )
    if selected.device != input.device:
        raise ValueError(f"selected is on {selected.device}, input on {input.device}{where}")


def _check_softcap(softcap: object, where: str) -> None:
    if softcap is None:
        return
    if not is_number(softcap) or not _is_finite(softcap) or softcap < 0:
        raise ValueError(
            f"softcap must be a finite number of at least 0, or None, got {softcap!r}{where}; the "
            "logits become softcap * tanh(logits / softcap), and stay as they are for 0 and None"
        )


def _check_normalizer(normalizer: object, reduction: str, where: str) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer replaces the denominator of reduction='mean', got reduction="
            f"{reduction!r}{where}; leave it out, or divide the result"
        )
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must hold one number, got shape {tuple(normalizer.shape)}{where}"
            )
        if normalizer.is_complex() or normalizer.is_quantized or normalizer.dtype == torch.bool:
            raise TypeError(f"normalizer must be a real number, got {normalizer.dtype}{where}")
    elif not is_number(normalizer):
        raise TypeError(
            f"normalizer must be a scalar tensor or a number, got {normalizer!r}{where}"
        )
    elif not _fits_a_float(normalizer):
        raise ValueError(f"normalizer is an int that no float can hold{where}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Python's and NumPy's numbers, and a symbol of the compiler; no bool."""
    return _is_int(value) or isinstance(value, (float, np.floating, torch.SymFloat))


def _is_finite(value: float) -> bool:
    """While compiling, a symbol is as good as finite: the operator looks at the number it gets."""
    return torch.compiler.is_compiling() or (_fits_a_float(value) and math.isfinite(value))


def _fits_a_float(value: float) -> bool:
    """False of ints beyond the largest float, which have no value there, not even inf."""
    return not isinstance(value, int) or abs(value) <= _LARGEST


def _plain_int(value: int) -> int:
    """NumPy's integers as Python's; a symbol of the compiler stays one."""
    return value if isinstance(value, torch.SymInt) else int(value)


def _check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, where: str) -> None:
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{where}")
    if input.dtype not in LOGITS_DTYPES:
        raise TypeError(f"input must be fp16, bf16, fp32 or fp64 logits, got {input.dtype}{where}")
    if input.dtype == torch.float64 and input.device.type in DEVICES_WITHOUT_FP64:
        raise ValueError(
            f"input is float64, which {input.device.type} devices do not compute in (torch takes "
            f"fp32 in its place, without a word){where}; use input.float(), or CPU tensors for "
            "fp64 checks"
        )
    if input.dim() < 1:
        raise ValueError(f"input must have shape [..., C_r], got a 0-d tensor{where}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"target must hold class ids in int64 or int32, got {target.dtype}{where}; class "
            "probabilities are not supported"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but input {tuple(input.shape)} needs "
            f"{tuple(input.shape[:-1])}{where}: one id for each row of logits, vocabulary last"
        )
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, input on {input.device}{where}")
    if weight is None:
        return
    if weight.dim() != 1 or weight.dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"weight must be a floating point vector [vocab_size] (fp16, bf16, fp32 or fp64), got "
            f"{weight.dtype} of shape {tuple(weight.shape)}{where}"
        )
    if weight.device != input.device:
        raise ValueError(f"weight is on {weight.device}, input on {input.device}{where}")
    if weight.requires_grad:
        raise ValueError(f"weight gets no gradient: pass weight.detach(){where}")


def _resolve_shard(
    columns: int, shard: VocabShard | None, rank: int, world: int, where: str, held: Held
) -> VocabShard:
    name, places = held.name, held.places
    if shard is None:
        if columns == 0:
            raise ValueError(
                f"{name} has no {places}{where}; an empty shard must be told: "
                "shard=VocabShard(start, start, vocab_size)"
            )
        return VocabShard(rank * columns, (rank + 1) * columns, world * columns)
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}{where}")
    if columns < shard.size:
        raise ValueError(
            f"{name} has {columns} {places} but shard holds the {shard.size} ids "
            f"[{shard.start}, {shard.stop}){where}; the shard must be the one that the head was "
            "split by"
        )
    if world == 1 and shard.size != shard.vocab_size:
        raise ValueError(
            f"shard holds ids [{shard.start}, {shard.stop}) of vocab_size={shard.vocab_size}, but "
            "there is one rank only; pass group= with the ranks that hold the others"
        )
    if columns == shard.vocab_size and shard.size < shard.vocab_size:
        part = held.part.format(start=shard.start, stop=shard.stop)
        raise ValueError(
            f"{name} looks gathered: it has all vocab_size={shard.vocab_size} {places}, but shard "
            f"holds [{shard.start}, {shard.stop}){where}; pass this rank's part, {part}"
        )
    return shard


def check_overwritable(input: Tensor, where: str) -> None:
    """In-place backward writes into the logits' memory: it must be theirs, and hold them once."""
    way_out = "use inplace_backward=False, or pass the output of an operation"
    if not torch.compiler.is_compiling():
        check_not_overwritten(input, where)
    if input.is_leaf:
        raise ValueError(
            f"inplace_backward=True would overwrite input, which is a leaf{where}; {way_out}"
        )
    if torch.compiler.is_compiling():
        return
    base = input._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            f"inplace_backward=True would overwrite the leaf that input is a view of{where}; "
            f"{way_out}"
        )
    if _overlaps_itself(input):
        raise ValueError(
            f"inplace_backward=True needs logits whose elements do not share memory, got shape "
            f"{tuple(input.shape)} with strides {input.stride()}{where}; use "
            "inplace_backward=False, or input.contiguous()"
        )


def _overlaps_itself(x: Tensor) -> bool:
    """Whether some element may share memory with another (sure to be False for dense views)."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False
