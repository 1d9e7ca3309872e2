"""The one rule of how exact a result must be; no check has a tolerance of its own.

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

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE_COUNTS_AT_MOST = 8.0


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at every |value|.

    Args:
        value: Any shape, any floating dtype.
        dtype: The floating dtype whose last place is meant.

    Returns:
        Tensor: fp64, of the shape of ``value``; below the smallest normal number of ``dtype`` it is
        the distance between its subnormals.

    Example:
        >>> ulp(torch.tensor([1.0, 4.0]), torch.bfloat16)
        tensor([0.0078, 0.0312], dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    size = value.detach().double().abs().clamp(min=info.smallest_normal)
    power_of_two = size / (2 * torch.frexp(size).mantissa)  # the mantissa lies in [0.5, 1)
    return power_of_two * info.eps


def naive_error(
    exact: Tensor,
    naive: Tensor,
    dtype: torch.dtype,
    *,
    least_ulps: float = 0.0,
    fp64_allowance: float = 1.5,
) -> float:
    """E of the rule: the largest error of the naive result, where both results are finite.

    The two options widen the rule for a check that runs once on an unknown machine, with a batch
    whose naive result may be right by luck. Tests, which choose their batches, use neither.

    Args:
        exact: The fp64 result, any shape.
        naive: The same by plain torch in fp32 (or in fp64), of the same shape.
        dtype: Of the result that is to be judged.
        least_ulps: E is at least this many units in the last place of fp32 at the largest |exact|.
        fp64_allowance: For an fp64 result: how many times E, because ``exact`` errs as well.

    Returns:
        float: E; 0.0 where no element is finite.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> naive_error(exact, torch.tensor([1.0, 2.25]), torch.float32)
        0.25
    """
    exact = exact.detach()
    errors = (naive.detach().double() - exact).abs()
    errors = errors[exact.isfinite() & naive.isfinite()]
    error = float(errors.max()) if errors.numel() else 0.0
    if dtype == torch.float64 and naive.dtype == torch.float32:
        error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return _granted(error, _largest(exact), dtype, least_ulps, fp64_allowance)


def error_with_device(on_host: float, on_device: float) -> float:
    """E where torch's own formulas were run on the device under test as well.

    A device may round more than a host does, but it may also be what is broken: its errors count
    for at most 8 times those of the host.

    Args:
        on_host: E of the naive result that the CPU computed.
        on_device: E of the naive result that the device computed.

    Returns:
        float: The larger one, within that bound.

    Example:
        >>> error_with_device(1e-7, 3e-7), error_with_device(1e-7, 1.0)
        (3e-07, 8e-07)
    """
    return max(on_host, min(on_device, DEVICE_COUNTS_AT_MOST * on_host))


@dataclass(frozen=True)
class Comparison:
    """A result beside the exact one, at the element that is worst beside what is allowed."""

    quantity: str
    """what was compared"""
    error: float
    """|actual - exact|; infinite where a NaN or an infinity stands that does not belong there"""
    allowed: float
    """2 E + ulp there"""

    @property
    def ratio(self) -> float:
        """Above 1 the result is wrong."""
        return self.error / self.allowed


def compare(
    quantity: str,
    actual: Tensor,
    exact: Tensor,
    error: float,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Measure a result by the rule, for a report; ``assert_close`` is for tests.

    Args:
        quantity: The name of what is compared.
        actual: The result, any dtype, any device.
        exact: The fp64 result on the CPU, of the same shape.
        error: E, see ``naive_error``.
        dtype: Whose last place is granted, if it is not that of ``actual``.

    Returns:
        Comparison: of the element that is worst in relation to what it may be off by.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> exact = torch.ones(1, dtype=torch.float64)
        >>> compare("loss", torch.tensor([1.25]), exact, error=0.25).ratio < 1
        True
    """
    if actual.shape != exact.shape:
        raise ValueError(f"{quantity} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
    if not exact.numel():
        return Comparison(quantity, 0.0, 1.0)
    off, allowed = _off(actual, exact, error, dtype)
    worst = int((off / allowed).argmax())
    return Comparison(quantity, float(off.flatten()[worst]), float(allowed.flatten()[worst]))


def assert_close(
    actual: Tensor,
    exact: Tensor,
    naive: Tensor,
    what: str = "result",
    dtype: torch.dtype | None = None,
    rows_error: float = 0.0,
) -> None:
    """Fail unless ``actual`` obeys the rule of this module.

    Args:
        actual: The result, any dtype, any device.
        exact: The fp64 result on the CPU.
        naive: The same by plain torch, see ``naive_error``. All three have one shape.
        what: Names the quantity in the message.
        dtype: The output's, if it is not that of ``actual`` (the last place of a result that was
            rounded on its way).
        rows_error: What a reduced result inherits from its rows: E is at least this.

    Raises:
        AssertionError: naming the worst element, its error and what was allowed.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_close(exact.float(), exact, exact.float(), "loss")
    """
    assert exact.dtype == torch.float64, f"{what}: exact must be fp64, got {exact.dtype}"
    assert actual.shape == exact.shape == naive.shape, (
        f"{what}: shapes {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(naive.shape)}"
    )
    if exact.numel() == 0:
        return
    dtype = dtype or actual.dtype
    error = max(naive_error(exact, naive, dtype), rows_error)
    off, allowed = _off(actual, exact, error, dtype)
    assert not bool((off[~exact.isfinite()] > 0).any()), (
        f"{what}: not the same infinities and NaNs as the fp64 result"
    )
    wrong = off > allowed
    if bool(wrong.any()):
        worst = int((off / allowed).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; element {worst} is "
            f"{float(actual.detach().cpu().flatten()[worst])!r}, "
            f"exact {exact.flatten()[worst].item()!r}, "
            f"error {off.flatten()[worst].item():.3e} > {allowed.flatten()[worst].item():.3e}"
        )


class Blocks:
    """The rule over a tensor that never exists whole: it is judged a block at a time.

    E is that of all blocks together, so nothing is judged before the last one was added.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> blocks = Blocks(torch.float32)
        >>> for part in exact.split(1):
        ...     blocks.add(part.float(), part, part.float())
        >>> blocks.within()
        True
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """``dtype`` is that of the result: fp32, or narrower."""
        self.dtype = dtype
        self.error = 0.0
        """the largest |actual - exact| so far"""
        self.naive_error = 0.0
        """E so far"""
        self.largest = 0.0
        """the largest |exact| so far"""
        self._beyond_ulp = 0.0

    def add(self, actual: Tensor, exact: Tensor, naive: Tensor) -> None:
        """One more block.

        Args:
            actual: The result, any shape.
            exact: The fp64 result on the CPU, of that shape.
            naive: The same by plain torch in fp32.
        """
        if not exact.numel():
            return
        off, last_place = _off(actual, exact, 0.0, self.dtype)
        self.error = max(self.error, float(off.max()))
        self._beyond_ulp = max(self._beyond_ulp, float((off - last_place).max()))
        self.naive_error = max(self.naive_error, naive_error(exact, naive, torch.float32))
        self.largest = max(self.largest, _largest(exact))

    def within(self, *, least_ulps: float = 0.0, rows_error: float = 0.0) -> bool:
        """Whether every element of every block obeys the rule.

        Args:
            least_ulps: See ``naive_error``.
            rows_error: What a reduced result inherits from its rows.
        """
        error = _granted(self.naive_error, self.largest, self.dtype, least_ulps)
        return self._beyond_ulp <= 2 * max(error, rows_error)


def _granted(
    error: float,
    largest: float,
    dtype: torch.dtype,
    least_ulps: float,
    fp64_allowance: float = 1.5,
) -> float:
    """E from the largest naive error and the largest |exact|."""
    size = torch.tensor(largest, dtype=torch.float64)
    if dtype == torch.float64:
        return fp64_allowance * max(error, 2 * float(ulp(size, dtype)) if largest else 0.0)
    return max(error, least_ulps * float(ulp(size, torch.float32)) if largest else 0.0)


def _largest(exact: Tensor) -> float:
    finite = exact.detach()[exact.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _off(
    actual: Tensor, exact: Tensor, error: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """How far every element is off, and what it may be: infinitely far where NaN or inf differ."""
    got, want = actual.detach().to("cpu").double(), exact.detach()
    finite = want.isfinite()
    same = torch.where(want.isnan(), got.isnan(), got == want)
    allowed = 2 * error + ulp(torch.where(finite, want, 0.0), dtype or actual.dtype)
    off = torch.where(
        finite, (got - want).abs().nan_to_num(torch.inf), torch.where(same, 0.0, torch.inf)
    )
    return off, allowed
