"""A report names nobody."""

from __future__ import annotations

import pytest

from vocab_parallel_ce.launch.doctor.scrub import Names, scrub

NAMES = Names(
    frozenset({"alice", "npu"}), frozenset({"node7.corp", "node7"}), frozenset({"/data/a"})
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/bob/x.py and /root/y", "~/x.py and ~/y"),
        ("/data/a/runs of alice", "~/runs of <user>"),
        ("connect node7.corp:29500, node7", "connect <host>:29500, <host>"),
        ("10.1.2.3:29500 [fe80::1:2]:80", "<address>:29500 [<address>]:80"),
        ("127.0.0.1 at 17:08:10", "127.0.0.1 at 17:08:10"),
        ("malice, npu and std::vector", "malice, npu and std::vector"),
        ("/rootfs 7.3.0.1.231", "/rootfs 7.3.0.1.231"),
    ],
)
def test_scrubbing(text: str, clean: str) -> None:
    assert scrub({"a": [text, 1, None]}, NAMES) == {"a": [clean, 1, None]}


def test_versions_are_not_taken_for_addresses() -> None:
    report = {"versions": {"x": "1.2.3.4"}, "driver": "24.1.0.3", "other": "1.2.3.4"}
    assert scrub(report, NAMES) == report | {"other": "<address>"}


def test_names_of_all_ranks_are_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "carol")
    both = Names.union([NAMES, Names.of_this_process()])
    assert scrub("alice and carol", both) == "<user> and <user>"
