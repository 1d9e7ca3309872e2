"""Runs a command where torch_npu finds its libraries: python -m tests.npu_sim COMMAND ..."""

from __future__ import annotations

import os
import sys

from .libraries import CannotBuildError, environment


def main(command: list[str]) -> None:
    if not command:
        sys.exit("usage: python -m tests.npu_sim COMMAND ...")
    try:
        variables = environment()
    except CannotBuildError as problem:
        sys.exit(f"tests.npu_sim: {problem}")
    try:
        os.execvpe(command[0], command, variables)
    except OSError as problem:
        sys.exit(f"tests.npu_sim: cannot run {command[0]!r}: {problem.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
