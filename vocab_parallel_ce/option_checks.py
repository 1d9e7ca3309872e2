"""Options whose value alone is wrong, whatever the tensors: numbers, ranges, names, switches."""

from __future__ import annotations

import math
import sys
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from .arguments import Options
from .collectives import COLLECTIVES
from .engines import ENGINES
from .header import REDUCTIONS
from .scales import number_of

_INT64 = torch.iinfo(torch.int64)
_LARGEST = sys.float_info.max


def check_numbers(options: Options) -> None:
    """Raise for an option whose value alone is wrong, before there is a call with tensors."""
    check_plain(
        options.reduction, options.ignore_index, options.label_smoothing, options.lse_square_scale,
        options.softcap, options.engine, options.collective, options.inplace_backward,
        options.finite_logits, options.check, where="",
    )  # fmt: skip
    check_scale(options.scale, where="")
    check_normalizer(options.normalizer, options.reduction, where="")


def check_plain(
    reduction: object,
    ignore_index: object,
    label_smoothing: object,
    lse_square_scale: object,
    softcap: object,
    engine: object,
    collective: object,
    inplace_backward: object,
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
    for name, value in (("inplace_backward", inplace_backward), ("finite_logits", finite_logits)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}{where}")
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check must be True, False or None, got {check!r}{where}")


def check_scale(scale: object, where: str) -> None:
    if isinstance(scale, Tensor):
        check_scale_tensor(scale, where)
        scale = number_of(scale)
        if scale is None:
            return
    if not is_number(scale) or not _is_finite(scale):
        raise ValueError(
            f"scale must be a finite number, got {scale!r}{where}; it multiplies the "
            "logits (1 / temperature)"
        )


def check_scale_tensor(scale: Tensor, where: str) -> None:
    if scale.is_complex() or scale.is_quantized or scale.dtype == torch.bool:
        raise TypeError(f"scale must hold real numbers, got {scale.dtype}{where}")


def _check_softcap(softcap: object, where: str) -> None:
    if softcap is None:
        return
    if not is_number(softcap) or not _is_finite(softcap) or softcap < 0:
        raise ValueError(
            f"softcap must be a finite number of at least 0, or None, got {softcap!r}{where}; the "
            "logits become softcap * tanh(logits / softcap), and stay as they are for 0 and None"
        )


def check_normalizer(normalizer: object, reduction: str, where: str) -> None:
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


def is_number(value: object) -> TypeGuard[float]:
    """Python's and NumPy's numbers, and a symbol of the compiler; no bool."""
    return _is_int(value) or isinstance(value, (float, np.floating, torch.SymFloat))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    """While compiling, a symbol is as good as finite: the operator looks at the number it gets."""
    return torch.compiler.is_compiling() or (_fits_a_float(value) and math.isfinite(value))


def _fits_a_float(value: float) -> bool:
    """False of ints beyond the largest float, which have no value there, not even inf."""
    return not isinstance(value, int) or abs(value) <= _LARGEST


def plain_int(value: int) -> int:
    """NumPy's integers as Python's; a symbol of the compiler stays one."""
    return value if isinstance(value, torch.SymInt) else int(value)
