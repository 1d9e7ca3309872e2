"""What multi-rank tests are made of: ways to divide a vocabulary, batches, and the naive formulas.

Everything is rebuilt from a seed on every rank, so that a case needs no tensors sent to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.testing.reference import ReferenceLoss
from vocab_parallel_ce.testing.reference import cross_entropy as reference
from vocab_parallel_ce.testing.tolerance import assert_close, naive_error

from .device import DEVICE


@dataclass(frozen=True)
class Sharding:
    """How a vocabulary lies on the ranks: [start, stop) and padding columns of each."""

    name: str
    vocab_size: int
    bounds: tuple[tuple[int, int], ...]
    padding: tuple[int, ...]
    explicit: bool = True
    """Whether the call is told its VocabShard; equal shards in rank order need not be."""

    def shard(self, rank: int) -> VocabShard | None:
        """The ``shard`` argument of this rank."""
        return VocabShard(*self.bounds[rank], self.vocab_size) if self.explicit else None

    def local(self, logits: Tensor, rank: int) -> Tensor:
        """This rank's columns of [..., V], and padding columns full of what nobody may read."""
        start, stop = self.bounds[rank]
        padding = logits.new_full((*logits.shape[:-1], self.padding[rank]), torch.nan)
        padding[..., ::2] = torch.inf
        return torch.cat([logits[..., start:stop], padding], -1)

    def columns(self, full: Tensor, rank: int) -> Tensor:
        """This rank's columns of the fp64 or naive result [..., V], without padding."""
        start, stop = self.bounds[rank]
        return full[..., start:stop]


def even(vocab_size: int, world: int) -> Sharding:
    """Equal shards in rank order, left for the library to infer."""
    assert vocab_size % world == 0
    size = vocab_size // world
    bounds = tuple((r * size, (r + 1) * size) for r in range(world))
    return Sharding("even", vocab_size, bounds, (0,) * world, explicit=False)


def sized(name: str, sizes: tuple[int, ...], padding: tuple[int, ...] | None = None) -> Sharding:
    """Shards of these sizes in rank order."""
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    bounds = tuple((a, a + n) for a, n in zip(starts, sizes, strict=True))
    return Sharding(name, sum(sizes), bounds, padding or (0,) * len(sizes))


def shardings(world: int, size: int = 60) -> list[Sharding]:
    """Even, uneven, padded, out of rank order, with empty and all-padding shards."""
    plans = [even(size, world)]
    share = size // world
    if world == 1:
        return [*plans, sized("padded", (size - 7,), (7,))]
    uneven = tuple(share + r - (world - 1 if r else 0) for r in range(world))
    plans.append(sized("uneven", uneven))
    plans.append(sized("padded", uneven, tuple(3 * r + 1 for r in range(world))))
    plans.append(sized("empty", (*uneven[1:], 0)))
    plans.append(sized("all padding", (0, *uneven[1:]), (5, *[1] * (world - 1))))
    backwards = sized("backwards", uneven)
    plans.append(replace(backwards, name="backwards", bounds=backwards.bounds[::-1]))
    return plans


SHARDINGS = [(world, plan) for world in (1, 2, 3, 4) for plan in shardings(world)]
SHARDING_IDS = [f"{world} ranks {plan.name}" for world, plan in SHARDINGS]


@dataclass(frozen=True)
class Batch:
    """Logits [N, V], target [N] with ignored rows, weight [V], an upstream gradient [N]."""

    logits: Tensor
    target: Tensor
    weight: Tensor
    upstream: Tensor


