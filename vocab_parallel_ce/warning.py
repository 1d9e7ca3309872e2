"""Warnings that are said once for a host and point at the line that called the library."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

_NOT_THE_CALLER = ("torch", "functools", "contextlib")


def is_first_of_host() -> bool:
    """Also true of a process that is no rank."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def warn(message: str) -> None:
    """A UserWarning; the other ranks of this host would only repeat it."""
    if is_first_of_host():
        warnings.warn(message, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The stacklevel at which ``warn`` finds the nearest frame that is not the library's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_inside(str(frame.f_globals.get("__name__", ""))):
        frame, level = frame.f_back, level + 1
    return level


def called_by_own_part() -> bool:
    """Whether ``parallel`` or ``launch`` called the loss, and not a program of the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        top, _, rest = str(frame.f_globals.get("__name__", "")).partition(".")
        if top == __package__:
            if rest.startswith(("parallel", "launch")):
                return True
        elif top not in _NOT_THE_CALLER:
            return False
        frame = frame.f_back
    return False


def _is_inside(module: str) -> bool:
    """Part of the library, or of what lies between it and the caller. A job is a caller."""
    top, _, rest = module.partition(".")
    own = top == __package__ and not rest.startswith("launch")
    return own or top in _NOT_THE_CALLER
