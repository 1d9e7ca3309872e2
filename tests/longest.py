"""The files that are begun first, in this order: those whose tests are few and take longest.

A worker takes whole files. One of these as the last would leave the other workers without work.
"""

from __future__ import annotations

# The first two warm the cache of compiled CPU kernels: one process compiles all of them while the
# other needs none. Four ranks that find none there would each compile the same.
LONGEST = (
    "tests/engines/test_contract.py",
    "tests/launch/ascend/test_script.py",
    "tests/engines/triton/test_compiled.py",
    "tests/npu/test_seed_examples.py",
    "tests/npu/test_sim_device.py",
    "tests/test_oracle.py",
    "tests/launch/train/test_job.py",
    "tests/launch/plan/test_job.py",
    "tests/launch/bench/test_job.py",
    "tests/examples/test_examples.py",
    "tests/test_large.py",
    "tests/test_memory.py",
)


def place(nodeid: str) -> int:
    """Of the test of that id, ``file::function[case]``, in the order of files."""
    file = nodeid.partition("::")[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)
