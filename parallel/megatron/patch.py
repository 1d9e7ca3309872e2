"""Puts functions in the place of Megatron's, in every module that holds those by name.

Assigning the name in the module that defines a function is not enough: ``from ... import`` has
copied it into Megatron's own packages and into users' modules. So

    the places where Megatron looks its losses up are set, whatever they hold (``places.py``);
    every other module-level name of the process that is the same object is set as well;
    models that took such an object when they were built (after 0.19) are set as well.

What is imported afterwards copies from the places that are set. Out of reach is what holds a
function in another way: a functools.partial, a default argument, a class.
"""

from __future__ import annotations

import functools
import sys
import weakref
from types import ModuleType
from typing import Any

from vocab_parallel_ce.warning import warn

from .places import (
    KNOWN_TO_WORK,
    SLOT,
    Function,
    built_models,
    calls_one_of,
    known_places,
    targets_of_new_models,
)

HOW_TO_GET_MEGATRON = "pip install 'vocab_parallel_ce[peers]' brings megatron-core 0.16.1"


class Patch:
    """The replacement of Megatron's losses, by name; ``apply`` and ``undo`` may be repeated."""

    def __init__(self, replacements: dict[str, Function]) -> None:
        self._ours = replacements
        self._before: dict[tuple[ModuleType, str], tuple[str, Any]] = {}
        self._models: list[tuple[weakref.ref[Any], Function, Function]] = []
        self.originals: dict[str, Function | None] = {}
        """Megatron's own function of each name, as the last patch found it"""

    def apply(self) -> None:
        """Replace all that can be found, and check that it took.

        Raises ImportError without megatron-core, and RuntimeError, with everything put back, where
        a place is missing or does not take the replacement, or a new model would not get it.
        """
        try:
            places = list(known_places())
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
            for told, target in targets_of_new_models():
                if not calls_one_of(target, self._ours.values()):
                    raise RuntimeError(
                        f"{told} gives new models another loss than the functions that were "
                        "replaced: this version of megatron-core looks it up elsewhere; "
                        f"{KNOWN_TO_WORK}"
                    )
            self._reach_built_models()
        except BaseException:
            self.undo()
            raise

    def _replace(self, module: ModuleType, attribute: str, name: str) -> None:
        ours = self._ours[name]
        if not hasattr(module, attribute):
            raise RuntimeError(
                f"{module.__name__} has no {attribute}: this version of megatron-core looks its "
                f"losses up elsewhere; {KNOWN_TO_WORK}"
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

    def _reach_built_models(self) -> None:
        """Models that hold Megatron's function itself get ours; what another chose is told."""
        for model in built_models():
            target = vars(model)[SLOT]
            bound = isinstance(target, functools.partial)
            function = target.func if bound else target
            if calls_one_of(function, self._ours.values()) or _is_of_this_library(function):
                continue
            name = next((name for name, old in self._before.values() if old is function), None)
            if name is None:
                warn(
                    f"vocab_parallel_ce: a {type(model).__name__} was built before install() with "
                    f"{target!r} as its loss, which is none of Megatron's and stays; "
                    f"model.{SLOT} = cross_entropy_target (of parallel.megatron) changes it"
                )
                continue
            ours = self._ours[name]
            if bound:
                ours = functools.partial(ours, *target.args, **target.keywords)
            setattr(model, SLOT, ours)
            self._models.append((weakref.ref(model), target, ours))

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
        for reference, before, ours in self._models:
            model = reference()
            if model is not None and vars(model).get(SLOT) is ours:
                setattr(model, SLOT, before)
        self._models.clear()
        self._before.clear()


def _is_of_this_library(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] == __name__.split(".")[0]


def _holders(function: Function) -> list[tuple[ModuleType, str]]:
    """Every module-level name in the process that is this very object."""
    return [
        (module, attribute)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for attribute, value in list(vars(module).items())
        if value is function
    ]
