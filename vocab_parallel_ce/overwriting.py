"""In-place backward: the gradient overwrites the logits, and what must not be read after that.

torch's version counter guards whoever saved the logits, and belongs to all views of one memory. So
several losses on parts of one tensor meet each other there: the second finds the counter raised,
though its own part may be whole. They are told so, in words that name ``inplace_backward``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

_MARK = "_vocab_parallel_ce_overwritten"
_WAY_OUT = (
    "with inplace_backward=True no other loss may use the same memory (views, slices and chunks of "
    "one tensor share it): make one loss of the whole tensor (reduction='none' keeps its rows "
    "apart), or pass each loss a .clone() of its part, or use inplace_backward=False"
)
_SIGNS = ("modified by an inplace operation", "modified inplace")


class _Region(NamedTuple):
    """Elements of a storage: rows of ``columns`` neighbours, ``step`` apart, within [low, high)."""

    low: int
    high: int
    step: int
    columns: int

    def meets(self, other: _Region) -> bool:
        """Whether the two may share an element; sure of a no."""
        if self.high <= other.low or other.high <= self.low:
            return False
        if self.step != other.step or self.step == 0:
            return True
        mine, theirs = self.low % self.step, other.low % self.step
        apart = mine + self.columns <= theirs or theirs + other.columns <= mine
        wraps = max(mine + self.columns, theirs + other.columns) > self.step
        return wraps or not apart


def _region(x: Tensor) -> _Region:
    low = int(x.storage_offset())
    high = low + 1 + sum((n - 1) * int(s) for n, s in zip(x.shape, x.stride(), strict=True))
    step = int(x.stride(-2)) if x.dim() > 1 else 0
    if x.stride(-1) != 1 or step == 0 or any(s % step for s in x.stride()[:-1]):
        step = 0
    return _Region(low, high if x.numel() else low, step, x.shape[-1])


def refuse_second_backward(ctx: Any) -> None:
    """A flag of our own: saved-tensor hooks can hide the version counter's complaint."""
    if ctx.overwritten:
        raise RuntimeError(
            "a second backward through a loss with inplace_backward=True: the first one "
            "overwrote the logits with their gradient; use inplace_backward=False to go "
            "backward more than once"
        )


def raise_explained(problem: RuntimeError) -> NoReturn:
    """torch's complaint about overwritten logits in the words of this library; others as is."""
    if not any(sign in str(problem) for sign in _SIGNS):
        raise problem
    said = str(problem).split(". ")[0]
    raise RuntimeError(
        f"the logits of this loss, or its class weights, were overwritten ({said}); {_WAY_OUT}"
    ) from problem


def mark(logits: Tensor) -> None:
    """Say that ``logits`` hold a gradient now: to autograd, and to the losses of other views."""
    owner = logits if logits._base is None else logits._base
    version, regions = getattr(owner, _MARK, (-1, ()))
    regions = regions if version == owner._version else ()
    torch.autograd.graph.increment_version(logits)
    setattr(owner, _MARK, (owner._version, (*regions, _region(logits))))


def check_not_overwritten(logits: Tensor, where: str) -> None:
    """Raise ValueError for logits that hold the gradient of an earlier loss instead."""
    try:
        _ = logits.grad_fn  # a chunk of memory that changed has none that torch could name
    except RuntimeError as problem:
        raise_explained(problem)
    owner = logits if logits._base is None else logits._base
    version, regions = getattr(owner, _MARK, (-1, ()))
    if version != owner._version:
        return  # never, or written anew since
    mine = _region(logits)
    if any(mine.meets(region) for region in regions):
        raise ValueError(
            "input holds the gradient of an earlier loss, which overwrote it "
            f"(inplace_backward=True){where}; {_WAY_OUT}"
        )


def check_overwritable(input: Tensor, where: str) -> None:
    """In-place backward writes into the logits' memory: it must be theirs, and hold them once."""
    way_out = "use inplace_backward=False, or pass the output of an operation"
    if not torch.compiler.is_compiling():
        check_not_overwritten(input, where)
    if input.is_leaf:
        raise ValueError(
            f"inplace_backward=True would overwrite input, which is a leaf{where}; {way_out}"
        )
    if torch.compiler.is_compiling():
        return
    base = input._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            f"inplace_backward=True would overwrite the leaf that input is a view of{where}; "
            f"{way_out}"
        )
    if _overlaps_itself(input):
        raise ValueError(
            f"inplace_backward=True needs logits whose elements do not share memory, got shape "
            f"{tuple(input.shape)} with strides {input.stride()}{where}; use "
            "inplace_backward=False, or input.contiguous()"
        )


def _overlaps_itself(x: Tensor) -> bool:
    """Whether some element may share memory with another (sure to be False for dense views)."""
    if x.numel() == 0:
        return False  # whatever its strides, which may be 0
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False
