"""Which kinds of tensors the loss takes: what has memory of its own, what gets some, what has none.

    MEMORY        plain, strided, owns its numbers: what engines take
    SETTLES       becomes that: the result of a collective that is under way is waited for, a
                  pending negation is carried out, zeros that exist in name only are written
    TRACED        a shape without numbers (meta, fake, functional): served by custom operators
    TRANSFORMED   seen through torch.func or a batched gradient: served by plain torch operations
    FOREIGN       anything else (sparse, nested, quantised, other subclasses): refused by name

The kind is read from the tensor's dispatch keys, once for each set of them.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import torch
from torch import Tensor


class Kind(enum.Enum):
    """See the head of this file."""

    MEMORY = enum.auto()
    SETTLES = enum.auto()
    TRACED = enum.auto()
    TRANSFORMED = enum.auto()
    FOREIGN = enum.auto()


# What the names of dispatch keys say, in this order; a tensor that none of them fits has memory.
_BY_NAME = (
    (Kind.FOREIGN, re.compile(r"Sparse|Mkldnn|Nested|Quantized|Conjugate")),
    (Kind.TRANSFORMED, re.compile(r"Batched|FuncTorch")),
    (Kind.TRACED, re.compile(r"^Meta$|^Functionalize$")),
    (Kind.SETTLES, re.compile(r"^Negative$|^ZeroTensor$")),
)
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_modes_active = torch._C._len_torch_dispatch_stack


def has_memory(value: Tensor) -> bool:
    """Whether ``value`` is sure to be of kind MEMORY, asked the cheapest way there is.

    What has no storage refuses to tell an address, or tells 0; that of an empty tensor is 0 too.
    """
    try:
        return (
            type(value) in _PLAIN
            and value.data_ptr() != 0
            and not value.is_neg()
            and not value.is_nested
        )
    except RuntimeError:
        return False


def ordinary(*values: Tensor | None) -> bool:
    """All of kind MEMORY, and no mode that intercepts operators: the case that must cost nothing.

    False says that the other functions here must be asked.
    """
    if _modes_active():
        return False
    for value in values:
        if value is None or has_memory(value):
            continue
        if kind_of(value) is not Kind.MEMORY or value.numel() > 0:
            return False
    return True


def kind_of(value: Tensor) -> Kind:
    """What ``value`` is to the loss."""
    keys = torch._C._dispatch_keys(value).raw_repr()
    if keys not in _by_keys:
        _by_keys[keys] = _of_keys(value)
    known = _by_keys[keys]
    return _of_subclass(value) if known is None else known


_by_keys: dict[int, Kind | None] = {}
"""None: a subclass with dispatch rules of its own, of which the type says more"""


def _of_keys(value: Tensor) -> Kind | None:
    names = re.findall(r"\w+", str(torch._C._dispatch_key_set(value)))[1:]
    for kind, pattern in _BY_NAME:
        if any(pattern.search(name) for name in names):
            return kind
    return None if "Python" in names else Kind.MEMORY


def _of_subclass(value: Tensor) -> Kind:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(value, (FakeTensor, FunctionalTensor)):
        return Kind.TRACED
    return Kind.SETTLES if _is_under_way(value) else Kind.FOREIGN


def _is_under_way(value: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return isinstance(value, AsyncCollectiveTensor)


# Settling


class _Settle(torch.autograd.Function):
    """The same numbers in memory of their own; the gradient goes back as it came."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _numbers(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _numbers(value: Tensor) -> Tensor:
    if _is_under_way(value):
        waited: Tensor = value.trigger_wait()  # type: ignore[attr-defined]
        return waited.detach()  # the caller's object stays as it is
    if value.is_neg():
        return value.resolve_neg()
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


def settled(value: Tensor) -> Tensor:
    """``value``, or the same in memory of its own where it only waits to be put there."""
    if torch.compiler.is_compiling() or not isinstance(value, Tensor):
        return value
    if kind_of(value) is not Kind.SETTLES:
        return value
    if value.requires_grad and torch.is_grad_enabled():
        out: Tensor = _Settle.apply(value)  # type: ignore[no-untyped-call]
        return out
    return _numbers(value)


# Tracing


def _mode(key: str) -> Any:
    if not _modes_active():
        return None
    return torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, key))


