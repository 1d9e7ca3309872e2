"""Numbers at the edge: extreme logits, infinities and NaN, rows and batches that do not count.

Each test runs on the eager engine and on the cpu engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import Expected, ReferenceLoss, assert_close, naive_error

from .cases import expected

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
ROWS, CLASSES = 64, 101

every_engine = pytest.mark.parametrize("engine", ["eager", "cpu"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _logits(dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(ROWS, CLASSES)).to(dtype)


def _target(ignored: int = 0) -> Tensor:
    target = torch.randint(CLASSES, (ROWS,))
    target[:ignored] = -100
    return target


def _check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    engine: str = "auto",
    reduction: str = "none",
    spread: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient against the oracle; returns both.

    ``spread`` weighs the rows differently instead of by 1.
    """
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, weight, reduction, engine=engine, **options)
    low, high = (0.5, 2) if spread else (1, 1)
    upstream = torch.linspace(low, high, loss.numel(), dtype=torch.float64).view(loss.shape)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    want = expected(logits, target, weight, reduction=reduction, **options)
    _close(loss, want.exact.loss, want.naive.loss, "loss", want.rows_error)
    gradients = want.gradients(lambda outcome: _weighted(outcome, upstream))
    _close(grad, *gradients, "gradient")
    return loss.detach(), grad


def _close(
    actual: Tensor, exact: Tensor, naive: Tensor, what: str, rows_error: float = 0.0
) -> None:
    """``assert_close``; an fp64 oracle of an fp64 result is itself off by up to E."""
    if actual.dtype == torch.float64:
        rows_error = 1.5 * max(rows_error, naive_error(exact, naive, actual.dtype))
    assert_close(actual, exact, naive, what, rows_error=rows_error)


def _weighted(outcome: ReferenceLoss, upstream: Tensor) -> Tensor:
    return (outcome.loss * upstream.to(outcome.loss.dtype)).sum()


# Extreme logits


@every_engine
@every_dtype
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e4, -1e4])
def test_an_offset_changes_nothing(offset: float, dtype: torch.dtype, engine: str) -> None:
    """lse alone, kept for backward, would cost a gradient at 1e4 three to four digits."""
    _check(_logits(dtype) + offset, _target(), engine=engine)
    _check(
        _logits(dtype) + offset, _target(5), engine=engine, reduction="mean", label_smoothing=0.1
    )


@every_engine
@every_dtype
def test_an_offset_that_is_exact_keeps_every_bit(dtype: torch.dtype, engine: str) -> None:
    """Logits on a grid that survives the offset: loss and gradient do, too, in every bit."""
    logits = torch.randint(-8, 9, (ROWS, CLASSES)).to(dtype)
    offset = 128.0 if dtype == torch.bfloat16 else 1024.0
    target = _target(3)
    results = []
    for shift in (0.0, offset, -offset):
        leaf = (logits + shift).requires_grad_()
        loss = cross_entropy(leaf, target, reduction="none", engine=engine)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@every_engine
