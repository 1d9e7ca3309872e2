"""What run.sh asks before it starts torchrun: are the cards here, and all machines?

Without this a missing machine, a blocked port or a NODE_RANK given twice shows as a hang, or as
tracebacks of torchrun's store. Here each machine gets one line, and status 2. The machines meet
where torchrun's store will listen afterwards, so the port is known to be open.

Machine 0 listens; the others connect, say in a line of JSON who they are, and wait for the answer,
another line: what is wrong, or nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from vocab_parallel_ce.launch import options
from vocab_parallel_ce.launch.jobs import JOBS
from vocab_parallel_ce.launch.refusal import say_and_leave
from vocab_parallel_ce.torch_import import torch_problem

LONGEST_LINE = 4096


class ProblemError(Exception):
    """Why the run cannot start, in one line that the user can act on."""


@dataclass(frozen=True)
class Machine:
    """What the variables of the same names, in capitals, say of this machine."""

    nproc: int
    nnodes: int
    node_rank: int


@dataclass(frozen=True)
class Place:
    """Where machines meet, and until when they wait."""

    address: str
    port: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def read_variables() -> tuple[Machine, Place]:
    nproc, nnodes = _integer("NPROC", 1), _integer("NNODES", 1)
    if nnodes > 1:
        for name, meaning in (
            ("NODE_RANK", f"0 on the first machine, up to {nnodes - 1}"),
            ("MASTER_ADDR", "the address of the first machine, the same on all"),
        ):
            if not os.environ.get(name):
                raise ProblemError(f"NNODES={nnodes} needs {name}: {meaning}")
    elif os.environ.get("NODE_RANK", "") not in ("", "0"):
        raise ProblemError(
            f"NODE_RANK={os.environ['NODE_RANK']}, but NNODES is 1; set NNODES to the number of "
            "machines"
        )
    machine = Machine(nproc, nnodes, _integer("NODE_RANK", 0, nnodes - 1) if nnodes > 1 else 0)
    place = Place(
        os.environ.get("MASTER_ADDR", ""),
        _integer("MASTER_PORT", 1, 65535),
        _integer("WAIT_SECONDS", 1),
    )
    return machine, place


def _integer(name: str, least: int, most: int | None = None) -> int:
    text = os.environ.get(name, "")
    value = int(text) if text.isascii() and text.isdigit() else None
    if value is None or value < least or (most is not None and value > most):
        upper = "on" if most is None else f"to {most}"
        raise ProblemError(f"{name}={text!r} must be a whole number from {least} {upper}")
    return value


def check_cards(device: str, nproc: int) -> None:
    try:
        options.device(device)
    except ValueError as error:
        raise ProblemError(f"--device {error}") from None
    problem = torch_problem()  # torchrun is part of it
    if problem is not None:
        raise ProblemError(problem)
    if device == "cpu":
        return

    import torch

    from vocab_parallel_ce.parallel.devices import npu_problem

    if device == "npu":
        problem = npu_problem()
    else:
        problem = None if torch.cuda.is_available() else "this machine shows none"
    if problem is not None:
        raise ProblemError(f"--device {device}: {problem}")
    count = int(torch.get_device_module(device).device_count())
    if nproc > count:
        raise ProblemError(
            f"NPROC={nproc}, but this machine shows {count} {device} devices; set NPROC={count}"
        )


def meet(machine: Machine, place: Place) -> None:
    """Returns when all machines are here and agree; raises ProblemError on each of them."""
    if machine.nnodes > 1:
        (_receive_all if machine.node_rank == 0 else _report)(machine, place)


def _receive_all(first: Machine, place: Place) -> None:
    deadline = time.monotonic() + place.seconds
    here: dict[int, socket.socket] = {}
    problem = ""
    with ExitStack() as closing:
        server = closing.enter_context(_listen(place.port))
        waiting: list[socket.socket] = []
        while not problem and len(here) < first.nnodes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = closing.enter_context(server.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, first.nnodes)) - set(here))
                problem = (
                    f"of {first.nnodes} machines, NODE_RANK {', '.join(map(str, missing))} did "
                    f"not come to {place} within {place.seconds:.0f} s; see what was started "
                    "there, with which NODE_RANK, and whether a firewall closes the port"
                )
                break
            other = _who_is_it(connection)
            if other is not None:
                waiting.append(connection)
                here = {rank: c for rank, c in here.items() if not _has_left(c)}
                problem = _conflict(first, other, here)
                here[other.node_rank] = connection
        for connection in waiting:
            _send_line(connection, {"problem": problem})
    if problem:
        raise ProblemError(problem)


def _conflict(first: Machine, other: Machine, here: dict[int, socket.socket]) -> str:
    for name in ("nnodes", "nproc"):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            return (
                f"{name.upper()} is {mine} on machine 0 and {theirs} on machine "
                f"{other.node_rank}; set it alike on all"
            )
    if other.node_rank == 0 or other.node_rank in here:
        return f"two machines have NODE_RANK={other.node_rank}; number them from 0 on"
    return ""


def _has_left(connection: socket.socket) -> bool:
    """Whether the other side was ended; then the same machine may come again."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ProblemError(
            f"port {port} of this machine cannot be used ({reason}): another "
            "run with NODE_RANK=0 may hold it; choose another MASTER_PORT, the same on all machines"
        ) from None


def _report(machine: Machine, place: Place) -> None:
    deadline = time.monotonic() + place.seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            # Short attempts: one begun before machine 0 listens may be lost on the way.
            with socket.create_connection(
                (place.address, place.port), min(5.0, left)
            ) as connection:
                connection.settimeout(left)
                _send_line(connection, asdict(machine))
                answer = _read_line(connection)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        else:
            if isinstance(answer.get("problem"), str):
                if answer["problem"]:
                    raise ProblemError(answer["problem"])
                return
            reason = "something else listens there"
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    raise ProblemError(
        f"machine {machine.node_rank} found no machine with NODE_RANK=0 at {place} within "
        f"{place.seconds:.0f} s ({reason}); see MASTER_ADDR and MASTER_PORT, what was started "
        "there, and whether a firewall closes the port"
    )


def _who_is_it(connection: socket.socket) -> Machine | None:
    """None for a visitor that is no machine of this run, such as a port scanner."""
    try:
        connection.settimeout(5.0)
        said = _read_line(connection)
        return Machine(**{name: int(str(said[name])) for name in Machine.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _send_line(connection: socket.socket, words: dict[str, object]) -> None:
    try:
        connection.sendall(json.dumps(words).encode() + b"\n")
    except OSError:
        return  # who went away meanwhile tries again, or has said why


def _read_line(connection: socket.socket) -> dict[str, object]:
    """Empty if it is no line of JSON."""
    with connection.makefile("rb") as stream:
        try:
            words = json.loads(stream.readline(LONGEST_LINE))
        except ValueError:
            return {}
    return words if isinstance(words, dict) else {}


def check_job(name: str) -> None:
    """Before torchrun starts a process a card, each of which would say the same."""
    known = [job for job in JOBS if job != "ascend"]
    if name not in known:
        raise ProblemError(f"JOB={name} is not one of {', '.join(known)}")


def main(device: str, job: str) -> None:
    try:
        check_job(job)
        machine, place = read_variables()
        check_cards(device, machine.nproc)
        meet(machine, place)
    except ProblemError as problem:
        say_and_leave("ascend", str(problem))


if __name__ == "__main__":
    main(*sys.argv[1:])