def batch(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    ignore_index: int = -100,
    seed: int = 0,
    spread: float = 3.0,
    ignored: float = 0.25,
) -> Batch:
    """The same batch wherever it is built; the first row is kept, the second is ignored."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab_size, generator=g) * spread).to(dtype)
    target = torch.randint(0, vocab_size, (rows,), generator=g)
    out = torch.rand(rows, generator=g) < ignored
    out[:1], out[1:2] = False, True
    # A row whose target happens to be ignore_index is ignored as well.
    target[:1] = 1 if ignore_index == 0 else 0
    target = torch.where(out, ignore_index, target)
    weight = torch.rand(vocab_size, generator=g) + 0.25
    weight[2::5] = 0.0
    upstream = torch.randint(-8, 9, (rows,), generator=g) / 8  # exact in every dtype
    return Batch(logits, target, weight, upstream)


def naive(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    scale: float = 1.0,
    like_reference: bool = False,
    order: Tensor | None = None,
    parts: int = 1,
) -> ReferenceLoss:
    """The textbook formulas in plain torch, in the dtype of the logits; differentiable.

    ``like_reference``: by the very operations of the fp64 reference. An fp64 result can only be
    asked to be as good as those, and their error in fp32 tells how good they are. ``order`` [V]
    is the order in which columns are added up, in ``parts`` shards one after the other;
    results are in the usual order.
    """
    if order is None:
        order = torch.arange(logits.shape[-1])
    place = order.argsort()
    x = logits[..., order] * scale
    kept = target != ignore_index
    column = place[torch.where(kept, target, 0).long()]
    w = x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype)[order]
    shifted = x - x.detach().amax(-1, keepdim=True)
    shards = [part.sum(-1, keepdim=True) for part in shifted.exp().tensor_split(parts, -1)]
    if DEVICE == "npu":  # of a shard the operator hands out log s, rounded, and never s
        shards = [part.log().exp() for part in shards]
    log_s = torch.stack(shards).sum(0).log()
    log_prob = shifted - log_s
    if like_reference:
        log_prob = x.log_softmax(-1)
    lse = x.logsumexp(-1)
    loss = -(1 - label_smoothing) * w[column] * log_prob.gather(-1, column[..., None]).squeeze(-1)
    if label_smoothing > 0:
        loss = loss - label_smoothing / x.shape[-1] * (w * log_prob).sum(-1)
    loss = torch.where(kept, loss, 0.0)
    zloss = torch.where(kept, lse_square_scale * lse.square(), 0.0)
    if reduction == "none":
        loss = loss + zloss
    elif reduction == "sum":
        loss, zloss = (loss + zloss).sum(), zloss.sum()
    else:
        zloss = zloss.sum() / kept.sum()
        loss = loss.sum() / torch.where(kept, w[column], 0.0).sum()
        loss = loss + zloss if lse_square_scale else loss
    p_z = log_prob.exp() * torch.where(log_prob == -torch.inf, 0.0, shifted)
    entropy = torch.where(kept, log_s.squeeze(-1) - p_z.sum(-1), 0.0)
    argmax = torch.where(kept, logits.argmax(-1), -1)
    return ReferenceLoss(loss, zloss, log_prob[..., place], lse, entropy, argmax)


def worst(exact: Tensor, results: list[Tensor]) -> Tensor:
    """Of several results, element by element the one that is farthest from ``exact``."""
    errors = torch.stack([(r.detach().double() - exact.detach()).abs() for r in results])
    chosen = errors.nan_to_num(-1.0).argmax(0, keepdim=True)
    return torch.stack([r.detach() for r in results]).gather(0, chosen)[0]


@dataclass(frozen=True)
class Expected:
    """What the loss of a batch must be, twice: exact in fp64, and as plain torch computes it."""

    exact: ReferenceLoss
    replicas: tuple[ReferenceLoss, ...]
    """the naive formulas with the columns in several orders, unsharded and in shards: rounding is
    chance, and one order may be lucky"""
    rows_error: float
    """See ``tolerance``; 0 when nothing was reduced."""
    x: Tensor
    """fp64 logits, the leaf of ``exact``"""
    x_naive: Tensor
    """fp32 logits, the leaf of ``naive``"""

    @functools.cached_property
    def naive(self) -> ReferenceLoss:
        """The worst of the naive results, element by element."""
        fields = zip(self.exact, *self.replicas, strict=True)
        return ReferenceLoss(*(worst(exact, plain) for exact, *plain in fields))

    def gradients(self, seed_of: Any) -> tuple[Tensor, Tensor]:
        """d(logits) [.., V] of a scalar function of the outcome, exact and (the worst) naive."""
        exact = torch.autograd.grad(seed_of(self.exact), self.x, retain_graph=True)[0]
        plain = [
            torch.autograd.grad(seed_of(replica), self.x_naive, retain_graph=True)[0]
            for replica in self.replicas
        ]
        return exact, worst(exact, plain)


def expected(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> Expected:
    """Both outcomes of a batch; ``options`` are those of ``reference.cross_entropy``."""
    logits, target = logits.detach().cpu(), target.cpu()
    x = logits.double().requires_grad_()
    x_naive = logits.float().requires_grad_()
    exact = reference(x, target, weight, **options)
    like_reference = logits.dtype == torch.float64
    columns = torch.arange(logits.shape[-1])
    shuffled = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))

    def replicas(options: dict[str, Any]) -> list[ReferenceLoss]:
        options = {**options, "like_reference": like_reference}
        return [
            naive(x_naive, target, weight, **options, order=order, parts=parts)
            for parts, order in enumerate((columns, columns.flip(0), shuffled), start=1)
        ]

    error = 0.0
    if options.get("reduction", "mean") != "none":
        per_row = {**options, "reduction": "none"}
        exact_rows = reference(x, target, weight, **per_row).loss
        naive_rows = worst(exact_rows, [r.loss for r in replicas(per_row)])
        error = naive_error(exact_rows, naive_rows, logits.dtype)
        if options.get("reduction") == "sum":
            error *= target.numel()
    return Expected(exact, tuple(replicas(options)), error, x, x_naive)


def gloo_events(work: Callable[[], object]) -> list[str]:
    """The collectives that ``work`` runs on this rank, as the profiler saw them in Gloo."""
    with profile() as events:
        work()
    return sorted(e.name for e in events.events() or [] if e.name.startswith("gloo:"))


class Findings:
    """Collects failed assertions: a rank that leaves a case early would leave the others waiting.

    with findings: assert ...        any number of times, then findings.report()
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: object
    ) -> bool:
        if not isinstance(problem, AssertionError):
            return False
        self.texts.append(str(problem))
        return True

    def report(self) -> None:
        """Fail if anything was found."""
        assert not self.texts, f"{len(self.texts)} findings:\n" + "\n".join(self.texts[:10])


def check_gradient(
    grad: Tensor, wanted: tuple[Tensor, Tensor], sharding: Sharding, rank: int, what: str
) -> None:
    """A rank's gradient [.., C_r] against the (exact, naive) ones [.., V]; 0 in the padding."""
    size = sharding.bounds[rank][1] - sharding.bounds[rank][0]
    exact, plain = (sharding.columns(full, rank) for full in wanted)
    # E is that of the whole row's gradient: a shard without the target has no large elements.
    error = naive_error(*wanted, grad.dtype)
    assert_close(grad[..., :size], exact, plain, f"gradient of {what}", rows_error=error)
    assert bool((grad[..., size:] == 0).all()), f"gradient of {what}: padding is not exactly 0"
