"""Every kernel and option compiled for H100 and A100: no spills, 128 bits a load, no atomics.

That is as far as a machine without a card goes: nothing compiled here is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from .compiler import CAPABILITIES, Compiled, Variant, variants

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ("row_partials", "row_gradient", "row_log_prob")  # of the logits
ROW_KERNELS = ("locate_rows", "sign_rows", "conclude_rows")  # of [N] vectors


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """What ``compiler`` printed, in a process where kernels are not interpreted."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    del env["TRITON_INTERPRET"]
    command = [sys.executable, "-m", "tests.engines.triton.compiler"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [Compiled(**{**fields, "variant": Variant(**fields["variant"])}) for fields in found]


def _are(what: str, wrong: Iterable[Compiled]) -> None:
    lines = [f"{c.kernel} {c.variant}: {c}" for c in wrong]
    assert not lines, f"{what}:\n" + "\n".join(lines)


def test_everything_was_compiled(compiled: list[Compiled]) -> None:
    assert {c.variant for c in compiled} == set(variants())
    for capability in CAPABILITIES:
        assert {c.kernel for c in compiled if c.variant.capability == capability} == {
            *KERNELS,
            *ROW_KERNELS,
        }


def test_no_register_is_spilled(compiled: list[Compiled]) -> None:
    _are("spills", (c for c in compiled if c.spills))


def test_memory_moves_by_128_bits(compiled: list[Compiled]) -> None:
    """16 elements a thread and step; forward the next step's are on their way besides."""
    for c in (c for c in compiled if c.kernel in KERNELS):
        words = 16 * (4 if c.variant.dtype == "float32" else 2) // 16
        reads = 2 * words if c.kernel == "row_partials" else words
        writes = 0 if c.kernel == "row_partials" else words
        if c.variant.apart:
            reads = writes = 0
        assert (c.loads, c.stores) == (reads, writes), f"{c.kernel} {c.variant}"


def test_enough_threads_fit_to_hide_memory(compiled: list[Compiled]) -> None:
    """Without options: by Little's law some 17 KB must be on their way to each multiprocessor.

    (3.35 TB/s, 650 ns and 132 multiprocessors of an H100.) Twice that can be: each thread asks for
    16 elements at once.
    """
    for c in (c for c in compiled if c.kernel in KERNELS):
        v = c.variant
        plain = not (v.smooth or v.entropy or v.argmax or v.apart)
        asked = c.threads_per_multiprocessor * 16 * (4 if v.dtype == "float32" else 2)
        assert asked >= (32 if plain else 8) * 1024, f"{c.kernel} {v}: {c}"
        assert c.shared <= 4096, f"{c.kernel} {v}: {c}"


def test_nothing_is_added_up_by_atomics(compiled: list[Compiled]) -> None:
    _are("atomics", (c for c in compiled if c.atomics))


def test_products_are_rounded_before_differences(compiled: list[Compiled]) -> None:
    """x - m of a row's maximum is 0, also where x = scale * z was rounded: no fma(scale, z, -m)."""
    _are("fused", (c for c in compiled if c.kernel == "row_partials" and c.fused))
