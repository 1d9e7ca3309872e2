"""The three functions of an engine against the contract's formulas in fp64, one shard at a time.

Every test runs on the eager engine and on that of the device, so the two agree; under Triton's
interpreter on the triton engine alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.engines import eager, npu
from vocab_parallel_ce.engines.contract import (
    ELSEWHERE,
    IGNORED,
    Coefficients,
    Engine,
    Wanted,
    arithmetic_dtype,
)
from vocab_parallel_ce.engines.cpu import engine as cpu
from vocab_parallel_ce.engines.triton import engine as triton
from vocab_parallel_ce.testing import assert_close, naive_error

from ..device import DEVICE, DTYPES, ENGINES, INTERPRETED, move


class Moved:
    """An engine as the tests of this file call it: with CPU tensors, copied to the device and back.

    What is not written to must come back as it went.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.LEAVES_LOG_PROB = engine.LEAVES_LOG_PROB
        self.ROW_FUNCTIONS = engine.ROW_FUNCTIONS

    def supports(self, logits: Tensor) -> bool:
        return self.engine.supports(move(logits))

    def _call(self, function: Callable[..., None], args: tuple[Any, ...], *written: Tensor) -> None:
        there: dict[int, Tensor] = {}

        def moved(value: Any) -> Any:
            if isinstance(value, Coefficients):
                return Coefficients(*(moved(part) for part in value))
            if not isinstance(value, Tensor):
                return value
            return there.setdefault(id(value), move(value))

        function(*(moved(arg) for arg in args))
        for here in written:
            here.copy_(there.pop(id(here)))
        for here in (arg for arg in args if isinstance(arg, Tensor) and id(arg) in there):
            assert torch.equal(_bits(there[id(here)].cpu()), _bits(here)), "an argument was changed"

    def partials(
        self,
        logits: Tensor,
        local_target: Tensor,
        weight: Tensor | None,
        scale: float,
        wanted: Wanted,
        out: Tensor,
        log_prob_out: Tensor | None = None,
    ) -> None:
        args = (logits, local_target, weight, scale, wanted, out, log_prob_out)
        written = (out,) if log_prob_out is None else (out, log_prob_out)
        self._call(self.engine.partials, args, *written)

    def gradient(
        self,
        logits: Tensor,
        m: Tensor,
        s: Tensor,
        local_target: Tensor,
        coefficients: Coefficients,
        weight: Tensor | None,
        scale: float,
        out: Tensor,
    ) -> None:
        args = (logits, m, s, local_target, coefficients, weight, scale, out)
        self._call(self.engine.gradient, args, out)

    def log_prob(self, logits: Tensor, m: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
        self._call(self.engine.log_prob, (logits, m, s, scale, out), out)


def _bits(values: Tensor) -> Tensor:
    """So that NaN equals itself."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    return values.contiguous().view(integers)


MODULES: dict[str, Engine] = {"eager": eager, "cpu": cpu, "npu": npu, "triton": triton}
SERVING: dict[str, Engine] = {
    name: MODULES[name] if DEVICE == "cpu" else Moved(MODULES[name]) for name in ENGINES
}
# Around the cpu engine's vectors of 16 and blocks of 1024, and rows above the eager one's block
# Enough that the largest naive error is no luck. Where kernels run in Python few rows must do, and
# their columns in as many more orders show how far the naive sums may be off.
ROWS = 8 if INTERPRETED else 64
MORE_ORDERS = 64 // ROWS - 1
COLUMNS = (1, 15, 16, 17, 100, 1023, 1024, 1040, 2075)
ALL = Wanted(smooth=True, entropy=True, argmax=True)
WANTED = [Wanted(*flags) for flags in product((False, True), repeat=3)]

every_engine = pytest.mark.parametrize("engine", ENGINES)
long_for_python = pytest.mark.skipif(INTERPRETED, reason="hundreds of rows, each run by Python")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Shard(NamedTuple):
    """One rank's rows: [N, C_r], [N], [C_r]."""

    logits: Tensor
    target: Tensor
    weight: Tensor


def _shard(rows: int, columns: int, dtype: torch.dtype, spread: float = 3.0) -> Shard:
    """Rows whose target is here, elsewhere, or ignored, in turn; the weight of one class is 0."""
    logits = (spread * torch.randn(rows, columns)).to(dtype)
    target = torch.randint(columns, (rows,))
    target[1::4] = ELSEWHERE
    target[2::4] = IGNORED
    weight = torch.rand(columns, dtype=arithmetic_dtype(dtype)) + 0.25
    weight[columns // 2] = 0.0
    return Shard(logits, target, weight)


def _statistics(
    shard: Shard,
    scale: float,
    dtype: torch.dtype,
    weighted: bool = True,
    exp: Callable[[Tensor], Tensor] = torch.exp,
) -> dict[str, Tensor]:
    """The contract's formulas, word for word, in this dtype."""
    x = shard.logits.to(dtype) * scale
    w = shard.weight.to(dtype) if weighted else torch.ones(x.shape[1], dtype=dtype)
    m = x.amax(1)
    d = x - torch.where(m == -torch.inf, 0.0, m)[:, None]
    e = exp(d)
    here = shard.target >= 0
    x_y = x.gather(1, shard.target.clamp(min=0)[:, None]).squeeze(1)
    return {
        "m": m,
        "s": e.sum(1),
        "x_y": torch.where(here, x_y, 0.0),
        "u": (w * d).sum(1),
        "t": torch.where(e == 0, 0.0, e * d).sum(1),
        "argmax": (x == m[:, None]).to(torch.uint8).argmax(1),
    }


def _partials(
    engine: str, shard: Shard, scale: float = 1.0, wanted: Wanted = ALL, weighted: bool = True
) -> dict[str, Tensor]:
    """The engine's answer by name, argmax as integers; memory it did not fill would be seen."""
    dtype = arithmetic_dtype(shard.logits.dtype)
    out = torch.full((len(wanted.rows), len(shard.target)), 123.25, dtype=dtype)
    weight = shard.weight if weighted else None
    SERVING[engine].partials(shard.logits, shard.target, weight, scale, wanted, out)
    named = dict(zip(wanted.rows, out.unbind(0), strict=True))
    if wanted.argmax:
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        named["argmax"] = named["argmax"].view(bits).long()
    return named


def _by_powers_of_two(x: Tensor) -> Tensor:
    return (x * math.log2(math.e)).exp2()


def _reordered(shard: Shard) -> Shard:
    """The same rows with their columns in another order."""
    order = torch.randperm(shard.logits.shape[1])
    place = order.argsort()[shard.target.clamp(min=0)]
    target = torch.where(shard.target < 0, shard.target, place)
    return Shard(shard.logits[:, order], target, shard.weight[order])


def _check_partials(
    engine: str, shard: Shard, scale: float = 1.0, wanted: Wanted = ALL, weighted: bool = True
) -> None:
    got = _partials(engine, shard, scale, wanted, weighted)
    assert tuple(got) == wanted.rows
    exact = _statistics(shard, scale, torch.float64, weighted)
    # A GPU's exponential is 2^x: e^x has the rounding error of x log2(e), in plain torch as well.
    exp = _by_powers_of_two if engine == "triton" else torch.exp
    naive = _statistics(shard, scale, torch.float32, weighted, exp)
    if engine == "npu":  # the operator hands out log s, never s
        naive["s"] = naive["s"].log().exp()
    rounded = _statistics(shard, scale, arithmetic_dtype(shard.logits.dtype), weighted)
    others = [
        _statistics(_reordered(shard), scale, torch.float32, weighted, exp)
        for _ in range(MORE_ORDERS)
    ]
    read = shard.target != IGNORED
    if wanted.ignored_rows:
        read[:] = True
    for name, value in got.items():
        if name == "argmax":
            # Scaling may round two different logits to one: the first of those is meant.
            assert torch.equal(value[read], rounded["argmax"][read])
        else:
            want = exact[name][read]
            errors = (naive_error(want, other[name][read], value.dtype) for other in others)
            assert_close(
                value[read], want, naive[name][read], name, rows_error=max(errors, default=0.0)
            )
        assert bool((value[~read] == 0).all()), f"{name} of an ignored row is not 0"


# Partials


@every_engine
@every_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_statistics(columns: int, dtype: torch.dtype, engine: str) -> None:
    shard = _shard(ROWS, columns, dtype)
    for wanted in (Wanted(), ALL):
        _check_partials(engine, shard, wanted=wanted)


@every_engine
@every_dtype
@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "+".join(w.rows[3:]) or "least")
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_statistics_wanted(weighted: bool, wanted: Wanted, dtype: torch.dtype, engine: str) -> None:
    """Each statistic alone and with the others lands in its own row."""
    _check_partials(engine, _shard(ROWS, 70, dtype), 1.3, wanted, weighted)


@every_engine
@every_dtype
@pytest.mark.parametrize("scale", [0.3, -1.5, 0.0])
def test_statistics_scale(scale: float, dtype: torch.dtype, engine: str) -> None:
    shard = _shard(ROWS, 1100, dtype)
    for wanted in (Wanted(), ALL):
        _check_partials(engine, shard, scale, wanted)


@every_engine
@every_dtype
@pytest.mark.parametrize("spread", [1e3, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_statistics_of_large_logits(
    offset: float, spread: float, dtype: torch.dtype, engine: str
) -> None:
    """Three clusters far apart: no e^(x - m) is subnormal, which the cpu engine takes for 0."""
    shard = _shard(ROWS, 1100, dtype)
    shard.logits.add_(offset + spread * torch.randint(-1, 2, shard.logits.shape))
    for wanted in (Wanted(), ALL):
        _check_partials(engine, shard, wanted=wanted)


@long_for_python
@every_engine
def test_statistics_of_many_blocks(engine: str) -> None:
    """More elements than one block of rows of the eager engine, and more than one of threads."""
    _check_partials(engine, _shard(300, 3000, torch.float32))


@every_engine
@every_dtype
def test_minus_infinity(dtype: torch.dtype, engine: str) -> None:
    """Columns of -inf have no probability; a row of nothing else has m = -inf and s = 0."""
    shard = _shard(ROWS, 1100, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[3] = -torch.inf
    shard.logits[4, :1030] = -torch.inf  # a whole block of the cpu engine
    for weighted in (False, True):
        _check_partials(engine, shard, weighted=weighted)
    _check_partials(engine, shard, wanted=Wanted())
    got = _partials(engine, shard, wanted=ALL)
    assert got["m"][3] == -torch.inf
    assert got["s"][3] == got["t"][3] == got["argmax"][3] == 0


@every_engine
@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 15, 600, 1098, 1099])
def test_nan_and_infinity_are_not_lost(
    place: int, value: float, dtype: torch.dtype, engine: str
) -> None:
    """Wherever it lies in a row, s is NaN, and the other rows know nothing of it."""
    shard = _shard(ROWS, 1100, dtype)
    clean = {wanted: _partials(engine, shard, wanted=wanted) for wanted in (Wanted(), ALL)}
    shard.logits[3, place] = value
    others = torch.arange(ROWS) != 3
    for wanted, before in clean.items():
        after = _partials(engine, shard, wanted=wanted)
        assert bool(after["s"][3].isnan())
        if "t" in after:
            assert bool(after["t"][3].isnan())
        for name in wanted.rows:
            assert torch.equal(after[name][others], before[name][others])


@every_engine
def test_nan_hides_behind_no_infinity(engine: str) -> None:
    """A NaN among nothing but -inf, and one before a larger logit."""
    shard = _shard(2, 1100, torch.float32)
    shard.logits[0] = -torch.inf
    shard.logits[0, 700] = torch.nan
    shard.logits[1, 3], shard.logits[1, 1099] = torch.nan, 1e4
    for wanted in (Wanted(), ALL):
        assert bool(_partials(engine, shard, wanted=wanted)["s"].isnan().all())


@every_engine
@every_dtype
def test_ignored_rows_are_not_read(dtype: torch.dtype, engine: str) -> None:
    """NaN in them changes nothing; asked for, they are answered as if they counted."""
    shard = _shard(ROWS, 1100, dtype)
    ignored = shard.target == IGNORED
    shard.logits[ignored] = torch.nan
    for wanted in (Wanted(), ALL):
        _check_partials(engine, shard, wanted=wanted)
    read_all = Wanted(ignored_rows=True)
    assert bool(_partials(engine, shard, wanted=read_all)["s"][ignored].isnan().all())
    finite = _shard(ROWS, 1100, dtype)
    _check_partials(engine, finite, wanted=read_all)


@every_engine
@every_dtype
@pytest.mark.parametrize("columns", [17, 1100])
def test_the_first_of_a_tie_wins(columns: int, dtype: torch.dtype, engine: str) -> None:
    shard = _shard(4, columns, dtype)
    shard.target[:] = 0
    for row, place in enumerate((0, 5, 15, columns - 2)):
        shard.logits[row, place::2] = 40.0
    got = _partials(engine, shard, wanted=Wanted(argmax=True))
    assert got["argmax"].tolist() == [0, 5, 15, columns - 2]
    shard.logits[:] = -3.0
    assert _partials(engine, shard)["argmax"].tolist() == [0, 0, 0, 0]


# Layouts

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


@every_engine
@every_dtype
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides: str, dtype: torch.dtype, engine: str) -> None:
    shard = _shard(ROWS, 1100, dtype)
    shard = shard._replace(logits=STRIDES[strides](shard.logits))
    for wanted in (Wanted(), ALL):
        _check_partials(engine, shard, wanted=wanted)
    _check_gradient(engine, shard, smooth=True, entropy=True)
    _check_gradient(engine, shard)
    _check_log_prob(engine, shard)


# Gradient


def _gradient_formula(
    shard: Shard, m: Tensor, s: Tensor, c: Coefficients, scale: float, dtype: torch.dtype
) -> Tensor:
    x = shard.logits.to(dtype) * scale
    m, s = m.to(dtype)[:, None], s.to(dtype)[:, None]
    smooth, entropy = (None if part is None else part.to(dtype)[:, None] for part in c[2:])
    c = Coefficients(c.softmax.to(dtype)[:, None], c.target.to(dtype)[:, None], smooth, entropy)
    p = (x - m).exp() / s
    dx = p * c.softmax
    if c.entropy is not None:
        dx = dx - torch.where(p == 0, 0.0, p * c.entropy * ((x - m) - s.log()))
    hot = torch.arange(x.shape[1]) == shard.target[:, None]
    dx = dx - torch.where(hot, c.target, 0.0)
    if c.smooth is not None:
        dx = dx - c.smooth * shard.weight.to(dtype)
    return torch.where(shard.target[:, None] == IGNORED, 0.0, dx)


def _check_gradient(
    engine: str,
    shard: Shard,
    scale: float = 1.0,
    smooth: bool = False,
    entropy: bool = False,
    weighted: bool = True,
) -> None:
    """Into memory of its own and into the logits' own."""
    rows = len(shard.target)
    arithmetic = arithmetic_dtype(shard.logits.dtype)
    if not weighted:
        shard = shard._replace(weight=torch.ones_like(shard.weight))
    local = _statistics(shard, scale, torch.float64)
    # The softmax is one over all shards: m and s are those of the whole row.
    m = (local["m"] + 0.5).to(arithmetic)
    s = (2.5 * local["s"]).to(arithmetic)
    parts = [torch.randn(rows, dtype=arithmetic) for _ in range(4)]
    c = Coefficients(
        parts[0], parts[1], parts[2] if smooth else None, parts[3] if entropy else None
    )
    exact = _gradient_formula(shard, m, s, c, scale, torch.float64)
    naive = _gradient_formula(shard, m, s, c, scale, torch.float32)
    weight = shard.weight if weighted else None

    out = torch.full_like(shard.logits, 123.25, memory_format=torch.contiguous_format)
    SERVING[engine].gradient(shard.logits, m, s, shard.target, c, weight, scale, out)
    assert_close(out, exact, naive, "gradient")
    if 0 in shard.logits.stride():
        return  # rows that share memory are never overwritten
    memory = torch.empty_strided(out.shape, shard.logits.stride(), dtype=out.dtype)
    memory.copy_(shard.logits)
    SERVING[engine].gradient(memory, m, s, shard.target, c, weight, scale, memory)
    if shard.logits.is_contiguous():
        assert torch.equal(memory, out)
    else:  # another kernel may serve such strides
        assert_close(memory, exact, naive, "gradient in place")


@every_engine
@every_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_gradient(columns: int, dtype: torch.dtype, engine: str) -> None:
    shard = _shard(ROWS, columns, dtype)
    _check_gradient(engine, shard)
    _check_gradient(engine, shard, smooth=True, entropy=True)


@every_engine
@every_dtype
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smooth"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("scale", [1.0, -0.7, 0.0])
def test_gradient_parts(
    scale: float, weighted: bool, entropy: bool, smooth: bool, dtype: torch.dtype, engine: str
) -> None:
    _check_gradient(engine, _shard(ROWS, 70, dtype), scale, smooth, entropy, weighted)


@long_for_python
@every_engine
def test_gradient_of_many_blocks(engine: str) -> None:
    _check_gradient(engine, _shard(300, 3000, torch.float32))
    _check_gradient(engine, _shard(300, 3000, torch.bfloat16), smooth=True, entropy=True)


@every_engine
@every_dtype
def test_gradient_where_p_is_zero(dtype: torch.dtype, engine: str) -> None:
    """-inf and far-off columns add exactly 0 to the entropy's part, never 0 * -inf."""
    shard = _shard(ROWS, 1100, dtype)
    shard.logits[:, ::3] = -torch.inf
    shard.logits[:, 1::3] -= 2e4
    shard.target[0] = 3  # a target of probability 0
    _check_gradient(engine, shard)
    _check_gradient(engine, shard, smooth=True, entropy=True)


@every_engine
@every_dtype
def test_gradient_of_ignored_rows_is_written_not_multiplied(
    dtype: torch.dtype, engine: str
) -> None:
    shard = _shard(ROWS, 1100, dtype)
    ignored = shard.target == IGNORED
    shard.logits[ignored, ::2] = torch.nan
    shard.logits[ignored, 1::2] = torch.inf
    m, s = torch.zeros(ROWS), torch.zeros(ROWS)
    m[ignored], s[ignored] = torch.nan, torch.nan
    s[~ignored] = 1e3
    m[~ignored] = 20.0
    arithmetic = arithmetic_dtype(dtype)
    bad = torch.where(ignored, torch.nan, 1.0).to(arithmetic)
    for c in (Coefficients(bad, bad), Coefficients(bad, bad, bad, bad)):
        out = torch.full_like(shard.logits, 123.25)
        SERVING[engine].gradient(
            shard.logits, m.to(arithmetic), s.to(arithmetic), shard.target, c, None, 1.0, out
        )
        assert bool((out[ignored] == 0).all())
        assert bool(out[~ignored].isfinite().all())


@every_engine
@every_dtype
def test_gradient_of_a_poisoned_row_is_nan(dtype: torch.dtype, engine: str) -> None:
    """s = NaN marks a row whose target or rank is wrong: no column of it stays plausible."""
    shard = _shard(4, 1100, dtype)
    shard.target[:] = torch.tensor([5, ELSEWHERE, 5, ELSEWHERE])
    arithmetic = arithmetic_dtype(dtype)
    m = torch.full((4,), 10.0, dtype=arithmetic)
    s = torch.tensor([torch.nan, torch.nan, 3.0, 3.0], dtype=arithmetic)
    ones = torch.ones(4, dtype=arithmetic)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, ones, ones)):
        out = torch.zeros_like(shard.logits)
        SERVING[engine].gradient(shard.logits, m, s, shard.target, c, None, 1.0, out)
        assert bool(out[:2].isnan().all())
        assert bool(out[2:].isfinite().all())


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_target_gradient_is_rounded_once(dtype: torch.dtype, engine: str) -> None:
    """B11: p = 0.9995 gives -5e-4, not the 0 of a p that was rounded to 1 before the 1 went off."""
    shard = Shard(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.int64), torch.ones(2))
    shard.logits[0, 1] = -7.6
    x = shard.logits.double()
    want = x.softmax(1) - torch.tensor([[1.0, 0.0]])
    s = torch.tensor([float((x - x.max()).exp().sum())])
    ones, m = torch.ones(1), torch.zeros(1)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, 0 * ones, 0 * ones)):
        out = torch.empty_like(shard.logits)
        SERVING[engine].gradient(shard.logits, m, s, shard.target, c, None, 1.0, out)
        assert -6e-4 < float(out[0, 0]) < -4e-4
        naive = x.float().softmax(1) - torch.tensor([[1.0, 0.0]])
        assert_close(out, want, naive, "gradient")


