"""Arguments of the fused head: shapes, dtypes, and how many rows of logits exist at a time.

What it shares with the logits-level functions is checked by theirs, on a stand-in for logits that
has their shape and no memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..arguments import Options, Outputs
from ..checks import check_group, prepare
from ..kinds import Kind, check_kinds, kind_of, settled, traced
from ..option_checks import is_number
from ..request import LinearRequest, is_on
from ..shard import Held, group_rank_and_size, rank_suffix
from ..tensor_checks import LOGITS_DTYPES
from .call import Statics, bytes_of_a_logit
from .chunks import least_mib, rows_of_a_chunk
from .straight import goes_straight
from .wide import makes_wide_logits

GRADIENTS = ("auto", "forward", "recompute")
HIDDEN_GRADIENTS = ("summed", "partial")
_HEAD = Held("linear_weight", "rows", "linear_weight[{start}:{stop}]")


class LinearOptions(NamedTuple):
    """The arguments that only the fused head has, beside its tensors."""

    gradient: str = "auto"
    hidden_gradient: str = "summed"
    sequence_parallel: bool = False
    scratch_mib: float | None = None
    drop_ignored: bool = False


class LinearTensors(NamedTuple):
    """The tensors of a call."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    normalizer: Tensor | float | None


def admit_linear(tensors: LinearTensors, options: Options) -> tuple[LinearTensors, Options]:
    """The same with memory of their own, where they only wait to get some.

    Raises as ``kinds.check_kinds`` and ``transforms.check_transforms`` do.
    """
    if torch.compiler.is_compiling():
        return tensors, options
    check_group(options.group)
    rank, world = group_rank_and_size(options.group)
    where = rank_suffix(rank, world)
    of_options = {"scale": options.scale, "selected": options.selected}
    given = {**tensors._asdict(), **of_options}
    named = {n: v for n, v in given.items() if isinstance(v, Tensor)}
    check_kinds(named, where)
    transforms.check_transforms(named, world == 1, where)
    memory: dict[str, Any] = {name: settled(value) for name, value in named.items()}
    options = options._replace(**{n: memory.pop(n) for n in of_options if n in memory})
    return tensors._replace(**memory), options


