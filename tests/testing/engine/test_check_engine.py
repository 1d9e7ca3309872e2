"""``check_engine`` passes what is right and finds what is broken, whichever function it is in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.engines import eager
from vocab_parallel_ce.engines.contract import IGNORED, Coefficients, Wanted
from vocab_parallel_ce.testing import check_engine
from vocab_parallel_ce.testing.engine import EngineCheck, Subject, engine_checks
from vocab_parallel_ce.testing.engine.checks import SEED
from vocab_parallel_ce.testing.engine.report import EngineReport

ROWS = 8
FEW = [torch.bfloat16]


def broken(**functions: Callable[..., Any]) -> Any:
    """The eager engine with these functions in the place of its own."""
    own = {name: getattr(eager, name) for name in ("partials", "gradient", "log_prob", "supports")}
    flags = {"__name__": "broken", "ROW_FUNCTIONS": None, "LEAVES_LOG_PROB": False}
    return SimpleNamespace(**flags | own | functions)


def test_a_right_engine_passes() -> None:
    report = check_engine(eager, "cpu", FEW, rows=ROWS, many_rows=False)
    assert report.passed
    assert report.checks == len(engine_checks(FEW, many_rows=False))
    assert str(report) == f"{eager.__name__} on cpu: 0 of {report.checks} checks failed"


def test_a_report_is_short_and_readable() -> None:
    report = EngineReport("mine", "npu", 50, {f"check {i}": "off" for i in range(33)})
    lines = str(report).splitlines()
    assert lines[0] == "mine on npu: 33 of 50 checks failed"
    assert lines[1] == "  check 0: off"
    assert (len(lines), lines[-1]) == (32, "  ... and 3 more")


def test_a_report_instead_of_an_error() -> None:
    engine = broken(**after("partials", _sum_is_off))
    report = check_engine(engine, "cpu", FEW, rows=ROWS, only="partials, 1", raises=False)
    assert not report.passed
    assert all(why.startswith("s: ") for why in report.failures.values())


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="rows=4"):
        check_engine(eager, rows=4)
    with pytest.raises(ValueError, match="only='grads'"):
        check_engine(eager, only="grads")


# Sabotage: (the function, how, the check that must notice, words of its complaint)


def after(name: str, spoil: Callable[..., None]) -> dict[str, Callable[..., None]]:
    """The eager engine's function, and then ``spoil`` with the same arguments."""

    def function(*arguments: Any) -> None:
        getattr(eager, name)(*arguments)
        spoil(*arguments)

    return {name: function}


def instead(name: str, change: Callable[..., tuple[Any, ...]]) -> dict[str, Callable[..., None]]:
    """The eager engine's function on other arguments."""

    def function(*arguments: Any) -> None:
        getattr(eager, name)(*change(*arguments))

    return {name: function}


def _named(wanted: Wanted, out: Tensor) -> dict[str, Tensor]:
    return dict(zip(wanted.rows, out.unbind(0), strict=True))


def _sum_is_off(logits: Tensor, *rest: Any) -> None:
    rest[5][1] *= 1 + 1e-4


def _reads_ignored(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Any, ...]:
    return (logits, torch.where(target == IGNORED, -1, target), *rest)


def _last_of_a_tie(
    logits: Tensor,
    target: Tensor,
    w: Any,
    scale: float,
    softcap: float,
    wanted: Wanted,
    out: Tensor,
    *_: Any,
) -> None:
    if wanted.argmax:
        last = logits.shape[1] - 1 - logits.flip(1).argmax(1)
        _named(wanted, out)["argmax"].view(torch.int32).copy_(last)


def _hides_nan(
    logits: Tensor,
    target: Tensor,
    w: Any,
    scale: float,
    softcap: float,
    wanted: Wanted,
    out: Tensor,
    *_: Any,
) -> None:
    out[1].nan_to_num_(1.0)


def _wrong_row(
    logits: Tensor,
    target: Tensor,
    w: Any,
    scale: float,
    softcap: float,
    wanted: Wanted,
    out: Tensor,
    *_: Any,
) -> None:
    named = _named(wanted, out)
    if {"u", "t"} <= set(named):
        out[3:5] = out[3:5].flip(0)


