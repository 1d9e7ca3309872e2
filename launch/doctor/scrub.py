"""Takes out of a report what would tell whose machine it was: users, hosts, homes, addresses.

Every rank knows its own names; a report is scrubbed of all of them. Whole words only, and not the
words that a report is made of: a user called "npu" is no secret.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OWN_WORDS = {
    "cpu",
    "cuda",
    "npu",
    "root",
    "user",
    "host",
    "localhost",
    "ascend",
    "torch",
    "python",
}
_USER_VARIABLES = ("USER", "LOGNAME", "USERNAME", "SUDO_USER")
_HOST_VARIABLES = ("HOSTNAME", "HOST", "MASTER_ADDR")
_ANY_HOME = r"(?:(?:/home|/Users)/|[A-Z]:\\Users\\)[^/\\\s'\",:;()]+|/root(?![\w-])"
_ADDRESS = r"(?<![\w:.])(?:\d+(?:\.\d+){3}|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)(?![\w.])"
_NO_ADDRESSES = {"date", "python", "platform", "versions", "cann", "driver"}
"""fields whose numbers with dots and colons are versions and times"""


@dataclass(frozen=True)
class Names:
    """What must not be seen."""

    users: frozenset[str]
    hosts: frozenset[str]
    homes: frozenset[str]

    @classmethod
    def of_this_process(cls) -> Names:
        users = {os.environ.get(name, "") for name in _USER_VARIABLES}
        with contextlib.suppress(KeyError, OSError):  # an id without a name, as in some containers
            users.add(getpass.getuser())
        hosts = {os.environ.get(name, "") for name in _HOST_VARIABLES} | {socket.gethostname()}
        hosts |= {host.partition(".")[0] for host in hosts if not host[:1].isdecimal()}
        return cls(frozenset(users), frozenset(hosts), frozenset({str(Path.home())}))

    @classmethod
    def union(cls, ranks: Iterable[Names]) -> Names:
        every = list(ranks)
        return cls(
            frozenset().union(*(names.users for names in every)),
            frozenset().union(*(names.hosts for names in every)),
            frozenset().union(*(names.homes for names in every)),
        )


def scrub(value: Any, names: Names, addresses: bool = True) -> Any:
    """A copy of a report, of strings, lists and dicts, without the names."""
    if isinstance(value, str):
        return _text(value, names, addresses)
    if isinstance(value, dict):
        return {k: scrub(v, names, addresses and k not in _NO_ADDRESSES) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item, names, addresses) for item in value]
    return value


def _text(text: str, names: Names, addresses: bool) -> str:
    for home in names.homes:
        if len(home) > 1:
            text = text.replace(home, "~")
    text = re.sub(_ANY_HOME, "~", text)
    if addresses:
        text = re.sub(_ADDRESS, _address, text)
    return _words(names.hosts, "<host>", _words(names.users, "<user>", text))


def _address(found: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return found[0]
    return found[0] if address.is_loopback or address.is_unspecified else "<address>"


def _words(words: Iterable[str], instead: str, text: str) -> str:
    for word in sorted(words, key=len, reverse=True):
        if len(word) > 1 and word.lower() not in _OWN_WORDS:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", instead, text)
    return text
