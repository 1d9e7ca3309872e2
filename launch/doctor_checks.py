"""What the selftest checks: every dtype and option against the fp64 truth; and what is refused.

A check runs on every rank at once, with the same seed, and each rank compares its own results: all
of the loss, and its own columns of log_prob and gradient. It returns what it measured and what it
found wrong; which rank, dtype and check that was is added by who runs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.collectives import BACKENDS_WITHOUT_FP64
from vocab_parallel_ce.launch.doctor_ranks import in_one_line
from vocab_parallel_ce.launch.doctor_truth import (
    IGNORE_INDEX,
    Batch,
    Comparison,
    Question,
    Truth,
    batch,
    compare,
    objective,
    truth,
)
from vocab_parallel_ce.launch.measure import count_collectives

OPERATOR_LIMIT = 200_000  # rows that the fused operator of Ascend takes at most


@dataclass(frozen=True)
class Place:
    """Where this rank stands, and how large the checks are."""

    device: torch.device
    rank: int
    world: int
    group: dist.ProcessGroup | None
    """None with one rank"""
    rows: int
    vocab: int
    quick: bool

    @property
    def asynchronous(self) -> bool:
        """Accelerators answer a bad target with NaN, a CPU with an error."""
        return self.device.type != "cpu"


@dataclass
class Found:
    """What a check found on one rank."""

    comparisons: list[Comparison] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    digest: str = ""
    """of results that must have the same bits on every rank"""
    skipped: str = ""

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Place, torch.dtype], Found]
    gate: bool = False
    """where it is skipped, the dtype's other checks are as well"""


# --- a loss against the truth -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A question, and the way it is put to the library."""

    question: Question
    function: str = "loss"
    """loss: cross_entropy; operator: cross_entropy_loss; tokens: token_statistics"""
    sharding: str = "even"
    collective: str = "auto"
    inplace: bool = False
    strided: bool = False
    lead: tuple[int, ...] | None = None
    """the leading shape of the logits, where it is not [N]"""
    check: bool | None = None


def shards(kind: str, vocab: int, world: int) -> list[tuple[int, int, int]]:
    """(start, stop, padding columns) of every rank."""
    share = vocab // world
    if kind == "even" or world == 1:
        padding = 5 if kind == "padded" else 0
        return [(r * share, (r + 1) * share, padding) for r in range(world)]
    # Each rank but the last lacks one column more than the one before it.
    sizes = [share - 1 - r % 3 for r in range(world - 1)]
    if kind == "empty":
        sizes[0] = 0
    sizes.append(vocab - sum(sizes))
    starts = [sum(sizes[:r]) for r in range(world)]
    cut = [(start, start + size, 0) for start, size in zip(starts, sizes, strict=True)]
    if kind == "padded":
        cut = [(start, stop, 2 * r + 1) for r, (start, stop, _) in enumerate(cut)]
    return cut[::-1] if kind == "reversed" else cut


@dataclass
class Prepared:
    """A case's tensors on this rank."""

    leaf: Tensor
    logits: Tensor
    """what is handed to the library: the leaf, a view of it, or a copy that may be overwritten"""
    target: Tensor
    weight: Tensor | None
    shard: VocabShard | None
    start: int
    stop: int

    def own_gradient(self) -> Tensor:
        """d(logits) [N, C_r], padding columns included."""
        assert self.leaf.grad is not None
        gradient = self.leaf.grad.reshape(self.target.numel(), self.leaf.shape[-1])
        return gradient[:, : self.logits.shape[-1]]


def _prepare(case: Case, b: Batch, place: Place) -> Prepared:
    q = case.question
    start, stop, padding = shards(case.sharding, q.vocab, place.world)[place.rank]
    # Padding is filled with what nobody may read.
    junk = torch.full((q.rows, padding), torch.nan, dtype=q.dtype)
    junk[:, ::2] = torch.inf
    local = torch.cat([b.logits[:, start:stop], junk], 1)
    columns = local.shape[1]
    if case.strided:
        local = torch.cat([local, local[:, :3]], 1)
    shape = (q.rows,) if case.lead is None else case.lead
    leaf = local.view(*shape, local.shape[1]).to(place.device, copy=True).requires_grad_()
    logits = leaf[..., :columns] if case.strided else leaf
    return Prepared(
        leaf=leaf,
        logits=logits.clone() if case.inplace else logits,
        target=b.target.view(shape).to(place.device, copy=True),
        weight=None if b.weight is None else b.weight.to(place.device),
        shard=None if case.sharding == "even" else VocabShard(start, stop, q.vocab),
        start=start,
        stop=stop,
    )


