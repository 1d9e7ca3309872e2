"""How a job ends when it cannot do what it was told: one line on standard error, and a status.

    vocab-parallel-ce train: --tp 3 times dp=1 is 3, but the number of processes is 2; ...

Under torchrun the first rank of each host says it. The others wait a moment: torchrun ends them
when the first has left. Who is still there then has a problem of its own, and says it. So a line
stands there once, and none is lost.

Imports nothing that may be missing: the doctor starts where nothing else can be imported.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from vocab_parallel_ce.warning import is_first_of_host

PROGRAM = "vocab-parallel-ce"
FAILED, USAGE_ERROR = 1, 2
PATIENCE = 20.0
"""Seconds that a rank waits for the first one of its host to say the same."""


class Refusal(Exception):  # noqa: N818  # not an error of the program but of what it was told
    """Ends the job with this one line and this exit status; the user can act on it."""

    def __init__(self, line: object, status: int = USAGE_ERROR) -> None:
        super().__init__(str(line))
        self.status = status


def is_rank_0() -> bool:
    """Also true of a process that is no rank."""
    return os.environ.get("RANK", "0") == "0"


def say_and_leave(job: str, line: str, status: int = USAGE_ERROR) -> NoReturn:
    """Ends this process; see the top of this file."""
    if not is_first_of_host():
        time.sleep(PATIENCE)
    who = "" if is_rank_0() else f"rank {os.environ['RANK']}: "
    said = f"{PROGRAM} {job}".strip() + f": {who}{one_line(line)}\n"
    sys.stderr.write(said)  # at once with its end: the lines of several ranks must not mix
    sys.stderr.flush()
    sys.exit(status)


def one_line(text: str) -> str:
    return " ".join(text.split())
