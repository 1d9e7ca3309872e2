"""Logits in fp32 for narrow hidden states, as accelerators make them; here by a product in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.linear import checks, head
from vocab_parallel_ce.linear.chunks import MIB
from vocab_parallel_ce.linear.wide import makes_wide_logits, wide_product

N, H, V = 96, 64, 512
WAYS = ("forward", "recompute")


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a.float(), b.float(), out=out)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "makes_wide_logits", lambda device, dtype: True)
    monkeypatch.setattr(head, "wide_product", _product)


def _confident() -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose target has a probability of about 0.99."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=g)
    target = torch.randint(V, (N,), generator=g)
    hidden = head[target] * 0.3 + 0.1 * torch.randn(N, H, generator=g)
    return hidden.bfloat16().requires_grad_(), head.bfloat16().requires_grad_(), target


def _errors(gradient: str, engine: str, scratch: float | None) -> list[float]:
    hidden, head, target = _confident()
    exact = [t.detach().double().requires_grad_() for t in (hidden, head)]
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target), exact)
    loss = linear_cross_entropy(
        hidden, head, target, gradient=gradient, engine=engine, scratch_mib=scratch
    )
    assert isinstance(loss, Tensor)
    got = torch.autograd.grad(loss, (hidden, head))
    return [float((a - w).norm() / w.norm()) for a, w in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("scratch", [None, 16 * V * 6 / MIB])
@pytest.mark.parametrize("engine", ["cpu", "eager"])
@pytest.mark.parametrize("gradient", WAYS)
def test_confident_rows_are_several_times_as_exact(
    gradient: str, engine: str, scratch: float | None, request: pytest.FixtureRequest
) -> None:
    narrow = _errors(gradient, engine, scratch)
    request.getfixturevalue("wide")
    for wide, other in zip(_errors(gradient, engine, scratch), narrow, strict=True):
        assert wide < 5e-3
        assert wide < other / 3


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("gradient", WAYS)
def test_with_a_bias(gradient: str) -> None:
    hidden, head, target = _confident()
    bias = torch.randn(V).bfloat16().requires_grad_()
    leaves = (hidden, head, bias)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target), exact)
    loss = linear_cross_entropy(hidden, head, target, linear_bias=bias, gradient=gradient)
    assert isinstance(loss, Tensor)
    for a, w in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert float((a - w).norm() / w.norm()) < 5e-3


def test_a_cpu_makes_none() -> None:
    assert not makes_wide_logits("cpu", torch.bfloat16)
    assert not makes_wide_logits("cuda", torch.float32)
    assert not makes_wide_logits("no such device", torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_makes_them() -> None:
    a = torch.randn(64, 64, device="cuda").bfloat16()
    out = wide_product(a, a, torch.empty(64, 64, device="cuda"))
    torch.testing.assert_close(out, a.float() @ a.float())
    assert makes_wide_logits("cuda", torch.bfloat16)
