"""vocab-parallel-ce ascend: runs the script beside this file with the interpreter of this process.

vocab-parallel-ce ascend --tp 8         the training job on the 8 cards of one machine
vocab-parallel-ce ascend --help         machines, variables, other jobs
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vocab_parallel_ce.launch.refusal import say_and_leave

SCRIPT = Path(__file__).with_name("run.sh")


def app(arguments: Sequence[str], prog_name: str) -> None:
    """Becomes the script; returns only by an exit."""
    bash = shutil.which("bash")
    if bash is None:
        say_and_leave("ascend", "bash is not found; install it, it runs the script that starts")
    os.environ.setdefault("PYTHON", sys.executable)
    sys.stdout.flush()
    os.execv(bash, [bash, str(SCRIPT), *arguments])