# Log-probabilities


def _check_log_prob(engine: str, shard: Shard, scale: float = 1.0) -> None:
    arithmetic = arithmetic_dtype(shard.logits.dtype)
    exact = _statistics(shard, scale, torch.float64)
    m, s = exact["m"].to(arithmetic), exact["s"].to(arithmetic)

    def formula(dtype: torch.dtype) -> Tensor:
        x = shard.logits.to(dtype) * scale
        return x - m.to(dtype)[:, None] - s.to(dtype).log()[:, None]

    out = torch.full_like(shard.logits, 123.25, memory_format=torch.contiguous_format)
    SERVING[engine].log_prob(shard.logits, m, s, scale, out)
    assert_close(out, formula(torch.float64), formula(torch.float32), "log_prob")


@every_engine
@every_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_log_prob(columns: int, dtype: torch.dtype, engine: str) -> None:
    """Of every row, ignored ones included."""
    shard = _shard(ROWS, columns, dtype)
    _check_log_prob(engine, shard)
    _check_log_prob(engine, shard, -0.6)
    shard.logits[:, 0] = -torch.inf
    shard.logits[3] = torch.nan
    if columns > 1:
        _check_log_prob(engine, shard)


@long_for_python
@every_engine
def test_log_prob_of_many_blocks(engine: str) -> None:
    _check_log_prob(engine, _shard(300, 3000, torch.float32))


# Both


@pytest.mark.skipif("cpu" not in ENGINES, reason="the cpu engine's threads")
@every_dtype
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """A row is never split: the cpu engine gives the same bits on one thread and on four."""
    shard = _shard(300, 1100, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            got = _partials("cpu", shard)
            out = torch.empty_like(shard.logits)
            read = shard.target != IGNORED
            m, s = torch.where(read, got["m"], 0.0), torch.where(read, got["s"], 1.0)
            c = Coefficients(m, s, s, m)
            cpu.gradient(shard.logits, m, s, shard.target, c, shard.weight, 1.0, out)
            results.append((*got.values(), out))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_engine
def test_logits_are_only_read(engine: str) -> None:
    shard = _shard(ROWS, 1100, torch.float32)
    before = [value.clone() for value in shard]
    _check_partials(engine, shard)
    _check_gradient(engine, shard, smooth=True, entropy=True)
    _check_log_prob(engine, shard)
    assert all(torch.equal(a, b) for a, b in zip(shard, before, strict=True))
