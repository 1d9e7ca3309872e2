"""Time, memory and exactness of the contenders, in turns, beside the matrix products alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce.launch.bench.fused_head.contenders import (
    CONTENDERS,
    Contender,
    Loss,
    Setting,
)
from vocab_parallel_ce.launch.measuring.clock import wall_seconds
from vocab_parallel_ce.launch.measuring.memory import exact_peaks, peak_extra
from vocab_parallel_ce.launch.measuring.rounds import in_turns, slowest
from vocab_parallel_ce.parallel.groups import ParallelGroups

PRODUCTS = "three products alone"
ACCURACY = (512, 256, 4096)
"""rows, width and vocabulary of the batch on which exactness is measured"""


@dataclass(frozen=True)
class Case:
    """A batch; the same wherever it is made."""

    rows: int
    width: int
    vocab: int
    dtype: torch.dtype
    ignored: float = 0.0
    confident: bool = False
    """the target's logit is so large that its probability is about 0.99"""

    def tensors(self, rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, this rank's rows of the head, and targets."""
        g = torch.Generator().manual_seed(0)
        head = torch.randn(self.vocab, self.width, generator=g) / self.width**0.5
        hidden = torch.randn(self.rows, self.width, generator=g)
        target = torch.randint(self.vocab, (self.rows,), generator=g)
        if self.confident:
            direction = F.normalize(head[target], dim=1)
            hidden = 0.3 * hidden + direction * (torch.tensor(self.vocab).log() + 5)
        target[torch.rand(self.rows, generator=g) < self.ignored] = -100
        mine = head.chunk(world)[rank]
        return (
            hidden.to(device, self.dtype).requires_grad_(),
            mine.to(device, self.dtype, copy=True).requires_grad_(),
            target.to(device),
        )


@dataclass
class Row:
    """What was found of one contender."""

    name: str
    status: str = ""
    milliseconds: float | None = None
    products: float | None = None
    """its time in units of the three products alone"""
    peak_mib: float | None = None
    errors: tuple[float, ...] = ()
    """of loss, hidden gradient and head gradient, random and confident rows; relative to fp64"""

    def as_dict(self) -> dict[str, Any]:
        """For a file of JSON."""
        return asdict(self)


def _step(loss: Loss, leaves: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, target = leaves
    torch.autograd.grad(loss(hidden, head, target), (hidden, head))


def _products(leaves: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """Logits and both gradients by whole matrices into memory that is there: nobody does less."""
    hidden, head = leaves[0].detach(), leaves[1].detach()
    logits = hidden.new_zeros(hidden.shape[0], head.shape[0])
    of_hidden, of_head = torch.empty_like(hidden), torch.empty_like(head)

    def run() -> None:
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(logits, head, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_head)

    return run


def measure(
    case: Case,
    groups: ParallelGroups,
    repeats: int,
    tell: Callable[[str], None],
    contenders: Sequence[Contender] = CONTENDERS,
) -> list[Row]:
    """The contenders; the same rows on every rank. All ranks call it."""
    group = groups.tp_group if groups.tp > 1 else None
    columns = -(-case.vocab // groups.tp)
    setting = Setting(group, groups.tp, groups.device, case.dtype, columns)
    leaves = case.tensors(groups.tp_rank, groups.tp, groups.device)
    rows = {c.name: Row(c.name, c.status(setting)) for c in contenders}
    ready: dict[str, Loss] = {}
    for contender in contenders:
        row = rows[contender.name]
        if not row.status:
            tell(contender.name)
            _try(contender, setting, groups, leaves, row, ready)
    tell("time and memory")
    runs: dict[str, Callable[[], None]] = {PRODUCTS: _products(leaves)}
    runs.update({name: partial(_step, loss, leaves) for name, loss in ready.items()})

    def timed(run: Callable[[], None]) -> float:
        groups.barrier()
        return wall_seconds(run, groups.device)

    slow = {c.name for c in contenders if c.slow}
    # All but the products have run already.
    runs[PRODUCTS]()
    turns = {name: partial(timed, run) for name, run in runs.items() if name not in slow}
    found = in_turns(turns, repeats, warm_up=0)
    everyone = groups.gather(found)
    medians = {
        name: statistics.median(slowest([rank[name] for rank in everyone])) for name in found
    }
    del runs[PRODUCTS]
    for name, run in runs.items():
        with exact_peaks():
            groups.barrier()
            peak = peak_extra(run, groups.device)
        peaks = [p for p in groups.gather(peak) if p is not None]
        row = rows[name]
        if name in medians:
            row.milliseconds = 1000 * medians[name]
        assert row.milliseconds is not None
        row.products = row.milliseconds / 1000 / medians[PRODUCTS]
        row.peak_mib = max(peaks) / (1 << 20) if peaks else None
    alone = Row(PRODUCTS, "", 1000 * medians[PRODUCTS], 1.0)
    return [alone, *rows.values()]


def _try(
    contender: Contender,
    setting: Setting,
    groups: ParallelGroups,
    leaves: tuple[Tensor, Tensor, Tensor],
    row: Row,
    ready: dict[str, Loss],
) -> None:
    """Prepare it, run it once, and compare it with fp64; what fails becomes its status."""
    error, loss = "", None
    try:
        loss = contender.prepare(setting)
        seconds = wall_seconds(partial(_step, loss, leaves), setting.device)
        row.milliseconds = 1000 * seconds if contender.slow else None
        row.errors = (
            *_errors(loss, setting, groups, confident=False),
            *_errors(loss, setting, groups, confident=True),
        )
    except Exception as problem:  # a peer may raise anything
        error = f"{type(problem).__name__}: {problem}".splitlines()[0][:80]
    errors = [text for text in groups.gather(error) if text]
    row.status = errors[0] if errors else ""
    if loss is not None and not errors:
        ready[contender.name] = loss


def _errors(
    loss: Loss, setting: Setting, groups: ParallelGroups, confident: bool
) -> tuple[float, float, float]:
    """Relative errors of the loss and, in the Frobenius norm, of both gradients."""
    case = Case(*ACCURACY, setting.dtype, confident=confident)
    hidden, head, target = case.tensors(groups.tp_rank, groups.tp, groups.device)
    value = loss(hidden, head, target)
    got = torch.autograd.grad(value, (hidden, head))
    _, whole, _ = case.tensors(0, 1, groups.device)
    exact = [t.detach().cpu().double().requires_grad_() for t in (hidden, whole)]
    want = F.cross_entropy(F.linear(exact[0], exact[1]), target.cpu())
    of_hidden, of_head = torch.autograd.grad(want, exact)
    of_head = of_head.chunk(groups.tp)[groups.tp_rank]
    off = [float((g.cpu().double() - w).norm() / w.norm()) for g, w in zip(
        got, (of_hidden, of_head), strict=True)]  # fmt: skip
    off_loss = float((value.detach().cpu().double() - want.detach()).abs() / want.detach().abs())
    return off_loss, off[0], off[1]
