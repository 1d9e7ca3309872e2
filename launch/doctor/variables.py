"""The environment variables that decide how a run goes, and a word on those that are set badly.

One table: name, the devices it matters to, what holds when it is unset, and a rule. A rule reads
the value, and where it must the rest of the environment, and returns what is wrong with it in one
sentence, or nothing. No device is asked here, and torch is not needed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vocab_parallel_ce.switches import (
    CHECK_VARIABLE,
    LINEAR_VARIABLE,
    LINEAR_WAYS,
    SCRATCH_MIB,
    SCRATCH_VARIABLE,
    WAY_VARIABLE,
    WAYS,
    check_is_on,
)


@dataclass(frozen=True)
class Setting:
    """What a rule may look at beside the value."""

    environ: Mapping[str, str]
    visible: Mapping[str, int]
    """devices of a kind that torch sees; a kind that could not be asked is missing"""


Rule = Callable[[str, Setting], str]


@dataclass(frozen=True)
class Variable:
    name: str
    kinds: tuple[str, ...]
    """devices it matters to; none: all of them"""
    default: str
    """in words: what holds while it is unset"""
    rule: Rule


@dataclass(frozen=True)
class Judged:
    name: str
    value: str | None
    default: str
    verdict: Literal["ok", "warning"]
    word: str


# --- rules ------------------------------------------------------------------------------------


def anything(value: str, setting: Setting) -> str:
    return ""


def whole_number(low: int, high: int | None = None, unit: str = "") -> Rule:
    def rule(value: str, setting: Setting) -> str:
        wanted = f"at least {low}" if high is None else f"in {low}..{high}"
        number = _number(value)
        fits = number is not None and number >= low and (high is None or number <= high)
        return "" if fits else f"must be a whole number{unit} {wanted}"

    return rule


def one_of(*words: str) -> Rule:
    def rule(value: str, setting: Setting) -> str:
        return "" if value.lower() in words else f"must be one of {', '.join(words)}"

    return rule


def flagged(bad: str, word: str, among: tuple[str, ...] = ("0", "1")) -> Rule:
    """One of a few numbers, of which ``bad`` deserves ``word``."""

    def rule(value: str, setting: Setting) -> str:
        return word if value.strip() == bad else one_of(*among)(value, setting)

    return rule


def both(*rules: Rule) -> Rule:
    """The first complaint of several rules."""

    def rule(value: str, setting: Setting) -> str:
        return next(filter(None, (each(value, setting) for each in rules)), "")

    return rule


def _number(value: str) -> int | None:
    return int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else None


def _exec_timeout(value: str, setting: Setting) -> str:
    if _number(value) == 0:
        return "0 lets a rank wait for a missing one without end"
    return whole_number(1, unit=" of seconds")(value, setting)


def _visible_devices(kind: str) -> Rule:
    def rule(value: str, setting: Setting) -> str:
        names = [name.strip() for name in value.split(",")]
        if not any(names) or names == ["-1"]:
            return f"names no card, so none is visible; unset it, or name {kind} cards by number"
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            return f"names {', '.join(repeated)} more than once; name every card once"
        # CUDA also takes names such as GPU-8932f937; Ascend takes numbers only.
        if kind == "npu" and not all(name.isdecimal() for name in names):
            return "must be numbers of cards, separated by commas"
        seen = setting.visible.get(kind)
        if seen is not None and seen < len(names):
            return f"names {len(names)} cards, but {seen} can be seen: some do not exist here"
        return ""

    return rule


def _whitelist(value: str, setting: Setting) -> str:
    if value.strip() == "0" and not setting.environ.get("HCCL_WHITELIST_FILE"):
        return "0 asks for a whitelist, but HCCL_WHITELIST_FILE names none; set it, or set 1"
    return one_of("0", "1")(value, setting)


def _address(value: str, setting: Setting) -> str:
    try:
        ipaddress.ip_address(value.strip())
    except ValueError:
        return "must be the IP address of a network interface of this host"
    return ""


def _interfaces() -> list[str]:
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []


def _interface_patterns(value: str, setting: Setting) -> str:
    """HCCL's and NCCL's syntax: prefixes, ``=`` for whole names, ``^`` for all but these."""
    exclude = value.startswith("^")
    patterns = value.removeprefix("^")
    exact = patterns.startswith("=")
    names = [name.strip() for name in patterns.removeprefix("=").split(",") if name.strip()]
    here = _interfaces()
    found = {i for i in here for n in names if (i == n if exact else i.startswith(n))}
    left = set(here) - found if exclude else found
    return "" if left or not here else f"matches no interface of this host ({', '.join(here)})"


def _interface_names(value: str, setting: Setting) -> str:
    here = _interfaces()
    missing = [name for name in value.split(",") if here and name.strip() not in here]
    return f"{', '.join(missing)} is no interface of this host" if missing else ""


def _threads(value: str, setting: Setting) -> str:
    threads, cores = _number(value), os.cpu_count() or 1
    if threads is None or threads < 1:
        return "must be a whole number, at least 1"
    ranks = max(1, _number(setting.environ.get("LOCAL_WORLD_SIZE", "1")) or 1)
    if threads * ranks > cores:
        who = f"{ranks} processes of {threads} threads" if ranks > 1 else f"{threads} threads"
        return f"{who} share {cores} cores and will wait for each other"
    return ""


def _autoload(value: str, setting: Setting) -> str:
    if value.strip() == "0":
        return (
            "import torch does not load torch_npu: a script must import torch_npu itself; unset "
            "this once torch_npu imports"
        )
    return one_of("0", "1")(value, setting)


def _task_queue(value: str, setting: Setting) -> str:
    if value.strip() == "0":
        return "0 launches every operator from the host's main thread: slow; 1 and 2 queue them"
    blocking = setting.environ.get("ASCEND_LAUNCH_BLOCKING") == "1"
    if blocking and value.strip() in ("1", "2"):
        return "has no effect while ASCEND_LAUNCH_BLOCKING=1"
    return one_of("0", "1", "2")(value, setting)


def _folder(value: str, setting: Setting) -> str:
    return "" if Path(value).is_dir() else "is no folder of this machine"


def _word_of(words: tuple[str, ...]) -> Rule:
    return lambda value, _: "" if value in words else f"must be one of {', '.join(words)}"


def _checking(value: str, setting: Setting) -> str:
    if check_is_on("environment"):
        return "every call exchanges a preflight and waits for the device: for debugging, not speed"
    return ""


_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _launcher(value: str, setting: Setting) -> str:
    missing = [name for name in _LAUNCHER if name not in setting.environ]
    if missing and len(missing) < len(_LAUNCHER):
        return f"is set but {', '.join(missing)} not: start with torchrun, or unset all of them"
    return ""


def _below(limit: str) -> Rule:
    def rule(value: str, setting: Setting) -> str:
        rank, size = _number(value), _number(setting.environ.get(limit, ""))
        if rank is not None and size is not None and rank >= size:
            return f"must be below {limit}={size}"
        return whole_number(0)(value, setting)

    return rule


_NOT_HANDLED = "a lost rank is not noticed: the others wait for it until their timeout"
_SATURATES = "saturates: -inf padding becomes the lowest finite number, overflow hides"
_SLOW_LAUNCH = "waits for every kernel before the next is launched: for debugging, slow"

# --- the table --------------------------------------------------------------------------------

VARIABLES = (
    Variable("ASCEND_RT_VISIBLE_DEVICES", ("npu",), "every card", _visible_devices("npu")),
    Variable("ASCEND_HOME_PATH", ("npu",), "CANN's set_env.sh was not sourced", _folder),
    Variable("HCCL_CONNECT_TIMEOUT", ("npu",), "120 s", whole_number(120, 7200, " of seconds")),
    Variable("HCCL_EXEC_TIMEOUT", ("npu",), "1836 s", _exec_timeout),
    Variable("HCCL_BUFFSIZE", ("npu",), "200 MB a group", whole_number(1, unit=" of MB")),
    Variable("HCCL_DETERMINISTIC", ("npu",), "false", one_of("false", "true", "strict")),
    Variable(
        "HCCL_OP_EXPANSION_MODE",
        ("npu",),
        "by model of card",
        one_of("ai_cpu", "aiv", "host", "host_ts"),
    ),
    Variable("HCCL_WHITELIST_DISABLE", ("npu",), "1", _whitelist),
    Variable("HCCL_IF_IP", ("npu",), "chosen by HCCL", _address),
    Variable("HCCL_SOCKET_IFNAME", ("npu",), "chosen by HCCL", _interface_patterns),
    Variable(
        "INF_NAN_MODE_ENABLE",
        ("npu",),
        "1",
        flagged("0", f"0 {_SATURATES}; newer torch_npu refuses it on cards that have infinities"),
    ),
    Variable(
        "INF_NAN_MODE_FORCE_DISABLE",
        ("npu",),
        "0",
        flagged("1", f"1 {_SATURATES}"),
    ),
    Variable("TASK_QUEUE_ENABLE", ("npu",), "1", _task_queue),
    Variable("ASCEND_LAUNCH_BLOCKING", ("npu",), "0", flagged("1", _SLOW_LAUNCH)),
    Variable(
        "MULTI_STREAM_MEMORY_REUSE",
        ("npu",),
        "1",
        flagged("0", "0 keeps the memory of other streams longer", ("0", "1", "2", "3")),
    ),
    Variable("TORCH_DEVICE_BACKEND_AUTOLOAD", ("npu",), "1", _autoload),
    Variable("TORCH_HCCL_ASYNC_ERROR_HANDLING", ("npu",), "1", flagged("0", _NOT_HANDLED)),
    Variable(
        "TORCH_HCCL_BLOCKING_WAIT",
        ("npu",),
        "0",
        flagged("1", "the host waits for every collective: slow"),
    ),
    Variable(
        SCRATCH_VARIABLE,
        ("npu",),
        f"by the card's cache, else {SCRATCH_MIB} MiB",
        whole_number(1, unit=" of MiB"),
    ),
    Variable(WAY_VARIABLE, ("npu",), "auto", _word_of(WAYS)),
    Variable(LINEAR_VARIABLE, ("npu",), "auto", _word_of(LINEAR_WAYS)),
    Variable("CUDA_VISIBLE_DEVICES", ("cuda",), "every card", _visible_devices("cuda")),
    Variable("CUDA_LAUNCH_BLOCKING", ("cuda",), "0", flagged("1", _SLOW_LAUNCH)),
    Variable("NCCL_SOCKET_IFNAME", ("cuda",), "chosen by NCCL", _interface_patterns),
    Variable(
        "NCCL_P2P_DISABLE", ("cuda",), "0", flagged("1", "cards talk through host memory: slow")
    ),
    Variable("NCCL_IB_DISABLE", ("cuda",), "0", flagged("1", "hosts talk over sockets: slow")),
    Variable(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING", ("cuda",), "3", flagged("0", _NOT_HANDLED, tuple("0123"))
    ),
    Variable(CHECK_VARIABLE, (), "0", _checking),
    Variable("OMP_NUM_THREADS", (), "every core; 1 under torchrun", _threads),
    Variable("GLOO_SOCKET_IFNAME", (), "chosen by Gloo", _interface_names),
    Variable("RANK", (), "one process", both(_launcher, _below("WORLD_SIZE"))),
    Variable("LOCAL_RANK", (), "one process", _below("LOCAL_WORLD_SIZE")),
    Variable("WORLD_SIZE", (), "one process", both(_launcher, whole_number(1))),
    Variable("LOCAL_WORLD_SIZE", (), "one process", whole_number(1)),
    Variable("MASTER_ADDR", (), "one process", _launcher),
    Variable("MASTER_PORT", (), "one process", both(_launcher, whole_number(1, 65535))),
)
# Shown wherever they are set: what they do is for their own manuals.
PREFIXES = ("HCCL_", "TORCH_HCCL_", "NCCL_", "TORCH_NCCL_")


def judge(
    environ: Mapping[str, str], kinds: tuple[str, ...], visible: Mapping[str, int] | None = None
) -> list[Judged]:
    """Every variable that matters to devices of ``kinds``, and every other one that is set."""
    setting = Setting(environ, visible or {})
    known = {variable.name for variable in VARIABLES}
    judged = []
    for variable in VARIABLES:
        matters = not variable.kinds or bool(set(variable.kinds) & set(kinds))
        if matters or variable.name in environ:
            judged.append(_judge(variable, setting, matters))
    others = sorted(n for n in environ if n.startswith(PREFIXES) and n not in known)
    return judged + [Judged(name, environ[name], "", "ok", "") for name in others]


def _judge(variable: Variable, setting: Setting, matters: bool) -> Judged:
    value = setting.environ.get(variable.name)
    word = variable.rule(value, setting) if matters and value is not None else ""
    return Judged(variable.name, value, variable.default, "warning" if word else "ok", word)
