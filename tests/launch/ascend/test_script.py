"""launch/ascend/run.sh as it is typed, with --device cpu: one machine, and two that are this one.

What the script asks before it starts torchrun (launch/ascend/meet.py) is tried with real sockets.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vocab_parallel_ce.launch.ascend import meet as meet_module
from vocab_parallel_ce.launch.ascend.meet import Machine, Place, ProblemError, check_cards, meet
from vocab_parallel_ce.launch.train.progress import read_metrics

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "launch" / "ascend" / "run.sh"
STEPS = 4
VARIABLES = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WAIT_SECONDS")


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _start(folder: Path, *arguments: object, **variables: object) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    given = {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [str(SCRIPT), *map(str, arguments)],
        env=clean | {"PYTHON": sys.executable} | given,
        cwd=folder,  # no path may depend on where it is started
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        said, errors = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said, errors


def _run(folder: Path, *arguments: object, **variables: object) -> tuple[int, str, str]:
    return _end(_start(folder, *arguments, **variables))


def _tiny(folder: Path) -> list[str]:
    """A training run of seconds, on a text of its own."""
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text(Path(textwrap.__file__).read_text())
    fixed = (
        f"--device cpu --vocab-size 513 --context 32 --width 32 --layers 1 --heads 2 --batch 4 "
        f"--lr 3e-3 --warmup 2 --log-every 1 --timeout 60 --steps {STEPS} --checkpoint-every 2 "
        "--text text --cache cache --dropout 0.1"
    )
    return fixed.split()


def _losses(out: Path) -> list[float]:
    return [line.loss for line in read_metrics(out / "metrics.jsonl")]


def _two_machines(folder: Path, *extra: str, restarts: int = 0) -> list[tuple[int, str, str]]:
    machines = [
        _start(
            folder, *_tiny(folder), *extra,
            NPROC=1, NNODES=2, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            MAX_RESTARTS=restarts, WAIT_SECONDS=60,
        )
        for port in [_free_port()]
        for rank in (1, 0)
    ]  # fmt: skip
    second, first = [_end(machine) for machine in machines]
    return [first, second]


@pytest.mark.full
def test_one_machine_and_two_train_alike(tmp_path: Path) -> None:
    code, said, errors = _run(tmp_path, *_tiny(tmp_path), "--out", "one", NPROC=2)
    assert code == 0, errors
    assert "Check passed." in said
    assert "tp 2, dp 1" in said
    assert len(_losses(tmp_path / "one")) == STEPS

    (code, said, errors), (other_code, other_said, other_errors) = _two_machines(
        tmp_path, "--out", "two"
    )
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "Check passed." in said  # rank 0 is on the machine with NODE_RANK=0
    assert other_said == ""
    assert _losses(tmp_path / "two") == _losses(tmp_path / "one")


@pytest.mark.full
def test_two_machines_survive_the_loss_of_a_rank(tmp_path: Path) -> None:
    ended = _two_machines(tmp_path, "--out", "cut", "--die-at-step", "4", restarts=1)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "Continuing cut after step 2." in ended[0][1]
    assert len(_losses(tmp_path / "cut")) == STEPS


ECHO = """
import json, os, sys
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME",
         "INF_NAN_MODE_ENABLE")