@every_dtype
@pytest.mark.parametrize("spread", [1e3, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_far_apart(smoothing: float, spread: float, dtype: torch.dtype, engine: str) -> None:
    """B2, B3: log(softmax) of an underflown softmax would be infinite."""
    logits = _logits(dtype) + spread * torch.randint(-1, 2, (ROWS, CLASSES)).to(dtype)
    loss, _ = _check(logits, _target(), engine=engine, label_smoothing=smoothing)
    assert bool(loss.isfinite().all())
    assert float(loss.max()) > spread / 2


@every_engine
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale(scale: float, dtype: torch.dtype, engine: str) -> None:
    _check(_logits(dtype), _target(3), engine=engine, scale=scale)
    _check(_logits(dtype), _target(3), engine=engine, scale=scale, lse_square_scale=0.01)


@every_engine
@every_dtype
def test_equal_logits(dtype: torch.dtype, engine: str) -> None:
    _check(torch.full((ROWS, CLASSES), 7.0, dtype=dtype), _target(), engine=engine)


@every_engine
def test_the_largest_finite_logits(engine: str) -> None:
    """x - m reaches the lowest fp32 number without becoming infinite times 0."""
    logits = torch.zeros(ROWS, CLASSES)
    logits[:, 0], logits[:, 1] = 1.7e38, -1.7e38
    target = torch.arange(ROWS) % 2  # of probability 1 and 0
    loss, grad = _check(logits, target, engine=engine)
    assert bool(loss.isfinite().all())
    assert bool(grad.isfinite().all())


# -inf columns


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_columns_of_minus_infinity(reduction: str, dtype: torch.dtype, engine: str) -> None:
    """A masked vocabulary: probability 0, gradient exactly 0, entropy without NaN."""
    logits = _logits(dtype)
    logits[:, ::2] = -torch.inf
    target = torch.randint(CLASSES // 2, (ROWS,)) * 2 + 1
    _, grad = _check(logits, target, engine=engine, reduction=reduction)
    assert bool((grad[:, ::2] == 0).all())
    leaf = logits.clone().requires_grad_()
    stats = token_statistics(leaf, target, entropy=True, engine=engine)
    want = expected(logits, target)
    assert stats.entropy is not None
    assert_close(stats.entropy, want.exact.entropy, want.naive.entropy, "entropy")
    (grad,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    assert bool((grad[:, ::2] == 0).all())
    assert bool(grad.isfinite().all())


@every_engine
@every_dtype
def test_a_target_of_minus_infinity(dtype: torch.dtype, engine: str) -> None:
    """Loss inf, as torch says, and torch's gradient: p - 1 with p = 0."""
    logits, target = _logits(dtype), _target()
    logits[5, target[5]] = -torch.inf
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", engine=engine)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    twin = logits.double().requires_grad_()
    exact = functional.cross_entropy(twin, target, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), twin)
    assert exact[5] == torch.inf
    assert loss[5] == torch.inf
    naive = logits.float().requires_grad_()
    plain = functional.cross_entropy(naive, target, reduction="none")
    (plain_grad,) = torch.autograd.grad(plain.sum(), naive)
    _close(loss, exact, plain, "loss")
    _close(grad, exact_grad, plain_grad, "gradient")
    assert grad[5, target[5]] == -1
    for reduction in ("mean", "sum"):
        assert cross_entropy(leaf, target, reduction=reduction, engine=engine) == torch.inf


@every_engine
@every_dtype
def test_smoothing_over_minus_infinity_is_infinite(dtype: torch.dtype, engine: str) -> None:
    """As in torch: label smoothing asks for probability where there is none."""
    logits, target = _logits(dtype), _target()
    logits[:, 50], target[target == 50] = -torch.inf, 51
    loss = cross_entropy(logits, target, label_smoothing=0.1, reduction="none", engine=engine)
    usual = functional.cross_entropy(logits.double(), target, label_smoothing=0.1, reduction="none")
    assert bool((usual == torch.inf).all())
    assert bool((loss == torch.inf).all())


@every_engine
@every_dtype
def test_a_row_of_minus_infinity_is_nan(dtype: torch.dtype, engine: str) -> None:
    """As in torch: a distribution over nothing. Other rows are untouched by it."""
    logits, target = _logits(dtype), _target()
    logits[5] = -torch.inf
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", engine=engine)
    assert bool(functional.cross_entropy(logits.double()[5:6], target[5:6]).isnan())
    assert loss.isnan().nonzero().tolist() == [[5]]
    (grad,) = torch.autograd.grad(loss[torch.arange(ROWS) != 5].sum(), leaf)
    others = torch.arange(ROWS) != 5
    assert bool(grad[others].isfinite().all())


@every_engine
@every_dtype
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_infinity_and_nan_in_a_row_that_counts(
    value: float, dtype: torch.dtype, engine: str
) -> None:
    """They are never hidden: that row's loss and gradient are NaN, and only that row's."""
    logits, target = _logits(dtype), _target()
    logits[5, 77] = value
    target[5] = 3
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", engine=engine)
    usual = functional.cross_entropy(logits.double(), target, reduction="none")
    assert torch.equal(loss.isnan(), usual.isnan())
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert bool(grad[5].isnan().all())
    others = torch.arange(ROWS) != 5
    assert bool(grad[others].isfinite().all())


# Ignored rows


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 6e4], ids=str)
def test_ignored_rows_may_hold_anything(
    value: float, reduction: str, dtype: torch.dtype, engine: str
) -> None:
    """B4: loss exactly 0, gradient exactly 0; the others as if those rows were not there."""
    logits, target = _logits(dtype), _target(9)
    logits[:9] = value
    weight = torch.rand(CLASSES) + 0.25
    both: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.01}]
    for options in both:
        loss, grad = _check(logits, target, weight, engine, reduction, **options)
        if reduction == "none":
            assert bool((loss[:9] == 0).all())
        assert bool((grad[:9] == 0).all())
        assert bool(grad[9:].any(1).all())


