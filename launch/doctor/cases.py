"""One call of the loss, forward and backward, every result of it against the fp64 truth.

A case runs on every rank at once, from the same seed, and each rank compares its own results: all
of the loss, and its own columns of log_prob and gradient. It returns what it measured and what it
found wrong; which rank, dtype and check that was is added by who runs it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.engines.contract import arithmetic_dtype
from vocab_parallel_ce.launch.doctor.truth import (
    IGNORE_INDEX,
    Question,
    Truth,
    batch,
    objective,
    selected_ids,
    truth,
)
from vocab_parallel_ce.testing import Batch, Comparison, compare, sharding


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
class Case:
    """A question, and the way it is put to the library."""

    question: Question
    function: str = "loss"
    """loss: cross_entropy; operator: cross_entropy_loss; tokens: token_statistics"""
    sharding: str = "even"
    """one of ``testing.KINDS``"""
    collective: str = "auto"
    inplace: bool = False
    strided: bool = False
    lead: tuple[int, ...] | None = None
    """the leading shape of the logits, where it is not [N]"""
    check: bool | None = None
    scale_of_rows: bool = False
    """``scale`` is handed over as a tensor, one number a row"""


@dataclass
class Prepared:
    """A case's tensors on this rank."""

    leaf: Tensor
    logits: Tensor
    """what is handed to the library: the leaf, a view of it, or a copy that may be overwritten"""
    target: Tensor
    weight: Tensor | None
    selected: Tensor | None
    shard: VocabShard | None
    start: int
    stop: int

    def own_gradient(self) -> Tensor:
        """d(logits) [N, C_r], padding columns included."""
        assert self.leaf.grad is not None
        gradient = self.leaf.grad.reshape(self.target.numel(), self.leaf.shape[-1])
        return gradient[:, : self.logits.shape[-1]]


def prepare(case: Case, b: Batch, place: Place) -> Prepared:
    q = case.question
    plan = sharding(case.sharding, q.vocab, place.world)
    start, stop = plan.bounds[place.rank]
    local = plan.local(b.logits, place.rank)
    columns = local.shape[1]
    if case.strided:
        local = torch.cat([local, local[:, :3]], 1)
    shape = (q.rows,) if case.lead is None else case.lead
    selected = selected_ids(q)
    leaf = local.view(*shape, local.shape[1]).to(place.device, copy=True).requires_grad_()
    logits = leaf[..., :columns] if case.strided else leaf
    return Prepared(
        leaf=leaf,
        logits=logits.clone() if case.inplace else logits,
        target=b.target.view(shape).to(place.device, copy=True),
        weight=b.weight.to(place.device) if q.weight else None,
        selected=None
        if selected is None
        else selected.view(*shape, q.selected).to(place.device, copy=True),
        shard=plan.shard(place.rank),
        start=start,
        stop=stop,
    )


def ask(case: Case, made: Prepared, place: Place) -> dict[str, Tensor]:
    """The library's answers by the names that the truth uses."""
    q = case.question
    common: dict[str, Any] = {
        "group": place.group,
        "shard": made.shard,
        "inplace_backward": case.inplace,
        "scale": torch.full_like(made.target, q.scale, dtype=torch.float32)
        if case.scale_of_rows
        else q.scale,
        "softcap": q.softcap,
        "collective": case.collective,
        "check": case.check,
        "ignore_index": IGNORE_INDEX,
    }
    if case.function == "tokens":
        tokens = token_statistics(
            made.logits, made.target, entropy=True, argmax=True, sum_p_squared=True,
            selected=made.selected, **common,
        )  # fmt: skip
        assert tokens.entropy is not None
        assert tokens.argmax is not None
        assert tokens.sum_p_squared is not None
        answers = {"token": tokens.log_prob, "lse": tokens.lse, "entropy": tokens.entropy}
        answers |= {"argmax": tokens.argmax, "sum_p_squared": tokens.sum_p_squared}
        found = tokens.selected_log_prob
        return answers if found is None else answers | {"selected": found}
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


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bytes_of(one) == bytes_of(other)


def bytes_of(tensor: Tensor) -> bytes:
    host = tensor.detach().cpu().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""


def against_truth(case: Case, place: Place, dtype: torch.dtype) -> Found:
    """One call, forward and backward, every result compared."""
    case = replace(case, question=replace(case.question, dtype=dtype))
    q = case.question
    b = batch(q)
    right = truth(q, case.function, place.device)
    made = prepare(case, b, place)
    before = bytes_of(made.leaf)
    answers = ask(case, made, place)
    found = Found()
    differentiable = {name: value for name, value in answers.items() if value.requires_grad}
    objective(case.function, differentiable, b.upstream.to(place.device)).backward()

    for name, value in answers.items():
        if name == "argmax":
            found.expect(bool((value.cpu() == right.argmax).all()), "argmax is not the largest")
            continue
        exact = right.exact[name]
        if name == "log_prob":
            value, exact = value[..., : made.stop - made.start], exact[:, made.start : made.stop]
            value = value.reshape(exact.shape)
        expected = dtype if case.function == "operator" else arithmetic_dtype(dtype)
        found.expect(value.dtype == expected, f"{name} is {value.dtype}, not {expected}")
        value = value.reshape(exact.shape)
        found.comparisons.append(compare(name, value, exact, right.error[name]))
    _compare_gradient(made, right, found)
    if case.inplace:
        overwritten = same_bits(made.logits.reshape(-1), made.own_gradient().reshape(-1))
        found.expect(overwritten, "inplace_backward did not leave the gradient in the logits")
    found.expect(bytes_of(made.leaf) == before, "the logits were modified")
    if case.collective == "all_gather":
        found.digest = hashlib.sha256(bytes_of(answers["loss"])).hexdigest()
    return found


def _compare_gradient(made: Prepared, right: Truth, found: Found) -> None:
    gradient, size = made.own_gradient(), made.stop - made.start
    exact = right.exact["gradient"][:, made.start : made.stop]
    found.comparisons.append(
        compare("gradient", gradient[:, :size], exact, right.error["gradient"])
    )
    found.expect(bool((gradient[:, size:] == 0).all()), "the gradient of padding is not 0")
    ignored = made.target.reshape(-1) == IGNORE_INDEX
    found.expect(bool((gradient[ignored] == 0).all()), "the gradient of ignored rows is not 0")
