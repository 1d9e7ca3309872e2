"""The right answers of a check, in fp64 and unsharded, and how far from them a result may be.

    |result_i - exact_i|  <=  2 E  +  ulp_i

    exact   reference.py, in fp64 on the host
    E       the largest error of torch's own F.cross_entropy, log_softmax and so on in fp32, on the
            same logits: on the host, with the columns in either order, or on the device under
            test, whichever is larger (but a device does not count for more than 8 times the host:
            it may be what is broken)
    ulp_i   one unit in the last place of the result's dtype at |exact_i|

E is at least two units in the last place of fp32 at the largest |exact|, because torch may be right
by luck, and for a reduced loss what its rows can add up to. For an fp64 result E is 2^-29 of that,
four times: ``exact`` is fp64 itself and was seen to err by 3.8 such E against 80-bit arithmetic
(the gradient of an entropy). Infinities and NaN must be the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce.testing.reference import ReferenceLoss
from vocab_parallel_ce.testing.reference import cross_entropy as reference

RULE = "error <= 2 x error of torch's own formulas in fp32 + 1 ulp of the result's dtype"
DEVICE_COUNTS_AT_MOST = 8.0
FP64_ALLOWANCE = 4.0
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
    """a quarter of the rows is ignored and holds NaN"""
    label_smoothing: float = 0.0
    z: float = 0.0
    scale: float = 1.0
    normalizer: float | None = None
    extreme: bool = False
    """rows near +-10,000 and near 0, and columns of -inf"""


@dataclass(frozen=True)
class Batch:
    """The question's tensors, on the host; the same on every rank."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    upstream: Tensor
    """[3, N] gradients that come from above, exact in every dtype"""


@lru_cache(maxsize=8)
def batch(q: Question) -> Batch:
    """Made from a seed; the first row is never ignored."""
    g = torch.Generator().manual_seed(q.rows * 1_000_003 + q.vocab)
    logits = torch.randn(q.rows, q.vocab, generator=g).mul_(3)
    target = torch.randint(q.vocab, (q.rows,), generator=g)
    weight = torch.rand(q.vocab, generator=g).add_(0.25)
    weight[3::7] = 0.0
    upstream = torch.randint(-8, 9, (3, q.rows), generator=g) / 8
    upstream[:, 0] = 1.0
    if q.extreme:
        logits += torch.tensor([0.0, 10_000.0, -10_000.0])[torch.arange(q.rows) % 3][:, None]
        masked = torch.rand(q.vocab, generator=g) < 0.25
        masked[target] = False
        logits[:, masked] = -torch.inf
    if q.ignored:
        out = torch.arange(q.rows) % 4 == 1
        target[out], logits[out] = IGNORE_INDEX, torch.nan
    return Batch(logits.to(q.dtype), target, weight if q.weight else None, upstream)


Answers = dict[str, Tensor]
Formula = Callable[..., ReferenceLoss]


