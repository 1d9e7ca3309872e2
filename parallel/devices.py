"""Which device this process takes. Why it cannot take one is a line that names the way out."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE
from vocab_parallel_ce.parallel.environment import environment_int
from vocab_parallel_ce.torch_import import AUTOLOAD_VARIABLE, why_backend_failed
from vocab_parallel_ce.warning import warn

VISIBLE_CARDS_VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"


def npu_problem() -> str | None:
    """Why no NPU can be used here and what to do about it, in one line; None where one can."""
    if importlib.util.find_spec("torch_npu") is None:
        version = torch.__version__.split("+")[0]
        return (
            "torch_npu is not installed; install CANN and the torch-npu that belongs to "
            f"torch {version}, or use --device cpu"
        )
    problem = _torch_npu_import_problem()
    if problem is not None:
        return problem
    if torch.get_device_module("npu").is_available():
        return None
    if VISIBLE_CARDS_VARIABLE in os.environ:
        return (
            f"torch_npu sees no card under {VISIBLE_CARDS_VARIABLE}="
            f"{os.environ[VISIBLE_CARDS_VARIABLE]!r}; name cards that npu-smi info lists, or unset "
            "it"
        )
    return (
        "torch_npu sees no card; if npu-smi info lists none either, the driver is missing, or "
        "this container was started without the cards (/dev/davinci*)"
    )


@functools.cache
def _torch_npu_import_problem() -> str | None:
    """Tried once: a second import of a package that broke off halfway fails in other ways."""
    autoload = os.environ.get(AUTOLOAD_VARIABLE)
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # whatever a package made for another torch may raise
        return why_backend_failed("torch_npu", error)
    finally:  # its import changes the variable and does not restore it when it fails
        if autoload is None:
            os.environ.pop(AUTOLOAD_VARIABLE, None)
        else:
            os.environ[AUTOLOAD_VARIABLE] = autoload
    return None


def npu_is_available() -> bool:
    """True when torch_npu is installed and sees a device."""
    return npu_problem() is None


def default_device_type() -> str:
    """What this machine has: npu, else cuda, else cpu."""
    if npu_is_available():
        return "npu"
    if torch.cuda.is_available():
        return "cuda"
    _warn_that_no_npu_is_used()
    return "cpu"


@functools.cache
def _warn_that_no_npu_is_used() -> None:
    """Once: who installed torch_npu did not mean to run on the CPU."""
    if importlib.util.find_spec("torch_npu") is not None:
        warn(f"running on the CPU: {npu_problem()}")


def device_problem(kind: str) -> str | None:
    """Why this process cannot use a device of this kind, and the way out; None where it can."""
    if kind == "cpu":
        return None
    if kind == "npu":
        problem = npu_problem()
    else:
        problem = None if torch.cuda.is_available() else "this machine shows none; use --device cpu"
    return problem or _crowding(kind, int(torch.get_device_module(kind).device_count()))


def _crowding(kind: str, count: int) -> str | None:
    """More processes than devices: told on every rank, not only on those that have no device."""
    local_rank = environment_int("LOCAL_RANK", 0)
    processes = environment_int("LOCAL_WORLD_SIZE", 1)
    if processes > count:
        return (
            f"LOCAL_WORLD_SIZE={processes} processes were started on this machine, which shows "
            f"{count} {kind} devices; start at most {count} (torchrun --nproc-per-node {count})"
        )
    if local_rank >= count:
        return (
            f"LOCAL_RANK={local_rank} has no {kind} device: this machine shows {count}; "
            f"start at most {count} processes here (torchrun --nproc-per-node {count})"
        )
    return None


def local_device(device_type: str | None = None) -> torch.device:
    """The device of this process: number LOCAL_RANK of its kind, made current."""
    kind = device_type or default_device_type()
    if kind not in BACKEND_OF_DEVICE:
        raise ValueError(f"device={kind!r} is not one of {', '.join(BACKEND_OF_DEVICE)}")
    problem = device_problem(kind)
    if problem is not None:
        raise ValueError(f"device={kind!r}, but {problem}")
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, environment_int("LOCAL_RANK", 0))
    torch.get_device_module(kind).set_device(device)
    return device
