"""Device "npu" with the host's memory: every aten kernel of torch_npu becomes the CPU's kernel.

torch_npu keeps its dispatcher entries, autograd formulas, caching allocator, streams and process
group. What it would compute on the card is computed by the CPU kernel of the same operator, on CPU
tensors that lie on the very memory of the npu tensors. Whatever has no CPU kernel stays with
torch_npu, asks CANN, and raises there.

site/sitecustomize.py calls ``install`` in every process that the command starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from .ledger import entered

# Storage and shape: torch_npu's own kernels, which only move or look at memory.
OWN_KERNELS = {
    "_has_compatible_shallow_copy_type",
    "_pin_memory",
    "_reshape_alias",
    "_to_copy",
    "as_strided",
    "as_strided_",
    "contiguous",
    "empty",
    "empty_like",
    "empty_strided",
    "empty_with_format",
    "empty_with_swapped_memory",
    "is_pinned",
    "record_stream",
    "resize_",
    "resize_as_",
    "set_",
    "unfold",
    "view",
    "view_as_complex",
    "view_as_real",
}
COMPOSED = "CompositeImplicitAutograd"
CPU_KEYS = (
    "CPU",
    COMPOSED,
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)
ATTENTION = "scaled_dot_product_attention"

_libraries: list[torch.library.Library] = []


def install() -> None:
    """Puts the CPU behind device npu in this process; again is harmless."""
    import torch_npu  # noqa: F401

    if _libraries:
        return
    from . import operators

    # torch before 2.8 lets a kernel be replaced without being asked.
    again = (
        {"allow_override": True}
        if "allow_override" in signature(torch.library.Library.impl).parameters
        else {}
    )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
        aten = torch.library.Library("aten", "IMPL")
        _libraries.append(aten)
        for name in torch._C._dispatch_get_all_op_names():
            namespace, _, aten_name = name.partition("::")
            if namespace != "aten":
                continue
            if _is_computed(name):
                aten.impl(aten_name, _kernel(aten_name), "PrivateUse1", **again)
            # An operator that torch composes of others, but torch_npu answers by one of CANN.
            if _has_kernel(name, "AutogradPrivateUse1") and _has_kernel(name, COMPOSED):
                composition = (
                    _attention if aten_name == ATTENTION else _operator(aten_name).decompose
                )
                aten.impl(aten_name, composition, "AutogradPrivateUse1", **again)
        npu = torch.library.Library("npu", "IMPL")
        _libraries.append(npu)
        for name, kernel in operators.KERNELS.items():
            if not _exists(f"npu::{name}"):  # torch_npu has one of two names
                continue
            npu.impl(name, entered(name, kernel), "PrivateUse1", **again)


def cpu_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the memory of an npu tensor."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), size
    )
    alias = torch.empty(0, dtype=tensor.dtype)
    return alias.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of CPU tensors as a kernel of npu tensors; its results are copied over."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(args, kwargs)
        cpu_kwargs = {name: _to_cpu(value) for name, value in kwargs.items()}
        return _to_npu(function(*_to_cpu(args), **cpu_kwargs), device)

    return kernel


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Torch's own composition would choose a fused kernel of the CPU."""
    math = torch.ops.aten._scaled_dot_product_attention_math.default
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    return math(*arguments, scale=scale, enable_gqa=enable_gqa)[0]


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return cpu_alias(value)
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return [_to_cpu(item) for item in value]
    return value


def _to_npu(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to_npu(item, device) for item in value)
    if not isinstance(value, torch.Tensor) or value.device.type == "npu":
        return value
    result = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    if value.numel():
        cpu_alias(result).copy_(value)
    return result


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor) and item.device.type == "npu":
                return item.device
            if isinstance(item, torch.device) and item.type == "npu":
                return item
    return torch.device("npu", torch.get_device_module("npu").current_device())


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def _exists(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(name))


def _operator(aten_name: str) -> Any:
    base, _, overload = aten_name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _is_computed(name: str) -> bool:
    """Whether torch_npu computes this aten operator on the card, and the CPU can too."""
    aten_name = name.removeprefix("aten::")
    if aten_name.partition(".")[0] in OWN_KERNELS or not _has_kernel(name, "PrivateUse1"):
        return False
    if not any(_has_kernel(name, key) for key in CPU_KEYS):
        return False
    returns = _operator(aten_name)._schema.returns
    return not any(value.alias_info and not value.alias_info.is_write for value in returns)


def _kernel(aten_name: str) -> Callable[..., Any]:
    operator = _operator(aten_name)
    written = [
        (index, argument.name)
        for index, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    kernel = _writing_kernel(operator, written) if written else on_cpu(operator)
    return entered(aten_name, kernel, written)


def _writing_kernel(operator: Any, written: list[tuple[int, str]]) -> Callable[..., Any]:
    """An in-place or out= operator: the CPU kernel writes through the aliases."""
    returned = len(operator._schema.returns)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        cpu_args = _to_cpu(args)
        cpu_kwargs = {name: _to_cpu(value) for name, value in kwargs.items()}
        operator(*cpu_args, **cpu_kwargs)
        targets = []
        for index, name in written:
            positional = index < len(args)
            target = args[index] if positional else kwargs[name]
            _follow(operator, target, cpu_args[index] if positional else cpu_kwargs[name])
            targets.append(target)
        return None if returned == 0 else targets[0] if returned == 1 else tuple(targets)

    return kernel


def _follow(operator: Any, npu: Any, cpu: Any) -> None:
    """Takes over the shape of an empty out= tensor that the CPU kernel has resized."""
    if isinstance(npu, (list, tuple)):
        for one_npu, one_cpu in zip(npu, cpu, strict=True):
            _follow(operator, one_npu, one_cpu)
    elif isinstance(npu, torch.Tensor) and npu.size() != cpu.size():
        if npu.numel():
            raise RuntimeError(f"npu_sim: {operator} changes a shape in place, which is not made")
        npu.resize_(cpu.size())
        cpu_alias(npu).copy_(cpu)
