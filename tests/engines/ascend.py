"""Compiles the Triton kernels for Ascend, as far as that goes without CANN.

    make ascend-triton

triton-ascend lowers each kernel to the dialect that it hands to CANN's own compiler; of that the
open part (bishengir-opt, in the package ascendnpu-ir) plans the buffers on chip: 192 KiB of an
Ascend 910B, here with double buffers. What fits is printed; what does not is an error. These are
the npu engine's kernels, with the blocks that its way takes. None was ever run on a card.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from vocab_parallel_ce.engines.npu import kernels
from vocab_parallel_ce.engines.npu.triton_way import block_of

DEVICE = "Ascend910B2"
PIPELINES = (
    f"--hacc-append-device-spec=target={DEVICE}",
    "--lower-hfusion-pipeline=enable-triton-kernel-compile=true enable-auto-multi-buffer=true",
    "--convert-to-hivm-pipeline=enable-triton-kernel-compile=true",
    "--optimize-hivm-pipeline=enable-triton-kernel-compile=true enable-auto-multi-buffer=true",
)
OPTIONS = ("WEIGHTED", "SMOOTH", "ENTROPY", "ARGMAX", "SQUARES")
KERNELS = ("row_partials", "row_gradient", "row_log_prob")
FLOATS = ("m", "s", "softmax", "target_part", "smooth", "entropy", "weight")


@dataclass(frozen=True)
class Variant:
    """One kernel with its types and constants."""

    kernel: str
    dtype: str
    options: bool
    tail: bool = True
    capped: bool = False
    """under a softcap, and with a scale for each row"""

    @property
    def block(self) -> int:
        """Columns that a program has on chip at a time."""
        itemsize = 4 if self.dtype == "fp32" else 2
        return block_of(self.kernel, itemsize, self.options, self.capped)

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that are fixed when the kernel is compiled; those that are not there too."""
        every: dict[str, Any] = {
            **dict.fromkeys(OPTIONS, self.options),
            **dict.fromkeys(("CAPPED", "ROW_SCALE"), self.capped),
            "APART": False, "IGNORED_ROWS": False, "HAS_TAIL": self.tail, "BLOCK": self.block,
        }  # fmt: skip
        if not self.options:
            every |= dict.fromkeys(("weight", "smooth", "entropy"))
        if not self.capped:
            every["scales"] = None
        names = getattr(kernels, self.kernel).arg_names
        return {name: every[name] for name in names if name in every}

    @property
    def types(self) -> dict[str, str]:
        """The types of all other arguments."""
        pointers = {
            **dict.fromkeys(FLOATS, "*fp32"),
            "logits": f"*{self.dtype}",
            "local_target": "*i64",
            "out": "*fp32" if self.kernel == "row_partials" else f"*{self.dtype}",
            "out_bits": "*i32",
            **dict.fromkeys(("every_scale", "cap"), "fp32"),
            "scales": "*fp32",
        }
        names = getattr(kernels, self.kernel).arg_names
        return {n: pointers.get(n, "i32") for n in names if n not in self.constants}

    def __str__(self) -> str:
        options = "every option" if self.options else "no option"
        options += ", softcap and a scale for each row" if self.capped else ""
        rest = "" if self.tail else ", no rest"
        what = f"{self.kernel} {self.dtype} {options}{rest}"
        return f"{what}, blocks of {self.block}"


def variants() -> Iterator[Variant]:
    """What is compiled: every kernel in two dtypes, with every option and with none, and the same
    under a softcap.
    """
    for kernel in KERNELS:
        for dtype in ("bf16", "fp32"):
            yield Variant(kernel, dtype, False)
            yield Variant(kernel, dtype, False, capped=True)
            if kernel != "row_log_prob":
                yield Variant(kernel, dtype, True)
                yield Variant(kernel, dtype, True, capped=True)
        yield Variant(kernel, "bf16", False, tail=False)


def _lower(variant: Variant, cache: str) -> Path:
    """The kernel in the dialect that CANN's compiler takes; compiling stops there, without CANN."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    os.environ["TRITON_CACHE_DIR"] = cache
    function = getattr(kernels, variant.kernel)
    source = ASTSource(fn=function, signature=variant.types, constants=variant.constants)
    try:
        compile(source, target=GPUTarget("npu", DEVICE, 0))
    except Exception as problem:
        if "ASCEND_HOME_PATH is not set" not in str(problem):
            raise
    (lowered,) = Path(cache).rglob("*.ttadapter")
    return lowered


def shape_problem(variant: Variant, lowered: str) -> str:
    """What in the lowered kernel would be slow or wrong on a core, or nothing.

    A mask that is understood becomes a view of a part of the block. One that is not becomes a
    choice between what was loaded and something else: beyond the row, which is another core's.
    """
    if re.search(r"arith\.cmpi .*tensor<", lowered):
        return "compares integers element by element"
    if variant.dtype == "bf16" and re.search(r"arith\.select .*xbf16>", lowered):
        return "a mask is no part of a block: memory beyond the row is read and written"
    return ""


def _plan(optimizer: str, lowered: Path) -> str:
    """What keeps the kernel from fitting, or nothing."""
    command = [optimizer, str(lowered), *PIPELINES, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return ""
    overflow = re.search(r"ub overflow, requires \d+ bits while \d+ bits available", done.stderr)
    error = re.search(r"error: .*", done.stderr)
    found = overflow or error
    return found[0] if found else f"exit status {done.returncode}"


def main() -> int:
    """Print one line a kernel; 1 if any does not fit."""
    spec = util.find_spec("ascendnpuir")
    if spec is None or not spec.submodule_search_locations:
        print("ascendnpu-ir is not installed: make ascend-triton", file=sys.stderr)
        return 2
    optimizer = Path(next(iter(spec.submodule_search_locations))) / "bin" / "bishengir-opt"
    optimizer.chmod(0o755)
    print("(triton-ascend asks for CANN's compiler as it goes, and says 'Invalid bishengir path'.)")
    failed = 0
    for variant in variants():
        with tempfile.TemporaryDirectory() as cache:
            lowered = _lower(variant, cache)
            problem = shape_problem(variant, lowered.read_text()) or _plan(str(optimizer), lowered)
        failed += bool(problem)
        print(f"{variant}: {problem or 'fits'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
