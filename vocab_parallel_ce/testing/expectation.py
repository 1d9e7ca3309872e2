"""What the loss of a batch must be, and how far off plain torch is: the two sides of the rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .naive import naive
from .reference import ReferenceLoss
from .reference import cross_entropy as reference
from .tolerance import naive_error


def worst(exact: Tensor, results: list[Tensor]) -> Tensor:
    """Of several results, element by element the one that is farthest from ``exact``.

    Args:
        exact: The fp64 result, any shape.
        results: At least one, of that shape.

    Returns:
        Tensor: of that shape, in the dtype of the results; a NaN counts as near.
    """
    errors = torch.stack([(r.detach().double() - exact.detach()).abs() for r in results])
    chosen = errors.nan_to_num(-1.0).argmax(0, keepdim=True)
    return torch.stack([r.detach() for r in results]).gather(0, chosen)[0]


@dataclass(frozen=True)
class Expected:
    """What the loss of a batch must be, twice: exact in fp64, and as plain torch computes it.

    ``tolerance.assert_close`` takes a field of both, and ``rows_error`` for one that was reduced.
    """

    exact: ReferenceLoss
    replicas: tuple[ReferenceLoss, ...]
    """the naive formulas with the columns in several orders, unsharded and in shards: rounding is
    chance, and one order may be lucky"""
    rows_error: float
    """See ``tolerance``; 0 when nothing was reduced."""
    zloss_rows_error: float
    """The same of the z part alone."""
    x: Tensor
    """fp64 logits, the leaf of ``exact``"""
    x_naive: Tensor
    """fp32 logits, the leaf of ``naive``"""

    @functools.cached_property
    def naive(self) -> ReferenceLoss:
        """The worst of the naive results, element by element."""
        fields = zip(self.exact, *self.replicas, strict=True)
        return ReferenceLoss(*(worst(exact, plain) for exact, *plain in fields))

    def gradients(self, scalar: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """The gradient of any function of the outcome, exact and (the worst) naive.

        Args:
            scalar: From a ReferenceLoss, of fp64 or fp32, to a 0-d tensor.

        Returns:
            tuple[Tensor, Tensor]: d(logits) [..., V] in fp64, and in fp32.
        """
        exact = torch.autograd.grad(scalar(self.exact), self.x, retain_graph=True)[0]
        plain = [
            torch.autograd.grad(scalar(replica), self.x_naive, retain_graph=True)[0]
            for replica in self.replicas
        ]
        return exact, worst(exact, plain)


def inherited_error(
    rows_error: float, rows: int, reduction: str, normalizer: float | Tensor | None = None
) -> float:
    """What a reduced loss inherits from its rows: E of the sum or mean is at least this.

    Args:
        rows_error: E of the rows.
        rows: Their number.
        reduction: "sum" or "mean".
        normalizer: The denominator of a mean that was given one.

    Returns:
        float: ``rows`` times E for a sum, that over the normalizer, or E for a plain mean.

    Example:
        >>> inherited_error(0.5, 8, "sum"), inherited_error(0.5, 8, "mean")
        (4.0, 0.5)
    """
    if reduction == "sum":
        return rows_error * rows
    return rows_error if normalizer is None else rows_error * rows / float(normalizer)


def expected(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    sums_as_logs: bool = False,
    **options: Any,
) -> Expected:
    """Both outcomes of a batch, on the CPU; nothing is communicated.

    Args:
        logits: [..., V] of all ranks together, any floating dtype; of fp16 and bf16 logits the
            rounded values are what counts.
        target: [...] class ids or ``ignore_index``.
        weight: [V] class weights, or None.
        sums_as_logs: See ``naive.naive``.
        options: Those of ``reference.cross_entropy``: reduction, ignore_index, label_smoothing,
            lse_square_scale, scale, softcap, normalizer, selected.

    Returns:
        Expected: with graphs, so that ``gradients`` can be asked for any function of the results.

    Example:
        >>> from vocab_parallel_ce import cross_entropy
        >>> data = batch(8, 60, torch.float32)
        >>> want = expected(data.logits, data.target, label_smoothing=0.1)
        >>> x = data.logits.clone().requires_grad_()
        >>> loss = cross_entropy(x, data.target, label_smoothing=0.1)
        >>> assert_close(loss, want.exact.loss, want.naive.loss, rows_error=want.rows_error)
        >>> (gradient,) = torch.autograd.grad(loss, x)
        >>> assert_close(gradient, *want.gradients(lambda outcome: outcome.loss), "gradient")
    """
    logits, target = logits.detach().cpu(), target.cpu()
    weight = None if weight is None else weight.detach().cpu()
    x = logits.double().requires_grad_()
    x_naive = logits.float().requires_grad_()
    exact = reference(x, target, weight, **options)
    columns = torch.arange(logits.shape[-1])
    shuffled = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))

    def replicas(options: dict[str, Any]) -> list[ReferenceLoss]:
        how: dict[str, Any] = {
            "like_reference": logits.dtype == torch.float64,
            "sums_as_logs": sums_as_logs,
        }
        return [
            naive(x_naive, target, weight, **options, **how, order=order, parts=parts)
            for parts, order in enumerate((columns, columns.flip(0), shuffled), start=1)
        ]

    reduction = options.get("reduction", "mean")
    errors = [0.0, 0.0]
    if reduction != "none":
        per_row = {**options, "reduction": "none", "normalizer": None}
        right, plain = reference(x, target, weight, **per_row), replicas(per_row)
        errors = [
            naive_error(exact_rows, worst(exact_rows, naive_rows), logits.dtype)
            for exact_rows, naive_rows in (
                (right.loss, [r.loss for r in plain]),
                (right.zloss, [r.zloss for r in plain]),
            )
        ]
        rows, normalizer = target.numel(), options.get("normalizer")
        errors = [inherited_error(error, rows, reduction, normalizer) for error in errors]
    return Expected(exact, tuple(replicas(options)), errors[0], errors[1], x, x_naive)
