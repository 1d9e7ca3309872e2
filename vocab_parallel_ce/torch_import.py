"""Says in one line why torch cannot be imported, and what to do about it.

torch-npu registers itself with torch, so on a machine that has the package but not CANN even
``import torch`` fails, at the end of three chained tracebacks. Nothing else of this package can be
imported then, so this file imports nothing at its head that could fail.
"""

from __future__ import annotations

import functools
import importlib
import os
import re

AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"


def why_backend_failed(name: str, error: BaseException) -> str:
    """One line about a device backend of torch, such as torch_npu, that is there but fails."""
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    reason = (str(root) or type(root).__name__).splitlines()[0].strip()
    if name == "torch_npu" and re.search(r"lib\w+\.so.*cannot open shared object file", reason):
        cause = f"because CANN is not found ({reason}): source {SET_ENV}"
    else:
        cause = f"({reason}): install the version made for your torch"
    package = name.replace("_", "-")
    return (
        f"{name} is installed but does not load {cause}; or, to work without it, set "
        f"{AUTOLOAD_VARIABLE}=0 or uninstall {package}"
    )


@functools.cache
def torch_problem() -> str | None:
    """None if torch can be imported. Found once: torch cannot be imported a second time."""
    autoload = os.environ.get(AUTOLOAD_VARIABLE)
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return "torch is not installed; pip install torch (2.5 or newer)"
    except RuntimeError as error:
        failed = re.match(r"Failed to load the backend extension: (\w+)", str(error))
        if failed is None:
            raise
        # torch_npu changes the variable and does not restore it when it fails.
        if autoload is None:
            os.environ.pop(AUTOLOAD_VARIABLE, None)
        else:
            os.environ[AUTOLOAD_VARIABLE] = autoload
        return f"torch cannot be imported: {why_backend_failed(failed[1], error)}"
    return None


def require_torch() -> None:
    """Raise ImportError with that line alone; nothing of the failed import is worth reading."""
    problem = torch_problem()
    if problem is not None:
        # Under this name `python -m` prints the message and not a traceback.
        raise ImportError(problem, name=__package__) from None