@every_engine
def test_token_statistics_of_ignored_rows(engine: str) -> None:
    """0 each, argmax -1, no gradient, whatever they hold."""
    logits, target = _logits(), _target(9)
    logits[:9] = torch.nan
    leaf = logits.clone().requires_grad_()
    stats = token_statistics(leaf, target, entropy=True, argmax=True, engine=engine)
    assert stats.entropy is not None
    assert stats.argmax is not None
    for value in (stats.log_prob, stats.lse, stats.entropy):
        assert bool((value[:9] == 0).all())
        (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert bool((grad[:9] == 0).all())
        assert bool(grad[9:].isfinite().all())
    assert bool((stats.argmax[:9] == -1).all())
    assert torch.equal(stats.argmax[9:], logits[9:].argmax(1))


@every_engine
def test_log_prob_keeps_its_sign_of_zero(engine: str) -> None:
    """A certain token and an ignored one: 0.0, not -0.0, in every printed table."""
    logits = torch.tensor([[200.0, 0.0], [1.0, 2.0]])
    stats = token_statistics(logits, torch.tensor([0, -100]), engine=engine)
    assert stats.log_prob.tolist() == [0.0, 0.0]
    assert not bool(stats.log_prob.signbit().any())


@every_engine
@pytest.mark.parametrize("ignore_index", [0, 7, CLASSES - 1, -1, -100, 10**12, -(2**40)])
def test_any_ignore_index(ignore_index: int, engine: str) -> None:
    """Inside the vocabulary that class is never a target but stays in the softmax."""
    target = _target()
    target[3:6] = ignore_index
    logits = _logits()
    loss, _ = _check(logits, target, engine=engine, ignore_index=ignore_index)
    assert bool((loss[3:6] == 0).all())
    kept = target != ignore_index
    usual = functional.cross_entropy(logits.double()[kept], target[kept])
    mean = cross_entropy(logits.double(), target, ignore_index=ignore_index, engine=engine)
    assert_close(mean, usual, usual, "mean", rows_error=1e-15)


@every_engine
@pytest.mark.parametrize("options", [{}, {"lse_square_scale": 0.01}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("held", [1.0, torch.nan])
def test_all_rows_ignored(held: float, options: dict[str, Any], engine: str) -> None:
    """B6: mean is NaN as in torch, sum and none are 0; the gradient is exactly 0 in each."""
    target = torch.full((ROWS,), -100)
    for reduction in REDUCTIONS:
        leaf = torch.full((ROWS, CLASSES), held).requires_grad_()
        loss = cross_entropy(leaf, target, reduction=reduction, engine=engine, **options)
        usual = functional.cross_entropy(torch.ones(ROWS, CLASSES), target, reduction=reduction)
        assert loss.shape == usual.shape
        assert torch.equal(loss.isnan(), usual.isnan())
        assert bool(loss.isnan().all()) == (reduction == "mean")
        loss.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros(ROWS, CLASSES))


@every_engine
def test_all_rows_ignored_with_a_normalizer(engine: str) -> None:
    """A data-parallel rank without a kept row adds 0, not NaN."""
    leaf = _logits().requires_grad_()
    loss = cross_entropy(leaf, torch.full((ROWS,), -100), normalizer=12.0, engine=engine)
    loss.backward()
    assert loss == 0
    assert leaf.grad is not None
    assert not bool(leaf.grad.any())


@every_engine
def test_a_token_of_loss_zero_still_counts(engine: str) -> None:
    """B6: the mean divides by the kept rows, not by those whose loss is not 0."""
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = cross_entropy(logits, torch.tensor([0, 1]), engine=engine)
    exact = torch.tensor(3.0, dtype=torch.float64).log() / 2
    assert_close(loss, exact, exact, "mean")


# Empty and tiny


@every_engine
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_no_rows(shape: tuple[int, ...], engine: str) -> None:
    """mean NaN, sum 0, none empty, as in torch; an empty gradient; every function."""
    leaf = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    mean = cross_entropy(leaf, target, label_smoothing=0.1, engine=engine)
    total = cross_entropy(leaf, target, reduction="sum", lse_square_scale=0.1, engine=engine)
    rows = cross_entropy(leaf, target, reduction="none", engine=engine)
    assert bool(mean.isnan())
    assert total == 0
    assert rows.shape == target.shape
    for in_place in (False, True):
        out = cross_entropy(
            leaf * 1, target, reduction="sum", inplace_backward=in_place, engine=engine
        )
        (grad,) = torch.autograd.grad(out, leaf)
        assert grad.shape == shape
    asked: dict[str, Any] = {"entropy": True, "argmax": True, "sum_p_squared": True}
    selected = target[..., None].expand(*target.shape, 2)
    *stats, found = token_statistics(leaf, target, **asked, selected=selected, engine=engine)
    assert all(value is not None and value.shape == target.shape for value in stats)
    assert found is not None
    assert found.shape == selected.shape
    assert cross_entropy_loss(leaf, target, engine=engine).log_prob.shape == shape


@every_engine
@every_dtype
def test_one_class(dtype: torch.dtype, engine: str) -> None:
    """Loss 0, gradient 0, entropy 0, whatever the logit."""
    logits = (100 * torch.randn(6, 1)).to(dtype)
    target = torch.tensor([0, 0, -100, 0, 0, 0])
    loss, grad = _check(logits, target, engine=engine)
    assert not bool(loss.any())
    assert not bool(grad.any())
    # Every product of these is exact, so what cancels in theory cancels in fp32.
    _check(logits, target, torch.tensor([0.5]), engine, spread=False, label_smoothing=0.25)
    stats = token_statistics(logits, target, entropy=True, argmax=True, engine=engine)
    assert stats.entropy is not None
    assert not bool(stats.entropy.any())
    assert stats.argmax is not None
    assert stats.argmax.tolist() == [0, 0, -1, 0, 0, 0]


@every_engine
def test_one_row_of_one_dimension(engine: str) -> None:
    logits, target = torch.randn(CLASSES), torch.tensor(3)
    want = expected(logits, target)
    assert_close(
        cross_entropy(logits, target, engine=engine), want.exact.loss, want.naive.loss, "loss"
    )


# Weights and smoothing


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_of_zero(smoothing: float, reduction: str, dtype: torch.dtype, engine: str) -> None:
    """A class that weighs nothing: its rows cost nothing by themselves but are kept rows."""
    weight = torch.rand(CLASSES) + 0.25
    weight[::3] = 0.0
    target = _target(5)
    target[5:9] = 3
    loss, _ = _check(_logits(dtype), target, weight, engine, reduction, label_smoothing=smoothing)
    if reduction == "none" and smoothing == 0:
        assert bool((loss[5:9] == 0).all())


@every_engine
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_all_weights_zero(options: dict[str, Any], engine: str) -> None:
    """The mean over nothing is NaN, as in torch; the others are 0."""
    weight, target = torch.zeros(CLASSES), _target()
    for reduction in REDUCTIONS:
        loss = cross_entropy(_logits(), target, weight, reduction, engine=engine, **options)
        usual = functional.cross_entropy(_logits(), target, weight, reduction=reduction, **options)
        assert torch.equal(loss.isnan(), usual.isnan())
        assert torch.equal(loss.nan_to_num(), usual.nan_to_num())


@every_engine
@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_label_smoothing_of_one(reduction: str, dtype: torch.dtype, engine: str) -> None:
    """The target only tells which rows count."""
    logits = _logits(dtype)
    losses = [
        _check(logits, target, engine=engine, reduction=reduction, label_smoothing=1.0)[0]
        for target in (_target(5), _target(5))
    ]
    assert torch.equal(*losses)


@every_engine
@every_dtype
def test_smoothing_of_a_vanishing_probability(dtype: torch.dtype, engine: str) -> None:
    """p = e^-20000 is 0 in every dtype; its log is -20000 and finite."""
    logits = _logits(dtype)
    logits[:, 7] = -20000.0
    target = _target()
    target[:4] = 7
    loss, _ = _check(logits, target, engine=engine, label_smoothing=0.1)
    assert bool(loss.isfinite().all())
    assert float(loss[:4].min()) > 17000


# Precision


@every_engine
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_entropy_of_a_large_vocabulary(offset: float, engine: str) -> None:
    """B17: lse - sum(p x) is off by 8e-5 at 131072 classes and by 2e-2 with 1000 added to them."""
    logits = torch.randn(4, 131072) * 2 + offset
    target = torch.zeros(4, dtype=torch.int64)
    stats = token_statistics(logits, target, entropy=True, engine=engine)
    assert stats.entropy is not None
    p = logits.double().softmax(1)
    exact = -(p * p.log()).sum(1)
    assert float((stats.entropy - exact).abs().max()) < 2e-6
    want = expected(logits, target)
    assert_close(stats.entropy, exact, want.naive.entropy, "entropy")
    lse = logits.logsumexp(1)
    fields = lse - ((logits - lse[:, None]).exp() * logits).sum(1)
    if offset == 1000:
        assert float((fields - exact).abs().max()) > 1e-3, "this batch shows nothing"


@every_engine
@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_gradient_at_large_logits(offset: float, engine: str) -> None:
    """e^(x - lse) with one rounded lse near 1000 loses two to three digits; (m, s) loses none."""
    logits, target = _logits(spread=0.5) + offset, _target()
    _, grad = _check(logits, target, engine=engine)
    upstream = torch.linspace(0.5, 2, ROWS)[:, None]
    hot = functional.one_hot(target, CLASSES)
    exact = (logits.double().softmax(1) - hot) * upstream
    through_lse = ((logits - logits.logsumexp(1)[:, None]).exp() - hot) * upstream
    others = hot == 0
    ours = float((grad - exact)[others].abs().max())
    theirs = float((through_lse - exact)[others].abs().max())
    assert theirs > 20 * ours, "this batch shows nothing"


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_target_gradient_of_a_near_certain_token(dtype: torch.dtype, engine: str) -> None:
    """B11: p - 1 is formed before it is rounded; the rounded p would be 1 and the gradient 0."""
    logits = torch.zeros(ROWS, 2, dtype=dtype)
    logits[:, 1] = -torch.linspace(6, 9, ROWS).to(dtype)
    _, grad = _check(logits, torch.zeros(ROWS, dtype=torch.int64), engine=engine)
    assert bool((grad[:, 0] < 0).all())


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_outputs_of_the_operator(dtype: torch.dtype, engine: str) -> None:
    """fp32 all the way, rounded once: right in the last place of bf16 and fp16."""
    logits, target = _logits(dtype), _target(5)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"lse_square_scale": 0.01, "label_smoothing": 0.1}
        out = cross_entropy_loss(
            logits,
            target,
            reduction=reduction,
            label_smoothing=0.1,
            lse_square_scale_for_zloss=0.01,
            return_zloss=True,
            engine=engine,
        )
        want = expected(logits, target, reduction=reduction, **options)
        names: dict[str, Callable[[ReferenceLoss], Tensor]] = {
            "loss": lambda o: o.loss.reshape(-1),
            "zloss": lambda o: o.zloss.reshape(-1),
            "log_prob": lambda o: o.log_prob,
        }
        for name, read in names.items():
            assert_close(
                getattr(out, name),
                read(want.exact),
                read(want.naive),
                name,
                rows_error=want.rows_error,
            )
        assert_close(out.lse_for_zloss, want.exact.lse, want.naive.lse, "lse")


@every_engine
@every_dtype
def test_token_statistics_values(dtype: torch.dtype, engine: str) -> None:
    """Every field and its gradient, at a temperature."""
    logits, target = _logits(dtype), _target()
    leaf = logits.clone().requires_grad_()
    stats = token_statistics(leaf, target, entropy=True, argmax=True, scale=0.7, engine=engine)
    want = expected(logits, target, reduction="none", scale=0.7)
    assert stats.entropy is not None
    assert stats.argmax is not None
    _close(stats.log_prob, -want.exact.loss, -want.naive.loss, "log_prob")
    _close(stats.lse, want.exact.lse, want.naive.lse, "lse")
    _close(stats.entropy, want.exact.entropy, want.naive.entropy, "entropy")
    assert torch.equal(stats.argmax, logits.argmax(1))
    _check_stat_gradient(stats.log_prob, leaf, want, lambda o: -o.loss.sum())
    _check_stat_gradient(stats.lse, leaf, want, lambda o: o.lse.sum())
    _check_stat_gradient(stats.entropy, leaf, want, lambda o: o.entropy.sum())


def _check_stat_gradient(
    value: Tensor, leaf: Tensor, want: Expected, scalar: Callable[[ReferenceLoss], Tensor]
) -> None:
    (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    _close(grad, *want.gradients(scalar), "gradient")


# The two engines


@every_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_engines_agree(reduction: str, dtype: torch.dtype) -> None:
    """Each to the other as exact as to the oracle."""
    logits, target = _logits(dtype), _target(5)
    weight = torch.rand(CLASSES) + 0.25
    options: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 0.01}
    want = expected(logits, target, weight, reduction=reduction, **options)
    both = []
    for engine in ("eager", "cpu"):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, target, weight, reduction, engine=engine, **options)
        both.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    error = max(naive_error(want.exact.loss, want.naive.loss, torch.float32), want.rows_error)
    assert_close(both[0][0], both[1][0].double(), both[1][0], "loss", rows_error=error)
    exact, plain = want.gradients(lambda outcome: outcome.loss.sum())
    error = naive_error(exact, plain, torch.float32)
    assert_close(both[0][1], both[1][1].double(), both[1][1], "gradient", rows_error=error)


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_a_row_without_a_maximum_has_no_argmax(engine: str) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = torch.nan
    target = torch.zeros(3, dtype=torch.int64)
    best = token_statistics(logits, target, argmax=True, engine=engine).argmax
    assert best is not None
    assert best.tolist() == [int(logits[0].argmax()), -1, int(logits[2].argmax())]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_negative_class_weights_are_pytorchs_to_allow(reduction: str, smoothing: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=g, dtype=torch.float64)
    target = torch.tensor([0, 3, 8, -100, 3, 1])
    weight = torch.linspace(-2, 3, 9, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    loss = cross_entropy(ours, target, weight, **options)
    want = functional.cross_entropy(theirs, target, weight, **options)
    torch.testing.assert_close(loss, want)
    loss.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
