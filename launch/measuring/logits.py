"""Logits as if a layer had just made them, from a buffer that is used again and again.

A leaf would be wrong: autograd keeps, and at times copies, a gradient that no training step keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sink:
    """Where the logits' gradient ends: dropped, or kept when a check asked for it."""

    def __init__(self) -> None:
        self.keep = False
        self.gradient: Tensor | None = None


class _Head(torch.autograd.Function):
    """Stands for the layer that made the logits: hands them out, drops their gradient.

    ``anchor`` is a scalar leaf that gives the output a place in the graph. The output shares the
    buffer's memory but is no view of it to autograd, as a real head's output is none: several
    losses write into their logits, which autograd refuses on views made here.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor, sink: Sink) -> Tensor:
        ctx.sink = sink
        return torch.empty(0, dtype=buffer.dtype, device=buffer.device).set_(
            buffer.untyped_storage(), buffer.storage_offset(), buffer.shape, buffer.stride()
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if ctx.sink.keep:
            ctx.sink.gradient = gradients[0]
        return None, None, None


def produced(buffer: Tensor, sink: Sink | None = None) -> Tensor:
    """A non-leaf in the memory of ``buffer``; its gradient goes to ``sink``, or nowhere."""
    anchor = torch.zeros((), device=buffer.device, requires_grad=True)
    logits: Tensor = _Head.apply(anchor, buffer, sink or Sink())  # type: ignore[no-untyped-call]
    return logits
