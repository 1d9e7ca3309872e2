"""What this process finds: versions, CANN, driver, devices, backend, engines, variables.

Finding out never raises and never hangs: what is not there is said in words, tools and devices get
a time limit. The only verdict is ``problem``, why the device in question cannot be used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE
from vocab_parallel_ce.engines import engine_name, engine_of_device, select, why_not
from vocab_parallel_ce.engines.npu import choice
from vocab_parallel_ce.engines.npu.linear import choice as linear_choice
from vocab_parallel_ce.launch.doctor.findings import Choice, Device, Environment
from vocab_parallel_ce.launch.doctor.software import NOT_FOUND, without_torch
from vocab_parallel_ce.launch.doctor.variables import judge
from vocab_parallel_ce.launch.doctor.worker import LateError, Worker, in_one_line
from vocab_parallel_ce.linear.wide import makes_wide_logits
from vocab_parallel_ce.parallel.devices import default_device_type, local_device, npu_problem
from vocab_parallel_ce.tensor_checks import DEVICES_WITHOUT_FP64

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
DEVICE_SECONDS = 60.0

T = TypeVar("T")


def collect(asked: str | None, look_around: bool) -> Environment:
    """Everything about this process; ``asked`` is the device that the user named, if any.

    ``look_around``: this process will do nothing else, and may touch every card.
    """
    notes: list[str] = []
    npu = _limited(lambda: npu_problem() or "", notes, "torch_npu does not answer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no NPU is used is one of the notes
        kind = asked or _limited(default_device_type, notes, "cpu")
    found = without_torch(kind, npu)
    if asked is None and npu and "torch_npu" in found.versions:
        notes.append(f"no NPU is used: {npu}")
    problem = _problem(kind)
    if kind == "cpu":
        devices = [Device(found.processor, *_host_memory())]
    else:
        devices = [] if problem else _limited(lambda: _cards(kind, look_around), notes, [])
    visible = (
        {} if problem or kind == "cpu" else {kind: torch.get_device_module(kind).device_count()}
    )
    engines: dict[str, Choice] = {}
    if not problem:
        engines = _limited(lambda: _engines(kind), notes, engines)
    if not problem and all(choice.engine == "none" for choice in engines.values()):
        why = next((choice.why for choice in engines.values()), notes[-1] if notes else "")
        problem = f"device={kind!r} does not work: {why}"
    torch_version = f"{torch.__version__} (CUDA: {torch.version.cuda or 'none'})"
    return replace(
        found,
        versions=found.versions | {"torch": torch_version},
        problem=problem,
        notes=notes,
        devices=devices,
        backend=BACKEND_OF_DEVICE.get(kind, NOT_FOUND),
        engines=engines,
        variables=judge(os.environ, found.kinds, visible),
    )


def _limited(call: Callable[[], T], notes: list[str], otherwise: T) -> T:
    """What a device answers; ``otherwise``, and a note, if it fails or does not come back."""
    try:
        return Worker().call(call, DEVICE_SECONDS)
    except Exception as error:
        said = str(error) if isinstance(error, LateError) else in_one_line(error)
        notes.append(f"asking the device: {said}")
        return otherwise


# --- devices ----------------------------------------------------------------------------------


def _problem(kind: str) -> str:
    """Why devices of this kind cannot be used by the processes that were started here."""
    try:
        Worker().call(lambda: local_device(kind), DEVICE_SECONDS)
    except LateError as late:
        return f"device={kind!r} does not answer: making it current {late}"
    except Exception as error:
        return str(error) if isinstance(error, ValueError) else in_one_line(error)
    return ""


def _cards(kind: str, look_around: bool) -> list[Device]:
    """Every card that can be seen; free memory of this process's own, or of all of them.

    A look at other cards takes memory there, and with torch_npu a backward that follows aborts
    the process ("Uninitialized default NPU stream"): it is for a process that does nothing else.
    """
    module: Any = torch.get_device_module(kind)
    own = local_device(kind).index
    cards = []
    for index in range(module.device_count()):
        if look_around or index == own:
            free, total = module.mem_get_info(index)
        else:
            free, total = None, module.get_device_properties(index).total_memory
        cards.append(Device(module.get_device_name(index), total, free))
    return cards


def _host_memory() -> tuple[int | None, int | None]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


# --- engines ----------------------------------------------------------------------------------


def _engines(kind: str) -> dict[str, Choice]:
    device = local_device(kind)
    return {name: _choice(device, dtype) for name, dtype in DTYPES.items()}


def _choice(device: torch.device, dtype: torch.dtype) -> Choice:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fallback's reason is reported below
            name = engine_name(select("auto", torch.zeros(1, 8, dtype=dtype, device=device)))
    except Exception as error:
        return Choice("none", in_one_line(error))
    if dtype == torch.float64 and device.type in DEVICES_WITHOUT_FP64:
        return Choice("none", f"fp64 is refused: {device.type} devices do not compute in it")
    why = f"made for {device.type} tensors"
    if name == "npu":
        why = f"way {choice.told(dtype)}; the fused head by {linear_choice.told(dtype)}"
    if name == "eager":
        why = _why_eager(device.type, dtype)
    if makes_wide_logits(device.type, dtype):
        why += "; the fused head's logits are fp32"
    return Choice(name, why)


def _why_eager(kind: str, dtype: torch.dtype) -> str:
    reason = why_not(kind)
    if reason is not None:
        return f"plain torch, slower: {reason}"
    own = engine_of_device(kind)
    return f"plain torch: the {own} engine does not serve {str(dtype).removeprefix('torch.')}"