print(json.dumps([sys.argv[1:], [os.environ.get(name) for name in names]]))
"""


def test_arguments_and_variables_reach_the_module(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    arguments = ["--device=cpu", "--out", "a b", "", "*"]
    code, said, errors = _run(
        tmp_path, *arguments,
        MODULE="echo", PYTHONPATH=tmp_path, NPROC=1, IFNAME="eth7", GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS=3,
    )  # fmt: skip
    assert code == 0, errors
    assert json.loads(said) == [arguments, ["1", "3", "lo", "=eth7", None]]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NPROC": "two"}, "NPROC='two' must be a whole number from 1 on"),
        ({"NPROC": "0"}, "NPROC='0' must be a whole number from 1 on"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1, but NNODES is 1; set NNODES to the number of machines"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES=2 needs NODE_RANK: 0 on the first machine"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR: the address of"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK='2' must be a whole number from 0 to 1",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "a"},
            "NODE_RANK='-1' must be a whole number from 0 to 1",
        ),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' must be a whole number from 1 to 65535"),
        ({"WAIT_SECONDS": "x"}, "WAIT_SECONDS='x' must be a whole number from 1 on"),
    ],
)
def test_bad_variables_are_explained(
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"NPROC": "2", "NNODES": "1", "MASTER_PORT": "29500", "WAIT_SECONDS": "5"} | variables
    for name in VARIABLES:
        monkeypatch.setenv(name, given.get(name, ""))
    with pytest.raises(SystemExit) as stopped:
        meet_module.main("cpu", "train")
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"vocab-parallel-ce ascend: {message}")


def test_the_script_ends_in_one_line(tmp_path: Path) -> None:
    for variables, arguments, message in (
        ({"NNODES": "2"}, ["--device", "cpu"], "NNODES=2 needs NODE_RANK"),
        ({}, ["--device=tpu"], "--device 'tpu' is not one of npu, cuda, cpu"),
        ({"PYTHON": "/not/there"}, [], "PYTHON=/not/there is not found"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "WAIT_SECONDS": "1",
             "MASTER_PORT": str(_free_port())},
            ["--device", "cpu"],
            "machine 1 found no machine with NODE_RANK=0 at 127.0.0.1:",
        ),
    ):  # fmt: skip
        code, said, errors = _run(tmp_path, *arguments, **variables)
        assert (code, said) == (2, "")
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith(f"vocab-parallel-ce ascend: {message}")


def test_help_needs_nothing_and_starts_nothing(tmp_path: Path) -> None:
    for arguments in (["--help"], ["--tp", "8", "-h"]):
        code, said, errors = _run(tmp_path, *arguments, PYTHON="/not/there", PATH="/usr/bin:/bin")
        assert (code, errors) == (0, "")
        assert said.startswith("Starts the training job")
        for name in (*VARIABLES, "MAX_RESTARTS", "JOB", "PYTHON", "vocab-parallel-ce ascend"):
            assert name in said
        assert max(map(len, said.splitlines())) <= 100


@pytest.mark.full
def test_a_job_is_named_as_the_console_entry_names_it(tmp_path: Path) -> None:
    code, said, errors = _run(tmp_path, "--device", "cpu", "--vocab", "0", JOB="train", NPROC=1)
    assert code != 0
    assert said == ""
    assert "vocab-parallel-ce train: --vocab 0 must be at least 1\n" in errors


def test_a_job_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    code, said, errors = _run(tmp_path, "--device", "cpu", JOB="zzz", NPROC=2)
    assert (code, said) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("vocab-parallel-ce ascend: JOB=zzz is not one of doctor, train, ")


def test_a_job_in_a_folder_of_another_is_found(tmp_path: Path) -> None:
    """call-cost lies in bench: its name is no name of a module."""
    code, _, errors = _run(
        tmp_path, "--rounds", "1", "--no-first-calls", "--device", "cpu", JOB="call-cost", NPROC=1
    )
    assert "No module named" not in errors
    assert "--device" in errors  # the job itself was asked, and has no such option
    assert code != 0


def test_the_script_of_the_package_is_started(tmp_path: Path) -> None:
    """Through the link in the package, whose folder must not become a path of Python's."""
    process = subprocess.run(
        [sys.executable, "-m", "vocab_parallel_ce.launch", "ascend", "--device", "cpu"],
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "MODULE": "echo", "NPROC": "1", "PYTHONSAFEPATH": ""},
        cwd=_echo_of_the_path(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    python, path = json.loads(process.stdout)
    assert python == sys.executable
    assert str(REPOSITORY / "vocab_parallel_ce") not in path


def _echo_of_the_path(folder: Path) -> Path:
    (folder / "echo.py").write_text(
        "import json, sys; print(json.dumps([sys.executable, sys.path]))\n"
    )
    return folder


def test_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_cards("cuda", 4)
    with pytest.raises(ProblemError, match=r"NPROC=8, but this machine shows 4 cuda .* NPROC=4"):
        check_cards("cuda", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProblemError, match="--device cuda: this machine shows none"):
        check_cards("cuda", 1)


@pytest.mark.parametrize(
    ("arguments", "variables", "sourced"),
    [
        (["--device", "npu"], {}, True),
        ([], {}, True),  # npu is what it is for
        (["--device", "npu"], {"ASCEND_HOME_PATH": "/cann"}, False),
        (["--device", "cpu"], {}, False),
    ],
)
def test_cann_is_sourced_once_and_for_cards_only(
    arguments: list[str], variables: dict[str, str], sourced: bool, tmp_path: Path
) -> None:
    set_env = tmp_path / "set_env.sh"  # the real one reads variables that may be unset
    set_env.write_text('echo "sourced$NOT_SET_ANYWHERE"; export ASCEND_HOME_PATH=/x\n')
    # A bad NPROC ends it before any card is asked for.
    code, said, _ = _run(tmp_path, *arguments, SET_ENV=set_env, NPROC="none", **variables)
    assert code == 2
    assert said == ("sourced\n" if sourced else "")


# --- machines that meet, in threads ------------------------------------------------------------


def _all_meet(machines: list[Machine], seconds: float = 20.0) -> list[str]:
    """What each one is told; empty where it may start."""
    place = Place("127.0.0.1", _free_port(), seconds)

    def told(machine: Machine) -> str:
        try:
            meet(machine, place)
        except ProblemError as problem:
            return str(problem)
        return ""

    with ThreadPoolExecutor(len(machines)) as threads:
        return list(threads.map(told, machines))


def test_machines_that_agree_start() -> None:
    assert _all_meet([Machine(8, 3, rank) for rank in (2, 0, 1)]) == [""] * 3


def test_a_machine_alone_waits_for_nobody() -> None:
    meet(Machine(8, 1, 0), Place("", 1, 0.0))


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        (
            [Machine(8, 3, 0), Machine(8, 3, 1), Machine(8, 3, 1)],
            "two machines have NODE_RANK=1; number them from 0 on",
        ),
        (
            [Machine(8, 2, 0), Machine(4, 2, 1)],
            "NPROC is 8 on machine 0 and 4 on machine 1; set it alike on all",
        ),
        (
            [Machine(8, 2, 0), Machine(8, 3, 2)],
            "NNODES is 2 on machine 0 and 3 on machine 2; set it alike on all",
        ),
    ],
)
def test_machines_that_disagree_are_all_told(machines: list[Machine], message: str) -> None:
    assert _all_meet(machines) == [message] * len(machines)


