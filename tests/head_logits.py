"""Logits as a head makes them: no leaves, and in every layout in which a loss gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .device import DEVICE

CLASSES = 37  # two vectors of the cpu engine and a tail

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "lse_square_scale": 1e-3, "scale": 0.7},
}


def random_leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape)).to(DEVICE, dtype).requires_grad_()


def random_target(*lead: int, classes: int = CLASSES) -> Tensor:
    """The second row is ignored."""
    target = torch.randint(classes, lead)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    return target.to(DEVICE)


def made_of(leaf: Tensor) -> Tensor:
    """A non-leaf of the same values whose producer saves nothing of them."""
    return leaf * 1


def identity(x: Tensor) -> Tensor:
    return x


# Layouts: how logits arrive from the memory [2, 6, CLASSES + 1] of a head

Layout = Callable[[Tensor], Tensor]

LAYOUTS: dict[str, Layout] = {
    "3-D": lambda x: x,
    "flattened": lambda x: x.view(-1, x.shape[-1]),
    "shifted": lambda x: x[:, :-1],  # the next-token shift: rows that cannot be flattened
    "shifted and flattened in part": lambda x: x[:1, :-1].view(-1, x.shape[-1]),
    "sequence first": lambda x: x.transpose(0, 1),
    "columns cut": lambda x: x[..., :-1],
    "columns cut in front": lambda x: x.view(-1, x.shape[-1])[:, 1:],
    "every other column": lambda x: x[..., ::2],
    "every other row": lambda x: x.view(-1, x.shape[-1])[::2],
    "transposed": lambda x: x.view(-1, x.shape[-1]).t(),
    "4-D": lambda x: x.view(2, 2, 3, -1)[:, :, :-1].transpose(0, 2),
    "1-D": lambda x: x[1, 2],
    "1-D with a stride": lambda x: x[1, :, 3],
    "one row": lambda x: x[:1, 2],
    "expanded over one": lambda x: x[:1].expand(1, 6, CLASSES + 1),
    "no rows": lambda x: x[:, :0],
}


def assert_same(tensors: Sequence[Tensor | None]) -> None:
    """Two gradients, both there and equal bit for bit."""
    first, second = tensors
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
