"""What every engine must do: one function a check, each on one dtype.

``engine_checks`` lists them with every combination of options that they are run for. A check raises
AssertionError, and says there what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ...engines.contract import (
    ELSEWHERE,
    IGNORED,
    Coefficients,
    Wanted,
    arithmetic_dtype,
)
from ..tolerance import assert_close
from . import formulas
from .formulas import Shard, random_shard
from .subject import EVERYTHING, UNWRITTEN, Subject, same_bits

SEED = 1234
# Around vectors of 16 elements and blocks of 1024
COLUMNS = (1, 15, 16, 17, 100, 1023, 1024, 1040, 2075)
LEAST_AND_MOST = (Wanted(), EVERYTHING)
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda x: torch.cat([x, x.flip(1)], 1)[:, : x.shape[1]],
    "columns apart": lambda x: torch.stack([x, x.flip(1)], 2)[:, :, 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "backwards in memory": lambda x: x.flip(0).contiguous()[range(len(x))[::-1]],
    "amid words": lambda x: (
        torch.cat([x, x[:, :5]], 1).flatten().roll(3)[3:].as_strided(x.shape, (x.shape[1] + 5, 1))
    ),
    "rows expanded": lambda x: x[:1].expand(len(x), -1),
}


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
    check: Callable[[Subject, torch.dtype], None]
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


Check = Callable[[Subject, torch.dtype], None]


def _checks(dtype: torch.dtype, many_rows: bool) -> Iterator[tuple[str, Check]]:
    yield "dtype is served", is_served
    for columns in COLUMNS:
        yield f"partials, {columns} columns", partial(partials_of_width, columns=columns)
        yield f"gradient, {columns} columns", partial(gradient_of_width, columns=columns)
        yield f"log_prob, {columns} columns", partial(log_prob_of_width, columns=columns)
    for columns in (1, 1100):
        yield f"one row, {columns} columns", partial(one_row, columns=columns)
    for weighted, flags in product((False, True), product((False, True), repeat=3)):
        smooth, entropy, argmax = flags
        wanted = Wanted(smooth, entropy, argmax, squares=smooth == argmax)
        what = "+".join(wanted.rows[3:]) or "least"
        what += ", weight" if weighted else ""
        yield f"partials, {what}", partial(partials_wanted, wanted=wanted, weighted=weighted)
    for scale in (0.3, -1.5, 0.0):
        yield f"partials, scale {scale}", partial(partials_scaled, scale=scale)
    for spread, offset in product((1e3, 1e4), (0.0, 1e4, -1e4)):
        check = partial(partials_of_large_logits, spread=spread, offset=offset)
        yield f"partials, logits near {offset:g} +- {spread:g}", check
    yield "partials, -inf", minus_infinity
    for value, place in product((torch.nan, torch.inf), (0, 15, 600, 1098, 1099)):
        check = partial(nan_and_infinity_are_not_lost, value=value, place=place)
        yield f"partials, {value} at {place}", check
    yield "partials, NaN among infinities", nan_hides_behind_no_infinity
    yield "partials, ignored rows hold NaN", ignored_rows_are_not_read
    for columns in (17, 1100):
        yield f"argmax, ties in {columns} columns", partial(first_of_a_tie, columns=columns)
    for strides in STRIDES:
        yield f"strides: {strides}", partial(strided, strides=strides)
    for scale, flags in product((1.0, -0.7, 0.0), product((False, True), repeat=3)):
        weighted, entropy, smooth = flags
        chosen = {"smooth": smooth, "entropy": entropy, "weight": weighted}
        what = ", ".join([f"scale {scale}", *(name for name, on in chosen.items() if on)])
        check = partial(
            gradient_parts, scale=scale, smooth=smooth, entropy=entropy, weighted=weighted
        )
        yield f"gradient, {what}", check
    for cap in (5.0, 30.0):
        yield f"softcap {cap:g}", partial(all_three_capped, softcap=cap)
    yield "softcap, -inf and NaN", capped_infinities
    yield "scale, one a row", one_scale_a_row
    yield "gradient, p is 0", gradient_where_p_is_zero
    yield "gradient, ignored rows hold NaN", gradient_of_ignored_rows
    yield "gradient, unused rows hold NaN", gradient_of_unused_rows
    yield "gradient, logits promised finite", gradient_of_finite_logits
    yield "gradient, poisoned rows", gradient_of_a_poisoned_row
    if dtype in (torch.bfloat16, torch.float16):
        yield "gradient, the target's is rounded once", target_gradient_is_rounded_once
    yield "inputs are only read", inputs_are_only_read
    yield "log_prob left by partials", log_prob_left_by_partials
    if many_rows:
        yield "many blocks", many_blocks


def is_served(subject: Subject, dtype: torch.dtype) -> None:
    """``supports`` says so, for logits on its device."""
    logits = torch.zeros(1, 1, dtype=dtype, device=subject.device)
    assert subject.engine.supports(logits), f"supports() says that it does not serve {dtype}"


# Partials


def partials_of_width(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    shard = random_shard(subject.rows, columns, dtype)
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)


def one_row(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    """Every function, where there is a single row."""
    for target in (columns // 2, ELSEWHERE, IGNORED):
        shard = random_shard(1, columns, dtype)
        # Of one row the naive error is luck: logits whose statistics every dtype holds exactly.
        shard.logits.fill_(2.0)
        shard.target[:] = target
        for wanted in LEAST_AND_MOST:
            subject.check_partials(shard, wanted=wanted)
        subject.check_log_prob(shard)
        arithmetic = arithmetic_dtype(dtype)
        m, s = (torch.tensor([value], dtype=arithmetic) for value in (2.0, 4.0))
        ones = torch.ones(1, dtype=arithmetic)
        got = subject.gradient(shard, m, s, Coefficients(ones, ones))
        want = torch.full((1, columns), 0.0 if target == IGNORED else 0.25, dtype=dtype)
        if target >= 0:
            want[0, target] = -0.75
        assert_close(got, want.double(), want, "gradient")


def partials_wanted(subject: Subject, dtype: torch.dtype, wanted: Wanted, weighted: bool) -> None:
    """Each statistic alone and with the others lands in its own row."""
    subject.check_partials(random_shard(subject.rows, 70, dtype), 1.3, wanted, weighted)


def partials_scaled(subject: Subject, dtype: torch.dtype, scale: float) -> None:
    shard = random_shard(subject.rows, 1100, dtype)
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, scale, wanted)


def partials_of_large_logits(
    subject: Subject, dtype: torch.dtype, spread: float, offset: float
) -> None:
    """Three clusters far apart: no e^(x - m) is subnormal, which an engine may take for 0."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits.add_(offset + spread * torch.randint(-1, 2, shard.logits.shape))
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)