def _call(case: Case, made: Prepared, place: Place) -> dict[str, Tensor]:
    """The library's answers by the names that the truth uses."""
    q = case.question
    common: dict[str, Any] = {
        "group": place.group,
        "shard": made.shard,
        "inplace_backward": case.inplace,
        "scale": q.scale,
        "collective": case.collective,
        "check": case.check,
        "ignore_index": IGNORE_INDEX,
    }
    if case.function == "tokens":
        tokens = token_statistics(made.logits, made.target, entropy=True, argmax=True, **common)
        assert tokens.entropy is not None
        assert tokens.argmax is not None
        answers = {"token": tokens.log_prob, "lse": tokens.lse, "entropy": tokens.entropy}
        return answers | {"argmax": tokens.argmax}
    common |= {"weight": made.weight, "reduction": q.reduction}
    common |= {"label_smoothing": q.label_smoothing}
    common |= {"normalizer": None if q.normalizer is None else torch.tensor(q.normalizer)}
    if case.function == "loss":
        return {"loss": cross_entropy(made.logits, made.target, lse_square_scale=q.z, **common)}
    out = cross_entropy_loss(
        made.logits,
        made.target,
        lse_square_scale_for_zloss=q.z,
        return_zloss=q.z != 0,
        **common,
    )
    answers = {"loss": out.loss, "log_prob": out.log_prob}
    return answers | ({"zloss": out.zloss, "lse": out.lse_for_zloss} if q.z else {})


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: Tensor) -> bytes:
    host = tensor.detach().cpu().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""


def against_truth(case: Case, place: Place, dtype: torch.dtype) -> Found:
    """One call, forward and backward, every result compared."""
    case = replace(case, question=replace(case.question, dtype=dtype))
    q = case.question
    b = batch(q)
    right = truth(q, case.function, place.device)
    made = _prepare(case, b, place)
    before = _bytes(made.leaf)
    answers = _call(case, made, place)
    found = Found()
    differentiable = {name: value for name, value in answers.items() if value.requires_grad}
    objective(q, case.function, differentiable, b.upstream.to(place.device)).backward()

    for name, value in answers.items():
        if name == "argmax":
            found.expect(bool((value.cpu() == right.argmax).all()), "argmax is not the largest")
            continue
        exact = right.exact[name]
        if name == "log_prob":
            value, exact = value[..., : made.stop - made.start], exact[:, made.start : made.stop]
            value = value.reshape(exact.shape)
        expected = dtype if case.function == "operator" else _arithmetic(dtype)
        found.expect(value.dtype == expected, f"{name} is {value.dtype}, not {expected}")
        value = value.reshape(exact.shape)
        found.comparisons.append(compare(name, value, exact, right.error[name]))
    _compare_gradient(made, right, found)
    if case.inplace:
        overwritten = _same_bits(made.logits.reshape(-1), made.own_gradient().reshape(-1))
        found.expect(overwritten, "inplace_backward did not leave the gradient in the logits")
    found.expect(_bytes(made.leaf) == before, "the logits were modified")
    if case.collective == "all_gather":
        found.digest = hashlib.sha256(_bytes(answers["loss"])).hexdigest()
    return found


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compare_gradient(made: Prepared, right: Truth, found: Found) -> None:
    gradient, size = made.own_gradient(), made.stop - made.start
    exact = right.exact["gradient"][:, made.start : made.stop]
    found.comparisons.append(
        compare("gradient", gradient[:, :size], exact, right.error["gradient"])
    )
    found.expect(bool((gradient[:, size:] == 0).all()), "the gradient of padding is not 0")
    ignored = made.target.reshape(-1) == IGNORE_INDEX
    found.expect(bool((gradient[ignored] == 0).all()), "the gradient of ignored rows is not 0")


# --- what has no ordinary answer --------------------------------------------------------------


def _small(place: Place, dtype: torch.dtype, **changes: Any) -> tuple[Case, Batch, Prepared]:
    """A small case whose tensors a check may still change."""
    q = Question(dtype=dtype, rows=6, vocab=place.vocab, reduction="none", **changes)
    case = Case(q)
    return case, batch(q), _prepare(case, batch(q), place)


def all_ignored(place: Place, dtype: torch.dtype) -> Found:
    """Mean of nothing is NaN, a sum of nothing is 0, and the gradient is 0 in both."""
    found = Found()
    for reduction in ("mean", "sum", "none"):
        case, _, made = _small(place, dtype)
        made.target.fill_(IGNORE_INDEX)
        case = replace(case, question=replace(case.question, reduction=reduction))
        loss = _call(case, made, place)["loss"]
        loss.sum().backward()
        right = bool(loss.isnan().all() if reduction == "mean" else (loss == 0).all())
        found.expect(right, f"{reduction} of ignored rows alone is {loss.flatten()[0].item()}")
        clean = bool((made.own_gradient() == 0).all())
        found.expect(clean, f"{reduction} of ignored rows alone has a gradient that is not 0")
    return found


