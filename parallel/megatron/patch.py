"""Puts functions in the place of Megatron's, in every module that holds those by name.

Assigning the name in the module that defines a function is not enough: ``from ... import`` has
copied it into Megatron's own packages and into users' modules. So

    the places where Megatron looks its losses up are set, whatever they hold (``_known_places``);
    every other module-level name of the process that is the same object is set as well.

What is imported afterwards copies from the places that are set. Out of reach is what holds a
function without a module-level name: a functools.partial, a default argument, a class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

Function = Callable[..., Any]
HOW_TO_GET_MEGATRON = "pip install 'vocab_parallel_ce[peers]' brings megatron-core 0.16.1"


def _known_places() -> Iterator[tuple[str, ModuleType]]:
    """(name of a loss, module that must hold ours): first the one that defines it.

    ImportError where megatron-core is missing. The te form exists without TransformerEngine, as
    None, and its defining module may not be importable.
    """
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.models.common.language_module import language_module
    from megatron.core.tensor_parallel import cross_entropy

    yield "vocab_parallel_cross_entropy", cross_entropy
    yield "vocab_parallel_cross_entropy", tensor_parallel
    yield "fused_vocab_parallel_cross_entropy", fused_cross_entropy
    yield "fused_vocab_parallel_cross_entropy", language_module
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    if extension is not None and hasattr(extension, "te_parallel_cross_entropy"):
        yield "te_parallel_cross_entropy", extension
    yield "te_parallel_cross_entropy", language_module


class Patch:
    """The replacement of Megatron's losses, by name; ``apply`` and ``undo`` may be repeated."""

    def __init__(self, replacements: dict[str, Function]) -> None:
        self._ours = replacements
        self._before: dict[tuple[ModuleType, str], tuple[str, Any]] = {}
        self.originals: dict[str, Function | None] = {}
        """Megatron's own function of each name, as the last patch found it"""

    def apply(self) -> None:
        """Replace all that can be found, and check that it took.

        Raises ImportError without megatron-core, and RuntimeError, with everything put back, where
        a place is missing or does not take the replacement.
        """
        try:
            places = list(_known_places())
        except ImportError as problem:
            raise ImportError(
                "install() puts this loss in the place of megatron-core's, which cannot be "
                f"imported ({problem}): {HOW_TO_GET_MEGATRON}"
            ) from problem
        if not self._before:
            self.originals.clear()
        try:
            for name, module in places:
                self._replace(module, name, name)
            for name, before in list(self._before.values()):
                for module, attribute in [] if before is None else _holders(before):
                    self._replace(module, attribute, name)
        except BaseException:
            self.undo()
            raise

    def _replace(self, module: ModuleType, attribute: str, name: str) -> None:
        ours = self._ours[name]
        if not hasattr(module, attribute):
            raise RuntimeError(
                f"{module.__name__} has no {attribute}: this version of megatron-core looks its "
                "losses up elsewhere; versions 0.12.1 and 0.16.1 are known to work"
            )
        before = getattr(module, attribute)
        if before is ours:
            return
        self._before[module, attribute] = name, before
        self.originals.setdefault(name, before)
        setattr(module, attribute, ours)
        if getattr(module, attribute) is not ours:
            raise RuntimeError(
                f"{module.__name__}.{attribute} still holds Megatron's own function after it was "
                "replaced: something guards the attributes of that module"
            )

    def undo(self) -> None:
        """Put back what was there, also into modules that were imported since.

        What somebody else has put in our place meanwhile stays.
        """
        for (module, attribute), (_, before) in self._before.items():
            if any(getattr(module, attribute, None) is ours for ours in self._ours.values()):
                setattr(module, attribute, before)
        for name, ours in self._ours.items():
            for module, attribute in _holders(ours):
                setattr(module, attribute, self.originals.get(name))
        self._before.clear()


def _holders(function: Function) -> list[tuple[ModuleType, str]]:
    """Every module-level name in the process that is this very object."""
    return [
        (module, attribute)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for attribute, value in list(vars(module).items())
        if value is function
    ]