def minus_infinity(subject: Subject, dtype: torch.dtype) -> None:
    """Columns of -inf have no probability; a row of nothing else has m = -inf and s = 0."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[3] = -torch.inf
    shard.logits[4, :1030] = -torch.inf  # a whole block
    for weighted in (False, True):
        subject.check_partials(shard, weighted=weighted)
    subject.check_partials(shard, wanted=Wanted())
    got = subject.partials(shard)
    assert got["m"][3] == -torch.inf, f"m of a row of -inf is {got['m'][3]}"
    for name in ("s", "t", "argmax"):
        assert got[name][3] == 0, f"{name} of a row of -inf is {got[name][3]}"


def nan_and_infinity_are_not_lost(
    subject: Subject, dtype: torch.dtype, value: float, place: int
) -> None:
    """Wherever it lies in a row, s is NaN, and the other rows know nothing of it."""
    shard = random_shard(subject.rows, 1100, dtype)
    clean = {wanted: subject.partials(shard, wanted=wanted) for wanted in LEAST_AND_MOST}
    shard.logits[3, place] = value
    others = torch.arange(subject.rows) != 3
    for wanted, before in clean.items():
        after = subject.partials(shard, wanted=wanted)
        for name in {"s", "t"} & set(wanted.rows):
            assert bool(after[name][3].isnan()), f"{name} of its row is {after[name][3]}"
        for name in wanted.rows:
            same = torch.equal(after[name][others], before[name][others])
            assert same, f"{name} of other rows changed"


def nan_hides_behind_no_infinity(subject: Subject, dtype: torch.dtype) -> None:
    """A NaN among nothing but -inf, and one before a larger logit."""
    shard = random_shard(2, 1100, dtype)
    shard.logits[0] = -torch.inf
    shard.logits[0, 700] = torch.nan
    shard.logits[1, 3], shard.logits[1, 1099] = torch.nan, 1e4
    for wanted in LEAST_AND_MOST:
        s = subject.partials(shard, wanted=wanted)["s"]
        assert bool(s.isnan().all()), f"s is {s.tolist()}"


def ignored_rows_are_not_read(subject: Subject, dtype: torch.dtype) -> None:
    """NaN in them changes nothing; asked for, they are answered as if they counted."""
    shard = random_shard(subject.rows, 1100, dtype)
    ignored = shard.target == IGNORED
    shard.logits[ignored] = torch.nan
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)
    read_all = Wanted(ignored_rows=True)
    s = subject.partials(shard, wanted=read_all)["s"][ignored]
    assert bool(s.isnan().all()), "asked for, ignored rows that hold NaN have a finite s"
    subject.check_partials(random_shard(subject.rows, 1100, dtype), wanted=read_all)


def first_of_a_tie(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    """The smallest column wins, also where all of them are equal."""
    shard = random_shard(4, columns, dtype)
    shard.target[:] = 0
    places = [0, 5, 15, columns - 2]
    for row, place in enumerate(places):
        shard.logits[row, place::2] = 40.0
    got = subject.partials(shard, wanted=Wanted(argmax=True))["argmax"].tolist()
    assert got == places, f"argmax is {got}, not {places}"
    shard.logits[:] = -3.0
    got = subject.partials(shard)["argmax"].tolist()
    assert got == [0] * 4, f"argmax of equal logits is {got}"


# Layouts


def strided(subject: Subject, dtype: torch.dtype, strides: str) -> None:
    """All three functions on logits that lie in memory like this."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard = shard._replace(logits=STRIDES[strides](shard.logits))
    for wanted in LEAST_AND_MOST:
        subject.check_partials(shard, wanted=wanted)
    subject.check_gradient(shard, smooth=True, entropy=True)
    subject.check_gradient(shard)
    subject.check_log_prob(shard)


