"""Numbers that a launcher such as torchrun leaves in environment variables."""

from __future__ import annotations

import os


def environment_int(name: str, default: int) -> int:
    """The variable's number, or ``default`` where it is not set."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} is not a number") from None
