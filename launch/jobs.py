"""The jobs by name, and what starts one: ``vocab-parallel-ce JOB`` and ``python -m ...launch.JOB``.

    vocab-parallel-ce doctor --selftest
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch train --tp 2
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch.train --tp 2

A job whose packages are not installed ends in one line that says which extra brings them. Imports
the standard library alone, so that this line can be said, and that the doctor starts anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import vocab_parallel_ce
from vocab_parallel_ce.launch.refusal import PROGRAM, say_and_leave
from vocab_parallel_ce.torch_import import torch_problem

EXTRA = "pip install 'vocab_parallel_ce[launch]'"
_SHELL = ("typer", "rich")


@dataclass(frozen=True)
class Job:
    summary: str
    module: str
    """holds ``app``, which is called with arguments and prog_name"""
    packages: tuple[str, ...] = _SHELL
    """of the extra"""
    torch: bool = True


_LAUNCH = "vocab_parallel_ce.launch"
JOBS = {
    "doctor": Job(
        "what is here and what is set badly; is the loss right here?",
        f"{_LAUNCH}.doctor.command",
        packages=(),
        torch=False,
    ),
    "train": Job(
        "train a small GPT whose vocabulary is split over the ranks",
        f"{_LAUNCH}.train.command",
        (*_SHELL, "tokenizers", "matplotlib"),
    ),
    "megatron-gpt": Job(
        "train megatron-core's GPTModel with this loss or with Megatron's",
        f"{_LAUNCH}.megatron_gpt.command",
        (*_SHELL, "tokenizers", "matplotlib"),
    ),
    "bench": Job(
        "time and memory of the loss beside what one would otherwise use",
        f"{_LAUNCH}.bench.command",
        (*_SHELL, "matplotlib"),
    ),
    "curve": Job(
        "the time of a loss against rows and columns, as a picture",
        f"{_LAUNCH}.bench.curve.command",
        (*_SHELL, "matplotlib"),
    ),
    "call-cost": Job(
        "fixed cost of a call, and of the first call of a process",
        f"{_LAUNCH}.bench.call_cost.command",
    ),
    "fused-head": Job(
        "head and loss together, beside what one would otherwise use",
        f"{_LAUNCH}.bench.fused_head.command",
    ),
    "plan": Job(
        "what the loss will cost on a machine, by a model",
        f"{_LAUNCH}.plan.command",
    ),
    "ascend": Job(
        "start a job on all cards of one Ascend machine or of several",
        f"{_LAUNCH}.ascend.command",
        packages=(),
        torch=False,
    ),
}


def missing(job: Job) -> str:
    """Why it cannot start, in one line; empty where it can."""
    problem = torch_problem() if job.torch else None
    if problem is not None:
        return problem
    absent = [name for name in job.packages if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not installed; {EXTRA}"


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Starts a job; without arguments, with those of this process. Ends the process."""
    job = JOBS[name]
    problem = missing(job)
    if problem:
        say_and_leave(name, problem)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        importlib.import_module(job.module).app(given, prog_name=f"{PROGRAM} {name}")
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def main() -> None:
    """The console entry."""
    name, arguments = (sys.argv[1].replace("_", "-"), sys.argv[2:]) if sys.argv[1:] else ("", [])
    if name in JOBS:
        run(name, arguments)
    elif name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(f"{PROGRAM} {vocab_parallel_ce.__version__}")
    elif not name:
        say_and_leave("", f"name a job: {', '.join(JOBS)}; {PROGRAM} --help tells what they do")
    else:
        near = difflib.get_close_matches(name, JOBS, 1)
        way_out = f"did you mean {near[0]}?" if near else f"the jobs are {', '.join(JOBS)}"
        what = "option" if name.startswith("-") else "job"
        say_and_leave("", f"there is no {what} {sys.argv[1]!r}; {way_out}")


def usage() -> str:
    lines = [f"Usage: {PROGRAM} JOB [OPTIONS]", ""]
    lines += [f"  {name:<13} {job.summary}" for name, job in JOBS.items()]
    lines += ["", f"Options of a job:  {PROGRAM} JOB --help"]
    lines += [f"The version:       {PROGRAM} --version"]
    lines += [f"On 2 ranks:        torchrun --nproc-per-node 2 -m {_LAUNCH} JOB"]
    return "\n".join(lines)
