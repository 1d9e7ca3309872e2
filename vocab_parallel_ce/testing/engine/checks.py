"""The list of all that an engine must do, with every combination of options that it is run for.

A check is a function of ``partials.py``, ``gradient.py``, ``log_prob.py`` or ``all_three.py``, run
on one dtype. It raises AssertionError, and says there what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from ...engines.contract import Wanted
from . import all_three, gradient, log_prob, partials
from .subject import Subject

Check = Callable[[Subject, torch.dtype], None]

SEED = 1234
# Around vectors of 16 elements and blocks of 1024
COLUMNS = (1, 15, 16, 17, 100, 1023, 1024, 1040, 2075)


@dataclass(frozen=True)
class EngineCheck:
    """One check with its options.

    Example:
        >>> from vocab_parallel_ce.engines import eager
        >>> for check in engine_checks([torch.float32])[:3]:
        ...     check.run(Subject(eager))
    """

    name: str
    """with its options and its dtype"""
    check: Check
    dtype: torch.dtype

    def run(self, subject: Subject) -> None:
        """Run it from a fixed seed; the caller's generator goes on as if nothing had happened.

        Args:
            subject: The engine, its device, and how many rows a shard has.

        Raises:
            AssertionError: The engine is wrong; the text says in what.
            Exception: whatever the engine itself raised.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(SEED)
            self.check(subject, self.dtype)


def engine_checks(dtypes: Iterable[torch.dtype], *, many_rows: bool = True) -> list[EngineCheck]:
    """All checks of these dtypes.

    Args:
        dtypes: Of the logits.
        many_rows: Also shards of [300, 3000], more than one block of any engine: left out where
            kernels run in an interpreter.
    """
    return [
        EngineCheck(f"{name}, {str(dtype).removeprefix('torch.')}", check, dtype)
        for dtype in dtypes
        for name, check in _checks(dtype, many_rows)
    ]


def _checks(dtype: torch.dtype, many_rows: bool) -> Iterator[tuple[str, Check]]:
    yield "dtype is served", all_three.is_served
    for columns in COLUMNS:
        yield f"partials, {columns} columns", partial(partials.of_width, columns=columns)
        yield f"gradient, {columns} columns", partial(gradient.of_width, columns=columns)
        yield f"log_prob, {columns} columns", partial(log_prob.of_width, columns=columns)
    for columns in (1, 1100):
        yield f"one row, {columns} columns", partial(all_three.one_row, columns=columns)
    for weighted, flags in product((False, True), product((False, True), repeat=3)):
        smooth, entropy, argmax = flags
        wanted = Wanted(smooth, entropy, argmax, squares=smooth == argmax)
        what = "+".join(wanted.rows[3:]) or "least"
        what += ", weight" if weighted else ""
        check = partial(partials.in_its_own_row, wanted=wanted, weighted=weighted)
        yield f"partials, {what}", check
    for scale in (0.3, -1.5, 0.0):
        yield f"partials, scale {scale}", partial(partials.scaled, scale=scale)
    for spread, offset in product((1e3, 1e4), (0.0, 1e4, -1e4)):
        check = partial(partials.of_large_logits, spread=spread, offset=offset)
        yield f"partials, logits near {offset:g} +- {spread:g}", check
    yield "partials, -inf", partials.of_minus_infinity
    for value, place in product((torch.nan, torch.inf), (0, 15, 600, 1098, 1099)):
        check = partial(partials.nan_and_infinity_are_not_lost, value=value, place=place)
        yield f"partials, {value} at {place}", check
    yield "partials, NaN among infinities", partials.nan_hides_behind_no_infinity
    yield "partials, ignored rows hold NaN", partials.ignored_rows_are_not_read
    for columns in (17, 1100):
        check = partial(partials.first_of_a_tie, columns=columns)
        yield f"argmax, ties in {columns} columns", check
    for strides in all_three.STRIDES:
        yield f"strides: {strides}", partial(all_three.strided, strides=strides)
    for scale, flags in product((1.0, -0.7, 0.0), product((False, True), repeat=3)):
        weighted, entropy, smooth = flags
        chosen = {"smooth": smooth, "entropy": entropy, "weight": weighted}
        what = ", ".join([f"scale {scale}", *(name for name, on in chosen.items() if on)])
        check = partial(
            gradient.of_parts, scale=scale, smooth=smooth, entropy=entropy, weighted=weighted
        )
        yield f"gradient, {what}", check
    for cap in (5.0, 30.0):
        yield f"softcap {cap:g}", partial(all_three.capped, softcap=cap)
    yield "softcap, -inf and NaN", all_three.capped_infinities
    yield "scale, one a row", all_three.one_scale_a_row
    yield "gradient, p is 0", gradient.where_p_is_zero
    yield "gradient, ignored rows hold NaN", gradient.of_ignored_rows
    yield "gradient, unused rows hold NaN", gradient.of_unused_rows
    yield "gradient, logits promised finite", gradient.of_finite_logits
    yield "gradient, poisoned rows", gradient.of_a_poisoned_row
    if dtype in (torch.bfloat16, torch.float16):
        yield "gradient, the target's is rounded once", gradient.of_the_target_is_rounded_once
    yield "inputs are only read", all_three.inputs_are_only_read
    yield "log_prob left by partials", log_prob.left_by_partials
    if many_rows:
        yield "many blocks", all_three.many_blocks
