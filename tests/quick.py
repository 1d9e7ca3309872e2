"""The files that `make quick` runs: every folder of the sources is touched, in under two minutes.

A test holds the list to the tree: each file exists, and each folder of the sources has one here.
"""

from __future__ import annotations

QUICK = (
    "tests/docs/test_blocks.py",
    "tests/engines/cpu/test_threads.py",
    "tests/engines/test_contract.py",
    "tests/launch/ascend/test_meet.py",
    "tests/launch/bench/test_goals.py",
    "tests/test_agreement.py",
    "tests/test_header.py",
)
