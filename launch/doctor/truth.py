"""The right answers of a check, and how far from them a result may be: ``testing``'s, for a report.

The rule is that of ``vocab_parallel_ce.testing.tolerance``. E comes from torch's own formulas on
the host, with the columns in several orders, and on the device under test, whichever is larger. For
a reduced loss it is at least what its rows can add up to.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce import testing
from vocab_parallel_ce.testing import Batch, ReferenceLoss

RULE = "error <= 2 x error of torch's own formulas in fp32 + 1 ulp of the result's dtype"
# Wider than in tests, whose batches are known: with --rows and --vocab torch may be right by luck,
# and an alarm on a healthy card costs its owner a day. The fp64 gradient of an entropy was seen to
# err by 3.8 E against 80-bit arithmetic.
SLACK = {"least_ulps": 2.0, "fp64_allowance": 4.0}
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Question:
    """Everything that the right answers depend on."""

    dtype: torch.dtype = torch.float32
    rows: int = 64
    vocab: int = 4096
    reduction: str = "mean"
    weight: bool = False
    ignored: bool = False
    """a quarter of the rows is ignored and holds NaN and infinities"""
    label_smoothing: float = 0.0
    z: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    normalizer: float | None = None
    selected: int = 0
    """ids a row whose log-probabilities are asked for"""
    extreme: bool = False
    """rows near +-10,000 and near 0, and columns of -inf"""

    @property
    def options(self) -> dict[str, Any]:
        """As ``testing.cross_entropy`` takes them."""
        return {
            "reduction": self.reduction,
            "ignore_index": IGNORE_INDEX,
            "label_smoothing": self.label_smoothing,
            "lse_square_scale": self.z,
            "scale": self.scale,
            "softcap": self.softcap,
            "normalizer": self.normalizer,
        }


@lru_cache(maxsize=8)
def batch(q: Question) -> Batch:
    """The question's tensors, on the host; the same on every rank."""
    return testing.batch(
        q.rows,
        q.vocab,
        q.dtype,
        IGNORE_INDEX,
        seed=q.rows * 1_000_003 + q.vocab,
        ignored=0.25 if q.ignored else 0.0,
        unreadable=True,
        extreme=q.extreme,
    )


def selected_ids(q: Question) -> Tensor | None:
    """[N, K] where the question asks for ids: the target twice, then ids of every shard."""
    if not q.selected:
        return None
    target = batch(q).target.clamp(min=0)[:, None]
    steps = torch.arange(q.selected).sub(1).clamp(min=0)
    return (target + steps * (q.vocab // q.selected + 1)) % q.vocab


def class_weight(q: Question) -> Tensor | None:
    """[V] of the batch, where the question has weights."""
    return batch(q).weight if q.weight else None


Answers = dict[str, Tensor]


def objective(function: str, values: Answers, upstream: Tensor) -> Tensor:
    """The scalar whose gradient is compared: a different weight for every output of every row."""
    names = {
        "loss": ("loss",),
        "operator": ("loss", "zloss"),
        "tokens": ("token", "lse", "entropy", "selected"),
    }
    back = upstream.flip(0)
    weights = (upstream, upstream / -2, back / 2 + 0.25, back / -2 + 0.5)  # exact in every dtype
    parts = []
    for name, of_row in zip(names[function], weights, strict=False):
        if name in values:
            value = values[name].reshape(min(len(upstream), values[name].numel()), -1)
            column = 1 + torch.arange(value.shape[1], device=value.device) / 4
            parts.append((value * of_row[: len(value), None].to(value) * column.to(value)).sum())
    return torch.stack(parts).sum()


def _named(outcome: ReferenceLoss) -> Answers:
    """By the names of the library's results; ``token`` belongs to questions without options."""
    named = outcome._asdict()
    selected = named.pop("selected_log_prob")
    named |= {"selected": selected} if selected.numel() else {}
    return {name: named[name] for name in named if name != "argmax"} | {"token": -outcome.loss}


@dataclass(frozen=True)
class Truth:
    exact: Answers
    error: dict[str, float]
    """E of every answer"""
    argmax: Tensor


@lru_cache(maxsize=16)
def truth(q: Question, function: str, device: torch.device) -> Truth:
    """What ``function`` must answer. The same on every rank; nothing is communicated."""
    b = batch(q)

    def scalar(outcome: ReferenceLoss) -> Tensor:
        return objective(function, _named(outcome), b.upstream)

    want = testing.expected(
        b.logits, b.target, class_weight(q), **q.options, selected=selected_ids(q)
    )
    exact, plain = _named(want.exact), _named(want.naive)
    exact["gradient"], plain["gradient"] = want.gradients(scalar)
    exact = {name: value.detach() for name, value in exact.items()}
    error = _errors(q, exact, plain)
    for name, inherited in (("loss", want.rows_error), ("zloss", want.zloss_rows_error)):
        error[name] = max(error[name], inherited)
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # where torch lacks an operation, the host counts
            there = _on_device(q, exact, scalar, device)
            error = {name: testing.error_with_device(e, there[name]) for name, e in error.items()}
    return Truth(exact, error, want.exact.argmax)


def _errors(q: Question, exact: Answers, plain: Answers) -> dict[str, float]:
    return {
        name: testing.naive_error(value, plain[name].detach().cpu(), q.dtype, **SLACK)
        for name, value in exact.items()
    }


def _on_device(q: Question, exact: Answers, scalar: Any, device: torch.device) -> dict[str, float]:
    """E of torch's own formulas in fp32 on the device under test."""
    b, weight = batch(q), class_weight(q)
    x = b.logits.to(device, torch.float32, copy=True).requires_grad_()
    target = b.target.to(device)
    weight = None if weight is None else weight.to(device)
    ids = selected_ids(q)
    ids = None if ids is None else ids.to(device)

    def formulas(**changes: Any) -> ReferenceLoss:
        options = q.options | {"selected": ids} | changes
        return testing.cross_entropy(x, target, weight, **options, dtype=torch.float32)

    outcome = formulas()
    plain = _named(outcome)
    (plain["gradient"],) = torch.autograd.grad(scalar(outcome), x)
    error = _errors(q, exact, plain)
    if q.reduction != "none":
        changes = {"reduction": "none", "normalizer": None}
        options = q.options | changes
        right = testing.cross_entropy(b.logits, b.target, class_weight(q), **options)
        rows = formulas(**changes)
        for name in ("loss", "zloss"):
            of_rows = testing.naive_error(
                getattr(right, name), getattr(rows, name).detach().cpu(), q.dtype
            )
            inherited = testing.inherited_error(of_rows, q.rows, q.reduction, q.normalizer)
            error[name] = max(error[name], inherited)
    return error
