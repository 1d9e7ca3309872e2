"""Imitations of Megatron after 0.19: who holds its losses, and where a model takes its own from.

No such version is on the package index yet. The names, signatures and folders are those of its
documentation (developer guide, apidocs): ``released`` after 0.20.0, ``nightly`` after the pages
that follow it. The losses are those of the Megatron that is installed.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

_LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module"
_CROSS_ENTROPY = "megatron.core.tensor_parallel.cross_entropy"
_FUSED = "megatron.core.fusions.fused_cross_entropy"

# core.tensor_parallel.cross_entropy.unfused_cross_entropy (nightly: core.ops.loss.cross_entropy),
# "adapt vocab-parallel cross entropy to the backend target signature".
_ADAPTER = """
def unfused_cross_entropy(logits, labels, tp_group=None):
    return vocab_parallel_cross_entropy(logits, labels, tp_group=tp_group)
"""

# core.models.backends.select_cross_entropy (nightly: core.ops.loss.backends): "which cross entropy
# a config asks for, resolved once". The fused loss has a target's signature and is returned itself.
_BACKENDS = """
from functools import partial

from {unfused} import unfused_cross_entropy, vocab_parallel_cross_entropy as _reference_ce
from {fused} import fused_vocab_parallel_cross_entropy as _fused_ce


def te_cross_entropy(logits, labels, tp_group=None, *, cuda_graph_capturable=False):
    raise RuntimeError("TransformerEngine is missing")


def select_cross_entropy(
    cross_entropy_loss_fusion=False, cross_entropy_fusion_impl="native", cuda_graph_impl=None
):
    if not cross_entropy_loss_fusion:
        return unfused_cross_entropy
    if cross_entropy_fusion_impl == "native":
        return _fused_ce
    return partial(te_cross_entropy, cuda_graph_capturable=cuda_graph_impl == "full_iteration")
"""

# The part of a LanguageModule that keeps its loss from when it was built (Megatron-LM #6766).
_MODEL = """
import torch

from {backends} import select_cross_entropy


class LanguageModule(torch.nn.Module):
    def __init__(self, *config):
        super().__init__()
        self.vocab_parallel_cross_entropy = select_cross_entropy(*config)

    def compute_language_model_loss(self, labels, logits):
        return self.vocab_parallel_cross_entropy(logits, labels.t(), None).t()
"""


def released(patch: pytest.MonkeyPatch) -> Any:
    """0.20.0: the losses where they were, chosen in models.backends; hands out its backends."""
    from megatron.core.tensor_parallel import cross_entropy

    patch.setattr(cross_entropy, "unfused_cross_entropy", None, raising=False)
    exec(_ADAPTER, vars(cross_entropy))
    return _models(patch, "megatron.core.models.backends", _CROSS_ENTROPY, _FUSED)


def nightly(patch: pytest.MonkeyPatch) -> Any:
    """After 0.20.0: all in core.ops.loss, and nothing re-exported; hands out its backends."""
    from megatron.core import tensor_parallel
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    places = {name: f"megatron.core.ops.loss.{name}" for name in ("cross_entropy", "backends")}
    fused = "megatron.core.ops.loss.fused_cross_entropy"
    for folder in ("megatron.core.ops", "megatron.core.ops.loss"):
        _module(patch, folder)
    unfused = _module(patch, places["cross_entropy"])
    unfused.vocab_parallel_cross_entropy = tensor_parallel.vocab_parallel_cross_entropy
    exec(_ADAPTER, vars(unfused))
    _module(patch, fused).fused_vocab_parallel_cross_entropy = fused_vocab_parallel_cross_entropy
    patch.delattr(tensor_parallel, "vocab_parallel_cross_entropy")
    for moved in (_CROSS_ENTROPY, _FUSED):
        patch.setitem(sys.modules, moved, None)
    return _models(patch, places["backends"], places["cross_entropy"], fused)


def _models(patch: pytest.MonkeyPatch, place: str, unfused: str, fused: str) -> Any:
    backends = _module(patch, place)
    exec(_BACKENDS.format(unfused=unfused, fused=fused), vars(backends))
    language_module = _module(patch, _LANGUAGE_MODULE)
    exec(_MODEL.format(backends=place), vars(language_module))
    return backends


def _module(patch: pytest.MonkeyPatch, name: str) -> Any:
    module = ModuleType(name)
    patch.setitem(sys.modules, name, module)
    return module
