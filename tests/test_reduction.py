"""The derivative of the losses by the statistics is what autograd says of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from vocab_parallel_ce.reduction import row_coefficients, row_losses
from vocab_parallel_ce.request import RowRequest

N, V = 9, 7


@pytest.mark.parametrize(
    ("smoothing", "z_scale", "weighted"),
    list(itertools.product((0.0, 0.3, 1.0), (0.0, 0.1), (0, 1))),
)
def test_coefficients(smoothing: float, z_scale: float, weighted: int) -> None:
    request = RowRequest(
        0, V, V, True, smooth=smoothing > 0, label_smoothing=smoothing, lse_square_scale=z_scale
    )
    stats = torch.randn(2 + (smoothing > 0), N, dtype=torch.float64)
    stats[1, 3:6] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    stats.requires_grad_()
    target = torch.randint(V, (N,))
    target[[1, 5]] = -100
    weight = torch.rand(V).double() if weighted else None
    of_loss, of_zloss = torch.tensor(0.25).double(), torch.tensor(0.5).double()
    losses = row_losses(stats.unbind(0), target, weight, request)
    total = of_loss * losses.loss.sum()
    if losses.zloss is not None:
        total = total + of_zloss * losses.zloss.sum()
    (want,) = torch.autograd.grad(total, stats)
    got = row_coefficients(stats.detach(), losses, request, of_loss, of_zloss)
    torch.testing.assert_close(got, want)