def textbook(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    *,
    lse_square_scale: float,
    scale: float,
    normalizer: float | None,
) -> ReferenceLoss:
    """What one would write with torch's own functions; in the dtype of the logits."""
    x = logits * scale
    kept = target != ignore_index
    loss = F.cross_entropy(
        x,
        target,
        weight,
        reduction="none",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    log_prob, lse = x.log_softmax(-1), x.logsumexp(-1)
    zloss = torch.where(kept, lse_square_scale * lse.square(), 0.0)
    if reduction == "none":
        loss = loss + zloss
    else:
        mean = reduction == "mean"
        w = torch.ones_like(loss) if weight is None else weight[torch.where(kept, target, 0)]
        rows = normalizer or (kept.sum() if mean else 1)
        weights = normalizer or (torch.where(kept, w, 0.0).sum() if mean else 1)
        zloss = zloss.sum() / rows
        loss = loss.sum() / weights + (zloss if lse_square_scale else 0.0)
    finite = torch.where(log_prob == -torch.inf, 0.0, log_prob)
    entropy = torch.where(kept, -(log_prob.exp() * finite).sum(-1), 0.0)
    return ReferenceLoss(loss, zloss, log_prob, lse, entropy, x.argmax(-1))


def objective(q: Question, function: str, values: dict[str, Tensor], upstream: Tensor) -> Tensor:
    """The scalar whose gradient is compared: a different weight for every output of every row."""
    names = {
        "loss": ("loss",),
        "operator": ("loss", "zloss"),
        "tokens": ("token", "lse", "entropy"),
    }
    parts = [
        (values[name].reshape(-1) * u[: values[name].numel()].to(values[name])).sum()
        for name, u in zip(names[function], upstream, strict=False)
        if name in values
    ]
    return torch.stack(parts).sum()


def _answers(q: Question, function: str, formula: Formula, x: Tensor, order: Tensor) -> Answers:
    """Every output of ``function`` by one formula, and the gradient of its objective.

    The formula sees the columns in this ``order``; answers are in the usual one.
    """
    b, place = batch(q), order.argsort()
    column = place[b.target.clamp(min=0)]
    out = formula(
        x[:, order.to(x.device)],
        torch.where(b.target == IGNORE_INDEX, IGNORE_INDEX, column).to(x.device),
        None if b.weight is None else b.weight[order].to(x),
        q.reduction,
        IGNORE_INDEX,
        q.label_smoothing,
        lse_square_scale=q.z,
        scale=q.scale,
        normalizer=q.normalizer,
    )
    token = out.log_prob.gather(-1, column.to(x.device)[:, None]).squeeze(-1)
    values = {"loss": out.loss, "zloss": out.zloss, "lse": out.lse, "entropy": out.entropy}
    values |= {"token": token, "log_prob": out.log_prob[:, place.to(x.device)]}
    (gradient,) = torch.autograd.grad(objective(q, function, values, b.upstream), x)
    values |= {"gradient": gradient}
    return {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}


@dataclass(frozen=True)
class Truth:
    exact: Answers
    error: dict[str, float]
    """E of every answer"""
    argmax: Tensor


def truth(q: Question, function: str, device: torch.device) -> Truth:
    """What ``function`` must answer. The same on every rank; nothing is communicated."""
    exact, measured = _measured(q, function, device)
    error = dict(measured)
    if q.reduction != "none":
        per_row = replace(q, reduction="none", normalizer=None)
        rows = _measured(per_row, "operator", device)[1]
        b = batch(q)
        kept = b.target != IGNORE_INDEX
        weights = kept.double() if b.weight is None else b.weight.double()[b.target.clamp(min=0)]
        mean = float(weights[kept].sum()) if q.reduction == "mean" else 1.0
        for name, denominator in (("loss", mean), ("zloss", float(kept.sum()))):
            share = q.rows / (q.normalizer or (denominator if q.reduction == "mean" else 1.0))
            error[name] = max(error[name], share * rows[name])
    if q.dtype == torch.float64:
        narrower = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        error = {name: FP64_ALLOWANCE * narrower * e for name, e in error.items()}
    return Truth(exact, error, batch(q).logits.double().argmax(-1))


@lru_cache(maxsize=16)
def _measured(q: Question, function: str, device: torch.device) -> tuple[Answers, dict[str, float]]:
    """The exact answers, and E before what a reduced loss inherits."""
    logits = batch(q).logits
    columns = torch.arange(q.vocab)

    def answers(formula: Formula, dtype: torch.dtype, where: str, order: Tensor) -> Answers:
        x = logits.to(where, dtype, copy=True).requires_grad_()
        return _answers(q, function, formula, x, order)

    exact = answers(reference, torch.float64, "cpu", columns)
    host = [answers(textbook, torch.float32, "cpu", order) for order in (columns, columns.flip(0))]
    there = []
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # where torch lacks an operation, the host counts
            there = [answers(textbook, torch.float32, str(device), columns)]
    return exact, {
        name: _error(value, [plain[name] for plain in host], [plain[name] for plain in there])
        for name, value in exact.items()
    }


def _error(exact: Tensor, host: list[Tensor], there: list[Tensor]) -> float:
    finite = exact.isfinite()
    if not bool(finite.any()):
        return 0.0

    def largest(plain: Tensor) -> float:
        return float((plain - exact)[finite & plain.isfinite()].abs().max().nan_to_num(0.0))

    least = 2 * float(ulp(exact[finite].abs().max(), torch.float32))
    on_host = max(least, *map(largest, host))
    on_device = max(map(largest, there), default=0.0)
    return max(on_host, min(on_device, DEVICE_COUNTS_AT_MOST * on_host))


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at |value|, in fp64."""
    info = torch.finfo(dtype)
    size = value.abs().clamp(min=info.smallest_normal).double()
    return torch.exp2(torch.frexp(size).exponent.double() - 1) * info.eps


@dataclass(frozen=True)
class Comparison:
    """A result against the truth, at the element that is worst in relation to what is allowed."""

    quantity: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Above 1 it is wrong."""
        return self.error / self.allowed


def compare(quantity: str, result: Tensor, exact: Tensor, error: float) -> Comparison:
    """``result`` against fp64 numbers of the same shape; ``error`` is E."""
    got = result.detach().to("cpu").double()
    if got.shape != exact.shape:
        raise ValueError(f"{quantity} has shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    if not exact.numel():
        return Comparison(quantity, 0.0, 1.0)
    finite = exact.isfinite()
    same = torch.where(exact.isnan(), got.isnan(), got == exact)
    allowed = 2 * error + ulp(torch.where(finite, exact, 0.0), result.dtype)
    # What must be an infinity or NaN and is not is off by any measure; so is a NaN elsewhere.
    off = torch.where(
        finite, (got - exact).abs().nan_to_num(torch.inf), torch.where(same, 0.0, torch.inf)
    )
    worst = int((off / allowed).argmax())
    return Comparison(quantity, float(off.flatten()[worst]), float(allowed.flatten()[worst]))
