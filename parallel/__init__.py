"""Plugging the loss into a parallel run: process groups, vocabulary-parallel layers."""

from vocab_parallel_ce.torch_import import require_torch

require_torch()  # before anything that imports torch: one line where that cannot work