def no_rows(place: Place, dtype: torch.dtype) -> Found:
    """N = 0."""
    found = Found()
    for reduction in ("mean", "sum", "none"):
        case, _, made = _small(place, dtype)
        leaf = made.leaf.detach()[:0].requires_grad_()
        made = replace(made, leaf=leaf, logits=leaf, target=made.target[:0])
        case = replace(case, question=replace(case.question, reduction=reduction))
        loss = _call(case, made, place)["loss"]
        loss.sum().backward()
        found.expect(loss.shape == ((0,) if reduction == "none" else ()), f"{reduction}: bad shape")
        if reduction != "none":
            right = bool(loss.isnan() if reduction == "mean" else loss == 0)
            found.expect(right, f"{reduction} of no rows is {loss.item()}")
        found.expect(leaf.grad is not None and leaf.grad.shape == leaf.shape, "bad gradient")
    return found


def _refused(call: Callable[[], object], *words: str) -> str:
    """Why ``call`` is not refused as it should be, by a ValueError with these words; or nothing."""
    try:
        call()
    except ValueError as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        return f"the ValueError does not say {missing[0]!r}: {text}" if missing else ""
    return "there is no ValueError"


def _bad_batch(
    place: Place, dtype: torch.dtype, spoil: Callable[[Tensor], None], bad: list[int], *words: str
) -> Found:
    """ValueError on a CPU, and anywhere with check=True; else NaN in the rows ``bad`` alone."""
    found = Found()
    for check in (None, True):
        case, _, made = _small(place, dtype)
        spoil(made.target)
        call = partial(_call, replace(case, check=check), made, place)
        if not place.asynchronous or check:
            complaint = _refused(call, *words)
            how = "with check=True" if check else "on a CPU"
            found.expect(not complaint, f"{how}: {complaint}")
            continue
        loss = call()["loss"]
        loss.sum().backward()
        rows = loss.isnan().nonzero().flatten().tolist()
        found.expect(rows == bad, f"the loss is NaN in rows {rows}, not {bad}")
        rows = made.own_gradient().isnan().all(1).nonzero().flatten().tolist()
        found.expect(rows == bad, f"the gradient is NaN in rows {rows}, not {bad}")
    return found


def bad_target(place: Place, dtype: torch.dtype) -> Found:
    """A target that is neither a class nor ignore_index never gives a plausible number."""

    def spoil(target: Tensor) -> None:
        target[2] = place.vocab

    return _bad_batch(place, dtype, spoil, [2], "target is out of range", "row 2")


def other_targets(place: Place, dtype: torch.dtype) -> Found:
    """Ranks that were handed different targets: the commonest mistake."""

    def spoil(target: Tensor) -> None:
        target[0] = place.rank % place.vocab

    return _bad_batch(place, dtype, spoil, list(range(6)), "ranks disagree on target")


def collectives(place: Place, dtype: torch.dtype) -> Found:
    """One for the gather, two for all_reduce, none in backward."""
    found = Found()
    for collective, wanted in (("all_gather", 1), ("all_reduce", 2)):
        case, _, made = _small(place, dtype)
        call = partial(_call, replace(case, collective=collective), made, place)
        answers, forward = count_collectives(call)
        _, backward = count_collectives(answers["loss"].sum().backward)
        if forward is None or backward is None:
            found.skipped = "torch has no profiler here"
            continue
        found.expect(forward == wanted, f"{collective}: {forward} collectives, not {wanted}")
        found.expect(backward == 0, f"{collective}: {backward} collectives in backward, not 0")
    return found


def repeated(place: Place, dtype: torch.dtype) -> Found:
    """With the gather, two calls give the same bits, loss and gradient."""
    found = Found()
    results = []
    for _ in range(2):
        case, b, made = _small(place, dtype)
        loss = _call(replace(case, collective="all_gather"), made, place)["loss"]
        loss.backward(b.upstream[0].to(loss))
        results.append((loss, made.own_gradient()))
    (loss, gradient), (again, gradient_again) = results
    found.expect(_same_bits(loss, again), "the loss of a second call has other bits")
    found.expect(_same_bits(gradient, gradient_again), "its gradient has other bits")
    found.digest = hashlib.sha256(_bytes(loss)).hexdigest()
    return found


def reach(place: Place, dtype: torch.dtype) -> Found:
    """The ranks reach each other over the backend at all."""
    found = Found()
    mine = torch.full((8,), float(place.rank), device=place.device)
    dist.all_reduce(mine, group=place.group)
    total = place.world * (place.world - 1) / 2
    found.expect(bool((mine == total).all()), f"ranks add up to {mine[0].item()}, not {total}")
    return found


def fp64_is_refused(place: Place, dtype: torch.dtype) -> Found:
    """What the backend cannot carry is refused by name, before anything is sent."""
    case, _, made = _small(place, torch.float64)
    complaint = _refused(partial(_call, case, made, place), "float64", "use input.float()")
    found = Found()
    found.expect(not complaint, complaint)
    return found