def _minus_infinity_is_nan(
    logits: Tensor,
    target: Tensor,
    w: Any,
    scale: float,
    softcap: float,
    wanted: Wanted,
    out: Tensor,
    *_: Any,
) -> None:
    out[1][out[0] == -torch.inf] = torch.nan


def _writes_log_prob(*arguments: Any) -> None:
    if len(arguments) > 7 and arguments[7] is not None:
        arguments[7].zero_()


def _spoils_logits(logits: Tensor, *_: Any) -> None:
    logits[0, 0] += 1


def _no_target(logits: Tensor, m: Tensor, s: Tensor, target: Tensor, *rest: Any) -> Any:
    return (logits, m, s, torch.where(target >= 0, -1, target), *rest)


def _no_entropy(
    logits: Tensor, m: Tensor, s: Tensor, target: Tensor, c: Coefficients, *rest: Any
) -> Any:
    return (logits, m, s, target, c._replace(entropy=None), *rest)


def _no_weight(*arguments: Any) -> Any:
    return (*arguments[:5], None, *arguments[6:])


def _multiplied_into(
    logits: Tensor, m: Tensor, s: Tensor, target: Tensor, c: Coefficients, w: Any, scale: float,
    softcap: float, out: Tensor, *_: Any,
) -> None:  # fmt: skip
    eager.gradient(logits, m, s, target.clamp(min=-1), c, w, scale, softcap, out)
    out *= (target != IGNORED)[:, None]


def _uses_all(
    logits: Tensor, m: Tensor, s: Tensor, target: Tensor, c: Coefficients, w: Any, scale: float,
    softcap: float, out: Tensor, *_: Any,
) -> None:  # fmt: skip
    tiny = torch.finfo(m.dtype).tiny
    parts = (None if part is None else torch.where(part == 0, tiny, part) for part in c)
    eager.gradient(logits, m, s, target, Coefficients(*parts), w, scale, softcap, out)  # type: ignore[arg-type]


def _rounded_twice(
    logits: Tensor, m: Tensor, s: Tensor, target: Tensor, c: Coefficients, w: Any, scale: float,
    softcap: float, out: Tensor, *_: Any,
) -> None:  # fmt: skip
    owned = target >= 0
    off = torch.where(owned, c.target, 0.0).to(out.dtype)
    eager.gradient(logits, m, s, torch.where(owned, -1, target), c, w, scale, softcap, out)
    out.scatter_add_(1, target.clamp(min=0)[:, None], -off[:, None])


def _beside_out(*arguments: Any) -> None:
    base = arguments[8]._base
    if base is not None:
        base[..., -1] = 1.0


def _not_in_place(
    logits: Tensor, m: Tensor, s: Tensor, target: Tensor, c: Coefficients, w: Any, scale: float,
    softcap: float, out: Tensor, *_: Any,
) -> None:  # fmt: skip
    if out.data_ptr() == logits.data_ptr():
        out.zero_()  # before the logits were read
    eager.gradient(logits, m, s, target, c, w, scale, softcap, out)


def _dense_only(logits: Tensor, *rest: Any) -> Any:
    flat = logits.as_strided((logits.shape[0], logits.shape[1]), (logits.shape[1], 1))
    return (flat, *rest)


def _believes_all(logits: Tensor, *rest: Any) -> None:
    """Whatever the logits are: the promise is what tells it to."""
    if rest[8]:
        rest[7].masked_fill_(logits.isinf(), 0.0)
        rest[7][0] += 1


def _zero_poison(*arguments: Any) -> None:
    arguments[8].nan_to_num_(0.0)


def _caps_last(
    logits: Tensor, target: Tensor, w: Any, scale: float, softcap: float, wanted: Wanted,
    out: Tensor, *_: Any,
) -> None:  # fmt: skip
    factor = scale if softcap else 1.0
    eager.partials(logits.float() * factor, target, w, scale / factor, softcap, wanted, out)


def _no_squares(
    logits: Tensor, target: Tensor, w: Any, scale: float, softcap: float, wanted: Wanted,
    out: Tensor, *_: Any,
) -> None:  # fmt: skip
    named = _named(wanted, out)
    if wanted.squares:
        named["q"].copy_(named["s"])


