"""The one rule of how exact a result must be; no test has a tolerance of its own.

    |actual_i - exact_i|  <=  2 E  +  ulp_i

    exact   the fp64 result
    naive   the same quantity by the textbook formula in plain torch, in fp32 (fp16 and bf16 logits
            are upcast), never rounded to the output's dtype
    E       the largest error of ``naive`` against ``exact`` over all elements of the tensor (a
            single element of the naive result may be right by luck)
    ulp_i   one unit in the last place of the output's dtype at |exact_i|: the distance between two
            neighbouring numbers of that dtype there (of its subnormals below the smallest normal)

So a small probability in a bf16 gradient must be right in its own last place, not in that of the
largest element. Where ``exact`` is not finite, ``actual`` must hold the same infinity or NaN.

A reduced loss is one element, whose naive error may be none at all by luck. It inherits the
errors of its rows: E is then at least ``rows_error``, the E of the rows (times N for a sum of N).

An fp64 output cannot be measured against anything more exact, and ``exact`` errs as much as it
does. There E is the error of the naive fp32 result times eps(fp64) / eps(fp32), or two units in
the last place of the largest element, and half as much again for ``exact`` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at every |value|, in fp64."""
    info = torch.finfo(dtype)
    size = value.detach().double().abs().clamp(min=info.smallest_normal)
    power_of_two = size / (2 * torch.frexp(size).mantissa)  # the mantissa lies in [0.5, 1)
    return power_of_two * info.eps


def naive_error(exact: Tensor, naive: Tensor, dtype: torch.dtype) -> float:
    """E for an output of ``dtype``, among the elements where both results are finite."""
    errors = (naive.detach().double() - exact.detach()).abs()
    errors = errors[exact.isfinite() & naive.isfinite()]
    largest = float(errors.max()) if errors.numel() else 0.0
    if dtype != torch.float64:
        return largest
    if naive.dtype == torch.float32:
        largest *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    finite = exact.detach()[exact.isfinite()].abs()
    floor = 2 * float(ulp(finite.max(), dtype)) if finite.numel() else 0.0
    return 1.5 * max(largest, floor)


def assert_close(
    actual: Tensor,
    exact: Tensor,
    naive: Tensor,
    what: str = "result",
    dtype: torch.dtype | None = None,
    rows_error: float = 0.0,
) -> None:
    """Fail unless ``actual`` obeys the rule of this module.

    ``exact`` is fp64; ``what`` names the quantity in the message; ``dtype`` is the output's, if
    it is not ``actual``'s own (the last place of a result that was rounded on its way);
    ``rows_error`` is what a reduced result inherits from its rows.
    """
    actual = actual.detach().cpu()
    assert exact.dtype == torch.float64, f"{what}: exact must be fp64, got {exact.dtype}"
    assert actual.shape == exact.shape == naive.shape, (
        f"{what}: shapes {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(naive.shape)}"
    )
    if exact.numel() == 0:
        return
    got, want = actual.double(), exact.detach()
    finite = want.isfinite()
    same = torch.where(want.isnan(), got.isnan(), got == want)
    assert bool(same[~finite].all()), f"{what}: not the same infinities and NaNs as the fp64 result"
    want = torch.where(finite, want, 0.0)
    got = torch.where(finite, got, 0.0)
    dtype = dtype or actual.dtype
    largest = max(naive_error(exact, naive, dtype), rows_error)
    allowed = 2 * largest + ulp(want, dtype)
    error = (got - want).abs()
    wrong = ~(error <= allowed)
    if bool(wrong.any()):
        worst = int(torch.where(error.isnan(), torch.inf, error / allowed).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; element {worst} is "
            f"{got.flatten()[worst].item()!r}, exact {want.flatten()[worst].item()!r}, "
            f"error {error.flatten()[worst].item():.3e} > {allowed.flatten()[worst].item():.3e}"
        )