def many_blocks(subject: Subject, dtype: torch.dtype) -> None:
    """More elements than one block of rows, and more than one of threads."""
    shard = random_shard(300, 3000, dtype)
    subject.check_partials(shard)
    subject.check_gradient(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)
    subject.check_log_prob(shard)


# Gradient


def gradient_of_width(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    shard = random_shard(subject.rows, columns, dtype)
    subject.check_gradient(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)


def gradient_parts(
    subject: Subject,
    dtype: torch.dtype,
    scale: float,
    smooth: bool,
    entropy: bool,
    weighted: bool,
) -> None:
    shard = random_shard(subject.rows, 70, dtype)
    subject.check_gradient(shard, scale, smooth, entropy, weighted)


def gradient_where_p_is_zero(subject: Subject, dtype: torch.dtype) -> None:
    """-inf and far-off columns add exactly 0 to the entropy's part, never 0 * -inf."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[:, 1::3] -= 2e4
    shard.target[0] = 3  # a target of probability 0
    shard.logits[4] = -torch.inf  # the whole shard of this row
    subject.check_gradient(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)


def gradient_of_ignored_rows(subject: Subject, dtype: torch.dtype) -> None:
    """It is written as zeros, not multiplied into them: NaN there reaches nothing."""
    shard = random_shard(subject.rows, 1100, dtype)
    ignored = shard.target == IGNORED
    shard.logits[ignored, ::2] = torch.nan
    shard.logits[ignored, 1::2] = torch.inf
    arithmetic = arithmetic_dtype(dtype)
    m = torch.where(ignored, torch.nan, 20.0).to(arithmetic)
    s = torch.where(ignored, torch.nan, 1e3).to(arithmetic)
    bad = torch.where(ignored, torch.nan, 1.0).to(arithmetic)
    for c in (Coefficients(bad, bad), Coefficients(bad, bad, bad, bad)):
        out = subject.gradient(shard, m, s, c)
        assert bool((out[ignored] == 0).all()), "the gradient of an ignored row is not 0"
        assert bool(out[~ignored].isfinite().all()), "the gradient of a kept row is not finite"


def gradient_of_unused_rows(subject: Subject, dtype: torch.dtype) -> None:
    """Where every coefficient is 0 zeros are written, whatever the logits, m and s are."""
    shard = random_shard(subject.rows, 1100, dtype)
    arithmetic = arithmetic_dtype(dtype)
    unused = torch.arange(subject.rows) % 3 == 0
    shard.target[shard.target == IGNORED] = 5
    shard.logits[unused, ::2] = torch.nan
    m, s = (torch.where(unused, torch.nan, value).to(arithmetic) for value in (9.0, 10.0))
    used = torch.where(unused, 0.0, 1.0).to(arithmetic)
    for c in (Coefficients(used, used), Coefficients(used, used, used, used)):
        out = subject.gradient(shard, m, s, c)
        assert bool((out[unused] == 0).all()), "the gradient of a row without coefficients is not 0"
        assert bool(out[~unused].isfinite().all()), "the gradient of a used row is not finite"
    nothing = torch.zeros_like(used)
    for place in range(4):  # one of them alone is enough
        parts = [nothing] * place + [used] + [nothing] * (3 - place)
        out = subject.gradient(shard, m, s, Coefficients(*parts))
        assert bool((out[unused] == 0).all()), "the gradient of a row without coefficients is not 0"
        here = ~unused & (shard.target >= 0)
        assert bool((out[here] != 0).any(1).all()), "a row with one coefficient has no gradient"


def gradient_of_finite_logits(subject: Subject, dtype: torch.dtype) -> None:
    """The promise changes no number: finite logits and -inf give zeros, whatever else is NaN."""
    shard = random_shard(subject.rows, 1100, dtype)
    shard.logits[:, ::5] = -torch.inf
    rows, largest = torch.arange(subject.rows), torch.finfo(dtype).max
    nothing = (shard.target == IGNORED) | (rows % 3 == 0)
    shard.logits[nothing, 1], shard.logits[nothing, 2] = largest, -largest
    arithmetic = arithmetic_dtype(dtype)
    m, s = (torch.where(nothing, torch.nan, value).to(arithmetic) for value in (9.0, 1e3))
    c = torch.where(nothing, 0.0, 0.5).to(arithmetic)
    bad = torch.where(shard.target == IGNORED, torch.nan, c)
    for parts in (Coefficients(bad, bad), Coefficients(bad, bad, bad, bad)):
        for softcap in (0.0, 20.0):
            before = subject.gradient(shard, m, s, parts, shard.weight, 0.5, None, softcap)
            after = subject.gradient(shard, m, s, parts, shard.weight, 0.5, None, softcap, True)
            assert torch.equal(after, before), "finite_logits changes a number"
            assert bool((after[nothing] == 0).all()), "finite_logits: a row's gradient is not 0"


def gradient_of_a_poisoned_row(subject: Subject, dtype: torch.dtype) -> None:
    """s = NaN marks a row whose target or rank is wrong: no column of it stays plausible."""
    shard = random_shard(4, 1100, dtype)
    shard.target[:] = torch.tensor([5, ELSEWHERE, 5, ELSEWHERE])
    shard.logits[:, 3] = -torch.inf  # p = 0 hides nothing
    arithmetic = arithmetic_dtype(dtype)
    m = torch.full((4,), 10.0, dtype=arithmetic)
    s = torch.tensor([torch.nan, torch.nan, 3.0, 3.0], dtype=arithmetic)
    ones = torch.ones(4, dtype=arithmetic)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, ones, ones)):
        out = subject.gradient(shard, m, s, c)
        assert bool(out[:2].isnan().all()), "the gradient of a row with s = NaN has numbers"
        assert bool(out[2:].isfinite().all()), "NaN reached the gradient of another row"


def target_gradient_is_rounded_once(subject: Subject, dtype: torch.dtype) -> None:
    """p = 0.9995 gives -5e-4, not the 0 of a p that was rounded to 1 before the 1 went off."""
    shard = Shard(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.int64), torch.ones(2))
    shard.logits[0, 1] = -7.6
    x = shard.logits.double()
    want = x.softmax(1) - torch.tensor([[1.0, 0.0]])
    naive = x.float().softmax(1) - torch.tensor([[1.0, 0.0]])
    s = torch.tensor([float((x - x.max()).exp().sum())])
    ones, m = torch.ones(1), torch.zeros(1)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, 0 * ones, 0 * ones)):
        out = subject.gradient(shard, m, s, c)
        assert -6e-4 < float(out[0, 0]) < -4e-4, f"it is {float(out[0, 0])}, not -5.0e-4"
        assert_close(out, want, naive, "gradient")


# Log-probabilities


def log_prob_of_width(subject: Subject, dtype: torch.dtype, columns: int) -> None:
    """Of every row, ignored ones included."""
    shard = random_shard(subject.rows, columns, dtype)
    subject.check_log_prob(shard)
    subject.check_log_prob(shard, -0.6)
    shard.logits[:, 0] = -torch.inf
    shard.logits[3] = torch.nan
    if columns > 1:
        subject.check_log_prob(shard)


def log_prob_left_by_partials(subject: Subject, dtype: torch.dtype) -> None:
    """An engine with LEAVES_LOG_PROB fills ``log_prob_out``; any other leaves it alone."""
    shard = random_shard(subject.rows, 100, dtype)
    out = torch.full_like(shard.logits, UNWRITTEN)
    subject.partials(shard, wanted=Wanted(ignored_rows=True), log_prob_out=out)
    if not subject.engine.LEAVES_LOG_PROB:
        assert bool((out == UNWRITTEN).all()), "partials wrote log_prob without LEAVES_LOG_PROB"
        return
    exact = formulas.statistics(shard, 1.0, torch.float64)
    naive = formulas.statistics(shard, 1.0, torch.float32)
    want = formulas.log_prob(shard, exact["m"], exact["s"], 1.0, torch.float64)
    plain = formulas.log_prob(shard, naive["m"], naive["s"], 1.0, torch.float32)
    assert_close(out, want, plain, "log_prob left by partials")


# All three


def all_three_capped(subject: Subject, dtype: torch.dtype, softcap: float) -> None:
    """x = scale c tanh(z / c): the cap comes first. Padding of vectors and blocks stays outside."""
    for columns, scale in ((17, 0.7), (1100, -1.5), (1100, 1.0)):
        shard = random_shard(subject.rows, columns, dtype, spread=4.0)
        subject.check_partials(shard, scale, softcap=softcap)
        subject.check_gradient(shard, scale, smooth=columns == 17, entropy=True, softcap=softcap)
    subject.check_log_prob(shard, scale, softcap)
    strided_shard = shard._replace(logits=STRIDES["columns apart"](shard.logits))
    subject.check_partials(strided_shard, wanted=Wanted(), softcap=softcap)
    subject.check_gradient(strided_shard, softcap=softcap)


def capped_infinities(subject: Subject, dtype: torch.dtype) -> None:
    """A cap makes -c of -inf and c of inf, whose slope is 0; NaN stays NaN."""
    shard = random_shard(subject.rows, 70, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[:, 1] = torch.inf
    subject.check_partials(shard, softcap=10.0)
    subject.check_gradient(shard, smooth=True, entropy=True, softcap=10.0)
    shard.logits[3, 2] = torch.nan
    for wanted in LEAST_AND_MOST:
        s = subject.partials(shard, wanted=wanted, softcap=10.0)["s"]
        assert bool(s[3].isnan()), f"s of its row is {s[3]}"
        assert bool(s[torch.arange(len(s)) != 3].isfinite().all()), "NaN reached another row"


def one_scale_a_row(subject: Subject, dtype: torch.dtype) -> None:
    """Of either sign, and under a cap; that of an ignored row may be anything."""
    shard = random_shard(subject.rows, 1100, dtype)
    scale = torch.rand(subject.rows, dtype=arithmetic_dtype(dtype)) + 0.25
    ignored = shard.target == IGNORED
    for signs in (torch.ones_like(scale), torch.randn(subject.rows).sign().to(scale.dtype)):
        scale = scale * signs
        for softcap, wanted in ((0.0, Wanted()), (20.0, EVERYTHING)):
            subject.check_partials(shard, scale, wanted, softcap=softcap)
            subject.check_gradient(shard, scale, entropy=softcap > 0, softcap=softcap)
    subject.check_log_prob(shard, scale)
    before = subject.partials(shard, scale)
    after = subject.partials(shard, scale.masked_fill(ignored, torch.nan))
    assert all(torch.equal(after[name], before[name]) for name in before), "an ignored row's counts"


def inputs_are_only_read(subject: Subject, dtype: torch.dtype) -> None:
    shard = random_shard(subject.rows, 1100, dtype)
    before = [value.clone() for value in shard]
    subject.check_partials(shard)
    subject.check_gradient(shard, smooth=True, entropy=True)
    subject.check_log_prob(shard)
    for name, now, then in zip(Shard._fields, shard, before, strict=True):
        assert same_bits(now, then), f"{name} was changed"