def test_machines_that_do_not_come_are_named() -> None:
    first, second = _all_meet([Machine(8, 4, 0), Machine(8, 4, 2)], seconds=1.5)
    assert "of 4 machines, NODE_RANK 1, 3 did not come to 127.0.0.1:" in first
    assert "within 2 s" in first
    assert second in (first, "") or "found no machine with NODE_RANK=0" in second


def test_two_machines_that_think_they_are_the_first() -> None:
    said = sorted(_all_meet([Machine(8, 2, 0), Machine(8, 2, 0)], seconds=1.5))
    assert said[0].startswith("of 2 machines, NODE_RANK 1 did not come")
    assert "of this machine cannot be used (Address already in use)" in said[1]


def _beside(place: Place, act: Callable[[socket.socket], None]) -> None:
    """Visits machine 0 as soon as it listens."""
    for _ in range(100):
        try:
            with socket.create_connection((place.address, place.port), 1.0) as connection:
                act(connection)
                return
        except ConnectionRefusedError:
            time.sleep(0.02)


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"", b'{"nproc": 8}\n', b"[1]\n", b"\xff" * 8192]
)
def test_strangers_on_the_port_are_let_go(words: bytes) -> None:
    place = Place("127.0.0.1", _free_port(), 20.0)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, Machine(8, 2, 0), place)
        _beside(place, lambda connection: connection.sendall(words))
        meet(Machine(8, 2, 1), place)
        first.result()


def test_a_machine_that_was_ended_may_come_again() -> None:
    place = Place("127.0.0.1", _free_port(), 20.0)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(meet, Machine(8, 3, 0), place)
        line = json.dumps({"nproc": 8, "nnodes": 3, "node_rank": 1}).encode() + b"\n"
        _beside(place, lambda connection: connection.sendall(line))  # and closes
        third = threading.Thread(target=meet, args=(Machine(8, 3, 2), place))
        third.start()
        meet(Machine(8, 3, 1), place)
        third.join()
        first.result()


def test_something_else_that_listens_there_is_not_machine_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])

        def answer() -> None:
            connection = server.accept()[0]
            with connection:
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ProblemError, match=r"found no machine .* \(.+\); see MASTER_ADDR"):
            meet(Machine(8, 2, 1), Place("127.0.0.1", port, 1.0))
        thread.join()