def traced(logits: Tensor) -> bool:
    """Whether torch follows operators here, so that memory must not be written behind its back."""
    if torch.compiler.is_compiling() or kind_of(logits) is Kind.TRACED:
        return True
    return any(_mode(key) is not None for key in ("FAKE", "PROXY", "FUNCTIONAL"))


def without_numbers(value: object) -> bool:
    """Whether a call on ``value`` only finds shapes: it exchanges nothing, on any rank.

    Asked before errors are told to other ranks: of other subclasses nothing is read, it may raise.
    """
    if torch.compiler.is_compiling() or _mode("FAKE") is not None:
        return True
    if type(value) in _PLAIN:
        return False  # on meta as well: no group serves it, so every rank raises
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


# Refusing


def check_kinds(arguments: dict[str, Tensor], where: str) -> None:
    """Raise for tensors that the loss cannot serve, or not together.

    TypeError for a kind; ValueError for a mixture of tensors with numbers and without.
    """
    kinds = {name: kind_of(value) for name, value in arguments.items()}
    for name, kind in kinds.items():
        if kind is Kind.FOREIGN:
            raise TypeError(_foreign(name, arguments[name], where))
        if kind is Kind.MEMORY and _is_freed(arguments[name]):
            raise ValueError(_no_memory(name, arguments[name], where))
    if Kind.TRACED in kinds.values() or _mode("FAKE") is not None:
        _check_mixture(arguments, where)


def _foreign(name: str, value: Any, where: str) -> str:
    what, way_out = type(value).__name__, f"pass a plain tensor as {name}"
    if type(value) in (Tensor, torch.nn.Parameter):
        what, way_out = f"a tensor of layout {value.layout}", f"use {name}.to_dense()"
        if value.is_quantized:
            what, way_out = f"quantized ({value.dtype})", f"use {name}.dequantize()"
        elif value.is_conj():
            what, way_out = f"complex ({value.dtype})", f"use {name}.real"
    elif hasattr(value, "full_tensor"):
        way_out = f"use {name}.full_tensor() or {name}.to_local()"
    if value.is_nested:
        what, way_out = "a nested tensor", f"pass its rows as one tensor, {name}.values()"
    return f"{name} must be a plain tensor with memory of its own, got {what}{where}; {way_out}"


def _check_mixture(tensors: dict[str, Tensor], where: str) -> None:
    """Fake with fake, meta with meta: a shape cannot be counted with numbers."""
    from torch._subclasses.fake_tensor import FakeTensor

    mode = _mode("FAKE")
    fakes = [name for name, value in tensors.items() if isinstance(value, FakeTensor)]
    if (fakes or mode is not None) and not (mode is not None and mode.allow_non_fake_inputs):
        why = f"{', '.join(fakes)} fake, without any" if fakes else "FakeTensorMode on"
        for name, value in tensors.items():
            if kind_of(value) in (Kind.MEMORY, Kind.SETTLES):
                raise ValueError(
                    f"{name} is a tensor with numbers, but {why}{where}; make {name} fake as well, "
                    f"with fake_mode.from_tensor({name})"
                )
    on_meta = [name for name, value in tensors.items() if value.is_meta]
    for name, value in tensors.items():
        if on_meta and not value.is_meta:
            raise ValueError(
                f"{', '.join(on_meta)} on meta, where no tensor holds numbers, but {name} on "
                f"{value.device}{where}; use {name}.to('meta'), or tensors with numbers for all"
            )


def require_memory(value: Tensor, name: str = "input") -> None:
    """The last gate before an engine, which reads addresses; also of what hooks hand back."""
    if has_memory(value):
        return
    if kind_of(value) is not Kind.MEMORY or _is_freed(value):
        raise ValueError(_no_memory(name, value, ""))


def _is_freed(value: Tensor) -> bool:
    return value.numel() > 0 and value.data_ptr() == 0


def _no_memory(name: str, value: Tensor, where: str) -> str:
    return (
        f"{name} of shape {tuple(value.shape)} and type {type(value).__name__} has no memory that "
        "could be read (was its storage freed, or did a hook for saved tensors hand back another "
        f"kind?){where}; pass a plain tensor that holds its numbers until backward is over"
    )
