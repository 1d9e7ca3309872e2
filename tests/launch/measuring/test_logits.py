"""Logits that a layer seems to have made."""

from __future__ import annotations

import torch

from vocab_parallel_ce.launch.measuring.logits import Sink, produced


def test_logits_are_a_non_leaf_whose_gradient_is_dropped() -> None:
    buffer, sink = torch.randn(3, 5), Sink()
    logits = produced(buffer, sink)
    assert not logits.is_leaf
    assert logits._base is None
    assert logits.data_ptr() == buffer.data_ptr()
    logits.sum().backward()
    assert sink.gradient is None
    sink.keep = True
    produced(buffer, sink).sum().backward()
    assert sink.gradient is not None
    assert torch.equal(sink.gradient, torch.ones(3, 5))


def test_a_loss_may_write_into_them() -> None:
    """Autograd refuses that on a leaf, and on a view made by a function of several outputs."""
    buffer = torch.randn(3, 5)
    logits = produced(buffer)
    logits.mul_(2)
    logits.sum().backward()
    assert logits.data_ptr() == buffer.data_ptr()
