"""Python runs this at its start: whenever torch_npu has been imported, the stand-in is installed.

`import torch` imports torch_npu by itself, and a program may import torch_npu first: this serves
both, in unchanged programs and in every process they start, since PYTHONPATH names this folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _InstallsAfterwards(Loader):
    """torch_npu's own loader, and then device.install."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        from tests.npu_sim.device import install

        install()


class _FindsTorchNpu(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallsAfterwards(spec.loader)
        return spec


sys.meta_path.insert(0, _FindsTorchNpu())
