"""Compiles the kernels of the triton engine for Ascend, as far as that goes without CANN.

    make ascend-triton

triton-ascend lowers each kernel to the dialect that it hands to CANN's own compiler; of that the
open part (bishengir-opt, in the package ascendnpu-ir) plans the buffers on chip: 192 KiB of an
Ascend 910B, here with double buffers. What fits is printed; what was expected to and does not is
an error. The kernels are not selected on Ascend and were never run there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

from vocab_parallel_ce.engines.triton import kernels

DEVICE = "Ascend910B2"
PIPELINES = (
    f"--hacc-append-device-spec=target={DEVICE}",
    "--lower-hfusion-pipeline=enable-triton-kernel-compile=true enable-auto-multi-buffer=true",
    "--convert-to-hivm-pipeline=enable-triton-kernel-compile=true",
    "--optimize-hivm-pipeline=enable-triton-kernel-compile=true enable-auto-multi-buffer=true",
)
ROW = {"phase": "i32", "row_stride": "i32", "col_stride": "i32", "n_rows": "i32", "n_cols": "i32"}
OUT = {"out_row_stride": "i32", "out_col_stride": "i32", "part_columns": "i32", "scale": "fp32"}
# One core works through rows of its own, a block of columns at a time; long vectors suit it best,
# so that a program has one lane of that many elements.
BLOCKS = {"row_partials": {"": 4096, "all": 2048}, "row_gradient": {"": 4096, "all": 2048}}


def _signature(name: str, dtype: str, everything: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the arguments, and the values of those that are fixed."""
    block = BLOCKS[name]["all" if everything else ""]
    flags = dict.fromkeys(("WEIGHTED", "SMOOTH", "ENTROPY"), everything)
    fixed: dict[str, Any] = {**flags, "APART": False}
    types = {"logits": f"*{dtype}", "local_target": "*i64", **ROW, "scale": "fp32"}
    optional = {"weight": "*fp32"}
    if name == "row_partials":
        types |= {"out": "*fp32", "out_bits": "*i32", "out_stride": "i32"}
        fixed |= {"LANES": 1, "VEC": block, "ARGMAX": everything, "IGNORED_ROWS": False}
    else:
        rows = ("m", "s", "softmax", "target_part")
        types |= {"out": f"*{dtype}", **dict.fromkeys(rows, "*fp32"), **OUT}
        fixed |= {"BLOCK": block, "VEC": 16, "OUT_ALIGNED": True}
        optional |= {"smooth": "*fp32", "entropy": "*fp32"}
    if everything:
        types |= optional
    else:
        fixed |= dict.fromkeys(optional)
    order = list(getattr(kernels, name).arg_names)
    return {arg: types[arg] for arg in order if arg in types}, fixed


def _lower(name: str, types: dict[str, str], fixed: dict[str, Any], cache: str) -> Path:
    """The kernel in the dialect that CANN's compiler takes; compiling stops there, without CANN."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    os.environ["TRITON_CACHE_DIR"] = cache
    source = ASTSource(fn=getattr(kernels, name), signature=types, constants=fixed)
    try:
        compile(source, target=GPUTarget("npu", DEVICE, 0))
    except Exception as problem:
        if "ASCEND_HOME_PATH is not set" not in str(problem):
            raise
    (lowered,) = Path(cache).rglob("*.ttadapter")
    return lowered


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
    for name in BLOCKS:
        for dtype in ("bf16", "fp32"):
            for everything in (False, True):
                types, fixed = _signature(name, dtype, everything)
                with tempfile.TemporaryDirectory() as cache:
                    problem = _plan(str(optimizer), _lower(name, types, fixed, cache))
                failed += bool(problem)
                options = "every option" if everything else "no option"
                block = fixed.get("BLOCK", fixed["VEC"])
                print(f"{name} {dtype} {options}, blocks of {block}: {problem or 'fits'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
