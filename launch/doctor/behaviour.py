"""What the loss does where no number is compared: limits, refusals, collectives, repetition."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.launch.doctor.cases import (
    Case,
    Found,
    Place,
    Prepared,
    ask,
    bytes_of,
    prepare,
    same_bits,
)
from vocab_parallel_ce.launch.doctor.truth import IGNORE_INDEX, Question, batch
from vocab_parallel_ce.launch.doctor.worker import in_one_line
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.testing import Batch


def _small(place: Place, dtype: torch.dtype, **changes: Any) -> tuple[Case, Batch, Prepared]:
    """A small case whose tensors a check may still change."""
    q = Question(dtype=dtype, rows=6, vocab=place.vocab, reduction="none", **changes)
    case = Case(q)
    return case, batch(q), prepare(case, batch(q), place)


def all_ignored(place: Place, dtype: torch.dtype) -> Found:
    """Mean of nothing is NaN, a sum of nothing is 0, and the gradient is 0 in both."""
    found = Found()
    for reduction in ("mean", "sum", "none"):
        case, _, made = _small(place, dtype)
        made.target.fill_(IGNORE_INDEX)
        case = replace(case, question=replace(case.question, reduction=reduction))
        loss = ask(case, made, place)["loss"]
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
        loss = ask(case, made, place)["loss"]
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
        call = partial(ask, replace(case, check=check), made, place)
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
        call = partial(ask, replace(case, collective=collective), made, place)
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
        loss = ask(replace(case, collective="all_gather"), made, place)["loss"]
        loss.backward(b.upstream.to(loss))
        results.append((loss, made.own_gradient()))
    (loss, gradient), (again, gradient_again) = results
    found.expect(same_bits(loss, again), "the loss of a second call has other bits")
    found.expect(same_bits(gradient, gradient_again), "its gradient has other bits")
    found.digest = hashlib.sha256(bytes_of(loss)).hexdigest()
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
    complaint = _refused(partial(ask, case, made, place), "float64", "use input.float()")
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