def torch_itself(place: Place, dtype: torch.dtype) -> Found:
    """Whether the device computes in this dtype at all; fp64 is something that cards may lack."""
    found = Found()
    try:
        x = torch.ones(2, 2, device=place.device).to(dtype)
        wrong = not bool(((x.exp().sum(1) - 5.43656).abs() < 0.1).all())
        problem = "torch's own exp and sum give wrong numbers" if wrong else ""
        if x.dtype != dtype:  # torch_npu, where the card has no fp64
            problem = f"torch makes {x.dtype} of {dtype} on this device"
    except RuntimeError as error:
        problem = f"torch itself: {in_one_line(error)}"
    if dtype == torch.float64:
        found.skipped = problem
    else:
        found.expect(not problem, problem)
    return found


# --- the list ---------------------------------------------------------------------------------


def for_dtype(place: Place, dtype: torch.dtype) -> list[Check]:
    """The checks of one dtype, in order."""
    if dtype == torch.float64 and _without_fp64(place):
        return [Check("fp64 is refused as documented", fp64_is_refused)]
    base = Question(rows=place.rows, vocab=place.vocab)
    everything = replace(
        base, weight=True, ignored=True, label_smoothing=0.1, z=1e-3, scale=0.7, reduction="sum"
    )
    tokens = replace(base, reduction="none")
    wide = replace(base, rows=4, vocab=_whole(8192 if place.quick else 152_064, place.world))
    per_row = replace(base, reduction="none")
    cases = {
        "mean": Case(base),
        "sum": Case(replace(base, reduction="sum")),
        "none": Case(per_row),
        "weight": Case(replace(base, weight=True)),
        "ignore_index": Case(replace(base, ignored=True)),
        "label_smoothing": Case(replace(base, label_smoothing=0.1)),
        "z-loss": Case(replace(base, z=1e-2)),
        "scale": Case(replace(base, scale=1 / 0.7)),
        "normalizer": Case(replace(base, normalizer=37.0, z=1e-3, ignored=True)),
        "every option, mean": Case(replace(everything, reduction="mean")),
        "every option, sum, in place": Case(everything, inplace=True),
        "every option, none": Case(replace(everything, reduction="none")),
        "in place, none": Case(per_row, inplace=True),
        "padding columns": Case(per_row, sharding="padded"),
        "strided logits": Case(per_row, strided=True),
        "logits of three dimensions": Case(per_row, lead=(-1, 2 - place.rows % 2)),
        "a 1-D row": Case(replace(per_row, rows=1), lead=()),
        "extreme logits": Case(replace(per_row, extreme=True)),
        "cross_entropy_loss, none": Case(per_row, "operator"),
        "cross_entropy_loss, mean, z-loss": Case(replace(base, z=1e-3), "operator"),
        "cross_entropy_loss, every option": Case(
            replace(everything, ignored=False), "operator", inplace=True
        ),
        "token_statistics": Case(tokens, "tokens"),
        "token_statistics, in place": Case(replace(tokens, scale=0.7), "tokens", inplace=True),
        "token_statistics, extreme logits": Case(replace(tokens, extreme=True), "tokens"),
        "a large vocabulary": Case(replace(wide, reduction="none")),
    }
    if place.world > 1:
        cases |= {
            "all_gather": Case(per_row, collective="all_gather"),
            "all_reduce": Case(per_row, collective="all_reduce"),
            "all_reduce, every option": Case(everything, collective="all_reduce"),
            "uneven shards": Case(replace(everything, reduction="none"), sharding="uneven"),
            "shards out of rank order": Case(per_row, sharding="reversed"),
            "an empty shard": Case(per_row, sharding="empty"),
        }
    if not place.quick and dtype == torch.float32:
        many = replace(per_row, rows=OPERATOR_LIMIT + 1, vocab=2 * place.world)
        cases["more rows than the operator takes"] = Case(many)
    checks = [Check("torch's own arithmetic", torch_itself, gate=True)]
    checks += [Check(name, partial(against_truth, case)) for name, case in cases.items()]
    checks += [
        Check("all rows ignored", all_ignored),
        Check("no rows", no_rows),
        Check("target out of range", bad_target),
        Check("the same bits twice", repeated),
    ]
    if place.world > 1:
        checks.append(Check("ranks with different targets", other_targets))
    if place.world > 1 and dtype == torch.float32:
        checks.append(Check("number of collectives", collectives))
    return checks


def _without_fp64(place: Place) -> bool:
    return place.group is not None and dist.get_backend(place.group) in BACKENDS_WITHOUT_FP64


def _whole(vocab: int, world: int) -> int:
    return vocab - vocab % world