def _raises(*arguments: Any) -> None:
    raise RuntimeError("no kernel for this")


SABOTAGE = [
    ("s", after("partials", _sum_is_off), "partials, 100 columns", "s: "),
    ("ignored", instead("partials", _reads_ignored), "partials, ignored rows", "ignored row"),
    ("last tie", after("partials", _last_of_a_tie), "argmax, ties in 17 columns", "argmax is"),
    ("NaN", after("partials", _hides_nan), "partials, nan at 600", "s of its row is 1.0"),
    ("rows", after("partials", _wrong_row), "partials, u+t", "u: "),
    ("-inf", after("partials", _minus_infinity_is_nan), "partials, -inf", "s: "),
    ("left", after("partials", _writes_log_prob), "log_prob left", "wrote log_prob"),
    ("logits", after("partials", _spoils_logits), "inputs are only read", ""),
    ("strides", instead("partials", _dense_only), "strides: rows apart", "m: "),
    ("raise", {"partials": _raises}, "partials, 1 columns", "RuntimeError: no kernel for this"),
    ("target", instead("gradient", _no_target), "gradient, 100 columns", "gradient: "),
    ("entropy", instead("gradient", _no_entropy), "gradient, scale 1.0, entropy", "gradient: "),
    ("weight", instead("gradient", _no_weight), "gradient, scale 1.0, smooth, weight", "gradient"),
    ("multiplied", {"gradient": _multiplied_into}, "gradient, ignored rows", "row is not 0"),
    ("unused", {"gradient": _uses_all}, "gradient, unused rows", "without coefficients is not 0"),
    ("rounding", {"gradient": _rounded_twice}, "gradient, the target's is rounded once", ""),
    ("beside", after("gradient", _beside_out), "gradient, 100 columns", "beside out"),
    ("in place", {"gradient": _not_in_place}, "gradient, 100 columns", "in place"),
    ("promise", after("gradient", _believes_all), "gradient, logits promised", "changes a number"),
    ("poison", after("gradient", _zero_poison), "gradient, poisoned rows", "s = NaN has numbers"),
    ("scale", instead("log_prob", lambda x, m, s, scale, *rest: (x, m, s, 1.0, *rest)),
     "log_prob, 100 columns", "log_prob: "),
    ("sum", instead("log_prob", lambda x, m, s, *rest: (x, m, s * 1.1, *rest)),
     "log_prob, 1 columns", "log_prob: "),
    ("cap", instead("gradient", lambda *a: (*a[:7], 0.0, a[8])), "softcap 5", "gradient: "),
    ("cap last", {"partials": _caps_last}, "softcap 5", "m: "),
    ("one scale", instead("log_prob", lambda x, m, s, scale, *rest: (x, m, s, 1.0, *rest)),
     "scale, one a row", "log_prob: "),
    ("squares", after("partials", _no_squares), "partials, 100 columns", "q: "),
    ("unwritten", {"log_prob": lambda *arguments: None}, "log_prob, 16 columns", "log_prob: "),
    ("dtypes", {"supports": lambda logits: False}, "dtype is served", "does not serve"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("functions", "check", "complaint"), [row[1:] for row in SABOTAGE], ids=[r[0] for r in SABOTAGE]
)
def test_sabotage_is_noticed(functions: dict[str, Any], check: str, complaint: str) -> None:
    with pytest.raises(
        AssertionError, match=r"^broken on cpu: \d+ of \d+ checks failed\n"
    ) as raised:
        check_engine(broken(**functions), "cpu", FEW, rows=ROWS, only=check)
    _, *failures = str(raised.value).splitlines()
    assert failures
    assert all(line.startswith(f"  {check}") for line in failures)
    assert any(complaint in line for line in failures)


def test_a_check_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    drawn: list[Tensor] = []

    def check(subject: Subject, dtype: torch.dtype) -> None:
        drawn.append(torch.rand(3))

    EngineCheck("some", check, torch.float32).run(Subject(eager))
    assert torch.equal(torch.rand(3), want)
    torch.manual_seed(SEED)
    assert torch.equal(torch.rand(3), drawn[0])
