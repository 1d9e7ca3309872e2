"""Where a version of megatron-core defines its losses, and where its models look them up.

0.12 to 0.19: the functions stand in ``tensor_parallel`` and ``fusions``, and a model calls them by
name, two of them by the names that ``language_module`` has copied.

0.20.0 (by its documentation): a model asks ``models.backends.select_cross_entropy``, through its
provider, once, while it is built, and keeps the answer as ``model.vocab_parallel_cross_entropy``.
An answer is Megatron's function itself, or an adapter that calls it by a name of its module.

Its nightly documentation: the same in ``megatron.core.ops.loss``, the functions included.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

Function = Callable[..., Any]
SLOT = "vocab_parallel_cross_entropy"
"""the attribute of a model that holds its loss, after 0.19"""
_FUSED = "fused_vocab_parallel_cross_entropy"
_TE = "te_parallel_cross_entropy"
_TE_ADAPTER = "te_cross_entropy"  # after 0.19

_DEFINED_IN = {
    SLOT: (
        "megatron.core.tensor_parallel.cross_entropy",
        "megatron.core.ops.loss.cross_entropy",
    ),
    _FUSED: (
        "megatron.core.fusions.fused_cross_entropy",
        "megatron.core.ops.loss.fused_cross_entropy",
    ),
}
_LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module"
_SELECTED_IN = ("megatron.core.models.backends", "megatron.core.ops.loss.backends")
KNOWN_TO_WORK = (
    "versions 0.12 to 0.19 are known to work; where models look a target up, hand them "
    "parallel.megatron.cross_entropy_target"
)


def known_places() -> Iterator[tuple[str, ModuleType]]:
    """(name of a loss, module that must hold ours): first those that define it.

    ImportError where megatron-core is missing, RuntimeError where its modules have moved. The te
    form exists without TransformerEngine, as None, and its defining module may not be importable.
    """
    importlib.import_module("megatron.core")
    for name, places in _DEFINED_IN.items():
        modules = [module for module in map(_module, places) if hasattr(module, name)]
        # Where none has it, the first place is the one that is reported as missing.
        yield from ((name, module) for module in modules or [_needed(places[0])])
    tensor_parallel = _needed("megatron.core.tensor_parallel")
    if hasattr(tensor_parallel, SLOT):
        yield SLOT, tensor_parallel
    selectors = _selectors()
    extension: Any = sys.modules.get("megatron.core.extensions.transformer_engine")
    for name in (_TE, _TE_ADAPTER):
        yield from ((name, module) for module in (extension, *selectors) if hasattr(module, name))
    if not selectors:
        language_module = _needed(_LANGUAGE_MODULE)
        yield _FUSED, language_module
        yield _TE, language_module


def targets_of_new_models() -> Iterator[tuple[str, Any]]:
    """(who says so, the loss that a model built now gets); none before 0.20."""
    for module in _selectors():
        for fusion, kind in ((False, "native"), (True, "native")):
            told = f"{module.__name__}.select_cross_entropy({fusion}, {kind!r})"
            yield told, module.select_cross_entropy(fusion, kind)


def built_models() -> list[Any]:
    """The models of the process that have taken their loss already; none before 0.20."""
    if not _selectors():
        return []
    kind = _needed(_LANGUAGE_MODULE).LanguageModule
    return [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), kind) and SLOT in vars(candidate)
    ]


def calls_one_of(target: Any, functions: Collection[Function]) -> bool:
    """Whether a target is one of ``functions``, or an adapter that calls one by a global name."""
    names = getattr(getattr(target, "__code__", None), "co_names", ())
    called = [target.__globals__.get(name) for name in names]
    return any(found is function for function in functions for found in (target, *called))


def _selectors() -> list[Any]:
    """The modules that choose the loss of a model; none before 0.20."""
    if hasattr(_needed(_LANGUAGE_MODULE), _FUSED):
        return []
    return [m for m in map(_module, _SELECTED_IN) if hasattr(m, "select_cross_entropy")]


def _module(name: str) -> Any:
    """A module of Megatron, or None where this version has none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is not None and f"{name}.".startswith(f"{problem.name}."):
            return None
        raise


def _needed(name: str) -> Any:
    """A module that every version has, so far."""
    module = _module(name)
    if module is None:
        raise RuntimeError(
            f"there is no {name}: this version of megatron-core looks its losses up elsewhere; "
            f"{KNOWN_TO_WORK}"
        )
    return module
