"""Whether logits of narrow hidden states are made in fp32: asked of the device, once.

Rounding logits to bf16 rules the error of confident rows (p of the target near 1): a gradient from
fp32 logits is seven times as exact there, for 6 bytes an element of the chunk instead of 2. That
takes a product with a wider result, ``torch.mm(out_dtype=)``, which some devices have. On a CPU it
would take products in fp32, and nothing is gained.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .kept import is_narrow


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def makes_wide_logits(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device multiplies such matrices into fp32; asks it once, by a small product."""
    return _asked(device_type, dtype)


@functools.cache
def _asked(device_type: str, dtype: torch.dtype) -> bool:
    if device_type in ("cpu", "meta") or not is_narrow(dtype):
        return False
    try:
        with _disable_current_modes():  # a compiler that asks would get shapes for an answer
            ones = torch.ones(16, 16, dtype=dtype, device=device_type)
            out = torch.empty(16, 16, dtype=torch.float32, device=device_type)
            wide_product(ones, ones, out)
            return bool((out == 16).all())
    except Exception:  # a missing overload, a missing kernel, a device that is not here
        return False


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in fp32, in ``out``."""
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