def prepare_linear(
    tensors: LinearTensors, options: Options, linear: LinearOptions, outputs: Outputs
) -> Statics:
    """Check everything static and say what the primitive shall do.

    Raises TypeError or ValueError, or RuntimeError where an engine is asked for that is not
    available.
    """
    check_group(options.group)
    rank, world = group_rank_and_size(options.group)
    where = rank_suffix(rank, world)
    _check_words(linear, where)
    _check_tensors(tensors, where)
    _check_target(tensors.input, tensors.target, linear, world, where)
    if linear.sequence_parallel and linear.hidden_gradient == "partial":
        raise ValueError(
            "hidden_gradient='partial' leaves the gradient of the whole sequence unsummed, which "
            f"nobody holds with sequence_parallel=True{where}; use hidden_gradient='summed'"
        )
    columns = tensors.linear_weight.shape[0]
    logits = tensors.input.detach().new_empty(()).expand(*tensors.target.shape, columns)
    shared = prepare(logits, tensors.target, tensors.weight, options, outputs, _HEAD)
    biased, split = tensors.linear_bias is not None, linear.sequence_parallel and world > 1
    request = LinearRequest(*(*shared.scalars(), biased, split, linear.drop_ignored))
    share = -(-request.vocab_size // world)
    device, dtype = tensors.input.device.type, tensors.input.dtype
    wide = makes_wide_logits(device, dtype)
    itemsize = bytes_of_a_logit(dtype, wide)
    chunk = rows_of_a_chunk(share, itemsize, device, linear.scratch_mib, where)
    if linear.sequence_parallel and chunk < world:
        raise ValueError(
            f"scratch_mib={linear.scratch_mib} has room for {chunk} rows of logits, but with "
            f"sequence_parallel=True a portion has one of each of the {world} ranks{where}; pass "
            f"at least {least_mib(world * share * itemsize)}, or None for the default"
        )
    recording = torch.is_grad_enabled()
    frozen = recording and tensors.input.requires_grad != tensors.linear_weight.requires_grad
    straight = linear.gradient != "forward" and options.selected is None
    straight = straight and goes_straight(tensors.input, frozen, request, share)
    return Statics(
        request,
        chunk,
        linear.scratch_mib,
        linear.hidden_gradient == "partial",
        wide,
        sums_hidden=torch.is_grad_enabled()
        and tensors.input.requires_grad
        and linear.hidden_gradient == "summed",
        straight=straight,
    )


def seen_through_transforms(tensors: LinearTensors, options: Options) -> bool:
    """Whether torch.func stands between the caller and the numbers: on one rank, whole logits."""
    if torch.compiler.is_compiling():
        return False
    given = (*tensors, options.scale, options.selected)
    return transforms.active() or any(
        isinstance(x, Tensor) and kind_of(x) is Kind.TRANSFORMED for x in given
    )


def in_forward(
    tensors: LinearTensors,
    options: Options,
    linear: LinearOptions,
    return_zloss: bool,
    rows_shared: bool,
    straight: bool = False,
) -> bool:
    """Whether this call computes gradients together with the loss.

    ``rows_shared``: other ranks hold other rows, so that denominators are summed over them.
    ``straight``: the engine makes no logits, in backward either.

    Raises ValueError where that is asked for and cannot be.
    """
    z_apart = return_zloss and is_on(options.lse_square_scale)
    serves = options.reduction != "none" and not z_apart
    if linear.gradient == "forward" and not serves:
        why = "the z-loss has a gradient of its own" if z_apart else "every row has one of its own"
        where = rank_suffix(*group_rank_and_size(options.group))
        raise ValueError(
            f"gradient='forward' needs one incoming gradient, but with "
            f"{'return_zloss=True' if z_apart else 'reduction=none'} {why}{where}; use "
            "gradient='auto' or 'recompute'"
        )
    auto = linear.gradient == "auto" and serves and tensors.input.dtype != torch.float16
    auto &= not straight
    if rows_shared and traced(tensors.input):  # no operator sums in the middle of it
        return False
    leaves = (tensors.input, tensors.linear_weight, tensors.linear_bias)
    # Asked here: inside an autograd.Function gradients are off, and its inputs still need some.
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    return needed and (auto or linear.gradient == "forward")


def _check_words(linear: LinearOptions, where: str) -> None:
    for name, allowed in (("gradient", GRADIENTS), ("hidden_gradient", HIDDEN_GRADIENTS)):
        value = getattr(linear, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{where}")
    for name in ("sequence_parallel", "drop_ignored"):
        if not isinstance(getattr(linear, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(linear, name)!r}{where}")
    if linear.drop_ignored and linear.sequence_parallel:
        raise ValueError(
            "drop_ignored=True leaves rows out that each rank holds whole, but with "
            f"sequence_parallel=True each has a part of them{where}; use one of the two"
        )
    scratch = linear.scratch_mib
    if scratch is not None and (not is_number(scratch) or not 0 < scratch < float("inf")):
        raise ValueError(
            f"scratch_mib must be a number of MiB above 0, or None, got {scratch!r}{where}"
        )


def _check_tensors(tensors: LinearTensors, where: str) -> None:
    hidden, head, bias = tensors.input, tensors.linear_weight, tensors.linear_bias
    for name, value in (("input", hidden), ("linear_weight", head), ("target", tensors.target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{where}")
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"input must hold fp16, bf16, fp32 or fp64 hidden states, got {hidden.dtype}{where}"
        )
    if hidden.dim() < 1:
        raise ValueError(f"input must have shape [..., H], got a 0-d tensor{where}")
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(head.shape)}, but input {tuple(hidden.shape)} needs "
            f"[V_r, {hidden.shape[-1]}]{where}: one row for each id of this rank"
        )
    named = [("linear_weight", head)]
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"linear_bias must be a tensor, got {type(bias).__name__}{where}")
        if bias.shape != head.shape[:1]:
            raise ValueError(
                f"linear_bias has shape {tuple(bias.shape)}, but linear_weight "
                f"{tuple(head.shape)} needs ({head.shape[0]},){where}"
            )
        named.append(("linear_bias", bias))
    for name, value in named:
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} is {value.dtype}, input {hidden.dtype}{where}; convert one of them, or "
                "call inside torch.autocast, which converts both"
            )
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, input on {hidden.device}{where}")


def _check_target(
    hidden: Tensor, target: Tensor, linear: LinearOptions, world: int, where: str
) -> None:
    wanted = tuple(hidden.shape[:-1])
    if linear.sequence_parallel:
        if hidden.dim() < 2:
            raise ValueError(
                f"sequence_parallel=True needs input [S / {world}, ..., H], got shape "
                f"{tuple(hidden.shape)}{where}"
            )
        wanted = (wanted[0] * world, *wanted[1:])
        if target.shape != wanted:
            raise ValueError(
                f"target has shape {tuple(target.shape)}, but input {tuple(hidden.shape)} is one "
                f"of {world} equal parts of {wanted}{where}: with sequence_parallel=True target is "
                "whole on every rank, and every rank's part has the same length"
            )
    if target.shape != wanted:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but input {tuple(hidden.shape)} needs "
            f"{wanted}{where}: one id for each hidden state"
        )
