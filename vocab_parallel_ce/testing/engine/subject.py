"""The engine under test: called with CPU tensors wherever it computes, and judged by the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engines.contract import IGNORED, Coefficients, Engine, Wanted, arithmetic_dtype
from ..tolerance import assert_close, naive_error
from . import formulas
from .formulas import Shard
from .transfer import copy_back, move

UNWRITTEN = 123.25  # exact in every dtype
EVERYTHING = Wanted(smooth=True, entropy=True, argmax=True, squares=True)
LEAST_AND_MOST = (Wanted(), EVERYTHING)


@dataclass(frozen=True)
class Subject:
    """An engine, where it computes, and what about its device the naive formulas must know.

    ``calls`` of the three functions take CPU tensors; on another device they travel there and back
    with their strides, and what the engine must not write to has to come back as it went.
    """

    engine: Engine
    device: str = "cpu"
    rows: int = 64
    """enough that the largest naive error is no luck"""
    exponential: str = "e"
    """"2": the device's exponential is 2^x, and e^x has the rounding error of x log2(e)"""
    sums_as_logs: bool = False
    """the device's kernel hands out log s, rounded, and never s"""

    # The three functions

    def partials(
        self,
        shard: Shard,
        scale: float | Tensor = 1.0,
        wanted: Wanted = EVERYTHING,
        weighted: bool = True,
        log_prob_out: Tensor | None = None,
        softcap: float = 0.0,
    ) -> dict[str, Tensor]:
        """The engine's answer by name, argmax as integers; memory it did not fill would be seen."""
        dtype = arithmetic_dtype(shard.logits.dtype)
        out = torch.full((len(wanted.rows), len(shard.target)), UNWRITTEN, dtype=dtype)
        weight = shard.weight if weighted else None
        args = (shard.logits, shard.target, weight, scale, softcap, wanted, out, log_prob_out)
        self._call(
            self.engine.partials, args, out, *([] if log_prob_out is None else [log_prob_out])
        )
        named = dict(zip(wanted.rows, out.unbind(0), strict=True))
        if wanted.argmax:
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            named["argmax"] = named["argmax"].view(bits).long()
        return named

    def gradient(
        self,
        shard: Shard,
        m: Tensor,
        s: Tensor,
        c: Coefficients,
        weight: Tensor | None = None,
        scale: float | Tensor = 1.0,
        out: Tensor | None = None,
        softcap: float = 0.0,
        finite_logits: bool = False,
    ) -> Tensor:
        """What the engine wrote: into ``out``, or into dense memory of its own."""
        if out is None:
            out = torch.full_like(shard.logits, UNWRITTEN, memory_format=torch.contiguous_format)
        args = (shard.logits, m, s, shard.target, c, weight, scale, softcap, out, finite_logits)
        self._call(self.engine.gradient, args, out)
        return out

    def log_prob(
        self,
        shard: Shard,
        m: Tensor,
        s: Tensor,
        scale: float | Tensor = 1.0,
        softcap: float = 0.0,
    ) -> Tensor:
        """What the engine wrote into dense memory of its own."""
        out = torch.full_like(shard.logits, UNWRITTEN, memory_format=torch.contiguous_format)
        self._call(self.engine.log_prob, (shard.logits, m, s, scale, softcap, out), out)
        return out

    def _call(self, function: Callable[..., None], args: tuple[Any, ...], *written: Tensor) -> None:
        if self.device == "cpu":
            function(*args)
            return
        there: dict[int, Tensor] = {}

        def moved(value: Any) -> Any:
            if isinstance(value, Coefficients):
                return Coefficients(*(moved(part) for part in value))
            if not isinstance(value, Tensor):
                return value
            return there.setdefault(id(value), move(value, self.device))

        function(*(moved(arg) for arg in args))
        for here in written:
            copy_back(there.pop(id(here)), here)
        for here in (arg for arg in args if isinstance(arg, Tensor) and id(arg) in there):
            assert same_bits(there[id(here)].cpu(), here), "an argument was changed"

    # Against the formulas in fp64

    def check_partials(
        self,
        shard: Shard,
        scale: float | Tensor = 1.0,
        wanted: Wanted = EVERYTHING,
        weighted: bool = True,
        softcap: float = 0.0,
    ) -> None:
        """Every statistic that is wanted, in its own row; 0 on ignored rows."""
        got = self.partials(shard, scale, wanted, weighted, softcap=softcap)
        assert tuple(got) == wanted.rows
        exact = formulas.statistics(shard, scale, torch.float64, weighted, softcap=softcap)
        naive = self._naive(shard, scale, weighted, softcap)
        arithmetic = arithmetic_dtype(shard.logits.dtype)
        rounded = formulas.statistics(shard, scale, arithmetic, weighted, softcap=softcap)
        # Of few rows the naive error may be small by luck: more orders of their columns.
        others = [
            self._naive(formulas.reordered(shard), scale, weighted, softcap)
            for _ in range(64 // self.rows - 1)
        ]
        read = shard.target != IGNORED
        if wanted.ignored_rows:
            read[:] = True
        for name, value in got.items():
            if name == "argmax":
                # Scaling may round two different logits to one: the first of those is meant.
                assert torch.equal(value[read], rounded["argmax"][read]), (
                    f"argmax is {value[read].tolist()}, not {rounded['argmax'][read].tolist()}"
                )
            else:
                want = exact[name][read]
                errors = (naive_error(want, other[name][read], value.dtype) for other in others)
                least = max(errors, default=0.0)
                assert_close(value[read], want, naive[name][read], name, rows_error=least)
            assert bool((value[~read] == 0).all()), f"{name} of an ignored row is not 0"

    def _naive(
        self, shard: Shard, scale: float | Tensor, weighted: bool, softcap: float
    ) -> dict[str, Tensor]:
        exp = _by_powers_of_two if self.exponential == "2" else torch.exp
        naive = formulas.statistics(shard, scale, torch.float32, weighted, exp, softcap)
        if self.sums_as_logs:
            naive["s"] = naive["s"].log().exp()
        return naive

    def check_gradient(
        self,
        shard: Shard,
        scale: float | Tensor = 1.0,
        smooth: bool = False,
        entropy: bool = False,
        weighted: bool = True,
        softcap: float = 0.0,
    ) -> None:
        """Into dense memory, into the logits' own, and into a part of a wider buffer."""
        rows = len(shard.target)
        arithmetic = arithmetic_dtype(shard.logits.dtype)
        if not weighted:
            shard = shard._replace(weight=torch.ones_like(shard.weight))
        local = formulas.statistics(shard, scale, torch.float64, softcap=softcap)
        # The softmax is one over all shards: m and s are those of the whole row.
        nothing = local["s"] == 0
        m = (torch.where(nothing, 0.0, local["m"]) + 0.5).to(arithmetic)
        s = (2.5 * torch.where(nothing, 1.0, local["s"])).to(arithmetic)
        parts = [torch.randn(rows, dtype=arithmetic) for _ in range(4)]
        c = Coefficients(
            parts[0], parts[1], parts[2] if smooth else None, parts[3] if entropy else None
        )
        exact = formulas.gradient(shard, m, s, c, scale, torch.float64, softcap)
        naive = formulas.gradient(shard, m, s, c, scale, torch.float32, softcap)
        weight = shard.weight if weighted else None

        out = self.gradient(shard, m, s, c, weight, scale, softcap=softcap)
        assert_close(out, exact, naive, "gradient")
        wide = torch.full((rows, out.shape[1] + 3), UNWRITTEN, dtype=out.dtype)
        self.gradient(shard, m, s, c, weight, scale, wide[:, 1:-2], softcap)
        assert_close(wide[:, 1:-2], exact, naive, "gradient in a part of a buffer")
        around = torch.cat([wide[:, :1], wide[:, -2:]], 1)
        assert bool((around == UNWRITTEN).all()), "gradient: something beside out was written to"
        if 0 in shard.logits.stride():
            return  # rows that share memory are never overwritten
        memory = torch.empty_strided(out.shape, shard.logits.stride(), dtype=out.dtype)
        memory.copy_(shard.logits)
        self.gradient(shard._replace(logits=memory), m, s, c, weight, scale, memory, softcap)
        if shard.logits.is_contiguous():
            assert torch.equal(memory, out), "gradient in place has other bits than out of place"
        else:  # another kernel may serve such strides
            assert_close(memory, exact, naive, "gradient in place")

    def check_log_prob(
        self, shard: Shard, scale: float | Tensor = 1.0, softcap: float = 0.0
    ) -> None:
        """Of every row, ignored ones included."""
        arithmetic = arithmetic_dtype(shard.logits.dtype)
        exact = formulas.statistics(shard, scale, torch.float64, softcap=softcap)
        m, s = exact["m"].to(arithmetic), exact["s"].to(arithmetic)
        want = formulas.log_prob(shard, m, s, scale, torch.float64, softcap)
        naive = formulas.log_prob(shard, m, s, scale, torch.float32, softcap)
        assert_close(self.log_prob(shard, m, s, scale, softcap), want, naive, "log_prob")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a floating or integer dtype hold the same bits; NaN equals itself."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def _by_powers_of_two(x: Tensor) -> Tensor:
    return (x * math.log2(math.e)).exp2()
