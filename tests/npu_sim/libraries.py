"""Builds the libraries of CANN that torch_npu links to, and the environment that uses them.

torch_npu names what it needs: the undefined symbols of its own libraries. cann.c and hccl.c define
those that have to do something; every other one is generated here and refuses to be called.
Nothing is imported from torch or torch_npu, because without these libraries neither can be.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = (HERE / "cann.c", HERE / "hccl.c", HERE / "error.h", Path(__file__))

# How the names begin that the libraries of a real CANN define.
PREFIXES = ("acl", "rt", "Msprof", "Hccl", "hccl", "hcom", "tdt")
# Linked by torch_npu, but nothing of them is called before a graph is compiled.
EMPTY = ("libge_runner.so", "libgraph.so", "libacl_tdt_channel.so")


class CannotBuildError(Exception):
    """One line that says what is missing and how to get it."""


def environment() -> dict[str, str]:
    """This process's environment, changed so that `import torch` gives the stand-in device."""
    home = build()
    variables = dict(os.environ)

    def first(name: str, *values: str) -> None:
        old = [part for part in variables.get(name, "").split(os.pathsep) if part]
        variables[name] = os.pathsep.join([*values, *(v for v in old if v not in values)])

    first("LD_LIBRARY_PATH", str(home / "lib64"))
    first("PYTHONPATH", str(ROOT), str(HERE / "site"))
    first("PATH", str(Path(sys.executable).parent))
    variables.setdefault("NPU_SIM_DEVICES", "8")
    variables.setdefault("NPU_SIM_CANN", "9.0.0")
    # Where CANN's own set_env.sh would point.
    variables["ASCEND_HOME_PATH"] = str(home)
    variables["ASCEND_OPP_PATH"] = str(home / "opp")
    # Errors come from the line that causes them, and the stand-in never runs asynchronously.
    variables["TASK_QUEUE_ENABLE"] = "0"
    variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    # torch_npu refuses to load beside another accelerator.
    variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def build() -> Path:
    """The folder of the built libraries, made now if it is not there."""
    try:
        package = importlib.metadata.distribution("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        raise CannotBuildError(
            f"torch_npu is not installed for {sys.executable}: "
            "run `make .venv-npu/installed` and use .venv-npu/bin/python"
        ) from None
    digest = hashlib.sha256(package.version.encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    home = Path(sys.prefix) / "npu_sim" / digest.hexdigest()[:16]
    if not home.exists():
        home.parent.mkdir(exist_ok=True)
        # Built aside and renamed: two processes may come here at once, and both are then right.
        unfinished = Path(tempfile.mkdtemp(dir=home.parent, prefix="unfinished-"))
        try:
            _compile(unfinished, Path(str(package.locate_file(""))))
            try:
                unfinished.rename(home)
            except OSError:
                if not home.exists():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return home


def _compile(home: Path, site_packages: Path) -> None:
    for folder in ("lib64", "opp", "runtime", "compiler"):
        (home / folder).mkdir()
    lib = home / "lib64"

    def compile_library(name: str, *arguments: str) -> None:
        flags = ("-shared", "-fPIC", "-O2", "-Wall", f"-Wl,-soname,{name}")
        _run("gcc", *flags, "-o", str(lib / name), *arguments)

    compile_library("libascendcl.so", str(HERE / "cann.c"))
    compile_library("libhccl.so", str(HERE / "hccl.c"), f"-L{lib}", "-lascendcl", "-lm")
    defined = _symbols("--defined-only", lib / "libascendcl.so", lib / "libhccl.so")
    refusing = lib / "refusing.c"
    refusing.write_text(
        f'#include "{HERE / "error.h"}"\n'
        + "".join(
            f'int {name}(void) {{ return npu_sim_error(ACL_FAILURE, "{name} is not made"); }}\n'
            for name in sorted(_needed(site_packages) - defined)
        )
    )
    compile_library("libacl_op_compiler.so", str(refusing), f"-L{lib}", "-lascendcl")
    for name in EMPTY:
        compile_library(name, "-x", "c", os.devnull)


def _needed(site_packages: Path) -> set[str]:
    """The symbols that torch_npu takes from CANN."""
    ours = [*site_packages.glob("torch_npu/lib/*.so"), *site_packages.glob("torch_npu/_C*.so")]
    if not ours:
        raise CannotBuildError(f"no libraries of torch_npu in {site_packages}")
    linked = [path for path in ours if path.name != "libop_plugin_atb.so"]  # loaded on demand
    return {s for s in _symbols("--undefined-only", *linked) if s.startswith(PREFIXES)}


def _symbols(kind: str, *libraries: Path) -> set[str]:
    lines = _run("nm", "-D", kind, *map(str, libraries)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if len(line.split()) > 1}


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise CannotBuildError(
            f"{command[0]} is needed to build the stand-in for CANN (gcc, binutils)"
        ) from None
    except subprocess.CalledProcessError as problem:
        raise CannotBuildError(f"{' '.join(command)} failed:\n{problem.stderr}") from None
    return done.stdout
