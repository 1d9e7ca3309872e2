"""What every torch operator of this engine reads and writes in the memory of an A2 or A3 card.

From the sources of the kernels: CANN's op-plugin decides which kernels a call launches (ops-math's
and ops-nn's aclnn_*.cpp, of CANN 8.5.0 to 9.1.0), the kernels say how often they touch an element
(ops-nn's op_kernel folders; the TBE kernels of the CANN 8.1 toolkit). Nothing of it was measured on
a card, and what the second-level cache answers is not in it.

The rules, each beside the operators it holds for:

    EACH_ONCE      every operand is read once and the result written once. Mixed dtypes and the
                   broadcast of a row's or a column's value happen inside the kernel
    CASTS_FIRST    the same for one dtype; other dtypes are cast by kernels of their own
    OPERATOR       npu_cross_entropy_loss: three reads and a write, however short the row
    ELEMENTS       as many elements as there are indices
    ROWS           as many rows as there are indices
    PRODUCTS       every operand once and the result once: neither what a matrix product reads again
                   is counted, nor the tiles of logits that a fused one keeps in its workspace
    WHOLE_ROWS     whole rows are read and written, however few elements change
    NOTHING        memory only; no kernel reads or writes it
    None           unknown: several kernels may serve it, and which one does was not found out

A strided operand is made dense by one more kernel before any other sees it, and so is a strided
result afterwards, by a kernel that copies it into place.

The ways' ``FORWARD`` and ``BACKWARD`` are lists of ``Step``; the cost model (launch/plan) adds them
up, and the stand-in of the tests (tests/npu_sim) enters every call in a ledger by the same table
and compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Rule(Enum):
    """See the module."""

    EACH_ONCE = "each once"
    CASTS_FIRST = "casts first"
    OPERATOR = "operator"
    ELEMENTS = "elements"
    ROWS = "rows"
    PRODUCTS = "products"
    WHOLE_ROWS = "whole rows"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Operand:
    """One tensor that a kernel reads or writes."""

    elements: int
    itemsize: int
    dense: bool = True

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Moved:
    """Bytes of one call, and how many kernels it launches on its full-sized operands."""

    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Step:
    """One kernel of a way on [n, C_r]: which of "logits" and "fp32" it reads and writes."""

    operator: str
    reads: str
    writes: str = ""
    unless_fp32: bool = False
    """not launched where the logits are fp32, and the result was formed in its place"""
    unless_finite: bool = False
    """not launched where the caller promises ``finite_logits``"""


class UnknownTrafficError(RuntimeError):
    """An operator that is not in the table, or whose kernels are not known."""


_EACH_ONCE = """
    _npu_dtype_cast abs abs_ add addcmul all amax amin any arange argmax bitwise_and
    bitwise_and_ bitwise_left_shift bitwise_not bitwise_or bitwise_or_ bitwise_right_shift
    bitwise_xor bitwise_xor_ cat clamp clamp_ clamp_min clamp_min_ clone copy_ div eq exp exp_
    fill_ floor_divide full fused_cross_entropy_loss_with_max_sum ge gt index_add_
    isfinite isnan le log
    log_ logical_and logical_not logical_or lt masked_fill masked_fill_ max maximum mean min
    minimum mul nan_to_num ne neg neg_ npu_dtype_cast npu_fused_cross_entropy_loss_with_max_sum
    ones_like pow reciprocal remainder sign square stack sum tanh_ where zero_ zeros_like
"""
_CASTS_FIRST = "sub sub_ add_ mul_ div_ addcmul_ rsub"
_PRODUCTS = """
    addmm addmm_ mm npu_fused_linear_online_max_sum fused_linear_online_max_sum
    npu_fused_linear_cross_entropy_loss_with_max_sum_backward
    fused_linear_cross_entropy_loss_with_max_sum_grad
"""
_TABLE: dict[str, Rule | None] = {
    **dict.fromkeys(_EACH_ONCE.split(), Rule.EACH_ONCE),
    **dict.fromkeys(_CASTS_FIRST.split(), Rule.CASTS_FIRST),
    "npu_cross_entropy_loss": Rule.OPERATOR,
    "gather": Rule.ELEMENTS,
    "index_select": Rule.ELEMENTS,
    "index": Rule.ELEMENTS,
    "put_": Rule.ELEMENTS,
    "embedding": Rule.ROWS,
    **dict.fromkeys(_PRODUCTS.split(), Rule.PRODUCTS),
    "scatter_": Rule.WHOLE_ROWS,
    "scatter_add_": Rule.WHOLE_ROWS,
    "empty": Rule.NOTHING,
    "index_put_": None,
    "_index_put_impl_": None,
    "logsumexp": None,
    "_softmax": None,
    "_log_softmax": None,
}


def moved(operator: str, reads: Sequence[Operand], writes: Sequence[Operand]) -> Moved:
    """Bytes that one call reads and writes.

    Args:
        operator: The name of torch's operator, with the underscore of an in-place one.
        reads: Tensors that it gets, the one that it writes in place included.
        writes: Tensors that it fills.

    Raises:
        UnknownTrafficError: The operator is not in the table, or marked unknown there.
    """
    if operator not in _TABLE:
        raise UnknownTrafficError(
            f"{operator} is not in the table of engines/npu/traffic.py: look up what its kernels "
            "read and write, and add it"
        )
    rule = _TABLE[operator]
    if rule is None:
        raise UnknownTrafficError(f"what {operator} reads and writes on a card is unknown")
    if rule is Rule.NOTHING:
        return Moved(0, 0)
    if rule is Rule.ELEMENTS:
        few = min((operand.elements for operand in (*reads, *writes)), default=0)
        sizes = [operand.itemsize * few for operand in (*reads, *writes)]
        return Moved(sum(sizes), max((operand.itemsize for operand in writes), default=0) * few)
    read, written = _total(reads), _total(writes)
    if rule is Rule.ROWS:
        few = min((operand.bytes for operand in reads), default=0)
        return Moved(written + few, written)
    if operator in ("copy_", "clone") and _one_copy(reads, writes):
        return Moved(read, written)
    if rule is Rule.OPERATOR:
        largest = max(reads, key=lambda operand: operand.bytes)
        read += 2 * largest.bytes
    elif rule is Rule.WHOLE_ROWS:
        written = max(written, max(operand.bytes for operand in writes))
    elif rule is Rule.CASTS_FIRST:
        result = max((operand.itemsize for operand in writes), default=0)
        for operand in reads:
            if operand.itemsize < result:  # read and written by the cast, then read as wide
                read += operand.elements * result
                written += operand.elements * result
    apart = [operand for operand in (*reads, *writes) if not operand.dense]
    return Moved(read + _total(apart), written + _total(apart))


def _one_copy(reads: Sequence[Operand], writes: Sequence[Operand]) -> bool:
    """Whether a copy is one kernel: of one dtype it moves strided memory itself."""
    return len({operand.itemsize for operand in (*reads, *writes)}) == 1


def _total(operands: Iterable[Operand]) -> int:
    return sum(operand.bytes for operand in operands)


def of_step(step: Step, itemsize: int, finite_logits: bool = False) -> Moved:
    """Bytes an element of a step, for logits of ``itemsize`` bytes."""
    sizes = {"logits": itemsize, "fp32": 4}

    def operands(words: str) -> list[Operand]:
        return [Operand(1, sizes[word]) for word in words.split()]

    if (step.unless_fp32 and itemsize == 4) or (step.unless_finite and finite_logits):
        return Moved(0, 0)
    return moved(step.operator, operands(step.reads), operands(step.writes))
