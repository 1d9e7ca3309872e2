"""Jobs as their users run them: in this process, and in processes of their own under torchrun."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vocab_parallel_ce.launch import jobs

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(job: str, *options: object) -> Ended:
    """``vocab-parallel-ce JOB OPTIONS`` in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            jobs.run(job, [str(option) for option in options])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Ended(status, out.getvalue(), err.getvalue())


def one_line(ended: Ended, job: str, status: int = 2) -> str:
    """What the job said on standard error, which must be one line of the one style."""
    assert ended.exit_code == status, ended.output
    assert "Traceback" not in ended.output
    (line,) = ended.stderr.splitlines()
    start = f"vocab-parallel-ce {job}: "
    assert line.startswith(start)
    return line.removeprefix(start)


def launch(
    *arguments: str,
    ranks: int = 0,
    restarts: int = 0,
    environ: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """A program in processes of its own, under torchrun where ``ranks`` are asked for.

    Twenty seconds of a core for two ranks: ``run_forked`` where torchrun adds nothing to the test.
    """
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    launcher += ["--max-restarts", str(restarts)]
    return subprocess.run(
        [sys.executable, *(launcher if ranks else []), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environ or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
