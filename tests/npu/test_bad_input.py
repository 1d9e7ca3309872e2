"""Bad input of the npu engine, both of its ways: values, widths, rows and upstream gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy, token_statistics
from vocab_parallel_ce.engines.contract import ELSEWHERE, IGNORED, Coefficients, Wanted
from vocab_parallel_ce.switches import WAY_VARIABLE
from vocab_parallel_ce.testing import assert_close
from vocab_parallel_ce.testing.engine import Subject, random_shard

from .ways import SUBJECTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "plain": partial(cross_entropy, reduction="none"),
    "smooth": partial(cross_entropy, reduction="none", label_smoothing=0.1, lse_square_scale=1e-3),
    "entropy": lambda x, y, **o: cast(Tensor, token_statistics(x, y, entropy=True, **o).entropy),
    "capped": partial(cross_entropy, reduction="none", softcap=10.0),
    "a scale for each row": lambda x, y, **o: cross_entropy(
        x, y, reduction="none", scale=torch.linspace(0.5, 2, len(y)).to(x.device), **o
    ),
}


@pytest.fixture(params=["max_sum", "operator"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Asked for by its name."""
    monkeypatch.setenv(WAY_VARIABLE, request.param)
    name: str = request.param
    return name


def _on(
    device: str, loss: str, logits: Tensor, target: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each row and the gradient of the logits, on the host; cpu: the eager engine's."""
    x = logits.to(device).requires_grad_()
    rows = LOSSES[loss](x, target.to(device), engine="npu" if device == "npu" else "eager")
    (gradient,) = torch.autograd.grad(rows, x, upstream.to(device))
    return rows.detach().cpu(), gradient.cpu()


def _check_as_on_cpu(loss: str, logits: Tensor, target: Tensor, upstream: Tensor) -> None:
    """What is NaN or infinite there is so here, and nothing else; the rest is close."""
    exact = _on("cpu", loss, logits.float(), target, upstream)
    found = _on("npu", loss, logits, target, upstream)
    digits = 3 * torch.finfo(logits.dtype).eps
    for name, here, there in zip(("loss", "gradient"), found, exact, strict=True):
        torch.testing.assert_close(
            here.float(), there, rtol=max(digits, 3e-5), atol=1e-5, equal_nan=True, msg=name
        )


PLACES = (0, 5, 9, 128, 299)  # 5 is the target
VALUES = (torch.nan, torch.inf, -torch.inf, 3e4, -3e4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("way")
def test_every_value_in_every_place(dtype: torch.dtype, loss: str) -> None:
    """Of kept rows and of ignored ones; each in a row of its own."""
    torch.manual_seed(0)
    cases = [(place, value) for place in PLACES for value in VALUES]
    logits = torch.randn(2 * len(cases) + 1, 300).to(dtype)
    target = torch.full((len(logits),), 5)
    for row, (place, value) in enumerate(cases):
        logits[[2 * row, 2 * row + 1], place] = value
        target[2 * row + 1] = -100
    _check_as_on_cpu(loss, logits, target, torch.linspace(-1, 1, len(logits)))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("way")
def test_every_upstream_gradient(loss: str) -> None:
    logits = torch.randn(7, 200)
    logits[:, 7] = -torch.inf
    target = torch.tensor([3, 4, -100, 6, 7, 7, 5])
    for given in (0.0, -2.0, torch.inf, -torch.inf, torch.nan):
        upstream = torch.tensor([1.0, given, given, given, given, 1.0, -0.5])
        _check_as_on_cpu(loss, logits, target, upstream)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("way")
def test_all_rows_ignored(reduction: str) -> None:
    """Whatever they hold; "mean" is NaN with a gradient of 0, as in PyTorch."""
    logits = torch.randn(5, 40)
    logits[1], logits[2], logits[3] = torch.nan, torch.inf, -torch.inf
    x, y = logits.to("npu").requires_grad_(), torch.full((5,), -100).to("npu")
    loss = cross_entropy(x, y, reduction=reduction, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert bool(loss.isnan() if reduction == "mean" else (loss == 0).all())
    assert bool((gradient == 0).all())


# The two functions by themselves


def _of_few_rows(subject: str, rows: int) -> Subject:
    return Subject(SUBJECTS[subject].engine, "npu", rows, sums_as_logs=subject == "operator")


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("columns", [1, 127, 16_000, 16_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_around_a_tile(dtype: torch.dtype, columns: int, subject: str) -> None:
    torch.manual_seed(columns)
    shard = random_shard(8, columns, dtype)
    few = _of_few_rows(subject, 8)
    few.check_partials(shard)
    few.check_gradient(shard, smooth=True, entropy=True)
    few.check_gradient(shard)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_vocabulary_of_152064(subject: str) -> None:
    torch.manual_seed(1)
    shard = random_shard(4, 152_064, torch.bfloat16)
    got = SUBJECTS[subject].partials(shard, wanted=Wanted())
    x = shard.logits.double()
    read = shard.target != IGNORED
    s = (x - x.amax(1)[:, None]).exp().sum(1)
    naive = (shard.logits.float() - shard.logits.float().amax(1)[:, None]).exp().sum(1)
    assert torch.equal(got["m"][read].double(), x.amax(1)[read])
    assert_close(got["s"][read], s[read], naive[read], "s", rows_error=1e-5 * float(s.max()))
    _of_few_rows(subject, 4).check_gradient(shard)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_ignored_rows_are_exactly_zero(value: float, dtype: torch.dtype, subject: str) -> None:
    """Whatever they hold, and wherever; all rows ignored included."""
    shard = random_shard(12, 300, dtype)
    shard.target[:] = IGNORED
    for row in range(10):
        shard.logits[row, :: 30 * row + 1] = value
    got = SUBJECTS[subject].partials(shard)
    assert all(bool((statistic == 0).all()) for statistic in got.values())
    ones = torch.ones(12)
    for c in (Coefficients(ones, ones), Coefficients(ones, ones, ones, ones)):
        dx = SUBJECTS[subject].gradient(shard, ones, ones, c, shard.weight)
        assert bool((dx == 0).all())
        assert not bool(dx.isnan().any())


@pytest.mark.usefixtures("way")
def test_a_broken_promise_reaches_its_row_alone() -> None:
    """NaN in an ignored row whose logits were said to be finite: the loss never sees it."""
    x, y = torch.randn(6, 40).to("npu").requires_grad_(), torch.arange(6).to("npu")
    y[2] = -100
    kept = torch.arange(6) != 2
    loss = cross_entropy(x, y, label_smoothing=0.1)
    (before,) = torch.autograd.grad(loss, x)
    for value, broken in ((0.0, False), (-torch.inf, False), (torch.nan, True), (torch.inf, True)):
        with torch.no_grad():
            x[2, 7] = value
        promised = cross_entropy(x, y, label_smoothing=0.1, finite_logits=True)
        (after,) = torch.autograd.grad(promised, x)
        assert torch.equal(promised, loss)
        assert torch.equal(after[kept], before[kept])
        assert bool((after[2].isnan().any() if broken else after[2] == 0).all())


@pytest.mark.parametrize("subject", SUBJECTS)
def test_upstream_gradients_of_every_kind(subject: str) -> None:
    """0 gives zeros, a negative one its sign, infinity no plausible number."""
    shard = random_shard(5, 200, torch.float32)
    shard.logits[:, 7] = -torch.inf
    shard.target[:] = torch.tensor([3, 4, ELSEWHERE, 6, ELSEWHERE])
    m = shard.logits.amax(1)
    s = (shard.logits - m[:, None]).exp().sum(1)
    g = torch.tensor([0.0, -2.0, 0.5, torch.inf, torch.nan])
    dx = SUBJECTS[subject].gradient(shard, m, s, Coefficients(g, g))
    p = (shard.logits.double() - m[:, None]).exp() / s[:, None]
    hot = torch.arange(200) == shard.target[:, None]
    exact = g.double()[:, None] * (p - hot.double())
    assert bool((dx[0] == 0).all())
    torch.testing.assert_close(dx[1:3].double(), exact[1:3], rtol=1e-6, atol=1e-8)
    assert bool((~dx[3].isfinite()).all())
    assert bool(dx[4].isnan().all())
