"""Trains a small GPT with the vocabulary split across ranks."""

from vocab_parallel_ce.torch_import import require_torch

require_torch()  # before anything that imports torch: one line where that cannot work
