"""Processes that need not import torch: forks of one process that has imported it.

An import of torch takes two seconds of a core, one of everything that a training run needs eight,
and tests start more than a hundred processes. What is tested is what they do after that.

    context()                                   for ``multiprocessing``: what ranks.py starts
    run_forked("-m", "package.module", "--option", ranks=2)      a program, on two ranks

Where torchrun, or an interpreter that starts, is what is tested, tests start those.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Nothing that starts a thread. What is not installed is left out.
PRELOADED = [
    "torch.distributed", "torch._dynamo", "pytest", "numba", "tokenizers", "matplotlib.pyplot",
    "tests.cases", "vocab_parallel_ce.api", "vocab_parallel_ce.launch.train.command",
]  # fmt: skip


def context() -> ForkServerContext:
    """Whose processes are forks; the first of them waits for the imports."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def take_over(environ: dict[str, str]) -> None:
    """In a fork: the environment of who started it, as far as it is not read by imports."""
    from torch._dynamo import config

    os.environ.clear()
    os.environ.update(environ)
    config.disable = environ.get("TORCHDYNAMO_DISABLE") == "1"  # read by an import, long ago


def _program(arguments: list[str], environ: dict[str, str], folder: str, said: list[str]) -> None:
    """In the fork: what ``python ARGUMENTS`` does."""
    import torch

    take_over(environ)
    os.chdir(folder)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    if arguments[0] == "-c":
        sys.argv, sys.path[:0] = arguments[:1] + arguments[2:], [folder]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv, sys.path[:0] = arguments[1:], [folder]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(arguments[0]).parent)]
        runpy.run_path(arguments[0], run_name="__main__")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets and a program reads."""
    here, everywhere = {"RANK": rank, "WORLD_SIZE": ranks}, {"MASTER_ADDR": "127.0.0.1"}
    local = {f"LOCAL_{name}": value for name, value in here.items()}
    return {k: str(v) for k, v in (here | local | everywhere | {"MASTER_PORT": port}).items()}


def run_forked(
    *arguments: str,
    ranks: int = 0,
    environ: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """A program on ``ranks`` ranks, as torchrun starts it: the first that fails ends the others.
    Without ``ranks`` one process, as Python starts it.

    Returns its status, and what all ranks said.
    """
    given = os.environ | {"OMP_NUM_THREADS": "1"} | (environ or {})
    port = _free_port()
    with tempfile.TemporaryDirectory() as scratch:
        said = [os.path.join(scratch, name) for name in ("stdout", "stderr")]
        for file in said:
            Path(file).touch()
        processes = [
            context().Process(
                target=_program,
                args=(list(arguments), given | variables, str(cwd or ROOT), said),
                daemon=True,
            )
            for variables in [_of_rank(rank, ranks, port) for rank in range(ranks)] or [{}]
        ]
        for process in processes:
            process.start()
        status = _wait_for(processes, timeout)
        texts = [Path(file).read_text() for file in said]
    if status is None:
        raise subprocess.TimeoutExpired(list(arguments), timeout, *texts)
    return subprocess.CompletedProcess(list(arguments), status, *texts)


def _wait_for(processes: list[ForkServerProcess], timeout: float) -> int | None:
    """The status of the first that fails, 0 if none does, None if one never ends. None is left."""
    deadline, running = time.monotonic() + timeout, list(processes)
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        ended = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in ended]
        failed = [process.exitcode for process in ended if process.exitcode]
        if failed:
            for process in running:
                process.terminate()
                process.join(10)
                process.kill()
            return failed[0]
    for process in running:
        process.kill()
    return None if running else 0
